"""The nine trainings behind the weights in the package, see weights.sh: patches grow, and each starts from the one before.

The sixth is without compositions, the seventh and eighth with. The ninth starts from the mean of these two and is without again.
From the fifth on they were run with the code of commit 2865038, where dead leaves lose their depth and illumination when shown
in other light; the last two with that of commit b255acf on top, where every third scene is overexposed: its sky turns white.
"""
from pathlib import Path

from tinycea import train
from tinycea.zoo import load_model, save_model

ALL, LENS = "everyday+cdd11+patchwork", "everyday+lens"
SHARED = {"suite": ALL, "adapter": "cea:encoders=1+1,decoders=1+1,middle=1", "adapter_lr": 0.3,
          "images": "runs/photographs", "scenes": 64, "chunks": 1}
TRAININGS = ({"steps": 44_000, "patch": 64, "batch": 6, "floor": 1e-3},
             {"steps": 11_000, "patch": 96, "batch": 3, "lr": 1.5e-3, "floor": 3e-4, "seed": 1},
             {"steps": 16_000, "patch": 192, "batch": 2, "lr": 1.5e-3, "floor": 3e-4, "seed": 2},
             {"steps": 8_500, "patch": 192, "batch": 2, "lr": 1.2e-3, "floor": 3e-4, "seed": 3},
             {"steps": 4_500, "patch": 320, "batch": 2, "lr": 1.5e-3, "floor": 3e-4, "seed": 5, "chunks": 2},
             {"steps": 6_500, "patch": 256, "batch": 2, "lr": 1.2e-3, "floor": 3e-4, "seed": 6, "suite": "everyday"},
             {"steps": 2_800, "patch": 256, "batch": 2, "lr": 1e-3, "floor": 3e-4, "seed": 7},
             {"steps": 11_000, "patch": 256, "batch": 2, "lr": 1.4e-3, "floor": 3e-4, "seed": 8, "suite": ALL + "+lens"},
             {"steps": 2_400, "patch": 256, "batch": 2, "lr": 5e-4, "floor": 3e-4, "seed": 9, "suite": LENS, "chunks": 2})


def mean(first, second, path):
    """Write the model whose weights are the means of two models'."""
    (p, config), q = load_model(first), load_model(second).p
    p.flat[:] = (p.flat + q.flat) / 2
    save_model(path, p, config)


if __name__ == "__main__":
    for i, recipe in enumerate(TRAININGS, 1):
        folder, start = f"runs/weights-{i}", f"runs/weights-{i - 1}/model.safetensors" if i > 1 else None
        if i == len(TRAININGS):
            before, start = f"runs/weights-{i - 2}/model.safetensors", "runs/mean.safetensors"
            mean(before, f"runs/weights-{i - 1}/model.safetensors", start)
        if not Path(folder, "result.json").exists():
            train(folder, resume=Path(folder).exists(), start=start, **SHARED | recipe)
