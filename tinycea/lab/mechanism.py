"""What the layer is for: `tinycea mechanism` teaches one layer alone, and its rivals, to clean photographs under unknown colors.

A token holds a key of K = 3 numbers and its pixel's color, lifted to 13 by a fixed matrix L with orthonormal rows:

    x_n = (scale a_n + sigma g,  (J_n + sum_k a_nk t_k) L),       the tints t_k drawn anew for every picture, g ~ N(0, 1)

and the layer is to answer with J_n L. Regions: a_nk is 1 in region k, 0 elsewhere. Lamps: smooth fields, how much of lamp k's
light a pixel gets, signed or never negative. A token alone cannot know the tints, and one vector for the image cannot tell one
token from another. The layer can do both: its probe reads the tints off the picture, its affinities the amounts off the token.
"""
import os
from collections import defaultdict
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from .. import cea
from ..ablations import CEAConfig
from ..adapters import DescriptorConfig, ExpertsConfig, MLPConfig, PromptConfig, family
from ..ops import cpu
from ..optim import clip_by_norm, decay_mask, warmup_cosine
from ..params import Params
from ..plots import save, show
from ..runtime import machine, pool
from ..scenes import Scene, crop, photographs, pyramid

LIFT = np.linalg.qr(np.random.default_rng(0).normal(size=(13, 3)))[0].T.astype(np.float32)              # L (3,13)
SIDE = 24                                     # pixels of a picture to learn from


class Task(NamedTuple):
    """What is asked."""
    amounts: str                              # of AMOUNTS
    tint: float                               # standard deviation of t
    scale: float                              # of the key
    noise: float                              # sigma
    K: int = 3                                # tints


def largest(fields):
    """1 where a field is the largest, else 0."""
    return np.float32(fields == fields.max(-1, keepdims=True))


AMOUNTS = {"regions": largest, "signed": np.positive, "never negative": np.abs}    # of fields (...,K) of unit variance
TASKS = {"regions": Task("regions", 0.25, 2, 0.25), "lamps": Task("signed", 0.21, 1, 0.1),
         "lamps, never negative": Task("never negative", 0.21, 1, 0.1)}
CEA = CEAConfig(rank=4)
# All have the norm of the image, which leaves a token's size as it is: with one per token the rivals lose 3 dB on lamps.
MODELS = {"static": replace(CEA, static="AU", tokens="Xhat"), "token MLP": MLPConfig(norm="image"),
          "descriptor": DescriptorConfig(64, norm="image"), "prompt": PromptConfig(norm="image"),
          "experts, image": ExpertsConfig(level="image", norm="image"),
          "experts, token": ExpertsConfig(4, 4, 16, level="token", norm="image"), "CEA, image level": replace(CEA, level="image"),
          "CEA, token norm": replace(CEA, norm="token", tokens="Xhat"), "CEA, top-2": replace(CEA, affinity="topk"),
          "CEA, softmax": replace(CEA, affinity="softmax"), "CEA": CEA}
SHOWN = ("token MLP", "descriptor", "CEA, softmax", "CEA")


# ---- pictures --------------------------------------------------------------------------------------------------------

def contents(photos, side, count, rng):
    """Crops (count,side,side,3) of photographs at a half and a quarter of their size, minus their mean color, contrast 0.2."""
    levels = [level for photo in photos for level in (pyramid(Scene(photo), side)[1:3] or [Scene(photo)])]
    found = np.stack([crop(levels[i % len(levels)], side, rng).image for i in range(count)])
    found -= found.mean((1, 2), keepdims=True)
    return found * (0.2 / np.maximum(found.std((1, 2, 3), keepdims=True), 0.02))


def fields(n, side, K, rng):
    """Smooth random fields (n,side,side,K), each of unit variance; blobs grow with the side."""
    sigma = 1.2 * (side / SIDE)**0.8
    f = gaussian_filter(rng.standard_normal((n, side, side, K), np.float32), (0, sigma, sigma, 0), mode="wrap")
    return f / f.std((1, 2), keepdims=True)


def tokens(task, J, a, rng):
    """x (n,s,s,K+13) of the pictures J (n,s,s,3) under the amounts a (n,s,s,K)."""
    key = task.scale * a + task.noise * rng.standard_normal(a.shape, np.float32)
    tints = rng.normal(0, task.tint, (len(J), a.shape[-1], 3)).astype(np.float32)
    seen = J + (a.reshape(len(a), -1, a.shape[-1]) @ tints).reshape(J.shape)
    return np.concatenate((key, cpu.linear(seen, LIFT)[0]), -1)


