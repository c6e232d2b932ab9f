"""What CEA is compared with, under the same contract: token MLP, descriptor, prompt and experts, forward over backward.

A family has a configuration and three functions: the parameters' `shapes`, forward and backward. Like CEA, all start
from the normalized features of a stage, X̂ = Norm(X), and end with a factor that starts at zero, so that Y = X. The norm is each
token's own (LayerNorm) or the image's, as `CEAConfig.norm`.
SG is NAFNet's simple gate: the product of the two halves of the channels. Sizes, and where the non-linearity sits, are our
choice, made so that each family is as strong as we could make it at CEA's number of parameters. Static low-rank is
`CEAConfig(static="AU")`.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import ablations
from .ablations import CEAConfig, check, normalized, normalized_backward, repeated
from .cea import tokens
from .ops import cpu
from .params import accumulate
from .runtime import InputError


def _normalized(x, p, config, ops):
    """X̂ (B,H,W,C) and its cache; InputError unless x is of that shape, no side zero."""
    tokens(x, p)
    return normalized(x, p, config.norm, ops)


class Checked:
    """A configuration that is checked when made."""

    def __post_init__(self):
        check(self)


# ---- token MLP -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MLPConfig(Checked):
    """Every token through the same small network: Y = X + SG(X̂ W_1 + b_1) W_2, with M hidden channels."""
    hidden: int = 50
    norm: str = "token"


def mlp_shapes(C, config):
    """W_1 (C,2M), b_1 (2M,), W_2 (M,C), and the norm's."""
    M = config.hidden
    return {"norm.weight": (C,), "norm.bias": (C,), "W_1": (C, 2 * M), "b_1": (2 * M,), "W_2": (M, C)}


def mlp(x, p, config, ops=cpu):
    """x (B,H,W,C) -> (B,H,W,C), cache; so for every family."""
    Xhat, c_norm = _normalized(x, p, config, ops)
    u, c_1 = ops.linear(Xhat, p["W_1"], p["b_1"])
    v, c_gate = ops.simple_gate(u)
    w, c_2 = ops.linear(v, p["W_2"])
    return x + w, (c_norm, c_1, c_gate, c_2, ops)


def mlp_backward(dy, cache, g):
    c_norm, c_1, c_gate, c_2, ops = cache
    dv = accumulate(g, ops.linear_backward(dy, c_2), "W_2")
    du = ops.simple_gate_backward(dv, c_gate)
    dXhat = accumulate(g, ops.linear_backward(du, c_1), "W_1", "b_1")
    return dy + normalized_backward(dXhat, c_norm, g)


# ---- descriptor ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DescriptorConfig(Checked):
    """One vector for the image sets a scale and a shift per channel: Y = X + (X̂ (1+γ) + β) W.

    (γ, β) = SG(mean(X̂) W_1 + b_1) W_2 + b_2, with M hidden channels. Source: FiLM (Perez et al. 2018), as AirNet's and
    InstructIR's descriptors; the channel mix W follows InstructIR.
    """
    hidden: int = 28
    norm: str = "token"


def descriptor_shapes(C, config):
    """W_1 (C,2M), b_1 (2M,), W_2 (M,2C), b_2 (2C,), W (C,C), and the norm's."""
    M = config.hidden
    return {"norm.weight": (C,), "norm.bias": (C,), "W_1": (C, 2 * M), "b_1": (2 * M,),
            "W_2": (M, 2 * C), "b_2": (2 * C,), "W": (C, C)}


def descriptor(x, p, config, ops=cpu):
    Xhat, c_norm = _normalized(x, p, config, ops)
    C = x.shape[-1]
    d, c_pool = ops.global_average_pool(Xhat)
    u, c_1 = ops.linear(d, p["W_1"], p["b_1"])
    e, c_gate = ops.simple_gate(u)
    film, c_2 = ops.linear(e, p["W_2"], p["b_2"])                               # (B,1,1,2C)
    f, c_scale = ops.scale_channels(Xhat, 1 + film[..., :C])
    w, c_mix = ops.linear(f + film[..., C:], p["W"])
    return x + w, (c_norm, c_pool, c_1, c_gate, c_2, c_scale, c_mix, ops)


