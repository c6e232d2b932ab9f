"""The one training loop: a recipe, or several side by side on the same batches; and the run folder that explains itself.

Every batch is a pure function of (seed, step), so a run that was interrupted and resumed ends with the bits of one that was not.
One step followed through the flat buffer, and the loop in ten lines: notebooks/05_training_by_hand.
"""
import csv
import os
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from . import __version__, plots
from .evaluation import CROP, SSIM, evaluate, table, test_pairs, test_set
from .feed import INIT, entries_of, feed
from .nafnet import centered, centered_backward, init
from .ops import backend
from .ops.cpu import keep_memory
from .optim import clip_by_norm, decay_mask, warmup_cosine
from .params import Params, copy_into, load, save
from .restoration import restore_rgb
from .runtime import InputError, atomic, interruptible, locked, machine, peak_memory, shared, write_json
from .zoo import ADAPTERS, load_model, network, save_model, to_dict

EVERY = 100                                   # steps between two looks at the held-out patches
SAVE_SECONDS = 30                             # between two states written for resuming
CARE = 4                                      # times an image counts that leaves worse than it came; once in a nominal recipe
# Times lr: CEA's update is a product of learned factors and soon too large. The rivals' are the best of 0.1, 0.3 and 1 on the
# validation photographs (data/results).
ADAPTER_LR = dict.fromkeys(ADAPTERS, 0.1) | {"static": 0.3, "mlp": 0.3, "experts-image": 1.0, "experts-token": 0.3}
COLUMNS = ("step", "lr", "loss", "gradient_norm", "held_out_psnr", "seconds")       # of a log; the seconds are the step's own


@dataclass(frozen=True)
class Recipe:
    """What a run is made of; with the machine it determines every byte of the weights."""
    suite: str | None = "aio5"                # None: pairs alone
    adapter: str = "cea"
    steps: int = 2400
    seed: int = 0
    backend: str = "cpu"
    images: str | None = None                 # a folder that replaces scikit-image's training photographs
    pairs: list | None = None                 # two folders, degraded and clean images: half of a batch, see `feed.batch`
    batch: int = 6
    patch: int = 64                           # pixels a side
    chunks: int = 2                           # of a batch, computed side by side
    scenes: int = 32                          # dead leaves of 256 x 256
    lr: float = 4e-3
    adapter_lr: float = 0.1                   # times lr, see ADAPTER_LR
    decay: float = 1e-4
    warmup: int = 50                          # steps
    clip: float = 1.0
    floor: float = 3e-4                       # added to the mean squared error: beyond 35 dB there is little to win
    nominal: bool = False                     # degradations of nominal strength alone, see `feed.batch`
    start: str | None = None                  # a model file to start from, of the same network

    def __post_init__(self):
        for kind, name, value in ((field.type, field.name, getattr(self, field.name)) for field in fields(self)):
            right = isinstance(value, (int, float) if kind is float else kind) and (type(value) is bool) == (kind is bool)
            low = name in ("steps", "batch", "patch", "chunks", "scenes")
            right = right and (name != "pairs" or value is None or len(value) == 2)
            if not right or kind in (int, float) and not low <= value < (2**31 if kind is int else np.inf):
                raise InputError(f"{name} is {value!r}: expected {getattr(kind, '__name__', kind)}, in its range")


def recipe_for(adapter="cea", **rest):
    """A Recipe with the learning rate tuned for the adapter (ADAPTER_LR), and no suite beside pairs, unless they are given."""
    suite = None if rest.get("pairs") else "aio5"
    return Recipe(adapter=adapter, **{"adapter_lr": ADAPTER_LR.get(adapter.partition(":")[0], 0.1), "suite": suite} | rest)


# ---- one step --------------------------------------------------------------------------------------------------------

class State(NamedTuple):
    """What training changes, where the backend computes: parameters, their gradient, AdamW's two moments; and constants."""
    p: Params
    g: Params
    m: np.ndarray                             # as p.flat, like those below
    v: np.ndarray
    rates: np.ndarray                         # of learning, relative to the recipe's lr
    decay: np.ndarray


