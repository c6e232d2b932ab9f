"""The main job: train a restorer on toy degradations and leave a run folder that explains itself.

Every batch is a pure function of (seed, step), so a run that was interrupted and resumed ends with the bits of one that was not.
One step followed through the flat buffer, and the loop in ten lines: notebooks/05_training_by_hand.
"""
import csv
import json
import os
import platform
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from . import __version__, plots
from .cea import CEAConfig
from .degrade import patchwork, suite
from .errors import InputError, atomic
from .feed import INIT, feed, held_out_patches
from .nafnet import ADAPTERS, anatomies, by_adapter, centered, centered_backward, init, save_model, to_dict
from .ops import backend
from .ops.cpu import keep_memory
from .optim import clip_by_norm, decay_mask, warmup_cosine
from .params import Params, copy_into, load, save
from .restore import SSIM, TEST_SEED, held_out, make_folder, table
from .scenes import PHOTOGRAPHS, Scene, photographs

EVERY = 100                                   # steps between two looks at the held-out patches
SAVE_SECONDS = 30                             # between two states written for --resume
# Times lr: CEA's update is a product of three learned factors and soon too large. The rivals' are the best of 0.1, 0.3 and 1 on the
# validation photographs (data/results).
ADAPTER_LR = dict.fromkeys(ADAPTERS, 0.1) | {"static": 0.3, "mlp": 0.3, "experts-image": 1.0, "experts-token": 0.3}
FILES = ("config.json", "log.csv", "state.safetensors", "model.safetensors", "curve.png", "before_after.png", "routing.png",
         "result.json")                       # of a run folder; the state goes when the result has come
COLUMNS = ("step", "lr", "loss", "gradient_norm", "held_out_psnr", "seconds")


@dataclass(frozen=True)
class Recipe:
    """What a run is made of; with the machine it determines every byte of the weights."""
    suite: str = "aio5"
    adapter: str = "cea"
    steps: int = 3000
    seed: int = 0
    backend: str = "cpu"
    images: str | None = None                 # a folder that replaces scikit-image's training photographs
    batch: int = 8
    patch: int = 48                           # pixels a side
    scenes: int = 32                          # dead leaves of 256 x 256
    lr: float = 4e-3
    adapter_lr: float = 0.1                   # times lr, see ADAPTER_LR
    decay: float = 1e-4
    warmup: int = 50                          # steps
    clip: float = 1.0


def recipe_for(adapter="cea", **rest):
    """A Recipe with the learning rate that was tuned for the adapter (ADAPTER_LR), unless another one is given."""
    return Recipe(adapter=adapter, **{"adapter_lr": ADAPTER_LR.get(adapter.partition(":")[0], 0.1)} | rest)


# ---- the loop --------------------------------------------------------------------------------------------------------

def on_device(p, ops):
    """The parameters where a backend computes: copied to a GPU, or themselves."""
    return p.over(ops.to_device(p.flat))


def gradient(degraded, clean, p, config, ops, g):
    """Loss of one batch (minus PSNR in dB); g is overwritten with its gradient."""
    g.flat[:] = 0
    restored, cache = centered(ops.to_device(degraded), p, config, ops)
    loss, c_loss = ops.psnr_loss(restored, ops.to_device(clean))
    dloss, _ = ops.psnr_loss_backward(1.0, c_loss)
    centered_backward(dloss, cache, g)
    return float(loss)


def mean_psnr(degraded, clean, p, config, ops):
    """Mean PSNR in dB over a batch of patches, where the backend computes."""
    restored, _ = centered(degraded, p, config, ops, keep=False)
    return -float(ops.psnr_loss(np.clip(restored, 0, 1), clean)[0])


class State(NamedTuple):
    """What a training step changes, where the backend computes: parameters, their gradient, AdamW's two moments; and constants."""
    p: Params
    g: Params
    m: np.ndarray                             # as p.flat, like those below
    v: np.ndarray
    rates: np.ndarray                         # of learning, relative to the recipe's lr
    decay: np.ndarray


def start(recipe, config, ops, flat=None):
    """The State before the first step; or at another one, from `flat`, its arrays w, m and v."""
    p = init(config, np.random.default_rng([recipe.seed, INIT]))
    m, v = p.zeros_like().flat, p.zeros_like().flat
    if flat is not None:
        copy_into({"w": p.flat, "m": m, "v": v}, flat, "state.safetensors")
    p = on_device(p, ops)
    rates = p.zeros_like()
    for name, value in rates.items():
        value[...] = recipe.adapter_lr if name.startswith("adapters.") else 1
    return State(p, p.zeros_like(), ops.to_device(m), ops.to_device(v), rates.flat, recipe.decay * decay_mask(p))


