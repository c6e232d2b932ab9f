"""Which weights to ship: each trained model's gain on the validation photographs, in every suite, and its cost to a clean one.

    python -m tinycea.lab.candidates runs/weights/model.safetensors ... > data/results/weights/validation.txt
"""
import sys

import numpy as np

from ..degradations import SUITES, suite
from ..evaluation import psnr, test_set
from ..restoration import restore_rgb
from ..runtime import machine
from ..scenes import photographs
from ..zoo import load_model

ALL = "+".join(SUITES)

if __name__ == "__main__":
    print(f"whole validation photographs, {machine()}: gain of PSNR in dB, mean over a suite's degradations; "
          "clean: PSNR of a clean photograph, restored\n\n"
          f"{'':60s}" + "".join(f"{name:>10s}" for name in (*SUITES, "all", "noise15", "noise25", "clean")))
    for path in sys.argv[1:]:
        p, config = load_model(path)
        gains = {}
        for entry, _, image, clean in test_set(suite(ALL), "validation"):
            gains.setdefault(entry, []).append(psnr(restore_rgb(image, p, config), clean) - psnr(image, clean))
        values = [np.mean([np.mean(gains[entry]) for entry in suite(name)]) for name in (*SUITES, ALL)]
        values += [np.mean(gains[entry]) for entry in ("noise15", "noise25")]
        values.append(np.mean([psnr(restore_rgb(clean, p, config), clean) for clean in photographs("validation").values()]))
        print(f"{path:60s}" + "".join(f"{value:10.2f}" for value in values))
