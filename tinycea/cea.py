"""Continuous Expert Assembly (arXiv 2605.06127): the method, forward over backward.

For tokens X (B,N,C) of one stage's features:

    X̂ = Norm(X)                                           (B,N,C)      by the image's one mean and variance, eps 1e-6, then a
                                                                       weight and a bias per channel
    K = X̂ W_K,   V = X̂ W_V                                (B,N,D)      what the probe sees
    P = softmax over n of  Q K^T / sqrt(D/h)              (B,h,R,N)    Q (R,D): R learned rank queries in h heads
    Z = P V                                               (B,R,D)      one summary of the image per rank component
    A = Z W_A,   U = Z W_U                                (B,R,C)      routing bases, residual directions
    S = X A^T / sqrt(C)                                   (B,N,R)      signed affinities: no softmax, no top-k
    Y = X + S U / sqrt(R)                                 (B,N,C)      each token assembles its own residual

The image writes one linear map, Y = X (I + A^T U / sqrt(C R)). Through the norm it is blind to the image's scale: doubling X
doubles Y. (Not so with a norm per token, which would also divide away how much of a degradation a token carries.)
The paper's abstract fixes the probe, A, U and the signed affinities; norm, heads, scales and initialization are our choice.
Derived line by line in notebooks/02_hyper_adapter; the last two lines as attention: notebooks/03_linear_attention. To write the
backward yourself: notebooks/00_write_the_backward. Switches for ablation are in ablations.py.
"""
from .ops import cpu
from .params import accumulate
from .runtime import InputError


def shapes(C, rank=8, heads=4, probe_channels=None):
    """Parameter names and shapes of a layer on C channels: R = rank components, D = probe_channels (None: C) in h = heads.

    InputError when D is no multiple of the heads.
    """
    R, D = rank, probe_channels or C
    if D % heads:
        raise InputError(f"cea probe_channels is {D}: expected a multiple of the {heads} heads")
    return {"norm.weight": (C,), "norm.bias": (C,), "W_K": (C, D), "W_V": (C, D), "Q": (R, D), "W_A": (D, C), "W_U": (D, C)}


def init(p, rng):
    """Fill a layer's parameters in place, or a rival's: matrices N(0, 1/rows), Q N(0, 1), so a rival's prompts P and learned A,
    biases and the last factor zero, so that Y = X. Our choice."""
    last = next(name for name in ("U", "W_U", "W", "W_2") if name in p)
    for name, value in p.items():
        if name == "norm.weight":
            value[...] = 1
        elif name == last or value.ndim == 1:
            value[...] = 0
        else:
            value[...] = rng.normal(0, 1 if name in "QPA" else value.shape[0]**-0.5, value.shape)


def cea(x, p, heads=4, ops=cpu):
    """One layer. Features x (B,H,W,C), parameters p (see `shapes`) -> y (B,H,W,C), cache. InputError for any other shape."""
    X = tokens(x, p)
    Xhat, c_norm = ops.groupnorm(X, p["norm.weight"], p["norm.bias"])
    Z, c_Z = ops.summarize(Xhat, p["W_K"], p["W_V"], p["Q"], heads)
    A, c_A = ops.linear(Z, p["W_A"])
    U, c_U = ops.linear(Z, p["W_U"])
    Y, c_Y = ops.assembly(X, X, A, U)
    return Y.reshape(x.shape), (X, A, U, c_norm, c_Z, c_A, c_U, c_Y, ops)


def cea_backward(dy, cache, g):
    """dx, and every parameter's gradient added into g (names as in p): the forward read from the bottom up."""
    X, _, _, c_norm, c_Z, c_A, c_U, c_Y, ops = cache
    dX, dX_S, dA, dU = ops.assembly_backward(dy.reshape(X.shape), c_Y)          # dX_S: through the affinities
    dZ = accumulate(g, ops.linear_backward(dU, c_U), "W_U")
    dZ = dZ + accumulate(g, ops.linear_backward(dA, c_A), "W_A")
    dXhat = accumulate(g, ops.summarize_backward(dZ, c_Z), "W_K", "W_V", "Q")
    dX = dX + dX_S + accumulate(g, ops.groupnorm_backward(dXhat, c_norm), "norm.weight", "norm.bias")
    return dX.reshape(dy.shape)


def tokens(x, p):
    """Features (B,H,W,C) as tokens (B,N,C), a view; InputError for another shape than the layer's."""
    if getattr(x, "ndim", 0) != 4 or 0 in x.shape or p["norm.weight"].shape != x.shape[-1:]:
        raise InputError(f"x has shape {getattr(x, 'shape', None)}: expected (B,H,W,{p['norm.weight'].size}), no side zero")
    return x.reshape(len(x), -1, x.shape[-1])