def arrays(state, ops):
    """What `start` takes as `flat`, to be saved: the parameters w and AdamW's moments m and v."""
    return {"w": ops.to_host(state.p.flat), "m": ops.to_host(state.m), "v": ops.to_host(state.v)}


def advance(state, degraded, clean, step, recipe, config, ops):
    """Training step number `step`, from 1 -> loss in dB, the gradient's norm, the learning rate. InputError unless both are finite."""
    loss = gradient(degraded, clean, state.p, config, ops, state.g)
    norm = clip_by_norm(state.g.flat, recipe.clip)
    if not np.isfinite(loss + norm):
        raise InputError(f"training diverged at step {step}: the loss is {loss}, the gradient's norm {norm}")
    rate = warmup_cosine(step / recipe.steps, min(recipe.warmup / recipe.steps, 0.5), recipe.lr)
    ops.adamw(state.p.flat, state.g.flat, state.m, state.v, step, rate * state.rates, state.decay)
    return loss, norm, rate


def steps_in(minutes, recipe):
    """How many training steps fit into so many minutes, from ten that are timed and thrown away."""
    config, ops = by_adapter(recipe.adapter), backend(recipe.backend)
    p = on_device(init(config, np.random.default_rng(0)), ops)
    g, seconds = p.zeros_like(), []
    with feed(replace(recipe, scenes=1, steps=11)) as following:
        following()                           # the first one waits for its scenes
        for _ in range(10):
            start = time.perf_counter()
            gradient(*following(), p, config, ops, g)
            seconds.append(time.perf_counter() - start)
    return max(1, round(60 * minutes / float(np.median(seconds))))


def resumable(out, typed):
    """The Recipe of the interrupted run in `out`; InputError if there is none, it is finished, or an option typed now differs."""
    if (out / "result.json").exists():
        raise InputError(f"{out}: this run is finished, there is nothing to resume")
    if not (out / "state.safetensors").exists():
        raise InputError(f"{out}: holds no interrupted run to resume")
    try:
        recipe = Recipe(**json.loads((out / "config.json").read_text())["recipe"])
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{out / 'config.json'}: not the configuration of a run") from None
    for name, value in typed.items():
        if value != getattr(recipe, name):
            raise InputError(f"{out}: this run was started with {name} {getattr(recipe, name)}, it cannot resume with {value}")
    return recipe


