"""Does CEA gain if its summaries Z are taught to know the degradation, in training alone? Two losses beside the network's own.

    python data/priors.py FOLDER [SEED ...]       PSNR on a crop of each of FOLDER's first hundred images, see results.sh

prior: no labels; two patches under the same draw of a degradation are to agree in Z, others of the batch to differ (InfoNCE,
van den Oord et al. 2018): a self-supervised degradation prior. labels: a linear map of Z is to name the degradation
(cross-entropy). Both are taken of every CEA layer and added up. All learn from the same batches: four of the suite's
degradations, two patches each. Without SCA, for there CEA has something to gain.
"""
import sys
from types import SimpleNamespace

import numpy as np
from scipy.special import softmax
from tqdm import tqdm

from tinycea.degradations import apply, suite
from tinycea.evaluation import psnr, test_set
from tinycea.feed import BATCHES, leaves, photos
from tinycea.lab.comparison import grid
from tinycea.nafnet import centered, centered_backward
from tinycea.ops import cpu
from tinycea.optim import clip_by_norm, warmup_cosine
from tinycea.params import Params
from tinycea.runtime import machine
from tinycea.scenes import crop
from tinycea.training import start
from tinycea.zoo import network

NAMES = suite("aio5")
# Row -> the loss and its weight in dB, which neither drowns the network's gradient nor is drowned by it.
ROWS = {"cea": (None, 0), "cea, prior": ("prior", 0.1), "cea, labels": ("labels", 0.3)}


