"""Under mpiexec: two ranks train the bytes that one trains, and a comparison's cells may go to the ranks."""
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("mpi4py")
pytestmark = pytest.mark.slow


def run(*command, ranks=1):
    """Run the command under mpiexec; its environment is that of a process that no MPI has started."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI"))}
    subprocess.run(["mpiexec", "-n", str(ranks), sys.executable, *map(str, command)], env=env, check=True, timeout=300,
                   stdout=subprocess.DEVNULL)


def test_two_ranks_train_the_bytes_of_one(tmp_path):
    for ranks in (1, 2):
        run("-m", "tinycea", "train", "--steps", 4, "--out", tmp_path / str(ranks), ranks=ranks)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in "12")
    assert one == two


def test_ranks_compare_as_processes_do(tmp_path):
    for out, ranks, launcher in (("processes", 1, ()), ("ranks", 3, ("-m", "mpi4py.futures"))):
        run(*launcher, "-m", "tinycea", "compare", "--suites", "aio3", "--adapters", "none", "--seeds", 1, "--steps", 2,
            "--split", "validation", "--out", tmp_path / out, ranks=ranks)
    processes, ranks = (sorted((tmp_path / name / "runs.jsonl").read_text().splitlines()) for name in ("processes", "ranks"))
    assert [json.loads(line)["psnr"] for line in processes] == [json.loads(line)["psnr"] for line in ranks]
    assert len(ranks) == 1