def start(recipe, saved=None):
    """The State before the first step; or at another one, from `saved`, its arrays w, m and v."""
    config, ops = network(recipe.adapter), backend(recipe.backend)
    p = init(config, np.random.default_rng([recipe.seed, INIT]))
    m, v = p.zeros_like().flat, p.zeros_like().flat
    if recipe.start:
        copy_into(p, load_model(recipe.start).p, recipe.start)
    if saved is not None:
        copy_into({"w": p.flat, "m": m, "v": v}, saved, "state.safetensors")
    p = p.over(ops.to_device(p.flat))
    rates = p.zeros_like()
    for name, value in rates.items():
        value[...] = recipe.adapter_lr if name.startswith("adapters.") else 1
    return State(p, p.zeros_like(), ops.to_device(m), ops.to_device(v), rates.flat, recipe.decay * decay_mask(p))


def gradient(degraded, clean, p, config, ops, g, floor=1e-8, care=1):
    """Loss of one batch (minus PSNR in dB, see `psnr_loss` for its floor); g is overwritten with its gradient.

    There an image that leaves worse than it came counts `care` times.
    """
    g.flat[:] = 0
    degraded, clean = map(ops.to_device, (degraded, clean))
    restored, cache = centered(degraded, p, config, ops)
    loss, c_loss = ops.psnr_loss(restored, clean, floor)
    dloss, _ = ops.psnr_loss_backward(1.0, c_loss)
    if care != 1:
        _, (_, came) = ops.psnr_loss(degraded, clean, floor)
        dloss *= 1 + (care - 1) * (c_loss[1] > came)
    centered_backward(dloss, cache, g)
    return float(loss)


def chunk_gradient(degraded, clean, p, recipe):
    """Loss of a chunk of a batch, and its gradient, flat; they may be not finite."""
    g, care = p.zeros_like(), 1 if recipe.nominal else CARE
    with np.errstate(all="ignore"):
        return gradient(degraded, clean, p, network(recipe.adapter), backend(recipe.backend), g, recipe.floor, care), g.flat


def advance(state, degraded, clean, step, recipe, share=starmap):
    """Training step number `step`, from 1 -> learning rate, loss in dB, gradient's norm. InputError unless they are finite.

    Loss and gradient are means over the chunks of the batch, added in their order, whoever computes them (`share`).
    """
    chunks = list(zip(*(np.array_split(images, min(recipe.chunks, len(images))) for images in (degraded, clean))))
    loss, state.g.flat[:] = 0, 0
    for (part, _), (l, g) in zip(chunks, share(chunk_gradient, [(*pair, state.p, recipe) for pair in chunks])):
        loss += l * len(part) / len(degraded)
        state.g.flat[:] += g * (len(part) / len(degraded))
    norm = clip_by_norm(state.g.flat, recipe.clip)
    if not np.isfinite(loss + norm):
        raise InputError(f"training diverged at step {step}: the loss is {loss}, the gradient's norm {norm}")
    rate = warmup_cosine(step / recipe.steps, min(recipe.warmup / recipe.steps, 0.5), recipe.lr)
    backend(recipe.backend).adamw(state.p.flat, state.g.flat, state.m, state.v, step, rate * state.rates, state.decay)
    return rate, loss, norm


def mean_psnr(degraded, clean, p, config, ops):
    """Mean PSNR in dB over a batch of patches, where the backend computes."""
    restored, _ = centered(degraded, p, config, ops, keep=False)
    return -float(ops.psnr_loss(np.clip(restored, 0, 1), clean)[0])


# ---- the loop --------------------------------------------------------------------------------------------------------

class Progress(NamedTuple):
    """Where recipes trained side by side stand: their states, and their logs, lists of rows as COLUMNS says."""
    states: list[State]
    logs: list[list]