def batch(recipe, step):
    """Degraded and clean patches (8,P,P,3) and the degradations' numbers (8,): rows 2j and 2j+1 have the same, drawn alike."""
    rng, made = np.random.default_rng([recipe.seed, BATCHES, step]), []
    for which in rng.permutation(len(NAMES))[:recipe.batch // 2]:
        draw = rng.integers(2**32)
        for levels in (leaves(recipe.seed, int(rng.integers(recipe.scenes)), recipe.patch), photos(recipe.images, recipe.patch)):
            scene = crop(levels[rng.integers(len(levels))], recipe.patch, rng)
            made.append((apply(scene, NAMES[which], np.random.default_rng(draw)), scene.image, which))
    return [np.stack(part) for part in zip(*made)]


def cross_entropy(logits, right):
    """Of softmax(logits), (B,K), against the numbers `right` (B,): the mean in nats, and B times its gradient."""
    share, chosen = softmax(logits, axis=1), (np.arange(len(logits)), right)
    slope = share.copy()
    slope[chosen] -= 1
    return -np.log(share[chosen]).mean(), slope


def agreement(z, temperature=0.1):
    """InfoNCE of z (B,F), whose rows 2j and 2j+1 belong together: loss in nats, cache."""
    length = np.linalg.norm(z, axis=1, keepdims=True)
    n = z / length
    logits = n @ n.T / temperature
    np.fill_diagonal(logits, -np.inf)
    loss, slope = cross_entropy(logits, np.arange(len(z)) ^ 1)
    return loss, (n, length, slope, temperature)


def agreement_backward(dloss, cache):
    """dz."""
    n, length, slope, temperature = cache
    dn = (slope + slope.T) @ n * (dloss / (len(n) * temperature))
    return (dn - n * (n * dn).sum(1, keepdims=True)) / length


def naming(z, W, b, right):
    """Cross-entropy of softmax(z W + b) against the numbers `right` (B,): loss in nats, cache."""
    loss, slope = cross_entropy(z @ W + b, right)
    return loss, (z, W, slope)


def naming_backward(dloss, cache):
    """dz, dW, db."""
    z, W, slope = cache
    dlogits = slope * (dloss / len(z))
    return dlogits @ W.T, z.T @ dlogits, dlogits.sum(0)


class Watched(SimpleNamespace):
    """The CPU's ops; `seen` holds the Z of every CEA layer, and their gradients get `wanted` added."""

    def __init__(self):
        super().__init__(**vars(cpu) | {"summarize": self.look, "summarize_backward": self.add}, seen=[], wanted={})

    def look(self, *args):
        Z, cache = cpu.summarize(*args)
        self.seen.append(Z)
        return Z, (cache, len(self.seen) - 1)

    def add(self, dZ, cache):
        return cpu.summarize_backward(dZ + self.wanted.get(cache[1], 0), cache[0])


class Learner:
    """A network under training, and the linear maps that name degradations."""

    def __init__(self, seed, kind, weight):
        self.recipe = grid(["aio5"], ["cea:sca=false"], seed + 1, [4000], [None], "runs/photographs")[-1]
        self.config, self.state, self.kind, self.weight = network(self.recipe.adapter), start(self.recipe), kind, weight
        sizes = [self.config.adapter.rank * self.config.stages()[stage][0] for stage in self.config.adapted()]       # of each Z
        self.heads = Params({f"{k}.{name}": shape for k, size in enumerate(sizes)
                             for name, shape in (("W", (size, len(NAMES))), ("b", (len(NAMES),)))})
        self.moments = [self.heads.zeros_like().flat for _ in range(2)]

    def step(self, i, degraded, clean, which):
        """Step i, from 1 -> the loss beside the network's, in nats."""
        recipe, (p, g, m, v, rates, decay), ops, added = self.recipe, self.state, Watched(), 0
        g.flat[:], dheads = 0, self.heads.zeros_like()
        restored, cache = centered(degraded, p, self.config, ops)
        _, c_loss = cpu.psnr_loss(restored, clean, recipe.floor)
        for k, Z in enumerate(ops.seen if self.kind else ()):
            z = Z.reshape(len(Z), -1)
            if self.kind == "prior":
                loss, c = agreement(z)
                dz = agreement_backward(self.weight, c)
            else:
                loss, c = naming(z, self.heads[f"{k}.W"], self.heads[f"{k}.b"], which)
                dz, dheads[f"{k}.W"], dheads[f"{k}.b"] = naming_backward(self.weight, c)
            added += loss
            ops.wanted[k] = dz.reshape(Z.shape).astype(np.float32)
        centered_backward(cpu.psnr_loss_backward(1.0, c_loss)[0], cache, g)
        clip_by_norm(g.flat, recipe.clip)
        rate = warmup_cosine(i / recipe.steps, recipe.warmup / recipe.steps, recipe.lr)
        cpu.adamw(p.flat, g.flat, m, v, i, rate * rates, decay)
        cpu.adamw(self.heads.flat, dheads.flat, *self.moments, i, rate, np.zeros_like(dheads.flat))
        return added

    def tested(self, tests):
        """Mean PSNR in dB; and how often the crop that is nearest in Z has the same degradation."""
        found, summaries = [], []
        for _, _, degraded, clean in tests:
            ops = Watched()
            restored, _ = centered(degraded[None].astype(np.float32), self.state.p, self.config, ops, keep=False)
            found.append(psnr(np.clip(restored[0], 0, 1), clean))
            summaries.append(np.concatenate([Z.ravel() for Z in ops.seen]))
        z, names = np.stack(summaries), np.array([test[0] for test in tests])
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        near = z @ z.T - 9 * np.eye(len(z))
        return np.mean(found), np.mean(names[near.argmax(1)] == names)


if __name__ == "__main__":
    tests = list(test_set(NAMES, "validation", "crops", 1, images=sys.argv[1]))
    for seed in map(int, sys.argv[2:] or (0, 1)):
        learners = {name: Learner(seed, *row) for name, row in ROWS.items()}
        recipe = learners["cea"].recipe
        for i in (bar := tqdm(range(1, recipe.steps + 1), desc=f"seed {seed}", unit="step", disable=None)):
            made, beside = batch(recipe, i), {}
            for name, learner in learners.items():
                beside[name] = learner.step(i, *made)
            if i % 50 == 0:
                bar.set_postfix_str(", ".join(f"{name} {loss:.2f}" for name, loss in beside.items() if loss))
        for name, learner in learners.items():
            dB, near = learner.tested(tests)
            print(f"seed {seed}  {name:20s} {dB:6.2f} dB, nearest in Z has the same degradation: {near:.2f}", flush=True)
    print(machine())
