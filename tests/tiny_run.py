"""A script: trains a tiny network into the folder named, or goes on; it leaves the weights instead of tests and pictures."""
import sys
from pathlib import Path

from tinycea import runtime, training


def finish(recipe, p, log, out):
    p.flat.tofile(out / "weights")
    (out / "state.safetensors").unlink()


if __name__ == "__main__":
    training.finish, folder = finish, Path(sys.argv[1])
    resume, finished = (folder / "state.safetensors").exists(), (folder / "weights").exists()
    with runtime.ranks() as acting:
        if acting and (resume or not finished):              # it may have been killed with its work done
            training.train(folder, resume=resume, steps=int(sys.argv[2]), batch=4, patch=16, scenes=1)
