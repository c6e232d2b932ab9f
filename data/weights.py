"""The seventeen trainings behind the weights in the package, see weights.sh: patches grow, and each starts from an earlier end.

The sixth and ninth are without compositions, the others with. STARTS says what each begins with; the mean of the sixteenth's and
seventeenth's ends is shipped. Five more trainings, from there on, were no better by the rule in data/README.md. The first four
want the code of commit 0125695 or before; from the fifth on that of 2865038, where dead leaves lose their depth and illumination
when shown in other light; from the eighth on with that of b255acf on top of it, where every third scene is overexposed: its sky
turns white; from the eleventh on with that of f7cc144, eab9d7d, cf4dc88, 8d51e14, ddb19b8, 84b919c, f8dcddc and 46a3403: of four
patches three are photographs, what gained too little (blur, haze) or was harmed (JPEG, nothing at all) is drawn more often, from
the fifteenth on an image that leaves worse than it came counts four or five times, and from the seventeenth on one scene in eight
is dusk and one in eight is pale, though it is neither night nor haze. The nineteenth to twenty-second see thirty more
photographs, of dusk, fog and pale skies: the nineteenth with the code of 3350de3, the twentieth with 97e04a3 (harm counts ten
times), the last two with c5e8c2f (noise is drawn more often).
"""
import json
from dataclasses import replace
from pathlib import Path

from tinycea import train
from tinycea.degradations import suite
from tinycea.evaluation import evaluate, table, test_set
from tinycea.images import folder, write_image
from tinycea.restoration import restore_rgb
from tinycea.runtime import write_json
from tinycea.scenes import halve
from tinycea.zoo import WEIGHTS, load_model, save_model

SPARE = 44                                    # dB: the first at which at most 3 of 100 blurred photographs lose, see spare.py
ALL, LENS = "everyday+cdd11+patchwork", "everyday+lens"
BOTH = ALL + "+lens"
SMALL = {"suite": BOTH, "images": "runs/halves", "patch": 256, "batch": 2, "floor": 3e-4}
MORE = SMALL | {"images": "runs/more-halves"}
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
             {"steps": 1_400, "patch": 256, "batch": 2, "lr": 5e-4, "floor": 3e-4, "seed": 10, "suite": BOTH, "chunks": 2},
             SMALL | {"steps": 15_000, "lr": 1.2e-3, "seed": 11},
             SMALL | {"steps": 5_000, "lr": 7e-4, "seed": 12},
             SMALL | {"steps": 5_500, "lr": 9e-4, "seed": 13},
             SMALL | {"steps": 4_500, "lr": 7e-4, "seed": 14},
             SMALL | {"steps": 5_000, "lr": 9e-4, "seed": 15},
             SMALL | {"steps": 4_000, "lr": 6e-4, "seed": 16},
             SMALL | {"steps": 6_000, "lr": 9e-4, "seed": 17},
             SMALL | {"steps": 5_000, "lr": 8e-4, "seed": 18},
             MORE | {"steps": 16_000, "lr": 8e-4, "seed": 19},
             MORE | {"steps": 16_000, "lr": 8e-4, "seed": 20},
             MORE | {"steps": 4_500, "lr": 6e-4, "seed": 21},
             MORE | {"steps": 4_500, "lr": 6e-4, "seed": 22})
# What a training starts from, where that is not the end of the one before it: the mean of two networks, or one.
STARTS = {9: ("weights-7/model", "weights-8/model"), 10: ("mean-9", "weights-9/model"), 11: ("mean-10", "weights-10/model"),
          13: ("mean-11", "weights-12/model"), 14: ("mean-13", "weights-13/model"), 15: ("mean-14", "weights-14/model"),
          16: ("mean-15", "weights-15/model"), 18: ("weights-16/model", "weights-17/model"), 19: ("mean-18",), 20: ("mean-18",),
          21: ("mean-18", "weights-20/model"), 22: ("mean-21",)}


def halves(target, *sources):
    """The photographs of folders at half their size: sharp, and a patch sees more of them."""
    Path(target).mkdir(exist_ok=True)
    for source in sources:
        for name, image in folder(source):
            write_image(Path(target, name), halve(image))


def start_of(i):
    """The model file that training i starts from, or None."""
    *others, last = (f"runs/{name}.safetensors" for name in STARTS.get(i, [f"weights-{i - 1}/model"]))
    if others:
        mean(*others, last, last := f"runs/mean-{i}.safetensors")
    return last if i > 1 else None


def mean(first, second, path):
    """Write the model whose weights are the means of two models'."""
    (p, config), q = load_model(first), load_model(second).p
    p.flat[:] = (p.flat + q.flat) / 2
    save_model(path, p, config)


def publish(path, result):
    """Write the model at `path` and a run's result.json as the package's, with a table of its own: a mean has had no run."""
    p, config = load_model(path)
    config = replace(config, spare=SPARE)
    tests = test_set((*suite(BOTH), "clean"))
    rows = table(list(evaluate(lambda image, entry: restore_rgb(image, p, config), tests)))
    save_model(WEIGHTS, p, config, table=rows)
    write_json(WEIGHTS.with_suffix(".json"), json.loads(Path(result).read_text()) | {"rows": rows})


if __name__ == "__main__":
    halves("runs/halves", "runs/photographs")
    halves("runs/more-halves", "runs/photographs", "runs/more")
    for i, recipe in enumerate(TRAININGS, 1):
        start, out = start_of(i), f"runs/weights-{i}"
        if not Path(out, "result.json").exists():
            train(out, resume=Path(out).exists(), start=start, **SHARED | recipe)
    publish("runs/mean-18.safetensors", "runs/weights-17/result.json")
