"""A thousand hostile inputs and a few killed runs; more by `python -m tests.hostile`."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hostile.fuzz import Fuzzer

from tinycea import zoo

RUN = ("import sys, tinycea, os\n"
       "if __name__ == '__main__':\n"
       "    out = sys.argv[1]\n"
       "    tinycea.train(out, resume=os.path.exists(out + '/state.safetensors'), steps=400, batch=2, patch=16, scenes=1)\n")


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
    script, models = tmp_path / "run.py", []
    script.write_text(RUN)
    draw = random.Random(0)
    for name, numbers in (("whole", ()), ("killed", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL))):
        out = tmp_path / name
        for number in (*numbers, None):
            process = subprocess.Popen([sys.executable, script, out], stderr=subprocess.DEVNULL)
            if number:
                began = time.monotonic()
                while process.poll() is None and not (out / "state.safetensors").exists() and time.monotonic() < began + 60:
                    time.sleep(0.05)
                time.sleep(draw.uniform(0, 2))
                process.send_signal(number)
            process.wait(120)
            if (out / "result.json").exists():
                break
        models.append((out / "model.safetensors").read_bytes())
        assert {path.name for path in out.iterdir()} == {"config.json", "log.csv", "model.safetensors", "result.json",
                                                         "curve.png", "before_after.png", "routing.png"}
    assert models[0] == models[1]
    assert not [name for name in os.listdir(tmp_path) if name not in ("whole", "killed", "run.py")]
