"""A thousand hostile inputs and a few killed runs; more by `python -m tests.hostile` and `tests.hostile.kills`."""
import random
from pathlib import Path

import pytest
from hostile.fuzz import Fuzzer
from hostile.kills import kills

from tinycea import zoo


@pytest.mark.slow
def test_a_thousand_inputs_end_as_they_should(tmp_path):
    fuzzer = Fuzzer(tmp_path, seed=11)
    problems = [problem for _ in range(1000) if (problem := fuzzer.problem())]
    assert not problems, problems[:5]


def test_the_fuzzer_sees_a_bug(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "tensors_in", lambda path, data: {}["bug"])
    fuzzer = Fuzzer(tmp_path, seed=0)
    assert any(fuzzer.problem() for _ in range(50))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of a run in /proc")
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    assert kills(tmp_path, 10, random.Random(0)) == []
