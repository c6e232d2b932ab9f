"""The ten trainings behind the weights in the package, see weights.sh: patches grow, and each starts from the one before.

The sixth and ninth are without compositions, the others with. The ninth starts from the mean of seventh and eighth, the tenth
from the mean of that mean and the ninth. From the fifth on they were run with the code of commit 2865038, where dead leaves lose
their depth and illumination when shown in other light; the last three with that of commit b255acf on top of it, where every
third scene is overexposed: its sky turns white. What is shipped is the mean of what the tenth started from and its end.
"""
import json
from pathlib import Path

from tinycea import train
from tinycea.degradations import suite
from tinycea.evaluation import evaluate, table, test_set
from tinycea.restoration import restore_rgb
from tinycea.runtime import write_json
from tinycea.zoo import WEIGHTS, load_model, save_model

ALL, LENS = "everyday+cdd11+patchwork", "everyday+lens"
BOTH = ALL + "+lens"
SHARED = {"suite": ALL, "adapter": "cea:encoders=1+1,decoders=1+1,middle=1", "adapter_lr": 0.3,
          "images": "runs/photographs", "scenes": 64, "chunks": 1}
TRAININGS = ({"steps": 44_000, "patch": 64, "batch": 6, "floor": 1e-3},
             {"steps": 11_000, "patch": 96, "batch": 3, "lr": 1.5e-3, "floor": 3e-4, "seed": 1},
             {"steps": 16_000, "patch": 192, "batch": 2, "lr": 1.5e-3, "floor": 3e-4, "seed": 2},
             {"steps": 8_500, "patch": 192, "batch": 2, "lr": 1.2e-3, "floor": 3e-4, "seed": 3},
             {"steps": 4_500, "patch": 320, "batch": 2, "lr": 1.5e-3, "floor": 3e-4, "seed": 5, "chunks": 2},
             {"steps": 6_500, "patch": 256, "batch": 2, "lr": 1.2e-3, "floor": 3e-4, "seed": 6, "suite": "everyday"},
             {"steps": 2_800, "patch": 256, "batch": 2, "lr": 1e-3, "floor": 3e-4, "seed": 7},
             {"steps": 11_000, "patch": 256, "batch": 2, "lr": 1.4e-3, "floor": 3e-4, "seed": 8, "suite": BOTH},
             {"steps": 2_400, "patch": 256, "batch": 2, "lr": 5e-4, "floor": 3e-4, "seed": 9, "suite": LENS, "chunks": 2},
             {"steps": 1_400, "patch": 256, "batch": 2, "lr": 5e-4, "floor": 3e-4, "seed": 10, "suite": BOTH, "chunks": 2})


def mean(first, second, path):
    """Write the model whose weights are the means of two models'."""
    (p, config), q = load_model(first), load_model(second).p
    p.flat[:] = (p.flat + q.flat) / 2
    save_model(path, p, config)


def publish(path, result):
    """Write the model at `path` and a run's result.json as the package's, with a table of its own: a mean has had no run."""
    p, config = load_model(path)
    tests = test_set((*suite(BOTH), "clean"))
    rows = table(list(evaluate(lambda image, entry: restore_rgb(image, p, config), tests)))
    save_model(WEIGHTS, p, config, table=rows)
    write_json(WEIGHTS.with_suffix(".json"), json.loads(Path(result).read_text()) | {"rows": rows})


if __name__ == "__main__":
    for i, recipe in enumerate(TRAININGS, 1):
        folder, start = f"runs/weights-{i}", f"runs/weights-{i - 1}/model.safetensors" if i > 1 else None
        if i > 8:
            before = "runs/mean-9.safetensors" if i > 9 else "runs/weights-7/model.safetensors"
            mean(before, start, start := f"runs/mean-{i}.safetensors")
        if not Path(folder, "result.json").exists():
            train(folder, resume=Path(folder).exists(), start=start, **SHARED | recipe)
    mean(start, f"{folder}/model.safetensors", "runs/mean-11.safetensors")
    publish("runs/mean-11.safetensors", f"{folder}/result.json")
