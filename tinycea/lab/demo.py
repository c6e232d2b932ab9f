"""A photograph under three degradations in three regions, restored by the model in the package, drawn. `tinycea demo`."""
import numpy as np
from matplotlib.figure import Figure

from ..degradations import patchwork
from ..evaluation import TEST_SEED, psnr
from ..plots import label_region, save, show
from ..restoration import restore
from ..scenes import Scene, photographs


def publish(path, names=("noise25", "rain", "snow")):
    """Degraded | restored | clean, the borders of the regions drawn in, and each region's PSNR before and after."""
    clean = photographs("test")["astronaut"]
    degraded, mask, names = patchwork(Scene(clean), np.random.default_rng(TEST_SEED), names)
    label = mask.argmax(-1)
    figure = Figure((12, 4.9 * clean.shape[0] / clean.shape[1]), layout="constrained")
    for axes, image, title in zip(figure.subplots(1, 3), (degraded, restore(degraded), clean), ("degraded", "restored", "clean")):
        show(axes, image, title)
        for k, name in enumerate(names if image is not clean else ()):
            axes.contour(label == k, [0.5], colors="white", linewidths=1.2)
            label_region(axes, label == k, f"{name}\n{psnr(image[label == k], clean[label == k]):.1f} dB")
    save(figure, path)
    print(path)