def color(y):
    """What tokens (...,K+13) say of their pixel's color: (...,3)."""
    return cpu.linear(y[..., -LIFT.shape[1]:], LIFT.T)[0]


@cache
def bank(task):
    """What training pictures are made of: 2,000 crops of the built-in color photographs, and the amounts of 500 pictures."""
    rng = np.random.default_rng(1)
    photos = [photo for split in ("train", "validation") for photo in photographs(split).values() if np.ptp(photo, -1).any()]
    return contents(photos, SIDE, 2000, rng), AMOUNTS[task.amounts](fields(500, SIDE, task.K, rng))


tested_on = cache(photographs)                # the photographs of a split of a folder, read once for all tasks and sizes


@cache
def pictures(task, folder=None, side=SIDE, draws=4, split="test"):
    """(x, J, a) of pictures to test on, `draws` of each photograph of a split."""
    rng = np.random.default_rng(3)
    photos = tested_on(split, folder).values()
    J = contents(photos, side, draws * len(photos), rng)
    a = AMOUNTS[task.amounts](fields(len(J), side, task.K, rng))
    return tokens(task, J, a, rng), J, a


def psnr(y, J):
    """PSNR in dB of each picture, of what tokens say of its colors."""
    return -10 * np.log10(((color(y) - J)**2).mean((1, 2, 3)))


# ---- learning --------------------------------------------------------------------------------------------------------

def teach(task, config, steps, seed=0, rate=0.03, batch=4):
    """One layer alone, trained for so many steps on so many pictures each -> its parameters."""
    (crops, amounts), adapter, rng = bank(task), family(config), np.random.default_rng([seed, 2])
    p = Params(adapter.shapes(task.K + LIFT.shape[1], config))
    cea.init(p, rng)
    g, m, v, decay = p.zeros_like(), np.zeros_like(p.flat), np.zeros_like(p.flat), 1e-4 * decay_mask(p)
    for step in range(1, steps + 1):
        J, a = (kind[rng.integers(len(kind), size=batch)][..., rng.permutation(kind.shape[-1])] for kind in (crops, amounts))
        y, c = adapter.forward(tokens(task, J, a, rng), p, config)
        error = color(y) - J
        dy = np.zeros_like(y)
        dy[..., task.K:] = cpu.linear(error, LIFT * np.float32(2 / error.size))[0]
        g.flat[:] = 0
        adapter.backward(dy, c, g)
        clip_by_norm(g.flat, 1.0)
        cpu.adamw(p.flat, g.flat, m, v, step, warmup_cosine(step / steps, 0.05, rate), decay)
    return p


def trial(task, config, steps, folder):
    """A layer taught, and its PSNR on every test picture."""
    p = teach(task, config, steps)
    x, J, _ = pictures(task, folder)
    return p, psnr(family(config).forward(x, p, config)[0], J)


# ---- by hand ---------------------------------------------------------------------------------------------------------

def by_hand(task, sharp=1.5):
    """A layer that nobody taught, and its configuration: every matrix says what it is for.

    K = V = X̂. The queries look along the 2^K diagonals of the key's cube. What query r sees has the amounts z_r, and so the
    color sum_k z_rk t_k: A keeps the key of it, U minus the color. Then sum_r a_r^T u_r = -(sum_r z_r^T z_r) t, and W_A undoes
    the bracket as it is on average. What is left: a picture that is not average, the content's color, the key's noise.
    """
    diagonals = np.array(list(product((-1, 1), repeat=task.K))) / task.K**0.5
    R, K, C = len(diagonals), task.K, task.K + LIFT.shape[1]
    config, (crops, a), rng = CEAConfig(rank=R, heads=1), bank(task), np.random.default_rng(4)
    p = Params(family(config).shapes(C, config))
    X = tokens(task, crops[:len(a)], a, rng).reshape(len(a), -1, C)
    mean, std = X.mean(), X.std((1, 2)).mean()
    p["norm.weight"], p["norm.bias"], p["W_K"], p["W_V"] = 1, mean / std, np.eye(C), np.eye(C)       # X̂ is about X / std
    p["Q"][:, :K] = sharp * std * C**0.5 * diagonals                            # logits: `sharp` times the key along a diagonal
    Z, c_Z = cpu.summarize(cpu.groupnorm(X, p["norm.weight"], p["norm.bias"])[0], p["W_K"], p["W_V"], p["Q"], 1)
    z = cpu.attention(c_Z)[:, 0] @ a.reshape(len(a), -1, K)                     # (B,R,K), the amounts that a query sees
    p["W_A"][:K, :K] = np.linalg.inv((Z[..., :K].swapaxes(1, 2) @ z).mean(0)) * ((C * R)**0.5 * std / task.scale)
    p["W_U"][K:, K:] = -LIFT.T @ LIFT
    return p, config


