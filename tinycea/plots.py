"""The pictures a run leaves behind. Figures are drawn without pyplot: no window, no global state."""
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt

from .runtime import atomic


def save(figure, path):
    """A PNG file, whole or not at all."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", pad_inches=0.08)


def show(axes, image, title="", below="", **settings):
    """An image without ticks, a title above and a line below."""
    axes.imshow(image, **settings)
    axes.set(xticks=[], yticks=[], title=title, xlabel=below)


def curve(rows, path):
    """Training PSNR (minus the loss, a running mean over 100 steps) and held-out PSNR against the step; rows of log.csv."""
    steps, loss = np.array([row[0] for row in rows]), np.array([row[2] for row in rows])
    window = min(100, len(loss))
    figure = Figure((6.4, 3.6))
    axes = figure.subplots()
    mean = np.convolve(-loss, np.full(window, 1 / window), "valid")
    axes.plot(steps[window - 1:], mean, label=f"training batches, mean of {window}")
    axes.plot(*zip(*((row[0], row[4]) for row in rows if not np.isnan(row[4]))), "k--", marker=".", label="held-out patches")
    axes.set(xlabel="step", ylabel="PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def before_after(results, path):
    """One row per result of `evaluation.evaluate`: degraded | restored | clean, with PSNR and SSIM under each."""
    heights = [r["images"][2].shape[0] / r["images"][2].shape[1] for r in results]
    figure = Figure((10.5, 3.5 * sum(heights) + 0.5 * len(results)), layout="constrained")
    for axes, r in zip(figure.subplots(len(results), 3, squeeze=False, height_ratios=heights), results):
        degraded, restored, clean = r["images"]
        show(axes[0], degraded, f"{r['photograph']}, {r['entry']}", "{:.2f} dB, SSIM {:.3f}".format(*r["before"]))
        show(axes[1], restored, "restored", "{:.2f} dB, SSIM {:.3f}".format(*r["after"]))
        show(axes[2], clean, "clean", "the reference")
    save(figure, path)


def label_region(axes, region, text):
    """Text at the pixel of a region (H,W) that lies farthest from its border."""
    inside = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(inside.argmax(), region.shape)
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)
