"""Holds our degradations against CDD-11's: mean PSNR (dB) of the degraded photographs, written to data/calibration.csv."""
from pathlib import Path

import numpy as np

from tinycea.degrade import SUITES, degrade
from tinycea.scenes import Scene, photographs

# Mean PSNR of the degraded inputs of CDD-11's test set (Guo et al. 2024, "OneRestore")
CDD11 = dict(zip(SUITES["cdd11"], (12.0, 15.9, 22.0, 23.6, 14.9, 14.6, 13.5, 14.8, 14.8, 15.3, 14.6)))
SEEDS = 6


def mean_psnr(images, entry, seeds=SEEDS):
    """Mean over images and seeds of -10 log10 mean((degraded - clean)^2), in dB."""
    return np.mean([-10 * np.log10(np.mean((degrade(Scene(image), entry, np.random.default_rng(seed)) - image) ** 2))
                    for image in images for seed in range(seeds)])


if __name__ == "__main__":
    lines = [f"# python data/calibration.py ({SEEDS} seeds, whole photographs)", "entry,cdd11_dB,validation_dB,test_dB"]
    validation, test = (photographs(split).values() for split in ("validation", "test"))
    for entry in dict.fromkeys([*CDD11, *SUITES["aio3"], *SUITES["aio5"], "patchwork"]):
        lines.append(f"{entry},{CDD11.get(entry, '')},{mean_psnr(validation, entry):.1f},{mean_psnr(test, entry):.1f}")
        print(lines[-1])
    Path(__file__).with_suffix(".csv").write_text("\n".join(lines) + "\n")
