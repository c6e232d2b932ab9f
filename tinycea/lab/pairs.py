"""Two folders, degraded images and clean ones: PSNR and SSIM of each pair, before and after restoring. `tinycea evaluate`."""
import csv
import re

import numpy as np
from skimage.color import rgb2ycbcr
from skimage.restoration import denoise_nl_means
from tqdm import tqdm

from ..evaluation import psnr, ssim
from ..images import as_rgb, list_images, read_pixels
from ..restoration import restore
from ..runtime import InputError, atomic
from ..zoo import load_model

WORDS = re.compile(r"(norain|rain|snow|hazy|haze|noisy|noise|blurry|blur|low|normal|input|target|degraded|clean|gt|lq|hq)"
                   r"(?![a-z])")                # as in norain-001.png of Rain100, low00001.png of LOL, 0001_NOISY_SRGB of SIDD


def keys(file):
    """Names by which an image may be a pair's: its own; without what says degraded or clean; up to the first _."""
    name = file.stem.lower()
    return [name, re.sub(r"[\W_]+", "_", WORDS.sub("", name)).strip("_"), name.partition("_")[0]]


def matched(degraded, clean):
    """[(degraded file, clean file), ...] of two folders, and the files of both that have no partner."""
    (degraded, clean), by_name = (list_images([folder]) for folder in (degraded, clean)), {}
    for rank in range(2):
        for file in clean:
            by_name.setdefault(keys(file)[rank], file)
    found = [(file, next((by_name[key] for key in keys(file) if key in by_name), None)) for file in degraded]
    partners = [partner for _, partner in found]
    return ([pair for pair in found if pair[1]],
            [file for file, partner in found if not partner] + [file for file in clean if file not in partners])


def judged(image, clean, luma):
    """(PSNR in dB, SSIM) of images (H,W,3) in [0,1], RGB or Y of YCbCr (BT.601, 16 to 235 of 255)."""
    image, clean = (rgb2ycbcr(i)[..., :1] / 255 if luma else i for i in (image, clean))
    return psnr(image, clean), ssim(image, clean)


def non_local_means(image):
    """Told no noise: sigma is estimated from the mean of |second differences| (Immerkaer 1996)."""
    sigma = np.sqrt(np.pi / 2) / 6 * np.abs(np.diff(np.diff(image, 2, 0), 2, 1)).mean()
    return denoise_nl_means(image, 5, 6, 0.8 * sigma, sigma=sigma, channel_axis=-1)


def publish(degraded, clean, weights=None, luma=False, classical=False, table=None):
    """Print the means and, in a .csv, all pairs; InputError at the end names what has no partner, another size or no pixels."""
    pairs, alone = matched(degraded, clean)
    model, failed = weights and load_model(weights), [f"{file}: has no partner" for file in alone]
    restorers = {"degraded": lambda image: image} | ({"non-local means": non_local_means} if classical else {}) | (
        {"restored": lambda image: restore(image, model)} if model else {})
    rows = []
    for file, partner in tqdm(pairs, desc="pairs", disable=None):
        try:
            image, true = (as_rgb(read_pixels(f)) for f in (file, partner))
            if image.shape != true.shape:
                raise InputError(f"{file} and {partner}: have sizes {image.shape[:2]} and {true.shape[:2]}")
            if min(image.shape[:2]) < 11:
                raise InputError(f"{file}: is smaller than SSIM's window of 11 pixels")
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
