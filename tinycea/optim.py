"""What AdamW is fed: where weight decay applies, clipping by the global norm, the schedule; see notebooks/05_training_by_hand."""
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
