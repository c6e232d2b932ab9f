"""How little may a restoration change before it is better left undone? `NAFNetConfig.spare`, on the photographs that choose.

    python data/spare.py FOLDER [WEIGHTS] > data/results/harm/spare.txt

FOLDER is the 200 test images of BSDS500: the first hundred by name. Each row is what one value of `spare` makes of all that
`tinycea.lab.harm` does to them: a photograph whose restoration is at least so many dB (PSNR) from what came stays as it came.
"""
import os
import sys
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from tinycea.evaluation import TEST_SEED, psnr
from tinycea.lab.harm import ROWS, degraded, known
from tinycea.restoration import restore
from tinycea.runtime import machine, pool
from tinycea.zoo import WEIGHTS

SHOWN = "jpeg, quality 90", "jpeg, quality 40", "blur", "haze"
SPARES = 200, 50, 48, 46, 45, 44, 43, 42, 41, 40, 38          # 200 spares nothing


def judged(i, folder, weights):
    """(rows, 3): for each of ROWS the PSNR in dB of photograph i degraded and restored, and of its restoration from what came."""
    photos, (p, config) = known(folder, "validation", weights)
    model, found = (p, replace(config, spare=0)), []
    for _, image, clean in degraded(photos[i], i):
        restored = restore(image, model, threads=1)
        found.append((psnr(image, clean), psnr(restored, clean), psnr(restored, image)))
    return found


def table(results):
    """Lines of text: for each value of `spare`, gain, worst gain and share of photographs that lost."""
    before, after, change = np.moveaxis(results, -1, 0)
    names = list(ROWS)
    yield f"{'spare, dB':9s} {'levels':>6s}   {'clean changed':>13s} {'worst':>6s}   " + "   ".join(
        f"{name:>19s}" for name in (*SHOWN, "all but clean"))
    for spare in SPARES:
        gain = np.where(change < spare, after, before) - before
        touched = change[:, 0] < spare
        worst = after[touched, 0].min(initial=np.inf)
        shown = [gain[:, names.index(name)] for name in SHOWN] + [gain[:, 1:]]
        yield (f"{spare:9d} {255 * 10 ** (-spare / 20):6.2f}   {touched.mean():13.0%} {worst:6.2f}   "
               + "   ".join(f"{g.mean():+6.3f} {g.min():+6.2f} {np.mean(g < 0):5.1%}" for g in shown))


if __name__ == "__main__":
    folder, weights = sys.argv[1], (*sys.argv[2:], str(WEIGHTS))[0]
    count = len(known(folder, "validation", weights)[0])
    with pool(os.cpu_count()) as executor:
        found = executor.map(partial(judged, folder=folder, weights=weights), range(count))
        results = list(tqdm(found, total=count, desc="photographs", disable=None))
    print("\n".join(table(np.array(results))))
    print("gain in dB: mean, worst, share of photographs that lost; levels: root mean square of the change, of 255")
    print(f"{count} photographs of the validation split, whole, seed {TEST_SEED}; {machine()}")
