"""The pictures a run leaves behind. Figures are drawn without pyplot: no window, no global state."""
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt

from .runtime import atomic


def _save(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", pad_inches=0.08)


def _show(axes, image, title="", below="", **settings):
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
    _save(figure, path)


def before_after(results, path):
    """One row per result of `evaluation.evaluate`: degraded | restored | clean, with PSNR and SSIM under each."""
    heights = [r["images"][2].shape[0] / r["images"][2].shape[1] for r in results]
    figure = Figure((10.5, 3.5 * sum(heights) + 0.5 * len(results)), layout="constrained")
    for axes, r in zip(figure.subplots(len(results), 3, squeeze=False, height_ratios=heights), results):
        degraded, restored, clean = r["images"]
        _show(axes[0], degraded, f"{r['photograph']}, {r['entry']}", "{:.2f} dB, SSIM {:.3f}".format(*r["before"]))
        _show(axes[1], restored, "restored", "{:.2f} dB, SSIM {:.3f}".format(*r["after"]))
        _show(axes[2], clean, "clean", "the reference")
    _save(figure, path)


def routing(degraded, mask, names, S, kind, stage, path):
    """A photograph under different degradations, its regions, and the affinity map of every rank component.

    degraded (H,W,3), mask (H,W,K) of the K names, S (h,w,R), kind "signed", "softmax" or "topk". Maps share one scale.
    """
    R = S.shape[-1]
    limit = float(np.quantile(abs(S), 0.995)) or 1.0
    columns = 1 + -(-R // 2)
    figure = Figure((2.3 * columns, 2.3 * 2 * degraded.shape[0] / degraded.shape[1] + 1.4), layout="constrained")
    grid = figure.subplots(2, columns)
    _show(grid[0, 0], degraded, "degraded input")
    regions(grid[1, 0], mask, names)
    for axes in grid[:, 1:].flat[R:]:
        axes.axis("off")
    for r, axes in zip(range(R), grid[:, 1:].flat):
        negative = 100 * np.mean(S[..., r] < 0)
        _show(axes, S[..., r], f"r = {r + 1}", f"{negative:.0f} % negative", cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(axes.images[0], ax=grid[:, 1:], shrink=0.6, label="affinity S")
    figure.suptitle(f"{kind.capitalize()} affinity of every token to each of the {R} routing bases of this image, after {stage}",
                    fontsize=10)
    _save(figure, path)


def regions(axes, mask, names):
    """The mask (H,W,K) as gray levels, each region labeled with its degradation at its center."""
    label = mask.argmax(-1)
    _show(axes, label, "regions", cmap="gray", vmin=-0.5, vmax=len(names) - 0.5)
    for k, name in enumerate(names):
        _label(axes, label == k, name)


def _label(axes, region, text):
    """Text at the pixel of a region (H,W) that lies farthest from its border."""
    inside = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(inside.argmax(), region.shape)
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)


def demo(degraded, restored, clean, mask, names, path):
    """Degraded | restored | clean, the borders of the regions drawn in, and each region's PSNR before and after."""
    label = mask.argmax(-1)
    figure = Figure((12, 4.9 * clean.shape[0] / clean.shape[1]), layout="constrained")
    for axes, image, title in zip(figure.subplots(1, 3), (degraded, restored, clean), ("degraded", "restored", "clean")):
        _show(axes, image, title)
        if title == "clean":
            continue
        axes.contour(label, np.arange(len(names) - 1) + 0.5, colors="white", linewidths=1.2)
        for k, name in enumerate(names):
            psnr = -10 * np.log10(np.mean((image - clean)[label == k] ** 2))
            _label(axes, label == k, f"{name}\n{psnr:.1f} dB")
    _save(figure, path)


def quality(results, path, against="multiplications"):
    """PSNR of `compare.rows`, one panel per suite, a bar of one standard deviation over seeds.

    against: "multiplications" per pixel, or training "steps", on a logarithmic axis; the points of one adapter are joined.
    """
    suites = list(dict.fromkeys(row["suite"] for row in results if row["steps"]))
    figure = Figure((4.4 * len(suites), 3.8), layout="constrained")
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites):
        for i, label in enumerate(dict.fromkeys(row["label"] for row in results if row["suite"] == suite and row["steps"])):
            x, y, sd = zip(*[(row[against], row["psnr"], row["sd"] or 0) for row in results
                             if (row["suite"], row["label"]) == (suite, label)])
            axes.errorbar(x, y, sd, fmt="osD^v<>P*X"[i // 10 % 10] + "-", color=f"C{i % 10}", lw=1, capsize=2, label=label)
        axes.set(title=suite, ylabel="PSNR (dB)", **{"multiplications": {"xlabel": "multiplications per pixel"},
                                                     "steps": {"xlabel": "training steps", "xscale": "log"}}[against])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def strip(examples, path):
    """One row per example of `compare.examples`, a dict of title -> (image, PSNR or None); same size in a row."""
    columns = max(map(len, examples))
    figure = Figure((1.9 * columns, 2.3 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), columns, squeeze=False)
    for row, images in zip(grid, examples):
        for axes in row[len(images):]:
            axes.axis("off")
        for axes, (title, (image, psnr)) in zip(row, images.items()):
            _show(axes, image, title, "" if psnr is None else f"{psnr:.2f} dB")
            axes.title.set_fontsize(8)
    _save(figure, path)
