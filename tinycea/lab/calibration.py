"""Holds our degradations against CDD-11's: mean PSNR (dB) of the degraded photographs, printed as data/calibration.csv.

    python -m tinycea.lab.calibration > data/calibration.csv
"""
import numpy as np

from ..degradations import SUITES, apply
from ..evaluation import psnr
from ..scenes import Scene, photographs

# Mean PSNR of the degraded inputs of CDD-11's test set (Guo et al. 2024, "OneRestore")
CDD11 = dict(zip(SUITES["cdd11"], (12.0, 15.9, 22.0, 23.6, 14.9, 14.6, 13.5, 14.8, 14.8, 15.3, 14.6)))
SEEDS = 6


if __name__ == "__main__":
    print(f"# python -m tinycea.lab.calibration ({SEEDS} seeds, whole photographs)\nentry,cdd11_dB,validation_dB,test_dB")
    splits = [photographs(split).values() for split in ("validation", "test")]
    for entry in dict.fromkeys([*CDD11, *SUITES["aio3"], *SUITES["aio5"], "patchwork"]):
        means = [np.mean([psnr(apply(Scene(image), entry, np.random.default_rng(seed)), image)
                          for image in photos for seed in range(SEEDS)]) for photos in splits]
        print(f"{entry},{CDD11.get(entry, '')},{means[0]:.1f},{means[1]:.1f}")
