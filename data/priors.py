"""Does a layer gain if, in training, its summary of the image is taught to know the degradation? A loss beside the network's.

    python data/priors.py FOLDER PHOTOGRAPHS OUT SUITE:ROW ... [--seeds 3] [--steps 4000] [--default]

FOLDER: of the 200 images of BSDS500. PHOTOGRAPHS: to learn from. ROW: adapter, its rate, loss, the loss's weight in dB, as in
aio5:cea@0.03+labels*0.3. OUT: the folder of runs.jsonl; two lines are a trained network on validation and test photographs, as
of `tinycea compare`. It is not trained again.

labels: a linear map of the summary is to name the degradation (cross-entropy), on the batches of `tinycea compare`.
truth: labels, and the name is added to the summary as a learned vector, in training the true one, in use as the map names it: so
the network learns to restore as one that knows, from the first step. truth-mean: the map reads, and the vector is added to, the
mean of a summary's rows: CEA's Z has R of them, so its map is R times smaller. faded: truth at the first step, the own naming at
the last, in between so much of each.
prior: no labels; two patches under the same draw of a degradation are to agree in their summaries, others of the batch to differ
(InfoNCE, van den Oord et al. 2018). Its batches are four degradations, two patches each; prior*0 is a network untaught by them.
--default: in the recipe of `tinycea train`, whose patches are mild or clean, too; "clean" is a name then, and so tested.
The losses are taken of every layer that has a summary and added up: CEA's Z, the descriptor's e, and in a network without a
layer the means that SCA is written by.
"""
import argparse
import json
import os
import re
from collections import defaultdict
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.special import softmax, xlogy
from tqdm import tqdm

from tinycea.degradations import apply, suite
from tinycea.evaluation import test_set
from tinycea.feed import BATCHES, leaves, photos
from tinycea.feed import batch as ordinary
from tinycea.lab.comparison import LABELS, Split, finished, grid, interval, matrix, mean, scores
from tinycea.nafnet import centered, centered_backward
from tinycea.ops import cpu
from tinycea.optim import clip_by_norm, warmup_cosine
from tinycea.params import Params
from tinycea.runtime import locked, machine, pool, read_bytes
from tinycea.scenes import crop
from tinycea.training import CARE, recipe_for, start
from tinycea.zoo import network


def named(recipe, step, make=ordinary):
    """Degraded patches of a step, which of `names` was done to each, as a row of the unit matrix (B,.), and clean patches."""
    known, done = names(recipe), []

    def noted(scene, entry, *rest):
        done.append(known.index(entry))
        return apply(scene, entry, *rest)
    degraded, clean = make(recipe, step, noted)
    return degraded, np.eye(len(known), dtype=np.float32)[done], clean


def names(recipe):
    """What a patch may be called: a composition has a name of its own."""
    return (*LABELS, *(entry for entry in suite(recipe.suite) if "+" in entry), *["clean"] * (not recipe.nominal))


