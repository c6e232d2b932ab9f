"""How soon can a degradation be recognized? A classifier alone: the backbone's encoder and middle, the mean of its features, a
linear map to the suite's names; trained with the cross-entropy on the comparison's batches, and as it trains (see results.sh).

    python data/recognizer.py FOLDER        accuracy after so many steps, on a crop of each of FOLDER's first hundred images
"""
import sys

import numpy as np

from tinycea.evaluation import test_set
from tinycea.feed import batch, entries_of
from tinycea.lab.comparison import LABELS, grid, told
from tinycea.nafnet import NAFNetConfig, _stage, _stage_backward, init
from tinycea.ops import cpu as ops
from tinycea.optim import clip_by_norm, decay_mask, warmup_cosine
from tinycea.params import Params, accumulate
from tinycea.runtime import machine

CONFIG = NAFNetConfig(adapter=None)


def forward(images, p):
    """Logits (B,names) of images (B,H,W,3) in [0,1], and what `backward` needs."""
    x, _ = ops.pixel_unshuffle(2 * images - 1, 2)
    x, c_intro = ops.conv3x3(x, p["intro.weight"], p["intro.bias"])
    x, c_encoder = _stage(x, None, p, "encoders.0", CONFIG, ops, True)
    x, c_down = ops.down2x2(x, p["downs.0.weight"], p["downs.0.bias"])
    x, c_middle = _stage(x, None, p, "middle_blks", CONFIG, ops, True)
    means, c_means = ops.global_average_pool(x)
    logits, c_logits = ops.linear(means[:, 0, 0], p["names.weight"], p["names.bias"])
    return logits, (c_intro, c_encoder, c_down, c_middle, c_means, c_logits)


def backward(dlogits, cache, g):
    """Every parameter's gradient added into g: the forward read from the bottom up."""
    c_intro, c_encoder, c_down, c_middle, c_means, c_logits = cache
    dmeans = accumulate(g, ops.linear_backward(dlogits, c_logits), "names.weight", "names.bias")
    dx = ops.global_average_pool_backward(dmeans[:, None, None], c_means)
    dx = _stage_backward(dx, c_middle, g, "middle_blks")
    dx = accumulate(g, ops.down2x2_backward(dx, c_down), "downs.0.weight", "downs.0.bias")
    dx = _stage_backward(dx, c_encoder, g, "encoders.0")
    accumulate(g, ops.conv3x3_backward(dx, c_intro), "intro.weight", "intro.bias")


def fresh(names, seed, dtype=np.float32):
    """The parameters of a new classifier: a new network's, and zeros for the linear map."""
    full, channels = init(CONFIG, np.random.default_rng(seed), dtype), CONFIG.stages()["middle_blks"][0]
    p = Params({name: value.shape for name, value in full.items() if name.startswith(("intro", "encoders", "downs", "middle"))}
               | {"names.weight": (channels, len(names)), "names.bias": (len(names),)}, dtype)
    for name in full.keys() & p.keys():
        p[name] = full[name]
    return p


def learn(recipe, names):
    """The parameters of a classifier trained as the recipe says."""
    p = fresh(names, recipe.seed)
    g, m, v = (p.zeros_like() for _ in range(3))
    decay = recipe.decay * decay_mask(p)
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
        ops.adamw(p.flat, g.flat, m.flat, v.flat, step + 1, rate, decay)
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
