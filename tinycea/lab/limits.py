"""How far each kind of layer gets on the tasks of `tinycea mechanism`, at its best size and rate: `tinycea mechanism --long`.

Size and rate are chosen for every task on validation photographs. Then come five seeds on test photographs; and, with two seeds,
other tasks: 1 to 8 tints, noisier keys, more tokens, other ranks. Every trial done is a line of trials.jsonl in the run folder,
and is not done again.
"""
import json
import os
from collections import namedtuple
from concurrent.futures import as_completed
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..ablations import CEAConfig
from ..adapters import DescriptorConfig, ExpertsConfig, MLPConfig, PromptConfig, family
from ..params import Params
from ..runtime import locked, machine, pool, read_bytes
from .comparison import finished, interval
from .mechanism import MODELS, SHOWN, SIDE, TASKS, pictures, psnr, teach, theory

SIZES = {CEAConfig: [{"probe_channels": 16, "rank": rank} for rank in (4, 16)]} | {
    kind: [{name: size} for size in sizes] + [{"norm": "token"}] for kind, name, *sizes in ((MLPConfig, "hidden", 50, 200),
        (DescriptorConfig, "hidden", 64, 200), (PromptConfig, "hidden", 19, 64), (ExpertsConfig, "rank", 16, 32))}
# A layer to be taught and tested: its Task, configuration and rate; the pictures tested on are `side` tokens wide.
Trial = namedtuple("Trial", "task config rate seed side split", defaults=(0, SIDE, "test"))

# What else is asked: values, and a trial with one of them.
SWEEPS = {"tints K": ((1, 2, 3, 4, 8), lambda t, K: t._replace(task=t.task._replace(K=K))),
          "noise of the key": ((0.0, 0.1, 0.25, 0.5), lambda t, std: t._replace(task=t.task._replace(noise=std))),
          "side of a picture, tokens": ((12, SIDE, 72), lambda t, side: t._replace(side=side)),
          "rank R, CEA's": ((1, 2, 4, 16), lambda t, rank: t._replace(config=replace(t.config, rank=rank)))}


def tested(trial, folder, steps):
    """PSNR in dB of a trial, for each photograph: of two pictures, of a half and a quarter of its size."""
    p = teach(trial.task, trial.config, steps, trial.seed, trial.rate)
    x, J, _ = pictures(trial.task, folder, trial.side, 2, trial.split)
    return psnr(family(trial.config).forward(x, p, trial.config)[0], J).reshape(-1, 2).mean(1).tolist()


def results(trials, folder, steps, out):
    """Trial -> what `tested` says, (photographs,); those that the run folder does not hold are made side by side."""
    with locked(out), open(Path(out) / "trials.jsonl", "a+b") as file, pool(os.cpu_count()) as executor:
        file.truncate(read_bytes(file.name).rfind(b"\n") + 1)                   # half a line goes
        found = dict(finished(out, "trials.jsonl", lambda line: dict([line])))
        keys = {trial: repr((trial, steps, folder and os.path.realpath(folder))) for trial in trials}
        running = {executor.submit(tested, trial, folder, steps): key for trial, key in keys.items() if key not in found}
        for future in (bar := tqdm(as_completed(running), "teaching", len(running), unit="layer", disable=None)):
            found[running[future]] = future.result()
            file.write(json.dumps([running[future], future.result()]).encode() + b"\n")
            file.flush()
            bar.set_postfix_str(f"last {np.mean(future.result()):.2f} dB")
    return {trial: np.array(found[key]) for trial, key in keys.items()}


def publish(folder=None, out="runs/mechanism", steps=2000, seeds=5):
    """Print the tables. folder: of photographs to choose and to test on, see `scenes.photographs`."""
    run = partial(results, folder=folder, steps=steps, out=out)
    tried = {(name, model): [Trial(task, replace(config, **size), rate, split="validation")
                             for size in SIZES[type(config)] for rate in (0.01, 0.03)]
             for name, task in TASKS.items() for model, config in MODELS.items()}
    found = run([trial for trials in tried.values() for trial in trials])
    best = {key: max(trials, key=lambda t: found[t].mean())._replace(split="test") for key, trials in tried.items()}
    found = run([trial._replace(seed=seed) for trial in best.values() for seed in range(seeds)])
    for (name, model), trial in best.items():
        values, cea = (np.array([found[t._replace(seed=i)] for i in range(seeds)]) for t in (trial, best[name, "CEA"]))
        if model == next(iter(MODELS)):
            print(f"\n{name}: PSNR in dB, {seeds} seeds, {len(cea[0])} photographs (worst), minus CEA\n{'':19}parameters   rate")
        size = Params(family(trial.config).shapes(16, trial.config)).flat.size
        print(f"{model:18s} {size:10d} {trial.rate:6g} {values.mean():7.2f} ({values.min():5.2f}) {(values - cea).mean():+7.2f} "
              "[{:+.2f}, {:+.2f}]".format(*interval(values - cea)))
    for title, (values, vary) in SWEEPS.items():
        lines = {(name, model): [[vary(best[name, model], value)._replace(seed=seed) for seed in range(2)] for value in values]
                 for name, model in product(("regions", "lamps"), SHOWN) if "CEA" in model or "CEA" not in title}
        found = run([trial for line in lines.values() for trials in line for trial in trials])
        print(f"\n{title:30s}" + "".join(f"{value:7g}" for value in values))
        for (name, model), line in lines.items():
            print(f"{name:11s}{model:18s}", *(f"{np.mean([found[t] for t in trials]):6.2f}" for trials in line))
            if model == "CEA":
                print(f"{name:11s}{'theory of signed':18s}", *(
                    f"{theory(t.task, *pictures(t.task, folder, t.side, 2)).mean():6.2f}" for t, *_ in line))
    print(f"{steps} steps; {machine()}")