def twins(recipe, step, degrade=apply):
    """Degraded and clean patches (8,P,P,.) of one step: rows 2j and 2j+1 have the same degradation, drawn alike."""
    rng, made, entries = np.random.default_rng([recipe.seed, BATCHES, step]), [], suite(recipe.suite)
    for which in rng.permutation(len(entries))[:recipe.batch // 2]:
        draw = rng.integers(2**32)
        for levels in (leaves(recipe.seed, int(rng.integers(recipe.scenes)), recipe.patch), photos(recipe.images, recipe.patch)):
            scene = crop(levels[rng.integers(len(levels))], recipe.patch, rng)
            made.append((degrade(scene, entries[which], np.random.default_rng(draw)), scene.image))
    return [np.stack(part) for part in zip(*made)]


def cross_entropy(logits, target):
    """Of softmax(logits), (B,K), to targets (B,K), shares that add up to 1: the mean in nats, and B times its gradient."""
    share = softmax(logits, axis=1)
    return -xlogy(target, share).sum() / len(logits), share - target


def agreement(z, temperature=0.1):
    """InfoNCE of z (B,F), whose rows 2j and 2j+1 belong together: loss in nats, cache."""
    length = np.linalg.norm(z, axis=1, keepdims=True)
    n = z / length
    logits = n @ n.T / temperature
    np.fill_diagonal(logits, -np.inf)
    loss, slope = cross_entropy(logits, np.eye(len(z))[np.arange(len(z)) ^ 1])
    return loss, (n, length, slope, temperature)


def agreement_backward(dloss, cache):
    """dz."""
    n, length, slope, temperature = cache
    dn = (slope + slope.T) @ n * (dloss / (len(n) * temperature))
    return (dn - n * (n * dn).sum(1, keepdims=True)) / length


def naming(z, W, b, target):
    """Cross-entropy of softmax(z W + b) to the targets (B,K): loss in nats, cache."""
    loss, slope = cross_entropy(z @ W + b, target)
    return loss, (z, W, slope)


def naming_backward(dloss, cache):
    """dz, dW, db."""
    z, W, slope = cache
    dlogits = slope * (dloss / len(z))
    return dlogits @ W.T, z.T @ dlogits, dlogits.sum(0)


# Adapter -> the op that makes its summary.
SUMMARY = {"cea": "summarize", "descriptor": "simple_gate", "none": "global_average_pool"}


class Watched(SimpleNamespace):
    """The CPU's ops; `seen` holds the summary of every layer, and their gradients get `wanted` added.

    op: what makes them; what it makes of an image, (B,H,W,C) with H W > 1, is none. tell: f(layer's number, summary) -> what is
    added to it on its way; `came` holds the gradients of these, `said` is its to keep.
    """

    def __init__(self, op="summarize", tell=None):
        super().__init__(**vars(cpu) | {op: self.look, f"{op}_backward": self.add}, op=op, tell=tell,
                         seen=[], said={}, wanted={}, came={})

    def look(self, *args):
        y, cache = getattr(cpu, self.op)(*args)
        if y.ndim == 4 and y[0, ..., 0].size > 1:
            return y, (cache, None)
        k = len(self.seen)
        self.seen.append(y)
        return y + self.tell(k, y) if self.tell else y, (cache, k)

    def add(self, dy, cache):
        self.came[cache[1]] = dy
        return getattr(cpu, f"{self.op}_backward")(dy + self.wanted.get(cache[1], 0), cache[0])


class Learner:
    """A network under training, and the linear maps that name degradations, and that say a name."""

    def __init__(self, recipe, loss, weight):
        self.recipe, self.config, self.state = recipe, network(recipe.adapter), start(recipe)
        self.loss, self.weight, self.trust, self.heads, K = loss, weight, 1, {}, len(names(recipe))
        _, ops, _ = self.forward(np.zeros((1, recipe.patch, recipe.patch, 3), np.float32))
        self.heads = Params({f"{k}.{name}": shape for k, y in enumerate(ops.seen) for size in [self.of(y).size]
                             for name, shape in (("W", (size, K)), ("b", (K,)), ("E", (K, size)))})
        self.moments = [self.heads.zeros_like().flat for _ in range(2)]

    def of(self, y, mean=np.mean):
        """What of a summary y (B,...,F) is named and told: all of it, (B,.), or the mean of its rows, (B,F)."""
        return mean(y.reshape(len(y), -1, y.shape[-1]), 1) if self.loss.endswith("mean") else y.reshape(len(y), -1)

    def spread(self, z, y):
        """z, as `of` gives it, for every row of a summary like y."""
        return z.reshape(len(y), *[1] * (y.ndim - 2), -1) if self.loss.endswith("mean") else z.reshape(y.shape)

    def forward(self, images, target=None, keep=True):
        """Restored images, the watched ops, cache; target: shares of `names`, None in use."""
        def tell(k, y):
            own = softmax(self.of(y) @ self.heads[f"{k}.W"] + self.heads[f"{k}.b"], axis=1)
            ops.said[k] = own if target is None else self.trust * target + (1 - self.trust) * own
            return self.spread(ops.said[k] @ self.heads[f"{k}.E"], y)
        told = self.heads and self.loss.startswith(("truth", "faded"))
        ops = Watched(SUMMARY[self.recipe.adapter.partition(":")[0]], tell if told else None)
        restored, cache = centered(images, self.state.p, self.config, ops, keep=keep)
        return restored, ops, cache

    def gradient(self, degraded, target, clean):
        """Loss in dB on what `named` gives, and its gradient by the maps; that by the network is left in state.g."""
        recipe, g, dheads = self.recipe, self.state.g, self.heads.zeros_like()
        g.flat[:] = 0
        restored, ops, cache = self.forward(degraded, target)
        loss, c_loss = cpu.psnr_loss(restored, clean, recipe.floor)
        for k, y in enumerate(ops.seen if self.weight else ()):
            z = self.of(y)
            if self.loss == "prior":
                more, c = agreement(z)
                dz = agreement_backward(self.weight, c)
            else:
                more, c = naming(z, self.heads[f"{k}.W"], self.heads[f"{k}.b"], target)
                dz, dheads[f"{k}.W"], dheads[f"{k}.b"] = naming_backward(self.weight, c)
            loss += self.weight * more
            ops.wanted[k] = (self.spread(dz, y) * (z.size / y.size)).astype(y.dtype)
        dloss, _ = cpu.psnr_loss_backward(1.0, c_loss)
        if not recipe.nominal:                # as `training.gradient`
            dloss *= 1 + (CARE - 1) * (c_loss[1] > cpu.psnr_loss(degraded, clean, recipe.floor)[1][1])
        centered_backward(dloss, cache, g)
        for k in range(len(ops.seen)) if ops.tell else ():
            dheads[f"{k}.E"] = ops.said[k].T @ self.of(ops.came[k], np.sum)
        return loss, dheads

    def step(self, i, *made):
        """Step i, from 1, on what `named` gives."""
        recipe, (p, g, m, v, rates, decay) = self.recipe, self.state
        self.trust = 1 - (i - 1) / (recipe.steps - 1) if self.loss.startswith("faded") else 1
        _, dheads = self.gradient(*made)
        clip_by_norm(g.flat, recipe.clip)
        rate = warmup_cosine(i / recipe.steps, recipe.warmup / recipe.steps, recipe.lr)
        cpu.adamw(p.flat, g.flat, m, v, i, rate * rates, decay)
        cpu.adamw(self.heads.flat, dheads.flat, *self.moments, i, rate, np.zeros_like(dheads.flat))


def trial(recipe, loss, weight, folder):
    """Train and test one network: its lines."""
    cpu.keep_memory()
    learner, make = Learner(recipe, loss, weight), twins if loss == "prior" else ordinary
    for i in range(1, recipe.steps + 1):
        learner.step(i, *named(recipe, i - 1, make))
    line = {"recipe": asdict(recipe) | {"adapter": f"{recipe.adapter}+{loss}*{weight:g}"}, "machine": machine()}

    def restorer(image, entry):
        return learner.forward(image[None].astype(np.float32), None, False)[0][0]
    return [line | {"split": str(split), "psnr": looked_at(restorer, recipe, split)} for split in splits(recipe, folder)]


def splits(recipe, folder):
    """What a network is tested on: crops of a hundred photographs each; in the default recipe the second is three whole ones."""
    return Split("validation", folder), Split("test", folder if recipe.nominal else None)


def looked_at(restorer, recipe, split):
    """View -> entry -> photograph -> PSNR in dB."""
    entries, view = suite(recipe.suite) + ("clean",) * (not recipe.nominal), "crops" if split.photos else "photographs"
    return {view: scores(restorer, test_set(entries, split.name, view, 1 if split.photos else None, images=split.photos))}


def lead(values, others):
    """Mean lead in dB of a network over another, and as text with its interval; both seed -> (photographs, entries)."""
    ahead = np.array([(values[seed] - others[seed]).mean(-1) for seed in sorted(set(values) & set(others))])
    return ahead.mean(), "{:+.2f} [{:+.2f}, {:+.2f}]".format(ahead.mean(), *interval(ahead))


def publish(lines):
    """Print PSNR on the test photographs, the lead over the same network untaught, over none, and the share of told's lead.

    lines: those of the comparison too, whose networks are untaught.
    """
    table, chosen = defaultdict(dict), defaultdict(list)      # (suite, adapter, rate, loss) -> seed -> (photographs, entries)
    for line in lines:
        recipe = line["recipe"]
        adapter, _, loss = recipe["adapter"].partition("+")
        key = recipe["suite"], adapter, recipe.get("adapter_lr"), loss
        if line["split"].startswith("test"):
            table[key][recipe.get("seed")] = matrix(line)
        else:
            chosen[key].append(mean(line["psnr"]))
    print("PSNR in dB\nsuite  adapter, its rate, the loss's weight    seeds  validation   test  minus untaught         "
          "minus none             share")
    for key, values in table.items():
        suite_name, adapter, rate, loss = key
        sca = ":sca=false" * adapter.endswith(":sca=false")
        none, told = (table.get((suite_name, base + sca, 0.1, ""), {}) for base in ("none", "told"))
        if not loss or not none:
            continue
        untaught = table.get((suite_name, adapter, rate, "prior*0" if loss.startswith("prior") else ""), {})
        first, second = (lead(values, other)[1] if other and other is not values else "" for other in (untaught, none))
        share = f"{lead(values, none)[0] / lead(told, none)[0]:5.0%}" if told else ""
        validation = f"{np.mean(chosen[key]):6.2f}" if key in chosen else ""
        print(f"{suite_name:6s} {f'{adapter}@{rate:g}+{loss}':36s} {len(values):5d} {validation:>11s} "
              f"{np.mean(list(values.values())):6.2f}  {first:21s} {second:21s} {share}")


def publish_default(lines, folder):
    """Print, for the default recipe, gains over the degraded crops of the validation half, mean and worst, and what is kept."""
    recipe = recipe_for()
    degraded, _ = (looked_at(lambda image, entry: image, recipe, split) for split in splits(recipe, folder))
    before, entries = matrix({"psnr": degraded})[:, :-1], suite(recipe.suite)
    found = defaultdict(dict)
    for line in lines:
        recipe, split = line["recipe"], line["split"].split()[0]
        found[recipe["adapter"], recipe["adapter_lr"]].setdefault(split, []).append(matrix(line))
    print(f"PSNR in dB{'':22s}seeds  three photographs  crops   clean (worst)  gain (worst) in "
          + "".join(f"{entry:16s}" for entry in entries))
    for (adapter, rate), values in found.items():
        crops, whole = (np.array(values[split]) for split in ("validation", "test"))
        gain = crops[..., :-1] - before
        print(f"{adapter:31s} {len(crops):5d}  {whole[..., :-1].mean():17.2f}  {crops[..., :-1].mean():5.2f}   "
              f"{crops[..., -1].mean():5.2f} ({crops[..., -1].min():5.2f})                  "
              + "".join(f"{gain[..., k].mean():+5.2f} ({gain[..., k].min():+6.2f})  " for k in range(len(entries))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("folder", "photographs", "out"):
        parser.add_argument(name)
    parser.add_argument("rows", nargs="+")
    for name, usual in (("--seeds", 3), ("--steps", 4000)):
        parser.add_argument(name, type=int, default=usual)
    parser.add_argument("--default", action="store_true")
    a, todo = parser.parse_args(), {}
    for seed in range(a.seeds):
        for row in a.rows:
            suite_name, adapter, rate, loss, weight = re.fullmatch(r"(\w+):(.+)@([\d.]+)\+([\w-]+)\*([\d.]+)", row).groups()
            label, weight = f"{adapter}+{loss}*{float(weight):g}", float(weight)
            *_, recipe = [recipe_for(adapter, suite=suite_name, seed=seed, steps=a.steps, adapter_lr=float(rate), chunks=1)] \
                if a.default else grid([suite_name], [adapter], seed + 1, [a.steps], [float(rate)], a.photographs)
            todo[json.dumps(asdict(recipe) | {"adapter": label})] = recipe, loss, weight, a.folder
    with locked(a.out), open(Path(a.out) / "runs.jsonl", "a+b") as file, pool(os.cpu_count()) as executor:
        file.truncate(read_bytes(file.name).rfind(b"\n") + 1)                   # half a line goes
        done = {json.dumps(line["recipe"]) for line in finished(a.out) if line["split"].startswith("test")}     # the last one
        running = [executor.submit(trial, *work) for key, work in todo.items() if key not in done]
        for future in (bar := tqdm(as_completed(running), "training", len(running), unit="network", disable=None)):
            lines = future.result()
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            bar.set_postfix_str(f"{lines[0]['recipe']['adapter']} {mean(lines[0]['psnr']):.2f} dB")
    if a.default:
        publish_default(finished(a.out), a.folder)
    else:
        publish([line for folder in ("data/results/told", a.out) for line in finished(folder)
                 if line["recipe"].get("steps") == a.steps])
    print(f"{a.steps} steps; {machine()}")
