"""The comparison: a run in it is `tinycea train`'s, nothing is trained twice, Ctrl-C loses nothing, statistics are right."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, replace

import numpy as np
import pytest

from tinycea import cli, training
from tinycea.degradations import DEGRADATIONS, apply, patchwork, stains
from tinycea.lab import comparison as compare
from tinycea.nafnet import NAFNetConfig, shapes
from tinycea.runtime import InputError, locked, pool
from tinycea.scenes import dead_leaves
from tinycea.zoo import ADAPTERS, load_model, network

RECIPES = [replace(recipe, scenes=2, batch=2, patch=16)
           for recipe in compare.grid(["patchwork"], ["wider", "cea"], seeds=1, steps=[7])]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Three crops instead of all images, where this process tests."""
    few = compare.test_set(("patchwork",), "test", "crops")[:3]
    monkeypatch.setattr(compare, "test_set", lambda *which, **more: few)


def cell(folder, recipes=RECIPES):
    """The lines of one cell, trained in this process."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    while compare.train_slice(recipes, folder) < recipes[0].steps:
        pass
    return [compare.test_model(recipe, folder, compare.Split("test", None)) for recipe in recipes]


def weights(folder, recipe):
    return load_model(compare.model_path(recipe, folder))[0].flat.tobytes()


@pytest.mark.slow
def test_a_run_of_the_comparison_is_a_run_of_train(tmp_path, monkeypatch):
    lines = cell(tmp_path)
    monkeypatch.setattr(training, "finish", lambda recipe, p, *rest: p.flat.tobytes())
    for recipe, line in zip(RECIPES, lines):
        assert line["recipe"] == asdict(recipe) and line["milliseconds_per_step"] > 0
        assert training.train(tmp_path / recipe.adapter, **asdict(recipe)) == weights(tmp_path, recipe)


def test_a_cell_goes_on_where_its_last_slice_ended(tmp_path, monkeypatch):
    whole = cell(tmp_path / "whole")
    monkeypatch.setattr(compare, "SLICE_SECONDS", 0)
    (tmp_path / "cut" / "models").mkdir(parents=True)
    assert compare.train_slice(RECIPES, tmp_path / "cut") == 1
    assert [file.suffixes for file in (tmp_path / "cut" / "models").iterdir()] == [[".state", ".safetensors"]]
    lines = cell(tmp_path / "cut")
    assert [line["psnr"] for line in lines] == [line["psnr"] for line in whole]
    assert all(weights(tmp_path / "cut", recipe) == weights(tmp_path / "whole", recipe) for recipe in RECIPES)
    assert not list((tmp_path / "cut" / "models").glob("*.state*"))


def test_cells_share_their_batches_and_stay_small():
    recipes = compare.grid(["aio5", "cdd11"], ["cea", "mlp", "none:width=8"], seeds=2, steps=[100, 6000])
    found = list(compare.cells(recipes))
    assert sorted(map(str, sum(found, []))) == sorted(map(str, recipes))
    for members in found:
        assert len({replace(recipe, adapter="", adapter_lr=0) for recipe in members}) == 1
        assert len(members) * members[0].steps <= compare.CELL_STEPS
    assert len(found) == 2 * 2 * (1 + 3)


def test_rates_are_the_tuned_ones_unless_typed():
    assert [recipe.adapter_lr for recipe in compare.grid(["aio5"], ["prompt:hidden=7"], 1)] == [training.ADAPTER_LR["prompt"]]
    assert [recipe.adapter_lr for recipe in compare.grid(["aio5"], ["cea"], 1, rates=[0.5, 2])] == [0.5, 2]


@pytest.mark.parametrize("sca", ["", ":sca=false"])
def test_headline_networks_are_matched_in_parameters(sca):
    sizes = {name: sum(map(math.prod, shapes(network(name + sca)).values())) for name in compare.HEADLINE}
    assert all(abs(n / sizes["cea"] - 1) < 0.05 for n in sizes.values()), sizes


def test_every_preset_has_a_rate():
    assert set(training.ADAPTER_LR) == set(ADAPTERS)


# ---- the command -----------------------------------------------------------------------------------------------------

COMMAND = ["compare", "--suites", "patchwork", "--adapters", "wider", "cea", "--seeds", "1"]


@pytest.mark.slow
def test_quick_prints_a_table_and_trains_nothing_twice(tmp_path, capsys):
    for _ in range(2):
        assert cli.main(["compare", "--quick", "--suites", "patchwork", "--split", "validation", "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert said.count("minus CEA's") == 2
        assert "wider" in said and "cea" in said
        assert {file.name for file in tmp_path.iterdir()} == {"runs.jsonl", "models", "cost.png"}
        lines = (tmp_path / "runs.jsonl").read_text().splitlines()
        assert len(lines) == 2 and len(list((tmp_path / "models").iterdir())) == 2
        assert {json.loads(line)["recipe"]["adapter"] for line in lines} == {"wider", "cea"}


def test_rows_without_a_network_are_told_the_best_strength():
    degraded, tv, nlm = (compare.test_without_network({"suite": "patchwork", "adapter": row}, compare.Split("test", None))
                         for row in ("degraded", "total variation", "non-local means"))
    assert compare.matrix(tv).mean() > compare.matrix(degraded).mean() < compare.matrix(nlm).mean()
    assert nlm["strengths"]["patchwork"] in compare.CLASSICAL["non-local means"][1] and "strengths" not in degraded
    tables = compare.format_rows(compare.rows([degraded, tv, nlm] + lines(cea=20)))
    assert "aio5, 5 steps" in tables


@pytest.mark.slow
def test_ctrl_c_saves_and_says_so(tmp_path):
    """That the same command then ends with the same bytes is for tests/hostile/kills.py to see."""
    command = [sys.executable, "-m", "tinycea", *COMMAND, "--steps", "2000", "--split", "validation", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not list(tmp_path.glob("models/*.state.safetensors")):
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
    assert list(tmp_path.glob("models/*.state.safetensors")) and not (tmp_path / "runs.jsonl").read_text()


@pytest.mark.parametrize("arguments, message", [
    (["--suites", "aio9"], "unknown suite 'aio9'"), (["--adapters", "cea", "ceaa"], "unknown adapter 'ceaa'"),
    (["--adapters", "cea:depth=2"], "unknown option 'depth=2'"), (["--adapters", "cea:rank=0"], "expected a positive integer"),
    (["--seeds", "0"], "positive integer"), (["--steps", "many"], "positive integer"), (["--rates", "-1"], "positive number"),
    (["--split", "train"], "invalid choice"), (["--jobs", "0"], "positive integer")])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert cli.main(["compare", "--out", str(tmp_path / "new"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_damaged_lines_are_refused_and_half_a_line_is_dropped(tmp_path):
    path, line = tmp_path / "runs.jsonl", json.dumps({"recipe": {"suite": "aio5"}, "split": "test", "psnr": {}})
    for damage in ("1", "{}", "[" * 5000, '{"recipe": {"sui', '{"recipe": 1, "split": 1, "psnr": 1}'):
        path.write_text(f"{line}\n{damage}\n{line}\n")
        with pytest.raises(InputError, match="runs.jsonl: line 2"):
            compare.compare(RECIPES, tmp_path)
    path.write_text(line + "\n" + line[:20])
    assert len(compare.finished(tmp_path)) == 1
    compare.compare([], tmp_path)
    assert path.read_text() == line + "\n"


def test_a_folder_is_one_process_s(tmp_path):
    with locked(tmp_path / "models"), pytest.raises(InputError, match="another process"):
        compare.compare(RECIPES, tmp_path)
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process"):
        training.train(tmp_path / "run")
    assert not (tmp_path / "models").exists()
    with pytest.raises(InputError, match="the reason"), locked(tmp_path / "full/models"):
        (tmp_path / "full/runs.jsonl").touch()
        raise InputError("the reason")        # is told, not that `full` holds something and stays
    assert [path.name for path in tmp_path.glob("full/*")] == ["runs.jsonl"]


@pytest.mark.slow
def test_a_worker_that_has_died_is_one_sentence():
    with pytest.raises(InputError, match="has died"), pool(1) as executor:
        list(compare.work(executor, deque([(os._exit, 1)]), 1, lambda: False))
    with pytest.raises(InputError, match="has died"), pool(1) as executor:
        executor.submit(os._exit, 1).exception()
        list(compare.work(executor, deque([(print,)]), 1, lambda: False))      # where it is the next task that meets it


# ---- the ceiling -----------------------------------------------------------------------------------------------------

SCENE = dead_leaves((40, 56), np.random.default_rng(0))


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("entry", [*DEGRADATIONS, "low+haze+snow", "patchwork", "stains", "stains-overlapping", "clean"])
def test_a_label_says_what_was_done_and_changes_nothing(entry):
    image, label = np.split(compare.told(SCENE, entry, rng()), [3], -1)
    assert np.array_equal(image, apply(SCENE, entry, rng())) and label.shape[2] == len(compare.LABELS) == network("told").told
    amounts = dict(zip(compare.LABELS, np.moveaxis(2 * label - 1, -1, 0)))
    if entry == "patchwork":
        _, mask, names = patchwork(SCENE, rng())
        expected = dict(zip(names, np.moveaxis(mask, -1, 0)))
    elif entry in ("stains", "stains-overlapping"):
        expected = dict(zip(compare.LABELS[-3:], np.moveaxis(stains(SCENE, rng(), entry != "stains")[1], -1, 0)))
    else:
        expected = dict.fromkeys(() if entry == "clean" else entry.split("+"), 1)
    assert all(np.allclose(amounts[name], expected.get(name, 0), atol=1e-6) for name in compare.LABELS)


def test_a_label_is_as_strong_as_what_was_done():
    expected = [0.75 if name in ("low", "haze") else 0.5 for name in compare.LABELS]
    assert np.allclose(compare.told(SCENE, "low+haze", rng(), 0.5)[0, 0, 3:], expected)


# ---- the statistics --------------------------------------------------------------------------------------------------

def lines(**means):
    """Lines of two seeds, three photographs, two entries: adapter's mean + seed + 10 photograph + 100 entry."""
    return [{"recipe": {"suite": "aio5", "steps": 5, "seed": seed, "adapter": adapter, "adapter_lr": 0.1}, "split": "test",
             "parameters": 1, "multiplications_per_pixel": 2, "milliseconds_per_step": seed,
             "psnr": {"photographs": {f"e{e}": {f"p{f}": mean + seed + 10 * f + 100 * e for f in range(3)} for e in range(2)}}}
            for adapter, mean in means.items() for seed in (0, 1)]


