"""Continuous Expert Assembly (arXiv 2605.06127): the method, forward over backward.

For tokens X (B,N,C) of one stage's features:

    X̂ = LayerNorm(X)                                     (B,N,C)
    K = X̂ W_K,   V = X̂ W_V                               (B,N,D)      what the probe sees
    P = softmax over n of  Q K^T / sqrt(D/h)              (B,h,R,N)    Q (R,D): R learned rank queries in h heads
    Z = P V                                               (B,R,D)      one summary of the image per rank component
    A = Z W_A,   U = Z W_U                                (B,R,C)      routing bases, residual directions
    S = X̂ A^T / sqrt(C)                                   (B,N,R)      signed affinities: no softmax, no top-k
    Y = X + S U / sqrt(R)                                 (B,N,C)      each token assembles its own residual

The paper's abstract fixes the probe, A, U and the signed affinities; LayerNorm, heads, scales and initialization are our choice.
Derived line by line in notebooks/02_hyper_adapter; what the last two lines have to do with attention: notebooks/03_linear_attention.
"""
from dataclasses import dataclass

import numpy as np

from .errors import InputError
from .ops import cpu


@dataclass(frozen=True)
class CEAConfig:
    """The layer's sizes and its switches for ablation; the defaults are the method.

    rank R, heads h, probe_channels D (None: D = C).
    affinity: "signed" | "softmax" | "topk" (softmax over the `topk` largest affinities of a token).
    level: "token" | "image" (every token gets the image's mean affinities).
    static: "" | "A" | "U" | "AU", the factors that are learned constants (R,C) instead of written for each image.
    tokens: "Xhat" | "X", what the affinities are taken of. X keeps the tokens' magnitude, which helps on aio5 (data/results).
    """
    rank: int = 8
    heads: int = 4
    probe_channels: int | None = None
    affinity: str = "signed"
    topk: int = 2
    level: str = "token"
    static: str = ""
    tokens: str = "Xhat"

    def __post_init__(self):
        for name, valid in (("affinity", ("signed", "softmax", "topk")), ("level", ("token", "image")),
                            ("static", ("", "A", "U", "AU")), ("tokens", ("Xhat", "X"))):
            if getattr(self, name) not in valid:
                raise InputError(f"cea {name} is {getattr(self, name)!r}: choose one of {', '.join(map(repr, valid))}")
        D = 1 if self.probe_channels is None else self.probe_channels
        for name, n in (("rank", self.rank), ("heads", self.heads), ("topk", self.topk), ("probe_channels", D)):
            if not (isinstance(n, int) and n > 0):
                raise InputError(f"cea {name} is {n!r}: expected a positive integer")
        if self.static == "AU" and self.tokens == "X":
            raise InputError("cea static is 'AU' and tokens 'X': nothing would read the normalized tokens")
        if self.affinity == "topk" and self.topk > self.rank:
            raise InputError(f"cea topk is {self.topk}: expected at most the rank, {self.rank}")


def shapes(C, config):
    """Parameter names and shapes of a layer on C channels; raises InputError when D is no multiple of the heads."""
    R, D = config.rank, config.probe_channels or C
    if D % config.heads:
        raise InputError(f"cea probe_channels is {D}: expected a multiple of the {config.heads} heads")
    probe = {} if config.static == "AU" else {"W_K": (C, D), "W_V": (C, D), "Q": (R, D)}
    A = {"A": (R, C)} if "A" in config.static else {"W_A": (D, C)}
    U = {"U": (R, C)} if "U" in config.static else {"W_U": (D, C)}
    return {"norm.weight": (C,), "norm.bias": (C,)} | probe | A | U


def init(p, rng):
    """Fill a layer's parameters in place: matrices N(0, 1/rows), Q and a static A N(0, 1), W_U or a static U zero so that Y = X.

    Our choice. A generated A starts smaller than a static one: it is made from averages over tokens.
    """
    for name, value in p.items():
        if name == "norm.weight":
            value[...] = 1
        elif name in ("norm.bias", "W_U", "U"):
            value[...] = 0
        else:
            value[...] = rng.normal(0, 1 if name in "QA" else value.shape[0]**-0.5, value.shape)


