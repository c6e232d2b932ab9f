"""How soon can a degradation be recognized? A classifier alone: the backbone's encoder and middle, the mean of its features, a
linear map to the suite's names; trained with the cross-entropy on the comparison's batches, and as it trains (see results.sh).

    python data/recognizer.py FOLDER        accuracy after so many steps, on a crop of each of FOLDER's first hundred images
"""
import sys

import numpy as np

from tinycea.evaluation import test_set
from tinycea.feed import batch, entries_of
from tinycea.lab.comparison import LABELS, grid, told
from tinycea.nafnet import NAFNetConfig, init, nafblock, nafblock_backward
from tinycea.ops import cpu as ops
from tinycea.optim import clip_by_norm, decay_mask, warmup_cosine
from tinycea.params import Params, accumulate, under
from tinycea.runtime import machine

BLOCKS = "encoders.0.0", "middle_blks.0", "middle_blks.1"


def forward(images, p):
    """Logits (B,names) of images (B,H,W,3) in [0,1], and what `backward` needs."""
    x, _ = ops.pixel_unshuffle(2 * images - 1, 2)
    x, c_intro = ops.conv3x3(x, p["intro.weight"], p["intro.bias"])
    caches = []
    for i, block in enumerate(BLOCKS):
        if i == 1:
            x, c_down = ops.down2x2(x, p["downs.0.weight"], p["downs.0.bias"])
        x, cache = nafblock(x, under(p, block))
        caches.append(cache)
    means, c_means = ops.global_average_pool(x)
    logits, c_logits = ops.linear(means[:, 0, 0], p["names.weight"], p["names.bias"])
    return logits, (c_intro, c_down, caches, c_means, c_logits)


def backward(dlogits, cache, g):
    """Every parameter's gradient added into g: the forward read from the bottom up."""
    c_intro, c_down, caches, c_means, c_logits = cache
    dmeans = accumulate(g, ops.linear_backward(dlogits, c_logits), "names.weight", "names.bias")
    dx = ops.global_average_pool_backward(dmeans[:, None, None], c_means)
    for i in reversed(range(len(BLOCKS))):
        dx = nafblock_backward(dx, caches[i], under(g, BLOCKS[i]))
        if i == 1:
            dx = accumulate(g, ops.down2x2_backward(dx, c_down), "downs.0.weight", "downs.0.bias")
    accumulate(g, ops.conv3x3_backward(dx, c_intro), "intro.weight", "intro.bias")


def learn(recipe, names):
    """The parameters of a classifier trained as the recipe says."""
    full = init(NAFNetConfig(adapter=None), np.random.default_rng(recipe.seed))
    used = ("intro.", "downs.0.", *(block + "." for block in BLOCKS))
    p = Params({name: value.shape for name, value in full.items() if name.startswith(used)}
               | {"names.weight": (48, len(names)), "names.bias": (len(names),)})
    for name, value in full.items():
        if name in p:
            p[name][...] = value
    g, m, v = (p.zeros_like() for _ in range(3))
    for step in range(recipe.steps):
        images, _ = batch(recipe, step, told)
        right = images[:, 0, 0, 3:][:, [LABELS.index(name) for name in names]] > 0.5
        logits, cache = forward(images[..., :3], p)
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        g.flat[:] = 0
        backward((share - right).astype(np.float32) / len(right), cache, g)
        clip_by_norm(g.flat, recipe.clip)
        rate = warmup_cosine((step + 1) / recipe.steps, recipe.warmup / recipe.steps, recipe.lr)
        ops.adamw(p.flat, g.flat, m.flat, v.flat, step + 1, rate, recipe.decay * decay_mask(p))
    return p


if __name__ == "__main__":
    for recipe in grid(["aio5"], ["none"], 2, (500, 1000, 2000, 4000), images="runs/photographs"):
        names = entries_of(recipe)
        p = learn(recipe, names)
        tests = test_set(names, "validation", "crops", 1, images=sys.argv[1])
        found = [names[forward(degraded[None].astype(np.float32), p)[0].argmax()] for _, _, degraded, _ in tests]
        right = np.array([name == entry for name, (entry, *_) in zip(found, tests)]).reshape(-1, len(names))
        each = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, right.mean(0)))
        print(f"{recipe.steps:5d} steps, seed {recipe.seed}: right in {right.mean():.2f} ({each})", flush=True)
    print(machine())
