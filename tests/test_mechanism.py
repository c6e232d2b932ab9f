"""The layer alone, and the suite that needs it: what the tasks are, what the weights set by hand do, and the command."""
import re

import numpy as np
import pytest

from tinycea import cli
from tinycea.adapters import family
from tinycea.degradations import apply, stains
from tinycea.lab import limits, mechanism
from tinycea.lab.mechanism import AMOUNTS, CEA, LIFT, TASKS, by_hand, color, fields, pictures, psnr, teach, theory, tokens
from tinycea.runtime import InputError
from tinycea.scenes import Scene


def test_a_token_holds_its_key_and_its_lifted_color():
    task, rng = TASKS["lamps"]._replace(noise=0), np.random.default_rng(0)
    J, a = rng.random((2, 5, 7, 3)).astype(np.float32), rng.random((2, 5, 7, 3)).astype(np.float32)
    x = tokens(task, J, a, rng)
    assert x.shape == (2, 5, 7, 16) and np.array_equal(x[..., :3], a)
    assert np.allclose(LIFT @ LIFT.T, np.eye(3), atol=1e-6) and np.allclose(color(x) @ LIFT, x[..., 3:], atol=1e-6)
    for b in range(2):                                        # the color is J + a t for one t (3,3) in each picture
        shift = (color(x) - J)[b].reshape(-1, 3)
        t, left, *_ = np.linalg.lstsq(a[b].reshape(-1, 3), shift, rcond=None)
        assert left.max() < 1e-9 and 0.02 < t.std() < 0.6


def test_amounts_are_regions_fields_or_their_size():
    f = fields(2, 24, 3, np.random.default_rng(0))
    assert np.allclose(f.std((1, 2)), 1, atol=1e-5)
    regions = AMOUNTS["regions"](f)
    assert np.array_equal(regions.sum(-1), np.ones(f.shape[:3])) and np.array_equal(regions.argmax(-1), f.argmax(-1))
    assert (AMOUNTS["signed"](f) < 0).any() and np.array_equal(AMOUNTS["never negative"](f), abs(f))


@pytest.mark.parametrize("name, gain", [("regions", 8), ("lamps", 6), ("lamps, never negative", 6)])
def test_weights_set_by_hand_clean_what_no_token_could(name, gain):
    x, J, a = pictures(TASKS[name])
    p, config = by_hand(TASKS[name])
    before, after = psnr(x, J).mean(), psnr(family(config).forward(x, p, config)[0], J).mean()
    assert after > before + gain
    assert theory(TASKS[name], x, J, a).mean() > after - 1


def test_a_layer_learns_the_lamps_and_a_seed_gives_the_same_bytes():
    task = TASKS["lamps"]
    x, J, _ = pictures(task)
    p, again, other = teach(task, CEA, steps=150), teach(task, CEA, steps=150), teach(task, CEA, steps=150, seed=1)
    assert np.array_equal(p.flat, again.flat) and not np.array_equal(p.flat, other.flat)
    assert psnr(family(CEA).forward(x, p, CEA)[0], J).mean() > psnr(x, J).mean() + 3


@pytest.mark.slow
def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    mechanism.publish(out=tmp_path / "m.png", steps=2)
    table = capsys.readouterr().out
    for model in ("degraded", *mechanism.MODELS, "CEA set by hand", "theory of signed"):
        assert re.search(rf"^{re.escape(model)} .*\d\.\d\d", table, re.M), model
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


def test_a_bad_folder_or_picture_is_refused_at_once(tmp_path, capsys):
    assert cli.main(["mechanism", "--test", str(tmp_path / "none"), "-o", str(tmp_path / "m.png")]) == 2
    assert "is not a folder" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert cli.main(["mechanism", "-o", str(tmp_path / "m.jpg")]) == 2
    assert "is not the name of a .png file" in capsys.readouterr().err