def test_rows_are_paired_by_seed_and_photograph():
    cea, other = compare.rows(lines(cea=20, wider=21.5))
    assert (cea["psnr"], other["psnr"]) == (80.5, 82) and cea["sd"] == pytest.approx(0.5**0.5) and "minus_cea" not in cea
    assert other["minus_cea"] == {name: (1.5, 1.5, 1.5) for name in ("all", "e0", "e1")}      # all else cancels
    assert other["entries"] == {"e0": 32, "e1": 132} and other["seeds"] == [0, 1] and other["milliseconds"] == 0.5


def test_a_seed_that_cea_lacks_is_left_out_of_the_difference():
    found = lines(cea=20, wider=21.5)
    cea, other = compare.rows(found[:1] + found[2:])
    assert other["minus_cea"]["all"] == (1.5, 1.5, 1.5) and cea["sd"] is None


def test_of_several_rates_the_usual_one_is_what_others_are_held_against():
    fast = [line | {"recipe": line["recipe"] | {"adapter_lr": 1.0}} for line in lines(cea=10)]
    *_, other = compare.rows(fast + lines(cea=20, wider=21.5))
    assert other["minus_cea"]["all"] == (1.5, 1.5, 1.5)
    assert compare.rows(fast + lines(wider=21.5))[-1]["minus_cea"]["all"] == (11.5, 11.5, 11.5)


