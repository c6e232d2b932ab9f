"""python -m tests.hostile --count 20000 --seed 7: prints what is wrong with tinycea's answers; exits with 1 if anything is."""
import argparse
import sys
import tempfile

from tqdm import tqdm

from .fuzz import Fuzzer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--count", type=int, default=1000)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    fuzzer = Fuzzer(folder, args.seed)
    found = [problem for _ in tqdm(range(args.count), disable=None) if (problem := fuzzer.problem())]
print("\n".join(found[:50]))
print(f"{args.count} inputs, seed {args.seed}: {len(found)} problems")
sys.exit(bool(found))