def test_trials_done_are_not_done_again(tmp_path):
    trials = [limits.Trial(TASKS["lamps"], CEA, rate, split=split) for rate in (0.01, 0.03) for split in ("test", "validation")]
    kept = tmp_path / "trials.jsonl"
    first = limits.results(trials[:3], None, 2, tmp_path)
    assert len(kept.read_bytes().splitlines()) == 3
    for trial in trials[:3]:
        assert first[trial].shape == (len(mechanism.photographs(trial.split)),)
        assert np.array_equal(first[trial], limits.tested(trial, None, 2))
    kept.write_bytes(kept.read_bytes().replace(str(first[trials[0]][0]).encode(), b"7.0") + b'["half a line')
    again = limits.results(trials, None, 2, tmp_path)         # what is there is believed, what is not is made
    assert again[trials[0]][0] == 7 and np.array_equal(again[trials[1]], first[trials[1]])
    assert len(kept.read_bytes().splitlines()) == 4 and again[trials[3]].shape == first[trials[1]].shape
    assert len(limits.results(trials[:1], None, 3, tmp_path)) == 1 and len(kept.read_bytes().splitlines()) == 5   # other steps
    for damage in ("1", '["a key"]', "[" * 5000):
        kept.write_text(f"{damage}\n")
        with pytest.raises(InputError, match="trials.jsonl: line 1"):
            limits.results(trials[:1], None, 2, tmp_path)


def test_the_long_table_chooses_on_validation_and_tests_on_test(monkeypatch, capsys):
    asked = []

    def results(trials, folder, steps, out):
        asked.extend(trials)
        return {t: np.full(3, 10 * (t.rate == 0.01 and t.split == "validation") + getattr(t.config, "rank", 0) / 2 + t.seed
                           + t.task.K) for t in trials}
    monkeypatch.setattr(limits, "results", results)
    limits.publish(seeds=4)
    table = capsys.readouterr().out
    assert all((t.seed == 0) == (t.split == "validation") or t.split == "test" for t in asked)
    assert {t.config.rank for t in asked if t.seed == 3 and isinstance(t.config, type(CEA))} == {16}
    assert {t.rate for t in asked if t.split == "test"} == {0.01}
    for line in table.splitlines():                           # 3 tints, mean of seeds 1.5, half the rank 16
        if line.startswith("CEA "):
            assert " 0.01   12.50 (11.00)   +0.00 [+0.00, +0.00]" in line
        if line.startswith("token MLP "):
            assert " 0.01    4.50 ( 3.00)   -8.00 [-8.00, -8.00]" in line
    assert re.search(r"tints K +1 +2 +3 +4 +8\n", table) and "lamps      CEA                  9.50  10.50  11.50" in table
    assert "regions    CEA                  4.00   4.50   5.50  11.50" in table          # ranks
    assert table.count("theory of signed") == 8 and table.count("token MLP") == 3 + 2 * 3


# ---- the suite -----------------------------------------------------------------------------------------------------------

def test_stains_follow_their_formula():
    J = np.full((48, 60, 3), 0.5, np.float32)
    image, amounts = stains(Scene(J), np.random.default_rng(0))
    assert image.dtype == amounts.dtype == np.float32 and amounts.shape == (48, 60, 3)
    assert np.array_equal(amounts.sum(-1), np.ones((48, 60))) and set(np.unique(amounts)) == {0, 1}
    y, x = np.indices((48, 60))
    for k, place in enumerate((y, x, x + y)):                 # in a region: one tint, and the grain along its own direction
        inside = amounts[..., k] == 1
        flat = image[inside] - 0.125 - 0.75 * (0.5 + 0.12 * np.sin(np.pi / 2 * place[inside])[:, None])
        whole = (image[inside] > 0).all(-1) & (image[inside] < 1).all(-1)
        assert inside.sum() > 50 and whole.any() and np.ptp(flat[whole], 0).max() < 1e-6


def test_overlapping_stains_vary_smoothly():
    J = np.full((96, 96, 3), 0.5, np.float32)
    image, amounts = stains(Scene(J), np.random.default_rng(1), overlapping=True)
    assert amounts.min() >= 0 and 0.3 < amounts.mean() < 0.5 and abs(np.diff(amounts, axis=0)).max() < 0.2
    assert np.array_equal(image, apply(Scene(J), "stains-overlapping", np.random.default_rng(1)))
    gentle, _ = stains(Scene(J), np.random.default_rng(1), overlapping=True, strength=0.25)
    assert 0 < abs(gentle - J).mean() < abs(image - J).mean()
