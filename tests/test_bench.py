"""Proves the bench: it refuses rivals that compute something else, its figures are those of the runs, its rows have one form."""
import json
import os
import re
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from tinycea import cli
from tinycea.lab import bench
from tinycea.runtime import InputError

KEYS = {"name", "ratio", "spread", "rival"}


def side(outputs, seconds):
    """A fake process: its outputs, and the seconds of its runs in turn."""
    seconds = iter(seconds)
    return lambda task, *job: outputs if task == "prepare" else next(seconds)


def test_sides_take_turns_and_every_run_counts():
    asks = {"a": side([np.ones(3)], [1, 2, 3]), "b": side([np.ones(3)], [4, 5, 6])}
    assert bench.race(asks, "inference", (1, 8), 3) == {"a": [1, 2, 3], "b": [4, 5, 6]}


def test_each_side_gets_three_processes_and_all_their_turns_count(monkeypatch):
    """What a process got by luck stays with it: the median is over several."""
    lives = []

    @contextmanager
    def contender(*side):
        lives.append(side)
        yield len(lives)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(bench, "contender", contender)
    monkeypatch.setattr(bench, "race", lambda asks, kind, size, rounds: {side: [life] * rounds for side, life in asks.items()})
    monkeypatch.setattr(bench, "PEAKS", [])
    rows = list(bench.bench())
    assert lives == [("tinycea", 1)] * 3
    assert [row["ours_s"] for row in rows] == [2] * len(bench.JOBS)


@pytest.mark.parametrize("wrong", [[np.ones(3), np.array([1, 2, 3.01])], [np.ones(3), -np.array([1, 2, 3.0])], [np.ones(3)],
                                   [np.ones(3), np.array([1, 2, np.nan])]])
def test_a_rival_that_computes_something_else_is_not_timed(wrong):
    asks = {"a": side([np.ones(3), np.array([1, 2, 3.0])], [1]), "b": side(wrong, [1])}
    with pytest.raises(InputError, match="b computes something else than a"):
        bench.race(asks, "inference", (1, 8), 1)


def test_a_row_is_the_medians_their_ratio_and_the_quartiles_of_the_turns():
    row = bench.row("step", [1, 2, 6], [2, 8, 4], "PyTorch", "s")
    assert row == {"name": "step", "ours_s": 2, "theirs_s": 4, "ratio": 0.5, "spread": [0.375, 1.0], "rival": "PyTorch"}
    assert bench.format_row(row).split() == ["step", "2000", "ms", "4000", "ms", "0.50", "0.38-1.00", "PyTorch"]


@pytest.mark.parametrize("kind, size", [
    ("CEA forward", (64, 12, 3)), ("CEA forward+backward", (64, 12, 3)), ("NAFBlock forward+backward", (2, 5, 7, 6)),
    ("training step", (2, 10)), ("inference", (1, 12))])
@pytest.mark.parametrize("layout", ["NCHW", pytest.param("channels_last", marks=pytest.mark.slow)])
def test_both_sides_compute_the_same(kind, size, layout):
    pytest.importorskip("torch")
    run, answers = bench.theirs(kind, size, layout, 1)
    mine, right = bench.ours(kind, size)(), answers(run())
    assert len(mine) == len(right) == {"CEA forward": 1, "inference": 1, "training step": 2}.get(kind, 3)
    for a, b in zip(mine, right):
        assert np.abs(b).max() > 0 and np.abs(a - b.reshape(np.shape(a))).max() <= bench.TOLERANCE * np.abs(b).max()


def test_chunks_on_two_cores_and_jax_compute_the_same():
    """In a process of its own each, as JAX changes the modules of its process."""
    kinds = [("CEA forward+backward", (64, 12, 3)), ("NAFBlock forward+backward", (2, 5, 7, 6)), ("training step", (2, 12)),
             ("inference", (1, 12))]
    sides = [("tinycea", 1), ("tinycea", 2)] + [("JAX", 1)] * bool(bench.importlib.util.find_spec("jax"))
    with ExitStack() as stack:
        asks = {side: stack.enter_context(bench.contender(*side)) for side in sides}
        for job in kinds:
            assert set(bench.race(asks, *job, 0)) == set(sides)


def check(rows):
    for row in rows:
        units = {key.split("_")[1] for key in row if key.startswith(("ours_", "theirs_"))}
        assert len(units) == 1 and KEYS < row.keys() and len(row) == 6
        mine, other = row[f"ours_{(unit := units.pop())}"], row[f"theirs_{unit}"]
        assert mine > 0
        if other is None:
            assert row["ratio"] is row["spread"] is None
        else:
            assert row["ratio"] == pytest.approx(mine / other) and row["spread"][0] <= row["spread"][1]


@pytest.mark.slow
def test_quick_bench_as_a_user_runs_it(monkeypatch, capsys):
    """Of other sizes: its rows are whole, whatever they say."""
    small = {"training": (2, 16), "inference": (1, 32)}
    jobs, peaks = bench.QUICK
    monkeypatch.setattr(bench, "QUICK", [[(kind, small[kind.split()[0]]) for kind, _ in which] for which in (jobs[2:], peaks)])
    assert cli.main(["bench", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    check(rows)
    kinds = ["training step", "inference", "peak memory, training step"]
    assert all(any(row["name"].startswith(kind) for row in rows) for kind in kinds)


@pytest.mark.slow
def test_without_pytorch_the_rows_are_ours_alone(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "QUICK", ([("CEA forward", (64, 12, 3))], []))
    rows = list(bench.bench(quick=True))
    check(rows)
    assert {row["rival"] for row in rows} == {"PyTorch and JAX are not installed", "tinycea, 1 thread"}
    monkeypatch.setattr(bench, "bench", lambda quick: iter(rows))
    assert cli.main(["bench"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) + 2 and "torch" not in printed[-1]
    assert re.search(r"numpy .*; float32; \d{4}-\d\d-\d\d", printed[-1])


def die(*_):
    os._exit(1)


@pytest.mark.slow
def test_a_process_that_dies_is_one_sentence(monkeypatch, capfd):
    monkeypatch.setattr(bench, "serve", die)
    with bench.contender("tinycea") as ask, pytest.raises(InputError, match="process ended"):
        ask("prepare", "inference", (1, 8))
