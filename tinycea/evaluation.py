"""The one place of test sets, PSNR, SSIM and the tables made of them."""
from functools import cache
from itertools import product

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .degradations import apply
from .feed import divided
from .images import as_rgb
from .scenes import Scene, crop, photographs, read_pair

SSIM = "RGB float in [0,1], Gaussian window of standard deviation 1.5, population covariance (Wang et al. 2004)"
TEST_SEED = 0                                 # of the degradations of held-out photographs: the same in every run
VIEWS = {"photographs": 12, "crops": 48}      # degraded images of a photograph, about, shared out among the entries of a suite
CROP = 96                                     # pixels a side


@cache
def test_set(entries, split="test", view="photographs", draws=None, degrade=apply, images=None):
    """[(entry, photograph, degraded, clean), ...] of a split of `scenes.photographs`, or of a folder `images`, always the same.

    entries: a tuple, as `suite`'s.
    view: "photographs", whole as in use, or "crops" of CROP x CROP pixels, degraded one by one as in training: a network that has
    learned on patches what an image's averages mean may be misled by those of a whole photograph.
    draws: degraded images of each photograph and entry; None: the view's number, shared out among the entries.
    degrade: f(scene, entry, rng) -> image.
    """
    found = []
    for j, (photo, clean) in enumerate(photographs(split, images).items()):
        for entry, draw in product(entries, range(draws or max(1, VIEWS[view] // len(entries)))):
            rng = np.random.default_rng([TEST_SEED, j, draw, *entry.encode()])
            scene = crop(Scene(clean), CROP, rng) if view == "crops" else Scene(clean)
            found.append((entry, photo, degrade(scene, entry, rng), scene.image))
    return found


def test_pairs(folders, size=None):
    """As `test_set`, of at most 12 held-out pairs of two folders (`feed.divided`), whole, or crops of a size."""
    held = divided(*folders)[1] if folders else []
    for j, files in enumerate(held[::-(-len(held) // 12) or 1]):
        scene = read_pair(*files)
        scene = crop(scene, size, np.random.default_rng([TEST_SEED, j])) if size else scene
        yield "pairs", files[0].name, as_rgb(scene.degraded), as_rgb(scene.image)


def psnr(image, clean):
    """Peak signal-to-noise ratio in dB of images in [0,1]; infinite where they are equal."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(clean, image, data_range=1))


def ssim(image, clean):
    """Structural similarity as SSIM says, of images (H,W,3) in [0,1]; both sides at least 11 pixels."""
    return float(structural_similarity(clean, image, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                       use_sample_covariance=False))


def evaluate(restorer, tests):
    """Restore what `test_set` gave; yields dicts with entry, photograph, images, before and after.

    images: (degraded, restored, clean); before and after: each (PSNR, SSIM). restorer(image, entry) -> image.
    """
    for entry, photo, degraded, clean in tests:
        restored = np.clip(restorer(degraded, entry), 0, 1)
        yield {"entry": entry, "photograph": photo, "images": (degraded, restored, clean),
               "before": (psnr(degraded, clean), ssim(degraded, clean)), "after": (psnr(restored, clean), ssim(restored, clean))}


def table(results):
    """Rows (dicts), one per degradation, then their average: PSNR and SSIM before and after, means of what `evaluate` yields.

    Last comes what became of "clean" images, if there are any; their psnr_before is None, for infinite.
    """
    columns = ("psnr_before", "ssim_before", "psnr_after", "ssim_after")
    means = {entry: np.mean([r["before"] + r["after"] for r in results if r["entry"] == entry], 0)
             for entry in dict.fromkeys(r["entry"] for r in results)}
    clean = {"clean": means.pop("clean")} if "clean" in means else {}
    return [{"degradation": entry} | {column: float(x) if np.isfinite(x) else None for column, x in zip(columns, mean)}
            for entry, mean in (means | {"average": np.mean(list(means.values()), 0)} | clean).items()]


def format_table(rows):
    """The rows of `table` as aligned text."""
    lines = [f"{'degradation':16s} {'PSNR before':>11s} {'after':>7s} {'gain':>7s}   {'SSIM before':>11s} {'after':>7s}"]
    for r in rows:
        before, after = r["psnr_before"], r["psnr_after"]
        was, gain = ("inf", "") if before is None else (f"{before:.2f}", f"{after - before:+.2f}")
        lines.append(f"{r['degradation']:16s} {was:>11s} {after:7.2f} {gain:>7s}   "
                     f"{r['ssim_before']:11.3f} {r['ssim_after']:7.3f}")
    return "\n".join(lines)
