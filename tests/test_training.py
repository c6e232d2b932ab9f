"""The main job: same seed same bytes, Ctrl-C and --resume lose nothing, hostile moments leave whole files."""
import csv
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from tinycea import evaluation, feed, plots
from tinycea import training as job
from tinycea.evaluation import evaluate, psnr, ssim, table
from tinycea.images import write_image
from tinycea.nafnet import centered, init
from tinycea.ops import cpu
from tinycea.optim import warmup_cosine
from tinycea.restoration import restore_rgb
from tinycea.runtime import InputError
from tinycea.zoo import load_model, network

TINY = job.Recipe(steps=7, scenes=2, batch=2, patch=16)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One held-out photograph, small validation patches and no pictures: these tests are about the loop, not the result."""
    def few(entries, *which):
        if not which:
            return [evaluation.test_set((entry,), draws=1)[0] for entry in (entries[0], "clean")]
        tests = evaluation.test_set(entries[:1], *which)
        return [(*names, degraded[:16, :16], clean[:16, :16]) for *names, degraded, clean in tests]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "test_set", few)
        patch.setattr(job, "plots", MagicMock())
        yield


def train(recipe, out, **options):
    """`tinycea.train` by a Recipe."""
    return job.train(out, **options, **asdict(recipe))


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """The folder of an uninterrupted run of TINY."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(TINY, folder)
    return folder


def amid(monkeypatch, step, happens):
    """Something happens at the beginning of step number `step` (from 1) of this session."""
    steps, whole = [], job.advance

    def advance(*arguments):
        steps.append(0)
        if len(steps) == step:
            happens()
        return whole(*arguments)
    monkeypatch.setattr(job, "advance", advance)


def interrupt_at(monkeypatch, step):
    """Ctrl-C arrives."""
    amid(monkeypatch, step, lambda: signal.raise_signal(signal.SIGINT))


def log(folder):
    """The rows of log.csv without its seconds."""
    with open(folder / "log.csv", newline="") as file:
        return [[float(x or "nan") for x in row[:-1]] for row in list(csv.reader(file))[1:]]


def same_log(a, b):
    np.testing.assert_array_equal(log(a), log(b))


