"""Stains in the whole network, image in and image out: CEA and its rivals, at one, two and four times the training size.

    python -m tinycea.lab.stains PHOTOGRAPHS TEST [--out DIR] [--steps N] [--seeds N] [--split validation]

PHOTOGRAPHS is a folder to train on (beside dead leaves), TEST the 200 test images of BSDS500. What is in DIR is not made again.
"""
import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..degradations import apply, suite
from ..evaluation import TEST_SEED, psnr
from ..restoration import restore_rgb
from ..runtime import machine, make_folder
from ..scenes import Scene, crop, photographs
from ..zoo import load_model
from .comparison import cells, finished, grid, interval, model_path, train_slice, whole_lines

# Rates relative to the network's, chosen on the validation half: 0.1 and 0.3 for CEA, the rivals' own of `tinycea compare`.
MODELS = {"none": None, "wider": None, "mlp": 0.3, "descriptor": 0.3, "prompt": 0.3, "experts-token": 0.3,
          "cea:norm=token,tokens=Xhat": 0.3, "cea-image": 0.3, "cea-softmax": 0.3, "cea": 0.3}
BARE = tuple(f"{name}:sca=false" for name in ("none", "wider", "mlp", "descriptor", "prompt", "cea-softmax", "cea"))
SIDES = (48, 96, 192)


def tested(model, split, folder):
    """Entry -> side -> PSNR in dB of a random crop of each photograph."""
    found = {}
    for entry in suite("stains"):
        found[entry] = {str(side): [] for side in SIDES}
        for i, photo in enumerate(photographs(split, folder).values()):
            for side, values in zip(SIDES, found[entry].values()):
                rng = np.random.default_rng([TEST_SEED, i, side, *entry.encode()])
                scene = crop(Scene(photo), side, rng)
                image = apply(scene, entry, rng)
                values.append(psnr(image if model is None else np.clip(restore_rgb(image, *model), 0, 1), scene.image))
    return found


def trained(recipes, out, bar):
    """Train what `out` has no model of, cell by cell; Ctrl-C loses five seconds."""
    for cell in cells([recipe for recipe in recipes if not model_path(recipe, out).exists()]):
        done = 0
        while done < cell[0].steps:
            before, done = done, train_slice(cell, out)
            bar.update((done - before) * len(cell))


def report(lines):
    """Lines of text: means over seeds and photographs, and the gain over none of the same seed with its 95 % interval."""
    found = defaultdict(dict)
    for line in lines:
        found[line["recipe"]["adapter"]][line["recipe"]["seed"]] = line["psnr"]
    for entry in suite("stains"):
        yield f"\n{entry:28s}" + "".join(f"{side:7d} x {side:<20d}" for side in SIDES)
        for adapter, runs in found.items():
            none, text = found.get("none:sca=false" if "sca=false" in adapter else "none", {}), f"{adapter:28s}"
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
    parser.add_argument("--out", type=Path, default="runs/stains")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    args = parser.parse_args()
    make_folder(args.out / "models")
    models = MODELS | {name: MODELS[name.partition(":")[0]] for name in BARE}
    recipes = [recipe for name, rate in models.items()
               for recipe in grid(["stains"], [name], args.seeds, [args.steps], [rate], args.photographs)]
    recipes.sort(key=lambda recipe: recipe.seed)
    have = {json.dumps(line["recipe"]): line for line in finished(args.out) if line["split"] == args.split}
    with tqdm(total=sum(recipe.steps for recipe in recipes), desc="stains", unit="step", disable=None) as bar:
        trained(recipes, args.out, bar)
        for recipe in recipes:
            key = json.dumps(recipe.__dict__)
            if key not in have:
                have[key] = {"recipe": recipe.__dict__, "split": args.split,
                             "psnr": tested(load_model(model_path(recipe, args.out)), args.split, args.test)}
                with whole_lines(args.out) as file:
                    file.write(json.dumps(have[key]).encode() + b"\n")
    degraded = {"recipe": {"adapter": "degraded", "seed": 0}, "psnr": tested(None, args.split, args.test)}
    lines = [degraded, *(have[json.dumps(recipe.__dict__)] for recipe in recipes)]
    print(f"PSNR in dB, mean over {args.seeds} seeds and a crop of each photograph of the {args.split} split; gain over none "
          "with a 95 % interval" + "\n".join(report(lines)))
    print(f"{args.steps} steps; {machine()}")


if __name__ == "__main__":
    main()
