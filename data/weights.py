"""The seven trainings behind the weights in the package, see weights.sh: patches grow, and each starts from the one before.

The sixth is without compositions, the seventh with. From the fifth on they were run with the code of commit 2865038, where dead
leaves lose their depth and illumination when shown in other light.
"""
from pathlib import Path

from tinycea import train

SHARED = {"suite": "everyday+cdd11+patchwork", "adapter": "cea:encoders=1+1,decoders=1+1,middle=1", "adapter_lr": 0.3,
          "images": "runs/photographs", "scenes": 64, "chunks": 1}
TRAININGS = ({"steps": 44_000, "patch": 64, "batch": 6, "floor": 1e-3},
             {"steps": 11_000, "patch": 96, "batch": 3, "lr": 1.5e-3, "floor": 3e-4, "seed": 1},
             {"steps": 16_000, "patch": 192, "batch": 2, "lr": 1.5e-3, "floor": 3e-4, "seed": 2},
             {"steps": 8_500, "patch": 192, "batch": 2, "lr": 1.2e-3, "floor": 3e-4, "seed": 3},
             {"steps": 4_500, "patch": 320, "batch": 2, "lr": 1.5e-3, "floor": 3e-4, "seed": 5, "chunks": 2},
             {"steps": 6_500, "patch": 256, "batch": 2, "lr": 1.2e-3, "floor": 3e-4, "seed": 6, "suite": "everyday"},
             {"steps": 2_800, "patch": 256, "batch": 2, "lr": 1e-3, "floor": 3e-4, "seed": 7})

if __name__ == "__main__":
    for i, recipe in enumerate(TRAININGS, 1):
        folder, start = f"runs/weights-{i}", f"runs/weights-{i - 1}/model.safetensors" if i > 1 else None
        if not Path(folder, "result.json").exists():
            train(folder, resume=Path(folder).exists(), start=start, **SHARED | recipe)
