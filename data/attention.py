"""Self-attention on the tasks of `tinycea mechanism`: every token asks every other one. CEA does that through R latents.

    python data/attention.py [FOLDER]

FOLDER: of photographs to choose size and rate and to test on, see `tinycea mechanism --test`. With Q = X̂ W_Q, K = X̂ W_K,
V = X̂ W_V,

    softmax:  Y = X + softmax(Q Kᵀ/√D) V W_U,   N² affinities of N tokens;
    linear:   Y = X + Q (Kᵀ V/N) W_U,           signed, D² numbers for the image: what CEA writes with A and U, unsummarized.
"""
import os
import sys
from dataclasses import dataclass
from itertools import product

from scipy.special import softmax

from tinycea import adapters
from tinycea.ablations import normalized, normalized_backward
from tinycea.lab import mechanism
from tinycea.ops import cpu
from tinycea.params import accumulate
from tinycea.runtime import machine, pool

ROWS = "W_Q", "W_K", "W_V"


@dataclass(frozen=True)
class AttentionConfig:
    """One head of D channels; its affinities are a softmax's, or signed."""
    signed: bool = False
    D: int = 16


def shapes(C, config):
    """W_Q, W_K, W_V (C,D), W_U (D,C), and the norm's."""
    return {"norm.weight": (C,), "norm.bias": (C,)} | dict.fromkeys(ROWS, (C, config.D)) | {"W_U": (config.D, C)}


def attention(x, p, config, ops=cpu):
    """x (B,H,W,C) -> (B,H,W,C), cache."""
    Xhat, c_norm = normalized(x, p, "image", ops)
    tokens = Xhat.reshape(len(x), -1, x.shape[-1])
    (Q, c_Q), (K, c_K), (V, c_V) = (ops.linear(tokens, p[name]) for name in ROWS)
    scale = 1 / tokens.shape[1] if config.signed else config.D**-0.5
    P = Q @ K.swapaxes(1, 2) * scale
    P = P if config.signed else softmax(P, axis=2)
    y, c_U = ops.linear(P @ V, p["W_U"])
    return x + y.reshape(x.shape), (c_norm, c_Q, c_K, c_V, c_U, Q, K, V, P, scale, config, ops)


def attention_backward(dy, cache, g):
    """dx, and the parameters' gradients added into g."""
    c_norm, c_Q, c_K, c_V, c_U, Q, K, V, P, scale, config, ops = cache
    do = accumulate(g, ops.linear_backward(dy.reshape(len(dy), -1, dy.shape[-1]), c_U), "W_U")
    dP, dV = do @ V.swapaxes(1, 2), P.swapaxes(1, 2) @ do
    if not config.signed:
        dP = P * (dP - (dP * P).sum(2, keepdims=True))
    dQ, dK = dP @ K * scale, dP.swapaxes(1, 2) @ Q * scale
    dtokens = sum(accumulate(g, ops.linear_backward(d, c), name) for d, c, name in zip((dQ, dK, dV), (c_Q, c_K, c_V), ROWS))
    return dy + normalized_backward(dtokens.reshape(dy.shape), c_norm, g)


def tested(task, config, rate, seed, folder, split):
    """A layer taught -> PSNR in dB of every picture."""
    adapters.FAMILIES["attention"] = adapters.Family(AttentionConfig, shapes, attention, attention_backward)
    p = mechanism.teach(task, config, 2000, seed, rate)
    x, J, _ = mechanism.pictures(task, folder, split=split)
    return mechanism.psnr(attention(x, p, config)[0], J)


if __name__ == "__main__":
    folder, tasks = sys.argv[1] if len(sys.argv) > 1 else None, ("regions", "lamps")
    print("self-attention on the pictures of `tinycea mechanism`, size and rate best on validation; PSNR in dB, three seeds")
    with pool(os.cpu_count()) as executor:
        for name, signed in product(tasks, (False, True)):
            tried = {(D, rate): (mechanism.TASKS[name], AttentionConfig(signed, D), rate)
                     for D, rate in product((16, 32), (0.01, 0.03, 0.1))}
            found = {key: executor.submit(tested, *layer, 0, folder, "validation") for key, layer in tried.items()}
            D, rate = max(found, key=lambda key: found[key].result().mean())
            seeds = [executor.submit(tested, *tried[D, rate], seed, folder, "test") for seed in range(3)]
            print(f"{name:8s} {'linear' if signed else 'softmax':8s} D {D}, rate {rate:g}: ",
                  ", ".join(f"{seed.result().mean():.2f}" for seed in seeds), flush=True)
    print(machine())