def train_together(recipes, batches, progress, held_out=None, share=starmap):
    """The training loop: every recipe's step on every batch, written into `progress`; yields the number of steps done after each.

    recipes: of one length, seed and suite. held_out: degraded and clean patches looked at every EVERY steps, or None.
    share: as itertools.starmap; computes the gradients of a batch's chunks.
    """
    configs, ops = [network(recipe.adapter) for recipe in recipes], backend(recipes[0].backend)
    for step, (degraded, clean) in enumerate(batches, len(progress.logs[0]) + 1):
        for recipe, config, state, log in zip(recipes, configs, *progress):
            began = time.perf_counter()
            numbers = advance(state, degraded, clean, step, recipe, share)
            seconds = time.perf_counter() - began
            look = held_out and (step % EVERY == 0 or step == recipe.steps)
            log.append((step, *numbers, mean_psnr(*held_out, state.p, config, ops) if look else np.nan, seconds))
        yield step


def save_progress(path, progress, recipes):
    """Write a state file, whole or not at all: what training goes on from, and the recipes it belongs to."""
    tensors = {}
    for i, (state, log, recipe) in enumerate(zip(*progress, recipes)):
        host = backend(recipe.backend).to_host
        tensors |= {f"{i}.w": host(state.p.flat), f"{i}.m": host(state.m), f"{i}.v": host(state.v),
                    f"{i}.log": np.array(log).reshape(-1, len(COLUMNS))}
    save(path, tensors, recipes=list(map(asdict, recipes)))


def load_progress(path, recipes):
    """The Progress in a state file; before the first step where there is no file. InputError for a state of other recipes."""
    if path is None or not Path(path).exists():
        return Progress([start(recipe) for recipe in recipes], [[] for _ in recipes])
    tensors, metadata = load(path)
    if metadata.get("recipes") != list(map(asdict, recipes)):
        raise InputError(f"{path}: belongs to another recipe")
    try:
        states = [start(recipe, {key: tensors[f"{i}.{key}"] for key in "wmv"}) for i, recipe in enumerate(recipes)]
        return Progress(states, [tensors[f"{i}.log"].reshape(-1, len(COLUMNS)).tolist() for i in range(len(recipes))])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a whole state ({error})") from None


# ---- a run -----------------------------------------------------------------------------------------------------------

def train(out: str | Path | None = None, *, resume: bool = False, workers: int = 1, threads: int | None = None,
          **options) -> dict:
    """Train a model and leave the run folder `out` (None: runs/SUITE-ADAPTER-seedN) -> the dict of its result.json.

    options: fields of Recipe, as in train(suite="aio5", steps=300).
    workers: processes that make the batches. threads: how many processes compute a chunk of a batch each; None: one for each
    core. Under mpiexec the ranks do instead. These numbers change nothing but the time.
    Ctrl-C finishes the step under way, saves and raises KeyboardInterrupt; `resume=True` goes on from there.
    Raises InputError for an unknown suite, adapter or backend, a folder that holds another run, and a loss that is not finite.
    """
    recipe = recipe_for(**options)
    out = Path(out or f"runs/{recipe.suite or 'pairs'}-{recipe.adapter}-seed{recipe.seed}")
    keep_memory()
    with locked(out):
        if resume:
            recipe = resumable(out, options)
        elif any(out.iterdir()):
            raise InputError(f"{out} holds files already: --resume goes on with an interrupted run, --out names another folder")
        progress = load_progress(out / "state.safetensors", [recipe])
        try:
            learn(recipe, progress, out, workers, threads or os.cpu_count())
            return finish(recipe, progress.states[0].p, progress.logs[0], out)
        except KeyboardInterrupt:             # before the first step there is nothing to go on with
            raise KeyboardInterrupt(f"stopped after step {len(progress.logs[0])} of {recipe.steps}; `tinycea train --resume "
                                    f"--out {out}` goes on" if progress.logs[0] else "") from None


