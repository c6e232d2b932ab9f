"""AdamW over the flat buffer, its learning-rate schedule, and clipping by the global norm; see notebooks/05_training_by_hand."""
import math

import numpy as np


def decay_mask(p):
    """1 where weight decay applies, 0 at biases, norms, beta and gamma -> 1-D, as p.flat."""
    mask = p.zeros_like()
    for name, value in mask.items():
        value[...] = not (name.endswith(("bias", "beta", "gamma")) or "norm" in name)
    return mask.flat


def clip_by_norm(gradient, limit):
    """Scale a flat gradient in place so that its Euclidean norm is at most `limit` -> the norm before."""
    norm = math.sqrt(np.dot(gradient, gradient))
    if norm > limit:
        gradient *= limit / norm
    return norm


def warmup_cosine(progress, warmup, peak, floor=1e-7):
    """Learning rate at a share of the run in (0,1]: linear up to `peak` during `warmup`, then a half cosine down to `floor`."""
    if progress < warmup:
        return peak * progress / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def adamw(w, g, m, v, step, lr, decay, betas=(0.9, 0.99), eps=1e-8):
    """One update of the flat parameters w in place, and of the moments m and v (Loshchilov and Hutter 2019, algorithm 2).

    m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  w <- w - lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + decay w)
    step: t, counted from 1. lr, decay: numbers, or arrays like w (such as the decay times `decay_mask`).
    """
    b1, b2 = betas
    m += (1 - b1) * (g - m)
    v += (1 - b2) * (g * g - v)
    update = m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps)
    w -= lr * (update + decay * w)
