"""A thousand hostile inputs and a few killed runs; more by `python -m tests.hostile`."""
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile.fuzz import Fuzzer

from tinycea import zoo


def test_a_thousand_inputs_end_as_they_should(tmp_path):
    fuzzer = Fuzzer(tmp_path, seed=11)
    problems = [problem for _ in range(1000) if (problem := fuzzer.problem())]
    assert not problems, problems[:5]


def test_the_fuzzer_sees_a_bug(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "tensors_in", lambda path, data: {}["bug"])
    fuzzer = Fuzzer(tmp_path, seed=0)
    assert any(fuzzer.problem() for _ in range(50))


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    """At a random moment by SIGKILL, SIGTERM or SIGINT; then the same command goes on. Nothing is left but the run's files."""
    script, draw, weights = Path(__file__).with_name("tiny_run.py"), random.Random(0), []
    for name, numbers in (("whole", ()), ("killed", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL))):
        out = tmp_path / name
        for number in (*numbers, None):
            process = subprocess.Popen([sys.executable, script, out, "400"], stderr=subprocess.DEVNULL)
            if number:
                while process.poll() is None and not (out / "state.safetensors").exists():
                    time.sleep(0.05)
                time.sleep(draw.uniform(0, 1))
                process.send_signal(number)
            process.wait(120)
            if (out / "weights").exists():
                break
        weights.append((out / "weights").read_bytes())
        assert {path.name for path in out.iterdir()} == {"config.json", "log.csv", "weights"}
    assert weights[0] == weights[1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}
