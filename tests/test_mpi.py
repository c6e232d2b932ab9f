"""Under mpiexec: two ranks train the bytes that one trains, and a comparison's cells may go to the ranks."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinycea.lab import comparison

pytest.importorskip("mpi4py")
pytestmark = pytest.mark.slow


def run(*command, ranks=1):
    """Run the command under mpiexec; its environment is that of a process that no MPI has started."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI"))}
    subprocess.run(["mpiexec", "-n", str(ranks), sys.executable, *map(str, command)], env=env, check=True, timeout=300,
                   stdout=subprocess.DEVNULL)


def test_two_ranks_train_the_bytes_of_one(tmp_path):
    for ranks in (1, 2):
        run(Path(__file__).with_name("tiny_run.py"), tmp_path / str(ranks), 5, ranks=ranks)
    one, two = ((tmp_path / name / "weights").read_bytes() for name in "12")
    assert one == two


def test_ranks_compare_as_processes_do(tmp_path):
    run("-m", "mpi4py.futures", "-m", "tinycea", "compare", "--suites", "aio3", "--adapters", "none", "--seeds", 1, "--steps", 2,
        "--split", "validation", "--out", tmp_path / "ranks", ranks=3)
    comparison.compare(comparison.grid(["aio3"], ["none"], 1, [2]), tmp_path / "processes", "validation", 1)
    processes, ranks = (sorted((tmp_path / name / "runs.jsonl").read_text().splitlines()) for name in ("processes", "ranks"))
    assert [json.loads(line)["psnr"] for line in processes] == [json.loads(line)["psnr"] for line in ranks]
    assert len(ranks) == 1
