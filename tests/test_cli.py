"""The commands as a user types them: what they write, and one sentence with a non-zero exit for bad input."""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_images import read_image

from tinycea import cases, cea, cli, nafnet, ops, params, restoration, training
from tinycea.__main__ import main as command_line
from tinycea.ablations import CEAConfig
from tinycea.adapters import PromptConfig
from tinycea.degradations import DEGRADATIONS, SUITES, patchwork
from tinycea.evaluation import TEST_SEED, psnr, ssim
from tinycea.images import write_image
from tinycea.nafnet import NAFNetConfig, init
from tinycea.ops import BACKENDS
from tinycea.restoration import restore, restore_files
from tinycea.runtime import InputError
from tinycea.scenes import Scene, photographs
from tinycea.zoo import ADAPTERS, WEIGHTS, Model, load_model, save_model


def fails(capsys, *arguments):
    """Run a command that must be refused -> its one sentence."""
    assert cli.main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tinycea: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    write_image(path, photographs("validation")["rocket"][:37, :23])
    return path


# ---- what they do ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 1), (2, 3, 4), (37, 23, 2), (5, 64, 3)])
@pytest.mark.parametrize("suffix, dtype", [(".png", np.uint8), (".tif", np.uint16)])
def test_restore_keeps_size_channels_alpha_and_depth(tmp_path, shape, suffix, dtype):
    source, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write_image(source, np.random.default_rng(0).random(shape), dtype)
    assert list(restore_files([source], out)) == [out]
    before, after = read_image(source), read_image(out)
    assert after[0].shape == before[0].shape == shape and after[1] == before[1] == dtype
    if shape[2] in (2, 4):
        np.testing.assert_array_equal(after[0][..., -1], before[0][..., -1])


def test_restore_a_folder_writes_every_image_under_its_name(tmp_path, photo):
    write_image(tmp_path / "b.jpg", photographs("validation")["rocket"][:20, :30])
    assert cli.main(["restore", str(tmp_path), "-o", str(tmp_path / "new" / "folder")]) == 0
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"photo.png", "b.jpg"}


def test_shipped_weights_denoise_a_held_out_photograph():
    clean = photographs("test")["coffee"][100:200, 200:300]
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 25 / 255, clean.shape), 0, 1).astype(np.float32)
    restored = restore(noisy, load_model(WEIGHTS))
    assert np.mean((restored - clean) ** 2) < np.mean((noisy - clean) ** 2) / 4