def descriptor_backward(dy, cache, g):
    c_norm, c_pool, c_1, c_gate, c_2, c_scale, c_mix, ops = cache
    df = accumulate(g, ops.linear_backward(dy, c_mix), "W")
    dXhat, dgamma = ops.scale_channels_backward(df, c_scale)
    dbeta = df.sum((1, 2), keepdims=True)
    de = accumulate(g, ops.linear_backward(np.concatenate((dgamma, dbeta), -1), c_2), "W_2", "b_2")
    du = ops.simple_gate_backward(de, c_gate)
    dd = accumulate(g, ops.linear_backward(du, c_1), "W_1", "b_1")
    return dy + normalized_backward(dXhat + ops.global_average_pool_backward(dd, c_pool), c_norm, g)


# ---- prompt ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PromptConfig(Checked):
    """Learned maps, mixed for the image: w = softmax(mean(X̂) W_p) over T prompts P_t (s,s,D), resized to the features' size.

    Y = X + SG(X̂ W_1 + b_1 + resize(Σ_t w_t P_t W_P)) W_2, with M hidden channels. Source: PromptIR (Potlapalli et al. 2023),
    whose interaction is a transformer block; W_P comes before the resizing, which is cheaper and the same.
    """
    prompts: int = 5
    size: int = 8
    channels: int = 8
    hidden: int = 19
    norm: str = "token"


def prompt_shapes(C, config):
    """W_p (C,T), P (T,s,s,D), W_P (D,2M), W_1 (C,2M), b_1 (2M,), W_2 (M,C), and the norm's."""
    T, s, D, M = config.prompts, config.size, config.channels, config.hidden
    return {"norm.weight": (C,), "norm.bias": (C,), "W_p": (C, T), "P": (T, s, s, D), "W_P": (D, 2 * M),
            "W_1": (C, 2 * M), "b_1": (2 * M,), "W_2": (M, C)}


def prompt(x, p, config, ops=cpu):
    Xhat, c_norm = _normalized(x, p, config, ops)
    B, H, W, _ = x.shape
    d, c_pool = ops.global_average_pool(Xhat)
    logits, c_p = ops.linear(d, p["W_p"])
    w, c_softmax = ops.topk_softmax(logits, config.prompts)                     # (B,1,1,T)
    mixed, c_mix = ops.linear(w, p["P"].reshape(config.prompts, -1))
    q, c_P = ops.linear(mixed.reshape(B, *p["P"].shape[1:]), p["W_P"])          # (B,s,s,2M)
    resized, c_resize = ops.resize(q, H, W)
    u, c_1 = ops.linear(Xhat, p["W_1"], p["b_1"])
    v, c_gate = ops.simple_gate(u + resized)
    y, c_2 = ops.linear(v, p["W_2"])
    return x + y, (c_norm, c_pool, c_p, c_softmax, c_mix, c_P, c_resize, c_1, c_gate, c_2, ops)


def prompt_backward(dy, cache, g):
    c_norm, c_pool, c_p, c_softmax, c_mix, c_P, c_resize, c_1, c_gate, c_2, ops = cache
    dv = accumulate(g, ops.linear_backward(dy, c_2), "W_2")
    du = ops.simple_gate_backward(dv, c_gate)
    dXhat = accumulate(g, ops.linear_backward(du, c_1), "W_1", "b_1")
    dmixed = accumulate(g, ops.linear_backward(ops.resize_backward(du, c_resize), c_P), "W_P")
    dw = accumulate(g, ops.linear_backward(dmixed.reshape(len(dy), 1, 1, -1), c_mix), "P")
    dd = accumulate(g, ops.linear_backward(ops.topk_softmax_backward(dw, c_softmax), c_p), "W_p")
    return dy + normalized_backward(dXhat + ops.global_average_pool_backward(dd, c_pool), c_norm, g)