def learn(recipe, progress, out, workers, threads):
    """Train to the end, and save what there is from time to time, when interrupted, and when the batches end too soon."""
    ops, log, saved = backend(recipe.backend), progress.logs[0], None
    tests = [*test_set(entries_of(recipe), "validation", "crops", 1), *test_pairs(recipe.pairs, CROP)]
    held_out = [ops.to_device(np.stack(images)) for images in list(zip(*tests))[2:]]
    hands = min(threads, recipe.chunks) if recipe.backend == "cpu" else 1
    with (feed(recipe, len(log), workers) as batches, interruptible() as interrupted, shared(hands, keep_memory) as share,
          tqdm(total=recipe.steps, initial=len(log), desc="training", unit="step", disable=None) as bar):
        try:
            for step in train_together([recipe], batches, progress, held_out, share):
                if not np.isnan(log[-1][4]):
                    loss = np.mean([row[2] for row in log[-EVERY:]])
                    bar.set_postfix_str(f"loss {loss:.2f} dB, held-out PSNR {log[-1][4]:.2f} dB")
                bar.update()
                if saved is None or time.perf_counter() - saved > SAVE_SECONDS or step == recipe.steps or interrupted():
                    save_run(out, recipe, progress)
                    saved = time.perf_counter()
                if interrupted() and step < recipe.steps:
                    raise KeyboardInterrupt
        except (InputError, BrokenProcessPool):
            if log:
                save_run(out, recipe, progress)
            raise


def resumable(out, options):
    """The Recipe of the interrupted run in `out`; InputError if there is none, it is finished, or one of the options differs."""
    if (out / "result.json").exists():
        raise InputError(f"{out}: this run is finished, there is nothing to resume")
    path = out / "state.safetensors"
    if not path.exists():
        raise InputError(f"{out}: holds no interrupted run to resume")
    try:
        recipe = Recipe(**load(path)[1]["recipes"][0])
    except (TypeError, KeyError, IndexError):
        raise InputError(f"{path}: not the state of a run") from None
    for name, value in options.items():
        if value != getattr(recipe, name):
            raise InputError(f"{out}: this run was started with {name} {getattr(recipe, name)}, it cannot resume with {value}")
    return recipe


def save_run(out, recipe, progress):
    """The files of a run under way: its state, and for a reader its configuration and its log."""
    save_progress(out / "state.safetensors", progress, [recipe])
    write_json(out / "config.json", {"recipe": asdict(recipe), "model": to_dict(network(recipe.adapter)), "tinycea": __version__})
    with atomic(out / "log.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((int(step), *("" if np.isnan(x) else x for x in row)) for step, *row in progress.logs[0])


def finish(recipe, p, log, out):
    """Write the model, test it on the held-out photographs, draw the pictures; result.json comes last: the run is whole."""
    config, ops, entries = network(recipe.adapter), backend(recipe.backend), (*entries_of(recipe), "clean")
    tests = [*test_pairs(recipe.pairs), *test_set(entries)]
    results = list(tqdm(evaluate(lambda image, entry: restore_rgb(image, p, config, ops), tests),
                        total=len(tests), desc="held-out photographs", leave=False, disable=None))
    result = {"rows": table(results), "ssim": SSIM, "recipe": asdict(recipe), "parameters": p.flat.size,
              "seconds": round(sum(row[-1] for row in log), 1), "peak_memory_mb": peak_memory(), "machine": machine(),
              "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
              "versions": {"tinycea": __version__} | {name: version(name) for name in ("numpy", "scipy", "scikit-image")}}
    save_model(out / "model.safetensors", p.over(ops.to_host(p.flat)), config, table=result["rows"])
    plots.curve(log, out / "curve.png")
    photos = dict.fromkeys(r["photograph"] for r in results if r["entry"] == "clean")
    shown = [(photo, entries[i % len(entries)]) for i, photo in enumerate(photos)] + [(next(reversed(photos)), "clean")]
    plots.before_after([r for r in results[:3] if r["entry"] == "pairs"] +
                       [next(r for r in results if (r["photograph"], r["entry"]) == which) for which in shown],
                       out / "before_after.png")
    write_json(out / "result.json", result)
    (out / "state.safetensors").unlink()
    return result | {"folder": str(out)}