def test_degrade_is_reproducible_and_seeded(tmp_path, photo):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = str(tmp_path / f"{name}.png")
        assert cli.main(["degrade", str(photo), "-o", out, "--as", "haze+rain", "--seed", str(seed)]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b and a != c
    assert read_image(tmp_path / "a.png")[0].shape == read_image(photo)[0].shape


@pytest.mark.slow
def test_demo_draws_a_picture_and_every_region_is_restored(tmp_path):
    assert cli.main(["demo", "-o", str(tmp_path / "demo.png")]) == 0
    assert read_image(tmp_path / "demo.png")[0].std() > 0.1 and len(list(tmp_path.iterdir())) == 1
    clean = photographs("test")["astronaut"]
    degraded, mask, names = patchwork(Scene(clean), np.random.default_rng(TEST_SEED), ("noise25", "rain", "snow"))
    restored = restore(degraded)
    for k in range(3):
        region = mask.argmax(-1) == k
        before, after = (np.mean((image - clean)[region] ** 2) for image in (degraded, restored))
        assert after < before / 1.5, names[k]


def test_pairs_are_judged_as_scikit_image_does_and_the_odd_ones_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder in ("clean", "rain"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        clean = rng.random((12, 17, 3), np.float32)
        write_image(tmp_path / "clean" / f"norain-{i}.png", clean)
        write_image(tmp_path / "rain" / f"rain-{i}.png", np.clip(clean + 0.1, 0, 1))
    assert cli.main(["evaluate", str(tmp_path / "rain"), str(tmp_path / "clean"), "--csv", str(tmp_path / "t.csv")]) == 0
    rows = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    for i, row in enumerate(rows):
        image, clean = (read_image(tmp_path / folder)[0] for folder in (f"rain/rain-{i}.png", f"clean/norain-{i}.png"))
        assert np.allclose([float(n) for n in row[2:]], (psnr(image, clean), ssim(image, clean)))
    assert len(rows) == 3 and f"{np.mean([float(row[2]) for row in rows]):.2f}" in capsys.readouterr().out
    write_image(tmp_path / "clean" / "small.png", clean[:11])
    write_image(tmp_path / "rain" / "small.png", clean)
    write_image(tmp_path / "rain" / "alone.png", clean)
    (tmp_path / "rain" / "rain-0.png").write_bytes(b"damaged")
    assert cli.main(["evaluate", str(tmp_path / "rain"), str(tmp_path / "clean")]) == 2
    out, err = capsys.readouterr()
    assert "2 pairs" in out and all(name in err for name in ("alone.png", "small.png", "rain-0.png")) and err.count("\n") == 1
    assert "not a folder" in fails(capsys, "evaluate", tmp_path / "nosuch", tmp_path / "clean")


def test_the_table_in_the_weights_is_the_one_beside_them():
    assert params.load(WEIGHTS)[1]["table"] == json.loads(WEIGHTS.with_suffix(".json").read_text())["rows"]


@pytest.mark.slow
def test_gradcheck_prints_json_and_passes(capsys):
    assert cli.main(["gradcheck", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 40 and all(row["passed"] for row in rows)
    own = [row for row in rows if "broken" not in row["name"]]
    assert max(row["relative_error"] for row in own) <= 1e-6 and min(row["taylor_slope"] for row in own) >= 1.95
    assert sum("broken" in row["name"] for row in rows) == 4


def test_gradcheck_exits_1_on_a_wrong_gradient(monkeypatch, capsys):
    whole, right = cases.cases, cea.cea_backward
    monkeypatch.setattr(cases, "cases", lambda *which: (case for case in whole(*which) if case[0].startswith("cea")))
    monkeypatch.setattr(cea, "cea_backward", lambda dy, cache, g: -right(dy, cache, g))
    assert cli.main(["gradcheck"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_a_short_run_from_the_command_line(tmp_path, photo):
    """As typed in a shell, warnings as errors, on a folder of one's own."""
    command = [sys.executable, "-W", "error", "-m", "tinycea", "train", "--steps", "2", "--suite", "patchwork",
               "--adapter", "none", "--images", str(tmp_path), "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "average" in done.stdout and (tmp_path / "run" / "result.json").exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "holds files already" in again.stderr


@pytest.mark.parametrize("command, names", [("train", [*{*ADAPTERS} - {"told"}, *SUITES, *BACKENDS]), ("degrade", DEGRADATIONS),
                                            ("gradcheck", BACKENDS)])
def test_help_lists_every_name(capsys, command, names):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = set(re.findall(r"[\w-]+", re.sub(r"-\n\s+", "-", capsys.readouterr().out)))
    assert set(names) <= said


# ---- what they refuse ------------------------------------------------------------------------------------------------

@pytest.fixture
def one_scene(monkeypatch):
    """`tinycea train` draws one scene before it looks at the photographs, not 32."""
    recipe_for = training.recipe_for
    monkeypatch.setattr(training, "recipe_for", lambda **typed: recipe_for(**typed, scenes=1))


@pytest.mark.parametrize("arguments, message", [
    (["train", "--suite", "aio7"], "aio3, aio5, cdd11, patchwork"),
    (["train", "--adapter", "prompts"], "none, wider, cea"),
    (["train", "--backend", "tpu"], "cpu, reference, cuda"),
    (["train", "--stepz", "3"], "--steps"),
    (["train", "--step", "3"], "--steps"),
    (["train", "--steps", "0"], "positive integer"),
    (["train", "--steps", "2.5"], "positive integer"),
    (["train", "--seed", "-1"], "at least 0"),
    pytest.param(["train", "--images", "nowhere"], "nowhere", marks=pytest.mark.slow),
    (["train", "--resume", "--out", "nowhere"], "nowhere"),
    (["degrade", "x.png", "-o", "y.png", "--as", "fog"], "x.png"),
    (["degrade", "x.png", "-o", "y.png"], "--as"),
    (["restore", "nowhere.png", "-o", "out.png"], "nowhere.png"),
    (["gradcheck", "--backend", "gpu"], "cpu, reference"),
    (["paint"], "train"),
    (["train", "--images", ""], "folder"),
    (["restore", "", "-o", "out"], "path"),
    ([], "train|compare|restore"),
])
@pytest.mark.usefixtures("one_scene")
def test_bad_arguments(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_images(capsys, tmp_path, photo):
    text, empty, cut = tmp_path / "text.png", tmp_path / "empty.png", tmp_path / "cut.png"
    text.write_text("no image")
    empty.touch()
    cut.write_bytes(photo.read_bytes()[:-400])
    for path in (text, empty, cut):
        assert path.name in fails(capsys, "restore", path, "-o", tmp_path / "out.png")
        assert path.name in fails(capsys, "degrade", path, "-o", tmp_path / "out.png", "--as", "rain")
    assert not (tmp_path / "out.png").exists()


def test_a_bad_image_among_good_ones_is_named_and_the_others_are_restored(capsys, tmp_path, photo):
    (tmp_path / "text.png").write_text("no image")
    write_image(tmp_path / "z.png", photographs("validation")["rocket"][:5, :4])
    assert cli.main(["restore", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo.png", "z.png"}
    err = capsys.readouterr().err
    assert "text.png" in err and "photo.png" not in err and err.count("\n") == 1


def test_a_photo_is_never_replaced_by_its_own_result(capsys, tmp_path, photo):
    before = photo.read_bytes()
    fails(capsys, "restore", photo, "-o", photo)
    fails(capsys, "restore", photo, "-o", tmp_path)
    fails(capsys, "degrade", photo, "-o", tmp_path / "." / "photo.png", "--as", "rain")
    assert photo.read_bytes() == before


def test_bad_outputs(capsys, tmp_path, photo):
    file = tmp_path / "file"
    file.touch()
    assert "file" in fails(capsys, "restore", photo, "-o", file / "out.png")
    assert "file" in fails(capsys, "demo", "-o", file / "demo.png")
    assert "file" in fails(capsys, "degrade", photo, "-o", file / "out.png", "--as", "rain")
    for name in ("demo", "demo.xyz", "other"):
        assert name in fails(capsys, "demo", "-o", tmp_path / name)
    assert "folder" in fails(capsys, "restore", photo, photo.with_name("two.png"), "-o", tmp_path / "out.png")
    assert ".webp" in fails(capsys, "restore", photo, "-o", tmp_path / "out.webp")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "photo.png"}
    assert ".docx" in fails(capsys, "degrade", photo, "-o", tmp_path / "out.docx", "--as", "rain")
    other = tmp_path / "other"
    other.mkdir()
    (other / "photo.png").write_bytes(photo.read_bytes())
    assert "photo.png" in fails(capsys, "restore", photo, other, "-o", tmp_path / "out")


@pytest.fixture
def locked(tmp_path):
    """A folder in which nobody may write."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    return Path("/proc") if os.access(folder, os.W_OK) else folder          # root writes anywhere but there


def test_unwritable_folder(capsys, locked, photo):
    assert str(locked) in fails(capsys, "restore", photo, "-o", locked / "out.png")
    assert str(locked) in fails(capsys, "demo", "-o", locked / "demo.png")


@pytest.mark.slow
@pytest.mark.usefixtures("one_scene")
def test_train_refuses_bad_outputs(capsys, tmp_path, locked):
    (tmp_path / "file").touch()
    assert "file" in fails(capsys, "train", "--out", tmp_path / "file")
    assert str(locked) in fails(capsys, "train", "--out", locked / "run")


def test_too_large_for_memory_is_one_sentence_and_the_others_are_restored(capsys, tmp_path, photo, monkeypatch):
    write_image(tmp_path / "z.png", photographs("validation")["rocket"][:5, :4])
    whole = restoration.restore

    def small_memory(image, *rest):
        if image.size > 100:
            raise MemoryError
        return whole(image, *rest)
    monkeypatch.setattr(restoration, "restore", small_memory)
    assert cli.main(["restore", str(photo), str(tmp_path / "z.png"), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "photo.png: too large" in err and err.count("\n") == 1 and (tmp_path / "out" / "z.png").exists()


@pytest.mark.parametrize("length, most", [(40, 256), (400, 256), (257, 256), (1000, 448), (449, 448), (5000, 256)])
def test_windows_cover_everything_once(length, most):
    total, found = np.zeros(length), restoration.windows(length, most)
    for start, weights in found:
        assert len(weights) <= most and start + len(weights) <= length
        total[start:start + len(weights)] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert len(restoration.windows(length, 0)) == 1
    for (a, first), (b, second) in zip(found, found[1:]):                 # a window's inner border counts nothing, and no jump
        assert a < b and first[-1] == second[0] == 0 and max(abs(np.diff(first)).max(), abs(np.diff(second)).max()) < 0.06


def random_model(config):
    """A model no weight of which is zero."""
    model, rng = Model(init(config, np.random.default_rng(0)), config), np.random.default_rng(1)
    for value in model.p.values():
        value += rng.normal(0, 0.1, value.shape)
    return model


def test_windows_give_the_whole_where_no_layer_sees_all_of_it():
    model = random_model(NAFNetConfig(width=4, middle=1, sca=False, adapter=None))
    image = np.random.default_rng(2).random((520, 530, 3), np.float32)
    whole, one, two = restore(image, model, 0), restore(image, model, 256, 1), restore(image, model, 256, 2)
    assert np.abs(whole - one).max() < 1e-5 < np.abs(whole - image).max() and one.tobytes() == two.tobytes()
    pixels = np.rint(255 * image[..., 0]).astype("uint8")
    assert np.abs(restore(pixels, model, 0).astype(int) - restore(pixels, model, 256)).max() <= 1


def test_windows_judge_as_the_whole_does(monkeypatch):
    """With SCA and CEA, where every window by itself would see another picture; a mosaic of it comes near."""
    model = random_model(NAFNetConfig(width=4, middle=1, adapter=CEAConfig(rank=2, heads=1)))
    image = np.random.default_rng(2).random((400, 700, 3), np.float32) * np.linspace(0, 1, 700, dtype=np.float32)[:, None]
    summaries, off = restoration.summaries, {}                                  # and it is night at the left
    variants = {"mosaic": summaries, "alone": lambda *_: None, "whole": lambda image, model, _: summaries(image, model, 999)}
    for name, instead in variants.items():
        monkeypatch.setattr(restoration, "summaries", instead)
        off[name] = np.abs(restore(image, model, 256) - restore(image, model, 0)).max()
    assert off["whole"] < 1e-5 < 5 * off["mosaic"] < off["alone"], off


def test_an_image_of_up_to_four_windows_stays_whole():
    for height, same in ((512, True), (513, False)):
        image = np.random.default_rng(0).random((height, 512, 3), np.float32)
        assert (restore(image, window=256).tobytes() == restore(image, window=0).tobytes()) == same


@pytest.mark.parametrize("shape", [(256, 40), (250, 31), (511, 24)])
@pytest.mark.parametrize("options", [{}, {"adapter": None}, {"centered": False, "adapter": None, "unshuffle": 1}, {"sca": False}])
def test_two_halves_give_the_whole(shape, options):
    model = random_model(NAFNetConfig(**{"width": 4, "middle": 1, "adapter": CEAConfig(rank=2, heads=1)} | options))
    image = np.random.default_rng(2).random((1, *shape, 3), np.float32)
    image *= np.linspace(0.1, 1, shape[0], dtype=np.float32)[:, None, None]
    whole = nafnet.centered(image, *model, keep=False)[0]
    one, two = (restoration.banded(image, *model, threads=threads)[0] for threads in (1, 2))
    assert one.tobytes() == two.tobytes() and np.abs(whole - one).max() < 1e-5 * np.abs(whole).max()


def test_an_image_whose_layers_cannot_be_halved_stays_whole():
    image = np.random.default_rng(2).random((1, 256, 40, 3), np.float32)
    for options in ({"adapter": PromptConfig()}, {"adapter": CEAConfig(level="image")}, {"adapter": None, "local": 16}):
        model = random_model(NAFNetConfig(width=4, middle=1, **options))
        assert (restoration.banded(image, *model)[0] == nafnet.centered(image, *model, keep=False)[0]).all()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_half_that_fails_does_not_leave_the_other_waiting(monkeypatch, failing):
    calls = []

    def pool(x, gather=None):
        calls.append(len(calls))
        if calls[-1] == failing:
            raise MemoryError("too much")
        return cpu_pool(x, gather)
    cpu_pool = ops.cpu.global_average_pool
    monkeypatch.setattr(ops.cpu, "global_average_pool", pool)
    with pytest.raises(MemoryError, match="too much"):
        restoration.banded(np.zeros((1, 256, 16, 3), np.float32), *random_model(NAFNetConfig(width=4, middle=1, adapter=None)))


def test_a_flat_picture_stays_flat_up_to_its_border():
    for centered in (True, False):
        config = NAFNetConfig(width=4, middle=1, encoders=(), decoders=(), sca=False, adapter=None, centered=centered)
        p = init(config, np.random.default_rng(0))
        for value in p.values():
            value += np.random.default_rng(1).normal(0, 0.1, value.shape)
        restored = restore(np.full((40, 30, 3), 0.6), Model(p, config))
        spread = np.ptp(restored.reshape(20, 2, 15, 2, 3), (0, 2)).max()                  # over 2 x 2 pixels' four places each
        assert spread < 1e-6 if centered else spread > 1e-3                               # a NAFNet sees the zeros it is used to


@pytest.mark.parametrize("window", [-1, 255, 256.0, None])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(InputError, match="window is"):
        restore(np.zeros((5, 5)), window=window)


def test_ctrl_c_says_so(capsys, photo, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(restoration, "restore", interrupted)
    assert command_line(["restore", str(photo), "-o", str(tmp_path / "out.png")]) == 130
    assert capsys.readouterr().err == "tinycea: interrupted\n"


@pytest.mark.parametrize("module", ["raise KeyboardInterrupt",
                                    "import signal\nsignal.raise_signal(signal.SIGINT)\nprint('whole')\ndef tqdm(): pass"])
def test_ctrl_c_during_the_first_imports_says_so_when_they_are_done(tmp_path, module):
    (tmp_path / "tqdm.py").write_text(module)
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
    run = subprocess.run([sys.executable, "-m", "tinycea", "gradcheck"], env=os.environ | {"PYTHONPATH": path},
                         capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (130, "tinycea: interrupted\n") and run.stdout.count("whole") == ("whole" in module)


def test_bad_weights(capsys, tmp_path, photo):
    good = Path(WEIGHTS).read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good[:-1000])
    assert "cut.safetensors" in fails(capsys, "restore", photo, "-o", tmp_path / "out.png", "--weights", cut)
    p, _ = load_model(WEIGHTS)
    other = tmp_path / "other.safetensors"
    save_model(other, p, replace(load_model(WEIGHTS).config, width=20))
    assert "shape" in fails(capsys, "restore", photo, "-o", tmp_path / "out.png", "--weights", other)
    p.flat[:] *= 1e30                                                            # no warning, and no black picture
    save_model(other, p, load_model(WEIGHTS).config)
    assert "not finite" in fails(capsys, "restore", photo, "-o", tmp_path / "out.png", "--weights", other)
    p, config = load_model(WEIGHTS)
    p["ending.bias"][:] = np.inf                                                 # no white one either
    with pytest.raises(InputError, match="not finite"):
        restore(np.zeros((4, 4, 3), np.uint8), Model(p, config))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("shape, window", [((40, 30, 3), 512), ((300, 530), 256)])
def test_what_would_hardly_change_comes_back_as_it_came(tmp_path, shape, window):
    model = random_model(NAFNetConfig(width=4, middle=1, adapter=None))
    image = np.random.default_rng(0).integers(0, 256, shape, "uint8")
    change = psnr(restore(image, model, window) / 255, image / 255)
    for spare, same in ((0, False), (int(change), True), (int(change) + 1, False)):
        model = model._replace(config=replace(model.config, spare=spare))
        assert np.array_equal(restore(image, model, window), image) == same
        save_model(tmp_path / "model.safetensors", *model)
        write_image(tmp_path / "in.png", image)
        list(restore_files([tmp_path / "in.png"], tmp_path / "out.png", tmp_path / "model.safetensors", window))
        assert np.array_equal(read_image(tmp_path / "out.png")[0], read_image(tmp_path / "in.png")[0]) == same