# ---- experts ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ExpertsConfig:
    """E static low-rank experts of r columns each: Y = X + Σ_e G_e (X̂ A_e^T / sqrt(C)) U_e / sqrt(E r), with a router's gate G.

    π = softmax(mean(X̂) W_g) for the image, or of X̂ W_g for each token (level); G = π at its k largest, else 0 (Switch
    Transformer, Fedus et al. 2021: not normalized again, so that the router learns even for k = 1). Image level as MoCE-IR,
    without its noise: the same answer twice. Training adds `balance` times `ops.load_balance(π)` to the loss: the backward does,
    in the gradient. It is taken of π, before the top-k, so that the experts not chosen are heard too.
    """
    experts: int = 4
    topk: int = 1
    rank: int = 18
    level: str = "image"
    balance: float = 0.01
    norm: str = "token"

    def __post_init__(self):
        check(self, level=("image", "token"))
        if self.topk > self.experts:
            raise InputError(f"topk is {self.topk}: expected at most the number of experts, {self.experts}")
        if not (isinstance(self.balance, (int, float)) and 0 <= self.balance < np.inf):
            raise InputError(f"balance is {self.balance!r}: expected a finite number of at least 0")


def experts_shapes(C, config):
    """W_g (C,E), A and U (E r,C), and the norm's."""
    E, r = config.experts, config.rank
    return {"norm.weight": (C,), "norm.bias": (C,), "W_g": (C, E), "A": (E * r, C), "U": (E * r, C)}


def experts(x, p, config, ops=cpu):
    Xhat, c_norm = _normalized(x, p, config, ops)
    B, H, W, C = x.shape
    X, Xhat = x.reshape(B, H * W, C), Xhat.reshape(B, H * W, C)
    routed, c_pool = ops.global_average_pool(Xhat[:, None]) if config.level == "image" else (Xhat[:, None], None)
    logits, c_g = ops.linear(routed[:, 0], p["W_g"])                              # (B,1 or N,E)
    pi, c_softmax = ops.topk_softmax(logits, config.experts)
    G, c_top = ops.keep_topk(pi, config.topk)
    S, c_S = ops.affinity(Xhat, repeated(p["A"], B))
    T, c_T = ops.gate_experts(S, G)
    Y, c_Y = ops.combine(X, T, repeated(p["U"], B))
    return Y.reshape(x.shape), (c_norm, c_pool, c_g, pi, c_softmax, c_top, c_S, c_T, c_Y, config, ops)


def experts_backward(dy, cache, g):
    c_norm, c_pool, c_g, pi, c_softmax, c_top, c_S, c_T, c_Y, config, ops = cache
    B, H, W, C = dy.shape
    _, dT, dU = ops.combine_backward(dy.reshape(B, H * W, C), c_Y)
    g["U"] += dU.sum(0)
    dS, dG = ops.gate_experts_backward(dT, c_T)
    dXhat, dA = ops.affinity_backward(dS, c_S)
    g["A"] += dA.sum(0)
    dpi = ops.keep_topk_backward(dG, c_top) + ops.load_balance_backward(config.balance, ops.load_balance(pi)[1])
    drouted = accumulate(g, ops.linear_backward(ops.topk_softmax_backward(dpi, c_softmax), c_g), "W_g")
    if config.level == "image":
        drouted = ops.global_average_pool_backward(drouted[:, None], c_pool)[:, 0]
    return dy + normalized_backward((dXhat + drouted).reshape(dy.shape), c_norm, g)


# ---- all of them -----------------------------------------------------------------------------------------------------

class Family(NamedTuple):
    """A kind of adapter: its configuration's type, and its functions; see the top of this file."""
    config: type
    shapes: Callable
    forward: Callable
    backward: Callable


FAMILIES = {"cea": Family(CEAConfig, ablations.shapes, ablations.forward, ablations.backward),
            "mlp": Family(MLPConfig, mlp_shapes, mlp, mlp_backward),
            "descriptor": Family(DescriptorConfig, descriptor_shapes, descriptor, descriptor_backward),
            "prompt": Family(PromptConfig, prompt_shapes, prompt, prompt_backward),
            "experts": Family(ExpertsConfig, experts_shapes, experts, experts_backward)}


def family(config):
    """The Family of an adapter's configuration; None for anything else."""
    return next((family for family in FAMILIES.values() if type(config) is family.config), None)
