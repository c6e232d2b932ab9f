"""python -m tests.hostile.kills --count 100 --seed 7: kills train and compare at random moments, and runs the same command again.

The main process or one it started, by SIGKILL, SIGTERM or SIGINT. In the end there must be the bytes of an undisturbed run, no
file more, and at no time a process that outlives its main one. Linux: processes are found in /proc.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from tinycea.lab.comparison import finished
from tinycea.zoo import load_model

TESTS = Path(__file__).parents[1]
JOBS = {"train": (TESTS / "tiny_run.py", "100"), "compare": (TESTS / "tiny_compare.py",)}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def started(job, out):
    script, *rest = JOBS[job]
    with open(f"{out}.stderr", "w") as stderr:
        return subprocess.Popen([sys.executable, script, out, *rest], stderr=stderr, env={**os.environ, "TINY": str(out)})


def alive(out):
    """The processes of a run, by what their environment says."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TINY={out}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:                       # it has just ended, or is another user's
            pass
    return found


def outcome(out):
    """Every file of a finished run, by name: weights, and lines in an order of their own; not how long it took."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        found[path.name] = (load_model(path)[0].flat.tobytes() if path.suffix == ".safetensors" else
                            sorted(map(str, finished(out))) if path.suffix == ".jsonl" else
                            path.read_bytes() if path.name == "weights" else None)
    return found


def disturbed(job, out, seconds, count, rng):
    """Run a job in `out`, killed so many times in its first `seconds` -> problems, its `outcome`, how many kills it met."""
    problems, hits = [], 0
    for number in (*(rng.choice(SIGNALS) for _ in range(count)), None):
        process = started(job, out)
        if number:
            time.sleep(rng.uniform(0, seconds))
            children = [pid for pid in alive(out) if pid != process.pid]
            victim = rng.choice(children) if children and rng.random() < 0.4 else process.pid
            if process.poll() is None:
                with suppress(ProcessLookupError):              # the process was faster
                    os.kill(victim, number)
                    hits += 1
        case = f"{job}, {signal.Signals(number).name if number else 'not killed'} "
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            problems.append(case + "did not end")
            process.kill()
        late = time.time() + 10
        while (left := alive(out)) and time.time() < late:
            time.sleep(0.05)
        if left:
            problems.append(f"{case}left the processes {left}")
        if process.returncode == 0:
            break
    if process.returncode:
        problems.append(f"{job}: the same command ends with {process.returncode}: {Path(f'{out}.stderr').read_text()[-300:]}")
    return problems, outcome(out), hits


def kills(folder, count, rng):
    """Problems as sentences."""
    whole, seconds, problems, done = {}, {}, [], 0
    for job in JOBS:
        began = time.perf_counter()
        problems += disturbed(job, Path(folder, job), 0, 0, rng)[0]
        whole[job], seconds[job] = outcome(Path(folder, job)), time.perf_counter() - began
    with tqdm(total=count, desc="kills", disable=None) as bar:
        while done < count:
            job, most = rng.choice(list(JOBS)), min(rng.randint(1, 4), count - done)
            with tempfile.TemporaryDirectory(dir=folder) as out:
                found, result, hits = disturbed(job, Path(out), seconds[job], most, rng)
            problems += found + ([f"{job}: not what an undisturbed run leaves"] if result != whole[job] else [])
            done += hits
            bar.update(hits)
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        said = kills(temporary, args.count, random.Random(args.seed))
    print("\n".join(said))
    print(f"{args.count} kills, seed {args.seed}: {len(said)} problems")
    sys.exit(bool(said))