def cea(x, p, config, ops=cpu):
    """One layer. Features x (B,H,W,C), parameters p (see `shapes`) -> y (B,H,W,C), cache. InputError for any other shape."""
    if x.ndim != 4 or 0 in x.shape or p["norm.weight"].shape != x.shape[-1:]:
        raise InputError(f"x has shape {x.shape}: expected (B,H,W,{p['norm.weight'].size}), no side zero")
    B, H, W, C = x.shape
    X = x.reshape(B, H * W, C)
    Xhat, c_norm = ops.layernorm(X, p["norm.weight"], p["norm.bias"])
    c_Z = None
    if config.static != "AU":
        Z, c_Z = ops.summarize(Xhat, p["W_K"], p["W_V"], p["Q"], config.heads)
    A, c_A = (each(p["A"], B), None) if "A" in config.static else ops.linear(Z, p["W_A"])
    U, c_U = (each(p["U"], B), None) if "U" in config.static else ops.linear(Z, p["W_U"])
    tokens = X if config.tokens == "X" else Xhat
    Y, c_Y = _assemble(X, tokens, A, U, config, ops)
    return Y.reshape(x.shape), (c_norm, c_Z, c_A, c_U, c_Y, tokens, A, U, config, ops)


def cea_backward(dy, cache, g):
    """dx, and every parameter's gradient added into g (names as in p): the forward read from the bottom up."""
    c_norm, c_Z, c_A, c_U, c_Y, tokens, A, U, config, ops = cache
    dX, dtokens, dA, dU = _assemble_backward(dy.reshape(tokens.shape), c_Y, config, ops)
    dXhat, dZ = 0 if config.tokens == "X" else dtokens, 0
    if "U" in config.static:
        g["U"] += dU.sum(0)
    else:
        dZ = dZ + through(dU, c_U, g, ops, "W_U")
    if "A" in config.static:
        g["A"] += dA.sum(0)
    else:
        dZ = dZ + through(dA, c_A, g, ops, "W_A")
    if config.static != "AU":
        dXhat_Z, dW_K, dW_V, dQ = ops.summarize_backward(dZ, c_Z)
        g["W_K"] += dW_K
        g["W_V"] += dW_V
        g["Q"] += dQ
        dXhat += dXhat_Z
    dX_norm, dweight, dbias = ops.layernorm_backward(dXhat, c_norm)
    dX_norm += dX
    if config.tokens == "X":
        dX_norm += dtokens
    g["norm.weight"] += dweight
    g["norm.bias"] += dbias
    return dX_norm.reshape(dy.shape)


def through(dy, cache, g, ops, weight, bias=None):
    """dx of `ops.linear`; the gradients of its weight and bias are added into g under these names."""
    dx, dW, db = ops.linear_backward(dy, cache)
    g[weight] += dW.reshape(g[weight].shape)
    if bias:
        g[bias] += db
    return dx


def each(value, B):
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


def _affinities_backward(dS, cache, config, ops):
    c_S, c_T, c_mean = cache
    if config.level == "image":
        dS = ops.token_mean_backward(dS, c_mean)
    if config.affinity != "signed":
        dS = ops.topk_softmax_backward(dS, c_T)
    return ops.affinity_backward(dS, c_S)


def _assemble(X, tokens, A, U, config, ops):
    if config.affinity == "signed" and config.level == "token":
        return ops.assembly(X, tokens, A, U)
    S, c_S = _affinities(tokens, A, config, ops)
    Y, c_Y = ops.combine(X, S, U)
    return Y, (c_S, c_Y)


def _assemble_backward(dY, cache, config, ops):
    if config.affinity == "signed" and config.level == "token":
        return ops.assembly_backward(dY, cache)
    c_S, c_Y = cache
    dX, dS, dU = ops.combine_backward(dY, c_Y)
    return dX, *_affinities_backward(dS, c_S, config, ops), dU


def anatomy(cache):
    """What one forward pass wrote, for plots: the tokens (B,N,C) that S is taken of, S (B,N,R), A and U (B,R,C), P (B,h,R,N) or None where nothing is probed."""
    *_, c_Z, c_A, c_U, c_Y, tokens, A, U, config, ops = cache
    S, _ = _affinities(tokens, A, config, ops)
    return {"tokens": tokens, "S": S, "A": A, "U": U, "P": None if c_Z is None else ops.attention(c_Z)}
