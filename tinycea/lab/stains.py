"""Stains in the whole network, image in and image out: CEA and its rivals, at one, two and four times the training size.

    python -m tinycea.lab.stains PHOTOGRAPHS TEST [--out DIR] [--steps N] [--seeds N] [--split validation]

PHOTOGRAPHS is a folder to train on (beside dead leaves), TEST the 200 test images of BSDS500. What is in DIR is not made again.
"""
import argparse
from collections import defaultdict
from dataclasses import asdict
from itertools import product

import numpy as np

from ..degradations import apply, suite
from ..evaluation import TEST_SEED, psnr
from ..restoration import restore_rgb
from ..runtime import machine
from ..scenes import Scene, crop, photographs
from ..training import Recipe
from ..zoo import load_model
from .comparison import LABELS, compare, degrader, grid, interval, model_path

# Rates relative to the network's, chosen on the validation half: 0.1 and 0.3 for CEA, the rivals' own of `tinycea compare`.
MODELS = {"none": None, "wider": None, "mlp": 0.3, "descriptor": 0.3, "cea:norm=token,tokens=Xhat": 0.3,
          "cea:norm=image,tokens=Xhat": 0.3, "cea:norm=token,tokens=X": 0.3, "cea-softmax": 0.3, "cea": 0.3}
# Options -> the models with them: none; without SCA; given the amounts, so that there is nothing to recognize, only to use.
OPTIONS = {"": MODELS, ":sca=false": ("none", "descriptor", "descriptor:norm=image,sca=false", "cea-softmax", "cea"),
           f":told={len(LABELS)}": ("none", "mlp", "descriptor", "cea-softmax", "cea")}
SIDES = (48, 96, 192)


def tested(restorer, split, photos, degrade):
    """Entry -> side -> PSNR in dB of a random crop of each photograph of a folder."""
    found = {entry: {str(side): [] for side in SIDES} for entry in suite("stains")}
    for entry, side, (i, photo) in product(found, SIDES, enumerate(photographs(split, photos).values())):
        rng = np.random.default_rng([TEST_SEED, i, side, *entry.encode()])
        scene = crop(Scene(photo), side, rng)
        found[entry][str(side)].append(psnr(restorer(degrade(scene, entry, rng)), scene.image))
    return found


def test_model(recipe, folder, split):
    """The line of a trained network."""
    model = load_model(model_path(recipe, folder))
    values = tested(lambda image: restore_rgb(image, *model), *split, degrader(recipe.adapter))
    return {"recipe": asdict(recipe), "split": str(split), "psnr": values}


def report(lines):
    """Lines of text: means over seeds and photographs, and the gain over none of the same seed with its 95 % interval."""
    found = defaultdict(dict)
    for line in lines:
        found[line["recipe"]["adapter"]][line["recipe"]["seed"]] = line["psnr"]
    for entry in suite("stains"):
        yield f"\n{entry:31s}" + "".join(f"{side:7d} x {side:<20d}" for side in SIDES)
        for adapter, runs in found.items():
            options = next(options for options in reversed(OPTIONS) if adapter.endswith(options[1:]))
            none, text = found.get("none" + options, {}), f"{adapter:31s}"
            for side in map(str, SIDES):
                values = np.array([run[entry][side] for run in runs.values()])
                text += f"{values.mean():8.2f}"
                shared, gain = [seed for seed in runs if seed in none and runs is not none], ""
                if shared:
                    ahead = np.array([np.subtract(runs[seed][entry][side], none[seed][entry][side]) for seed in shared])
                    gain = " {:+.2f} [{:+.2f}, {:+.2f}]".format(ahead.mean(), *interval(ahead))
                text += f"{gain:21s}"
            yield text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs")
    parser.add_argument("test")
    parser.add_argument("--out", default="runs/stains")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    args = parser.parse_args()
    recipes = [recipe for options, names in OPTIONS.items() for name in names for recipe in grid(["stains"], [
        name + options * (":" not in name)], args.seeds, [args.steps], [MODELS.get(name, 0.3)], args.photographs)]
    lines = compare(recipes, args.out, args.split, photos=args.test, test=test_model)
    lines.sort(key=lambda line: recipes.index(Recipe(**line["recipe"])))
    degraded = {"recipe": {"adapter": "degraded", "seed": 0}, "psnr": tested(lambda image: image, args.split, args.test, apply)}
    print(f"PSNR in dB, mean over {args.seeds} seeds and a crop of each photograph of the {args.split} split; gain over none "
          "with a 95 % interval" + "\n".join(report([degraded, *lines])))
    print(f"{args.steps} steps; {machine()}")


if __name__ == "__main__":
    main()
