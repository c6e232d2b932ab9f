"""What each variant's CEA layers add to their tokens: its rank, how it varies over the image, whether it tells regions apart.

    python -m tinycea.lab.ranks runs/ablation > data/results/ablation/ranks.txt

Reads runs.jsonl and models/ of `tinycea compare`, aio5 and patchwork, and the validation photographs. A minute on two cores.
"""
import sys
from pathlib import Path

import numpy as np

from ..degradations import suite
from ..evaluation import test_set
from ..nafnet import anatomies, centered
from ..runtime import machine
from ..training import Recipe
from ..zoo import load_model
from .comparison import finished, model_path
from .questions import accuracy, regions

SUITES = ("aio5", "patchwork")


def variants(folder):
    """{adapter: {suite: its trained networks}} of the CEA variants, 1000 steps, in the order of runs.jsonl."""
    found = {}
    for line in finished(folder):
        if "parameters" in line and line["recipe"]["adapter"].startswith("cea") and line["recipe"]["steps"] == 1000:
            recipe = Recipe(**line["recipe"])
            network = load_model(model_path(recipe, Path(folder)))
            found.setdefault(recipe.adapter, {}).setdefault(recipe.suite, {})[recipe.seed] = network
    return {adapter: {name: list(networks[name].values()) for name in SUITES}
            for adapter, networks in found.items() if set(SUITES) <= set(networks)}


def spread(layer):
    """Effective rank of what a layer added, Y - X = S U (B,N,C), and how much that varies over the image: two (B,).

    The latter is the share of its energy left without its mean over the image.
    """
    added = np.float64(layer["S"]) @ layer["U"]
    energy = np.maximum(np.linalg.eigvalsh(added.swapaxes(1, 2) @ added), 0) + 1e-30
    share = energy / energy.sum(1, keepdims=True)
    varying = ((added - added.mean(1, keepdims=True))**2).sum((1, 2)) / (added**2).sum((1, 2))
    return np.exp(-(share * np.log(share)).sum(1)), varying


if __name__ == "__main__":
    folder = sys.argv[1]
    print(f"python -m tinycea.lab.ranks {folder}; {machine()}\n"
          "rank: effective rank (exponential of the entropy of the energies) of what a layer adds to the tokens of one image, "
          "mean over layers, images and seeds\n"
          "varies: share of its energy that is left when its mean over the image is taken away\n"
          "regions: accuracy of a linear classifier of three regions from the affinities of the last layer, chance 0.33\n")
    images = {name: [image for _, _, image, _ in test_set(suite(name), "validation", "crops")] for name in SUITES}
    patches, masks = zip(*regions("validation"))
    adapters = variants(folder)
    width = max(map(len, adapters))
    print(f"{'':{width}s}  " + "".join(f"{name + ' rank':>15s} varies" for name in SUITES) + "  regions  seeds")
    for adapter, networks in adapters.items():
        line = f"{adapter:{width}s}  "
        for name in SUITES:
            layers = [layer for p, config in networks[name] for image in images[name]
                      for layer in anatomies(centered(image[None], p, config)[1]).values()]
            rank, varying = np.mean([spread(layer) for layer in layers], (0, 2))
            line += f"{rank:15.2f} {varying:6.2f}"
        right = [accuracy([list(anatomies(centered(batch, p, config)[1]).values())[-1]["S"] for batch in patches], masks)
                 for p, config in networks["patchwork"]]
        print(line + f"  {np.mean(right):7.3f}  {len(right)}: {min(right):.3f} to {max(right):.3f}")
