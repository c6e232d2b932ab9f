"""Which weights to ship: what each trained model gains on the validation photographs, in every suite, and what it costs a clean photograph.

    python data/candidates.py runs/weights/model.safetensors ... > data/results/weights/validation.txt
"""
import sys

import numpy as np

from tinycea import compare
from tinycea.degrade import SUITES, suite
from tinycea.nafnet import load_model
from tinycea.restore import restore
from tinycea.scenes import photographs
from tinycea.train import machine

ALL = "+".join(SUITES)

if __name__ == "__main__":
    print(f"whole validation photographs, {machine()}: gain of PSNR in dB, mean over a suite's degradations; clean: PSNR of a clean photograph, restored\n\n"
          f"{'':60s}" + "".join(f"{name:>10s}" for name in (*SUITES, "all", "noise15", "noise25", "clean")))
    for path in sys.argv[1:]:
        p, config = load_model(path)
        gains = {}
        for entry, _, image, clean in compare.degraded(ALL, "validation", "photographs"):
            gains.setdefault(entry, []).append(compare.psnr(restore(image, p, config), clean) - compare.psnr(image, clean))
        values = [np.mean([np.mean(gains[entry]) for entry in suite(name)]) for name in (*SUITES, ALL)]
        values += [np.mean(gains[entry]) for entry in ("noise15", "noise25")]
        values.append(np.mean([compare.psnr(restore(clean, p, config), clean) for clean in photographs("validation").values()]))
        print(f"{path:60s}" + "".join(f"{value:10.2f}" for value in values))
