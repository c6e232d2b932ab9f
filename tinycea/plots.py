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
    held = [(row[0], row[4]) for row in rows if not np.isnan(row[4])]
    axes.plot(*zip(*held), "k--", marker=".", label="held-out patches")
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


def routing(degraded, mask, names, S, kind, stage, path):
    """A photograph under different degradations, its regions, and the affinity map of every rank component.

    degraded (H,W,3), mask (H,W,K) of the K names, S (h,w,R), kind "signed", "softmax" or "topk". Maps share one scale.
    """
    R = S.shape[-1]
    limit = float(np.quantile(abs(S), 0.995)) or 1.0
    columns = 1 + -(-R // 2)
    figure = Figure((2.3 * columns, 2.3 * 2 * degraded.shape[0] / degraded.shape[1] + 1.4), layout="constrained")
    grid = figure.subplots(2, columns)
    show(grid[0, 0], degraded, "degraded input")
    regions(grid[1, 0], mask, names)
    for axes in grid[:, 1:].flat[R:]:
        axes.axis("off")
    for r, axes in zip(range(R), grid[:, 1:].flat):
        negative = 100 * np.mean(S[..., r] < 0)
        show(axes, S[..., r], f"r = {r + 1}", f"{negative:.0f} % negative", cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(axes.images[0], ax=grid[:, 1:], shrink=0.6, label="affinity S")
    figure.suptitle(f"{kind.capitalize()} affinity of every token to each of the {R} routing bases of this image, after {stage}",
                    fontsize=10)
    save(figure, path)


def regions(axes, mask, names):
    """The mask (H,W,K) as gray levels, each region labeled with its degradation at its center."""
    label = mask.argmax(-1)
    show(axes, label, "regions", cmap="gray", vmin=-0.5, vmax=len(names) - 0.5)
    for k, name in enumerate(names):
        label_region(axes, label == k, name)


def label_region(axes, region, text):
    """Text at the pixel of a region (H,W) that lies farthest from its border."""
    inside = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(inside.argmax(), region.shape)
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)
