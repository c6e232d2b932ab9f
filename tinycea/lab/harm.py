"""Does a restorer do harm? Every degradation, and none, on a hundred photographs: the mean gain, the worst, how many lost.

    python -m tinycea.lab.harm FOLDER [--split validation] [--weights FILE] [--classical] [--count N]

FOLDER is the 200 test images of BSDS500: the first hundred by name choose (validation), the last hundred test. --classical adds
non-local means, told the noise, with the best of five strengths for each row; and BM3D, told it too, where `bm3d` is installed.
"""
import argparse
import os
from functools import cache, partial
from importlib.util import find_spec

import numpy as np
from tqdm import tqdm

from ..degradations import apply, jpeg, noise, suite
from ..evaluation import TEST_SEED, psnr
from ..restoration import restore
from ..runtime import machine, pool
from ..scenes import Scene, photographs
from ..zoo import WEIGHTS, load_model
from .comparison import non_local_means

STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)         # of non-local means, times sigma


def gray(image):
    return image.mean(-1, keepdims=True)[..., [0, 0, 0]]


ROWS = {"clean": lambda image, rng: image, "jpeg, quality 90": lambda image, rng: jpeg(image, rng, quality=90),
        "jpeg, quality 40": lambda image, rng: jpeg(image, rng, quality=40)} | {
    entry: lambda image, rng, entry=entry: apply(Scene(image), entry, rng)
    for entry in dict.fromkeys(("noise15", "noise25", "noise50", *suite("everyday+cdd11+patchwork"))) if entry != "jpeg"} | {
    "gray photograph, noise 25": lambda image, rng: noise(gray(image), rng, sigma=25)[..., [0, 0, 0]]}    # channels alike
SIGMAS = {"noise15": 15, "noise25": 25, "noise50": 50, "gray photograph, noise 25": 25}


@cache
def known(folder, split, weights):
    """The photographs and the model, read once in each process."""
    return list(photographs(split, folder).values()), load_model(weights)


def degraded(photo, i):
    """Yield (row, degraded, clean) of photograph i for each of ROWS: the same in every run."""
    for row, degrade in ROWS.items():
        image = degrade(photo, np.random.default_rng([TEST_SEED, i, 0, *row.encode()]))
        yield row, image, gray(photo) if "gray photograph" in row else photo


def judged(i, folder, split, weights, classical):
    """Row -> PSNR in dB of photograph i: degraded, restored, and of classical restorers by name."""
    photos, model = known(folder, split, weights)
    found = {}
    for row, image, clean in degraded(photos[i], i):
        images = {"degraded": image, "restored": restore(image, model, threads=1)}
        if classical and row in SIGMAS:
            sigma = SIGMAS[row] / 255
            images |= {("non-local means", s): non_local_means(image, s * sigma, sigma) for s in STRENGTHS}
            if find_spec("bm3d"):
                from bm3d import bm3d, bm3d_rgb
                images["BM3D", 1] = np.dstack([bm3d(image[..., 0], sigma)] * 3) if "gray" in row else bm3d_rgb(image, sigma)
        found[row] = {key: psnr(np.clip(y, 0, 1), clean) for key, y in images.items()}
    return found


def table(results):
    """Lines of text: for each row the means, the worst gain, the share of photographs that got worse."""
    yield f"{'PSNR in dB':28s} {'degraded':>9s} {'restored':>9s} {'gain':>7s} {'worst':>7s} {'lost':>5s}   classical"
    for row in ROWS:
        values = {key: np.array([found[row][key] for found in results]) for key in results[0][row]}
        before, after = values.pop("degraded"), values.pop("restored")
        if row == "clean":
            yield f"{row:38s} {after.mean():9.2f} {after.min():15.2f} {np.mean(after < np.inf):5.0%}   (changed)"
            continue
        gain, best = after - before, {}
        for (name, strength), column in values.items():
            best[name] = max(best.get(name, (0, 0)), (column.mean(), strength))
        yield (f"{row:28s} {before.mean():9.2f} {after.mean():9.2f} {gain.mean():+7.2f} {gain.min():+7.2f} "
               f"{np.mean(gain < 0):5.0%}   "
               + ", ".join(f"{name} {mean:.2f} (strength {strength})" for name, (mean, strength) in best.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--weights", default=str(WEIGHTS))
    parser.add_argument("--classical", action="store_true")
    parser.add_argument("--count", type=int, default=100, choices=range(1, 101), metavar="N", help="photographs, the first ones")
    args = parser.parse_args()
    count = min(vars(args).pop("count"), len(known(args.folder, args.split, args.weights)[0]))
    with pool(os.cpu_count()) as executor:
        results = list(tqdm(executor.map(partial(judged, **vars(args)), range(count)), "photographs", count, disable=None))
    print("\n".join(table(results)))
    print(f"{count} photographs of the {args.split} split, whole, seed {TEST_SEED}; {machine()}")
