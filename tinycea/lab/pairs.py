"""Two folders, degraded images and clean ones: PSNR and SSIM of each pair, before and after restoring. `tinycea evaluate`."""
import csv

import numpy as np
from skimage.color import rgb2ycbcr
from tqdm import tqdm

from ..evaluation import psnr, ssim
from ..images import as_rgb
from ..restoration import restore
from ..runtime import InputError, atomic
from ..scenes import matched, read_pair
from ..zoo import load_model


def judged(image, clean, luma):
    """(PSNR in dB, SSIM) of images (H,W,3) in [0,1], RGB or Y of YCbCr (BT.601, 16 to 235 of 255)."""
    image, clean = (rgb2ycbcr(i)[..., :1] / 255 if luma else i for i in (image, clean))
    return psnr(image, clean), ssim(image, clean)


def blind_non_local_means(image):
    """Non-local means, told no noise: sigma is estimated from the mean of |second differences| (Immerkaer 1996)."""
    from .comparison import non_local_means  # and Matplotlib, which is loaded for this row alone
    sigma = np.sqrt(np.pi / 2) / 6 * np.abs(np.diff(np.diff(image, 2, 0), 2, 1)).mean()
    return non_local_means(image, 0.8 * sigma, sigma)


def publish(degraded, clean, weights=None, luma=False, classical=False, table=None):
    """Print the means and, in a .csv, all pairs; InputError at the end names what has no partner, another size or no pixels."""
    pairs, alone = matched(degraded, clean)
    model, failed = weights and load_model(weights), [f"{file}: has no partner" for file in alone]
    restorers = {"degraded": lambda image: image} | ({"non-local means": blind_non_local_means} if classical else {}) | (
        {"restored": lambda image: restore(image, model)} if model else {})
    rows = []
    for file, partner in tqdm(pairs, desc="pairs", disable=None):
        try:
            scene = read_pair(file, partner)
            image, true = as_rgb(scene.degraded), as_rgb(scene.image)
            rows.append((file.name, partner.name, *(n for f in restorers.values() for n in judged(f(image), true, luma))))
        except InputError as error:
            failed.append(str(error))
    if table:
        with atomic(table) as temporary, open(temporary, "w", newline="") as out:
            columns = (f"{name} {unit}" for name in restorers for unit in ("PSNR", "SSIM"))
            csv.writer(out).writerows([("degraded", "clean", *columns), *rows])
    if rows:
        values = np.array([row[2:] for row in rows], float).reshape(len(rows), -1, 2)
        print(f"{len(rows)} pairs, {'Y' if luma else 'RGB'}: PSNR in dB and SSIM, mean (worst)")
        for name, value in zip(restorers, values.swapaxes(0, 1)):
            (dB, structure), (worst_dB, worst) = value.mean(0), value.min(0)
            print(f"{name:16s} {dB:7.2f} ({worst_dB:6.2f})   {structure:6.4f} ({worst:6.4f})")
    if failed:
        raise InputError(f"not judged: {'; '.join(failed)}")
