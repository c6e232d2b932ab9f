"""A script: compares two tiny networks in the folder named, or goes on; the score is a sum of weights, so it takes no time."""
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tinycea.lab import comparison

comparison.SLICE_SECONDS = 0.2                # here, and in the processes, which import this file too


def score(recipe, folder, split):
    p, _ = comparison.load_model(comparison.model_path(recipe, folder))
    return {"recipe": asdict(recipe), "split": str(split), "psnr": {"sum": float(p.flat.astype(float).sum())}}


if __name__ == "__main__":
    recipes = comparison.grid(["patchwork"], ["none", "cea"], seeds=1, steps=[50])
    comparison.compare([replace(recipe, batch=2, patch=16, scenes=1) for recipe in recipes], Path(sys.argv[1]), test=score)