def theory(task, x, J, a):
    """PSNR of each picture if signed affinities were all: the tints by least squares from the true amounts, then the key's noise.

    A residual of K noisy amounts carries a noise of K (sigma / scale)^2 times the tints' variance.
    """
    A, seen = a.reshape(len(a), -1, task.K), color(x).reshape(len(a), -1, 3)
    left = seen - A @ np.linalg.pinv(A) @ seen
    return -10 * np.log10(((left - J.reshape(left.shape))**2).mean((1, 2)) + task.K * (task.noise / task.scale * task.tint)**2)


# ---- what is printed and drawn ---------------------------------------------------------------------------------------

def trials(tasks, steps, folder):
    """(task's name, model) -> the result of its `trial`, computed side by side under a progress bar."""
    with pool(os.cpu_count()) as executor:
        running = {(name, model): executor.submit(trial, tasks[name], MODELS[model], steps, folder)
                   for name, model in product(tasks, MODELS)}
        for future in (bar := tqdm(running.values(), desc="teaching", unit="layer", disable=None)):
            bar.set_postfix_str(f"last {future.result()[1].mean():.2f} dB")
    return {job: future.result() for job, future in running.items()}


def publish(folder=None, out="mechanism.png", steps=2000):
    """Teach every model both tasks, print the table, draw the picture. folder: of photographs to test on, see `photographs`."""
    tasks = {name: TASKS[name] for name in ("regions", "lamps")}
    tested = {name: pictures(task, folder) for name, task in tasks.items()}     # first: a bad folder is refused at once
    results = trials(tasks, steps, folder)
    table, parameters = defaultdict(list), {}
    for name, task in tasks.items():
        x, J, a = tested[name]
        table["degraded"].append(psnr(x, J))
        for model in MODELS:
            p, found = results[name, model]
            table[model].append(found)
            parameters[model] = p.flat.size
        p, config = by_hand(task)
        table["CEA set by hand"].append(psnr(family(config).forward(x, p, config)[0], J))
        table["theory of signed"].append(theory(task, x, J, a))
    print(f"PSNR in dB over {len(J)} pictures, mean (worst){'':12s}" + "".join(f"{name:>16s}" for name in tasks))
    for model, columns in table.items():
        print(f"{model:24s} {parameters.get(model, ''):>6} parameters" if model in parameters else f"{model:42s}",
              *(f"{column.mean():8.2f} ({column.min():5.2f})" for column in columns))
    draw(tasks, folder, {key: p for key, (p, _) in results.items()}, out)
    print(f"{machine()}; the picture is {out}")


def draw(tasks, folder, taught, path, rows=4, side=128):
    """Photographs under each task: degraded, what the layers in SHOWN make of them, true."""
    columns, photos = ("degraded", *SHOWN, "true"), len(tested_on("test", folder))
    rows = min(rows, photos)
    figure = Figure((1.15 * len(columns) * len(tasks), 1.25 * rows + 0.3), layout="constrained")
    for block, (name, task) in zip(figure.subfigures(1, len(tasks)), tasks.items()):
        x, J, _ = (part[::2 * (photos // rows)][:rows] for part in pictures(task, folder, side, 2))     # two of a photograph
        shown = [color(x), *(color(family(MODELS[m]).forward(x, taught[name, m], MODELS[m])[0]) for m in SHOWN), J]
        block.suptitle(name, fontsize=9)
        for i, line in enumerate(block.subplots(len(x), len(columns), squeeze=False)):
            for axes, title, images in zip(line, columns, shown):
                show(axes, np.clip(images[i] + 0.5, 0, 1), title if i == 0 else "")
                axes.title.set_fontsize(7)
    save(figure, path)