def test_the_ceiling_is_what_a_told_network_gains_if_it_gains():
    none, told, half, cea = compare.rows(lines(none=20, told=24, mlp=22, cea=23))
    assert [row["ceiling"] for row in (none, told, half, cea)] == [4] * 4 and half["minus_none"]["all"] == (2, 2, 2)
    text = compare.format_rows([none, told, half, cea])
    assert " 50%" in text and " 75%" in text and "100%" in text and "minus_none" not in none
    assert all(row["ceiling"] is None for row in compare.rows(lines(none=20, told=19, cea=23)))


def test_interval_is_as_wide_as_seeds_and_photographs_make_it():
    """Against the normal approximation: differences a_s + b_f have a variance of var(a)/S + var(b)/F."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 1)), 2 * rng.normal(size=(1, 30))
    low, high = compare.interval(0.3 + a + b)
    half = 1.96 * np.sqrt(a.var() / 40 + b.var() / 30)
    assert low < (0.3 + a + b).mean() < high and (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert compare.interval(np.full((5, 3), 0.7)) == pytest.approx([0.7, 0.7])


def test_multiplications_are_counted():
    """A network of one block by hand: every product of the definitions in ops.reference."""
    C, N, image = 5, 8 * 8, 3
    config = NAFNetConfig(C, (), 1, (), 1, None)
    convolutions = N * (9 * image * C + 9 * C * image) + N * (C * 2 * C + 9 * 2 * C + C * C + C * 2 * C + C * C) + C * C
    norms = 2 * N * (C + C + C + 1)           # squares, xhat, weight; eps and mean count nothing
    gates = 2 * N * C + N * C                 # two gates, one channel scaling
    scaled = 2 * (C * C + C)                  # beta and gamma times weights and biases
    found = compare.multiplications(config, side=8) * N
    assert abs(found - (convolutions + norms + gates + scaled)) <= N + 2 * N