def same_model(a, b):
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_same_seed_same_bytes_and_another_seed_another_model(whole, tmp_path):
    for name, recipe, threads in (("again", TINY, 1), ("threads", TINY, 3), ("other", replace(TINY, seed=1), None)):
        train(recipe, tmp_path / name, threads=threads)
    assert same_model(tmp_path / "again", whole) and same_model(tmp_path / "threads", whole)
    assert not same_model(tmp_path / "other", whole)
    same_log(tmp_path / "again", whole)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted_run(whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume"):
        interrupt_at(patch, step)
        train(TINY, tmp_path / "cut")
    assert 0 < len(log(tmp_path / "cut")) < TINY.steps
    assert not (tmp_path / "cut" / "result.json").exists()
    assert job.resumable(tmp_path / "cut", {}) == TINY
    train(TINY, tmp_path / "cut", resume=True)
    assert same_model(tmp_path / "cut", whole)
    same_log(tmp_path / "cut", whole)


def test_interrupted_before_the_first_step_promises_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(job, "test_set", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(TINY, tmp_path / "cut")
    assert not str(stop.value) and not (tmp_path / "cut").exists()


@pytest.mark.slow
def test_resume_after_a_crash_starts_at_the_last_state(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        amid(patch, 4, lambda: 1 / 0)
        train(TINY, tmp_path / "cut")
    assert len(log(tmp_path / "cut")) == 3
    train(TINY, tmp_path / "cut", resume=True)
    assert same_model(tmp_path / "cut", whole)


def test_an_image_that_leaves_worse_than_it_came_counts_care_times():
    config, rng = network("cea"), np.random.default_rng(0)
    p, images = init(config, rng), rng.random((2, 16, 16, 3), np.float32)
    clean = images.copy()                     # the first is clean already: a fresh network harms it
    clean[1] = 0.9 * centered(images, p, config)[0][1] + 0.1 * images[1]        # the second it helps

    def gradient(which, care):
        g = p.zeros_like()
        job.gradient(images[which], clean[which], p, config, cpu, g, 3e-4, care)
        return g.flat
    worse, better = gradient([0], 1), gradient([1], 1)
    assert np.abs(worse).max() > 0 < np.abs(better).max()
    for care in (1, 4):
        expected = (care * worse + better) / 2
        assert np.abs(gradient([0, 1], care) - expected).max() < 1e-5 * np.abs(expected).max()
    chunk = job.chunk_gradient(images, clean, p, replace(TINY, floor=3e-4))[1]
    np.testing.assert_array_equal(chunk, gradient([0, 1], job.CARE))
    nominal = job.chunk_gradient(images, clean, p, replace(TINY, floor=3e-4, nominal=True))[1]
    np.testing.assert_array_equal(nominal, gradient([0, 1], 1))


def test_a_batch_depends_on_seed_and_step_alone():
    recipe = replace(TINY, suite="aio5+patchwork")
    first = [feed.batch(recipe, step) for step in range(3)]
    again = [feed.batch(recipe, step) for step in (2, 1, 0)][::-1]
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    degraded, clean = first[0]
    assert degraded.shape == clean.shape == (2, 16, 16, 3) and degraded.dtype == clean.dtype == np.float32
    assert not np.array_equal(first[0][1], first[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_feeds_the_same_bytes(workers):
    with feed.feed(TINY, 2, workers) as batches:
        fed = list(batches)
    assert len(fed) == TINY.steps - 2
    for step, right in enumerate(fed, 2):
        np.testing.assert_array_equal(right, feed.batch(TINY, step))


@pytest.mark.slow
def test_workers_report_what_they_cannot_read_and_their_own_death(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no readable image"):
        train(replace(TINY, images=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="has died"), feed.feed(TINY) as batches:
        multiprocessing.active_children()[0].kill()
        next(batches)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_run_whose_processes_die_is_saved_and_goes_on(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="has died"):
        amid(patch, 4, lambda: [process.kill() for process in multiprocessing.active_children()])
        train(TINY, tmp_path / "cut", threads=2)
    assert len(log(tmp_path / "cut")) == 3 and not multiprocessing.active_children()
    train(TINY, tmp_path / "cut", resume=True)
    assert same_model(tmp_path / "cut", whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_leaves_when_its_trainer_is_killed(tmp_path):
    code = """
import multiprocessing, time
from tinycea.feed import feed
from tinycea.training import Recipe
if __name__ == "__main__":
    with feed(Recipe(scenes=1, batch=2, patch=16)) as batches:
        next(batches)
        print(multiprocessing.active_children()[0].pid, flush=True)
        time.sleep(60)
"""
    (tmp_path / "trainer.py").write_text(code)
    trainer = subprocess.Popen([sys.executable, tmp_path / "trainer.py"], stdout=subprocess.PIPE)
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().rsplit(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path):
    train(replace(TINY, steps=80, suite="aio3", warmup=5), tmp_path / "run")
    loss = [row[2] for row in log(tmp_path / "run")]
    assert np.mean(loss[-20:]) < np.mean(loss[:20]) - 0.5


@pytest.mark.slow
def test_the_run_folder_is_complete_and_true(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "plots", plots)
    result = train(replace(TINY, adapter="cea-softmax"), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.csv", "model.safetensors", "curve.png", "before_after.png", "result.json"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) | {"folder": str(tmp_path / "run")} == result
    assert result["recipe"] == asdict(replace(TINY, adapter="cea-softmax"))
    p, config = load_model(tmp_path / "run" / "model.safetensors")
    assert config.adapter.affinity == "softmax" and p.flat.size == result["parameters"]


@pytest.mark.slow
def test_diverging_training_stops_with_one_sentence(tmp_path):
    with pytest.raises(InputError, match="diverged at step"), np.errstate(all="ignore"):
        train(replace(TINY, lr=1e30), tmp_path / "run")


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        train(TINY, tmp_path / "run")
    before = (tmp_path / "run" / "state.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="state.safetensors: cannot be written .No space left"):
        patch.setattr(Path, "write_bytes", full)
        train(TINY, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == before
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("typed, message", [({"steps": 9}, "steps 7"), ({"suite": "aio3"}, "suite aio5"),
                                            ({"seed": 1}, "seed 0")])
def test_resume_refuses_another_recipe(tmp_path, typed, message):
    job.save_run(tmp_path, TINY, job.load_progress(None, [TINY]))
    with pytest.raises(InputError, match=message):
        job.resumable(tmp_path, typed)


def test_resume_needs_an_interrupted_run(tmp_path):
    with pytest.raises(InputError, match="no interrupted run"):
        job.resumable(tmp_path, {})
    (tmp_path / "result.json").touch()
    with pytest.raises(InputError, match="finished"):
        job.resumable(tmp_path, {})


@pytest.mark.slow
def test_resume_refuses_a_damaged_state_and_needs_no_log(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        train(TINY, tmp_path / "run")
    state, rows = tmp_path / "run" / "state.safetensors", log(tmp_path / "run")
    whole = state.read_bytes()
    state.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="state.safetensors"):
        train(TINY, tmp_path / "run", resume=True)
    state.write_bytes(whole)
    (tmp_path / "run" / "log.csv").unlink()
    train(TINY, tmp_path / "run", resume=True)
    np.testing.assert_array_equal(log(tmp_path / "run")[:len(rows)], rows)


@pytest.mark.slow
def test_resume_refuses_the_state_of_another_model(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        train(replace(TINY, adapter="none"), tmp_path)
    with pytest.raises(InputError, match="started with adapter none"):
        train(TINY, tmp_path, resume=True)


@pytest.fixture
def pairs(tmp_path):
    """Two folders of five images each, the degraded ones half as bright, one of them smaller than a patch."""
    folders = [tmp_path / "dark", tmp_path / "clean"]
    for folder, share in zip(folders, (0.5, 1)):
        folder.mkdir()
        for i in range(5):
            image = np.random.default_rng(i).integers(0, 128, (12 if i == 2 else 20, 31, 3)) * 2
            write_image(folder / f"{i}.png", np.uint8(image * share))
    return list(map(str, folders))


def test_pairs_are_cropped_alike_and_a_tenth_of_the_clean_images_held_out(pairs):
    alone, mixed = job.recipe_for(pairs=pairs, batch=4, patch=16, scenes=2), replace(TINY, pairs=pairs)
    degraded, clean = feed.batch(alone, 0)
    assert degraded.shape == (4, 16, 16, 3) and degraded.dtype == clean.dtype == np.float32 and clean.max() > 0.9
    np.testing.assert_allclose(degraded, clean / 2, atol=1e-6)
    degraded, clean = feed.batch(mixed, 0)
    same = [np.allclose(d, c / 2, atol=1e-6) for d, c in zip(degraded, clean)]
    assert same == [True, False] and alone.suite is None and mixed.suite == "aio5"
    train, held, _ = feed.divided(*pairs)
    assert [file.name for file, _ in held] == ["0.png"] and len(train) == 4
    assert [name for _, name, _, _ in evaluation.test_pairs(pairs)] == ["0.png"]


def test_versions_of_a_held_out_image_are_held_out_with_it(pairs):
    """As RESIDE has of each clean image many hazy ones."""
    write_image(Path(pairs[0]) / "0_0.8_0.2.png", np.zeros((20, 31, 3)))
    train, held, _ = feed.divided(*pairs)
    assert [file.name for file, _ in held] == ["0.png", "0_0.8_0.2.png"] and len(train) == 4


def test_a_run_on_pairs_is_resumed_to_the_same_bytes(pairs, tmp_path, monkeypatch):
    recipe = {"pairs": pairs, "steps": 4, "batch": 2, "patch": 16}
    result = job.train(tmp_path / "whole", **recipe)
    assert [row["degradation"] for row in result["rows"]] == ["pairs", "average", "clean"] and result["recipe"]["pairs"] == pairs
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        job.train(tmp_path / "cut", **recipe)
    job.train(tmp_path / "cut", resume=True)
    assert same_model(tmp_path / "cut", tmp_path / "whole")


def test_pairs_that_cannot_be_trained_on_are_named_and_leave_no_folder(pairs, tmp_path, capfd):
    dark, clean = map(Path, pairs)
    (tmp_path / "empty").mkdir()
    for wrong, message in (([str(tmp_path / "empty"), pairs[1]], "no image"), ([pairs[0]], "pairs is"),
                           ([str(dark / "1.png"), pairs[1]], "two clean images")):
        with pytest.raises(InputError, match=message):
            job.train(tmp_path / "new" / "run", pairs=wrong)
    (clean / "4.png").unlink()
    for i in range(4):
        (dark / f"{i}.png").write_bytes(b"damaged")
    feed.divided.cache_clear()
    with pytest.raises(InputError, match=r"dark.0.png: not a readable image"):
        job.train(tmp_path / "new" / "run", pairs=pairs)
    with pytest.raises(InputError, match=r"dark.[123].png: not a readable image"):
        with feed.feed(job.recipe_for(pairs=pairs)) as batches:
            next(batches)
    assert not (tmp_path / "new").exists() and f"skipping {dark / '4.png'}: has no partner" in capfd.readouterr().err


def test_the_schedule_is_a_line_then_half_a_cosine():
    rate = [warmup_cosine(share, 0.2, 3.0, 1.0) for share in (0.05, 0.1, 0.2, 0.6, 1.0)]
    np.testing.assert_allclose(rate, [0.75, 1.5, 3.0, 2.0, 1.0])


def test_the_table_averages_photographs_then_degradations():
    results = [{"entry": entry, "before": (a, b), "after": (c, d)} for entry, a, b, c, d in
               (("rain", 10, 0.1, 20, 0.5), ("rain", 12, 0.3, 26, 0.7), ("haze", 5, 0.6, 7, 0.8))]
    rows = [[row[k] for k in ("degradation", "psnr_before", "ssim_before", "psnr_after", "ssim_after")] for row in table(results)]
    assert [row[0] for row in rows] == ["rain", "haze", "average"]
    np.testing.assert_allclose([row[1:] for row in rows], [[11, 0.2, 23, 0.6], [5, 0.6, 7, 0.8], [8, 0.4, 15, 0.7]])


def test_before_is_the_degraded_image_and_after_the_restored_one():
    config = network("none")
    p = init(config, np.random.default_rng(0))
    result = next(evaluate(lambda image, entry: restore_rgb(image, p, config), evaluation.test_set(("noise50",), draws=1)))
    degraded, restored, clean = result["images"]
    for name, image in (("before", degraded), ("after", restored)):
        assert result[name] == (psnr(image, clean), ssim(image, clean))
    assert result["before"][0] < 16


def test_a_run_folder_never_replaces_other_files(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(InputError, match="holds files already"):
        train(TINY, tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"
