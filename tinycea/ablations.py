"""CEA's switches for ablation, composed of the same ops as `cea.cea`, which runs where none is set."""
from dataclasses import dataclass, fields

import numpy as np

from . import cea
from .ops import cpu
from .params import accumulate
from .runtime import InputError

NORMS = {"image": "groupnorm", "token": "layernorm"}


def check(config, **choices):
    """InputError unless a configuration's fields are among their choices, its norm among NORMS, its integers positive."""
    for name, valid in (choices | {"norm": tuple(NORMS)}).items():
        if getattr(config, name) not in valid:
            raise InputError(f"{name} is {getattr(config, name)!r}: choose one of {', '.join(map(repr, valid))}")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in (int, int | None) and (not isinstance(value, field.type) or value is not None and value < 1):
            raise InputError(f"{field.name} is {value!r}: expected a positive integer")


@dataclass(frozen=True)
class CEAConfig:
    """The layer's sizes and its switches; the defaults are the method.

    rank R, heads h, probe_channels D (None: D = C).
    affinity: "signed" | "softmax" | "topk" (softmax over the `topk` largest affinities of a token).
    level: "token" | "image" (every token gets the image's mean affinities, the mean taken after a softmax).
    static: "" | "A" | "U" | "AU", the factors that are learned constants (R,C) instead of written for each image.
    norm: "image" | "token", what X is normalized by: the image's mean and variance, or each token's own (LayerNorm).
    tokens: "X" | "Xhat", what the affinities are taken of. The default was norm "token" and tokens "Xhat" in older model files.
    """
    rank: int = 8
    heads: int = 4
    probe_channels: int | None = None
    affinity: str = "signed"
    topk: int = 2
    level: str = "token"
    static: str = ""
    norm: str = "image"
    tokens: str = "X"

    def __post_init__(self):
        check(self, affinity=("signed", "softmax", "topk"), level=("token", "image"), static=("", "A", "U", "AU"),
              tokens=("X", "Xhat"))
        if self.static == "AU" and self.tokens == "X":
            raise InputError("cea static is 'AU' and tokens 'X': nothing would read the normalized tokens")
        if self.affinity == "topk" and self.topk > self.rank:
            raise InputError(f"cea topk is {self.topk}: expected at most the rank, {self.rank}")

    def is_the_method(self):
        return (self.affinity, self.level, self.static, self.norm, self.tokens) == ("signed", "token", "", "image", "X")


def shapes(C, config):
    """Parameter names and shapes of a layer on C channels, as `cea.shapes`; static factors are A or U (R,C)."""
    found = {}
    for name, shape in cea.shapes(C, config.rank, config.heads, config.probe_channels).items():
        if name.startswith("W_") and name[2:] in config.static:
            found[name[2:]] = (config.rank, C)
        elif config.static != "AU" or name.startswith("norm"):
            found[name] = shape
    return found


def forward(x, p, config, ops=cpu):
    """The layer under its switches. x (B,H,W,C), parameters p (see `shapes`) -> y (B,H,W,C), cache."""
    if config.is_the_method():
        y, cache = cea.cea(x, p, config.heads, ops)
        return y, (cache, config)
    X = cea.tokens(x, p)
    Xhat, c_norm = normalized(X, p, config.norm, ops)
    Z, c_Z = (None, None) if config.static == "AU" else ops.summarize(Xhat, p["W_K"], p["W_V"], p["Q"], config.heads)
    A, c_A = (repeated(p["A"], len(x)), None) if "A" in config.static else ops.linear(Z, p["W_A"])
    U, c_U = (repeated(p["U"], len(x)), None) if "U" in config.static else ops.linear(Z, p["W_U"])
    tokens = X if config.tokens == "X" else Xhat
    Y, c_Y = _assemble(X, tokens, A, U, config, ops)
    return Y.reshape(x.shape), ((tokens, A, U, c_norm, c_Z, c_A, c_U, c_Y, ops), config)


def backward(dy, cache, g):
    """dx, and every parameter's gradient added into g: the forward read from the bottom up."""
    cache, config = cache
    if config.is_the_method():
        return cea.cea_backward(dy, cache, g)
    tokens, _, _, c_norm, c_Z, c_A, c_U, c_Y, ops = cache
    dX, dtokens, dA, dU = _assemble_backward(dy.reshape(tokens.shape), c_Y, config, ops)
    dXhat, dZ = 0 if config.tokens == "X" else dtokens, 0
    for factor, d, c in (("U", dU, c_U), ("A", dA, c_A)):
        if factor in config.static:
            g[factor] += d.sum(0)
        else:
            dZ = dZ + accumulate(g, ops.linear_backward(d, c), f"W_{factor}")
    if config.static != "AU":
        dXhat = dXhat + accumulate(g, ops.summarize_backward(dZ, c_Z), "W_K", "W_V", "Q")
    dX = dX + normalized_backward(dXhat, c_norm, g)
    return (dX + dtokens if config.tokens == "X" else dX).reshape(dy.shape)


def normalized(x, p, norm, ops):
    """x (B,...,C) by the norm of that name -> X̂, cache."""
    Xhat, cache = getattr(ops, NORMS[norm])(x, p["norm.weight"], p["norm.bias"])
    return Xhat, (getattr(ops, NORMS[norm] + "_backward"), cache)


def normalized_backward(dXhat, cache, g):
    """dx, and the norm's gradients added into g."""
    backward, cache = cache
    return accumulate(g, backward(dXhat, cache), "norm.weight", "norm.bias")


def repeated(value, B):
    """A learned constant (R,C) as each of B images sees it: (B,R,C)."""
    return np.broadcast_to(value, (B, *value.shape))


def _affinities(tokens, A, config, ops):
    """S under the switches: signed, or a softmax over all or the largest; of each token, or the mean of the image's."""
    S, c_S = ops.affinity(tokens, A)
    c_T = c_mean = None
    if config.affinity != "signed":
        S, c_T = ops.topk_softmax(S, config.topk if config.affinity == "topk" else config.rank)
    if config.level == "image":
        S, c_mean = ops.token_mean(S)
    return S, (c_S, c_T, c_mean)


def _assemble(X, tokens, A, U, config, ops):
    if config.affinity == "signed" and config.level == "token":
        return ops.assembly(X, tokens, A, U)
    S, c_S = _affinities(tokens, A, config, ops)
    Y, c_Y = ops.combine(X, S, U)
    return Y, (c_S, c_Y)


def _assemble_backward(dY, cache, config, ops):
    if config.affinity == "signed" and config.level == "token":
        return ops.assembly_backward(dY, cache)
    (c_S, c_T, c_mean), c_Y = cache
    dX, dS, dU = ops.combine_backward(dY, c_Y)
    if config.level == "image":
        dS = ops.token_mean_backward(dS, c_mean)
    if config.affinity != "signed":
        dS = ops.topk_softmax_backward(dS, c_T)
    return dX, *ops.affinity_backward(dS, c_S), dU


def anatomy(cache):
    """What one forward pass wrote, for plots: the tokens (B,N,C) that S is taken of, S (B,N,R), A and U (B,R,C), and the probe's
    weights P (B,h,R,N), None where nothing is probed."""
    (tokens, A, U, _, c_Z, *_, ops), config = cache
    S, _ = _affinities(tokens, A, config, ops)
    return {"tokens": tokens, "S": S, "A": A, "U": U, "P": None if c_Z is None else ops.attention(c_Z)}