def train(recipe, out, resume=False, workers=1):
    """Train by the recipe into the run folder `out` -> the dict of result.json.

    Ctrl-C finishes the step under way, saves and raises KeyboardInterrupt; `resume=True` goes on from there.
    workers: processes that make the batches; their number changes nothing but the time.
    Raises InputError for an unknown suite, adapter or backend, a folder that holds another run, and a loss that is not finite.
    """
    config, ops, entries, out = by_adapter(recipe.adapter), backend(recipe.backend), suite(recipe.suite), Path(out)
    keep_memory()
    if not resume and any((out / name).exists() for name in FILES):
        raise InputError(f"{out} already holds a run: --resume goes on with it if it was interrupted, --out names another folder")
    validation = [ops.to_device(patches) for patches in held_out_patches(entries)]
    done, seconds, rows, flat = 0, 0.0, [], None
    if resume:
        flat, metadata = load(out / "state.safetensors")
        rows = flat.pop("log", np.empty(0)).tolist()
        done, seconds = metadata["step"], metadata["seconds"]
    state = start(recipe, config, ops, flat)

    def save_state():
        write_json(out / "config.json", {"recipe": asdict(recipe), "model": to_dict(config), "tinycea": __version__})
        log = np.array(rows).reshape(done, len(COLUMNS))
        save(out / "state.safetensors", arrays(state, ops) | {"log": log}, step=done, seconds=seconds)
        write_log(out / "log.csv", rows)

    with feed(recipe, done, workers) as following:
        coming = following() if done < recipe.steps else None     # photographs that cannot be read leave no run folder
        make_folder(out)
        began, saved, waited = time.perf_counter() - seconds, time.perf_counter(), 0.0
        with interruptible() as interrupted, \
                tqdm(total=recipe.steps, initial=done, desc="training", unit="step", disable=None) as bar:
            while done < recipe.steps and not interrupted():
                loss, norm, rate = advance(state, *coming, done + 1, recipe, config, ops)
                done += 1
                psnr = mean_psnr(*validation, state.p, config, ops) if done % EVERY == 0 or done == recipe.steps else np.nan
                seconds = time.perf_counter() - began
                rows.append((done, rate, loss, norm, psnr, seconds))
                if not np.isnan(psnr):
                    recent = np.mean([row[2] for row in rows[-EVERY:]])
                    bar.set_postfix_str(f"loss {recent:.2f} dB, held-out PSNR {psnr:.2f} dB")
                bar.update()
                if time.perf_counter() - saved > SAVE_SECONDS:
                    save_state()
                    saved = time.perf_counter()
                if done < recipe.steps:
                    asked = time.perf_counter()
                    coming = following()
                    waited += time.perf_counter() - asked
    save_state()
    try:
        if done < recipe.steps:
            raise KeyboardInterrupt
        return finish(recipe, config, state.p, ops, entries, rows, seconds, waited, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after step {done} of {recipe.steps}; `tinycea train --resume --out {out}` goes on") from None


def finish(recipe, config, p, ops, entries, rows, seconds, waited, out):
    """Write the model, test it on the held-out photographs, draw the pictures; result.json comes last: the run is whole."""
    photos = len(PHOTOGRAPHS["test"])
    results = list(tqdm(held_out(entries, p, config, ops), total=photos * len(entries), desc="held-out photographs", leave=False, disable=None))
    result = {"rows": table(results), "ssim": SSIM, "recipe": asdict(recipe), "parameters": p.flat.size,
              "seconds": round(seconds, 1), "seconds_waiting_for_data": round(waited, 1), "peak_memory_mb": peak_memory(),
              "peak_memory_mb_of_data_process": peak_memory("RUSAGE_CHILDREN"),
              "machine": machine(), "versions": {"tinycea": __version__} | {name: version(name) for name in ("numpy", "scipy", "scikit-image")}}
    save_model(out / "model.safetensors", p.over(ops.to_host(p.flat)), config, table=result["rows"])
    plots.curve(rows, out / "curve.png")
    plots.before_after([next(r for r in results if r["photograph"] == photo and r["entry"] == entries[i % len(entries)])
                        for i, photo in enumerate(dict.fromkeys(r["photograph"] for r in results))], out / "before_after.png")
    if config.adapted() and isinstance(config.adapter, CEAConfig):
        plots.routing(*affinity_maps(p, config, ops), out / "routing.png")
    write_json(out / "result.json", result)
    (out / "state.safetensors").unlink()
    return result


def affinity_maps(p, config, ops, names=("noise25", "rain", "blur")):
    """A held-out photograph, one degradation per region -> degraded, mask, names, S (h,w,R), its kind and its stage, the last one."""
    degraded, mask, names = patchwork(Scene(photographs("test")["coffee"]), np.random.default_rng(TEST_SEED), names)
    _, cache = centered(ops.to_device(degraded[None]), p, config, ops)
    stage, anatomy = list(anatomies(cache).items())[-1]
    m, pixels = config.multiple(), config.unshuffle * config.stages()[stage][0] // config.width       # a token is pixels x pixels
    h, w = (-(-n // m) * m // pixels for n in degraded.shape[:2])
    return degraded, mask, names, ops.to_host(anatomy["S"]).reshape(h, w, -1), config.adapter.affinity, stage


def machine():
    """The processor, its cores and the system, as far as the system tells."""
    try:
        model = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):              # not Linux, or a processor without a name there
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def peak_memory(whose="RUSAGE_SELF"):
    """Peak resident memory in MB of this process, or of the largest that it has started; None where the system does not tell."""
    if whose == "RUSAGE_SELF" and sys.platform == "linux":        # getrusage's peak is at least that of the process that started us
        return round(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10)
    try:
        import resource
    except ImportError:                       # Windows
        return None
    return round(resource.getrusage(getattr(resource, whose)).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


@contextmanager
def interruptible():
    """Within, Ctrl-C is remembered instead of raised: yields a function that tells whether it came. A second one is raised."""
    came = []

    def handler(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


# ---- the run folder --------------------------------------------------------------------------------------------------

def write_json(path, value):
    """JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def write_log(path, rows):
    """log.csv, whole or not at all: one line per step, the held-out PSNR left blank where it was not looked at."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((int(step), *("" if np.isnan(x) else x for x in row)) for step, *row in rows)
