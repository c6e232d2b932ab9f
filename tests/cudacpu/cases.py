"""The sample kernels: how each is launched, and what it must compute according to NumPy."""
from pathlib import Path
from typing import NamedTuple

import numpy as np

KERNELS = Path(__file__).parent / "kernels"
f32, f64, i32 = np.float32, np.float64, np.int32


def nan(*shape, dtype=f32):
    return np.full(shape, np.nan, dtype)


def data(*shapes, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(s)).astype(f32) for s in shapes]


# Each function launches the kernels of a module and returns [(computed, expected), ...].

def assemble(module, seed=0, N=70, C=128, r=8):
    x, y, a, b = data((N, C), (N, C), (r, C), (r, C), scale=0.3)
    expected = y + (x.astype(f64) @ a.T) @ b
    module.get_function("assemble<float,128>")((3,), (256,), (y, x, a, b, i32(N), i32(r)), shared_mem=2 * r * C * 4, seed=seed)
    return [(y, expected)]


def tiled(module, seed=0, N=70, C=128, r=16):
    x, y, a, b = data((N, C), (N, C), (r, C), (r, C), scale=0.3)
    expected = y + (x.astype(f64) @ a.T) @ b
    module.get_function("assemble_tiled<128,16>")((-(-N // 64),), (256,), (y, x, a, b, i32(N)), seed=seed)
    return [(y, expected)]


def tf32(module, seed=0, N=128, C=64, r=16):
    x, y, a, b = data((N, C), (N, C), (r, C), (r, C), scale=0.3)
    expected = y + (x.astype(f64) @ a.T) @ b
    module.get_function("assemble_tf32<64,16>")((N // 64,), (128,), (y, x, a, b, i32(N)), seed=seed)
    return [(y, expected)]


def attention(module, seed=0, N=213, r=10, D=64, split=64):
    q, k, v = data((r, D), (N, D), (N, D))
    s = q.astype(f64) @ k.T / np.sqrt(D)
    p = np.exp(s - s.max(1, keepdims=True))
    expected = (p / p.sum(1, keepdims=True)) @ v
    n = -(-N // split)
    pm, pl, pa, o = nan(n, r), nan(n, r), nan(n, r, D), nan(r, D)
    arguments = (pm, pl, pa, q, k, v, i32(r), i32(N), i32(split), f32(D ** -0.5))
    module.get_function("attn_partial<64>")((n,), (256,), arguments, seed=seed)
    module.get_function("attn_combine<64>")((r,), (D,), (o, pm, pl, pa, i32(r), i32(n)), shared_mem=4 * n, seed=seed)
    return [(o, expected)]


def layernorm(module, seed=0, n=45, C=128, eps=1e-5, blocks=3):
    x, g, b, dy = data((n, C), (C,), (C,), (n, C))
    mu = x.astype(f64).mean(1, keepdims=True)
    rs = 1 / np.sqrt(x.astype(f64).var(1, keepdims=True) + eps)
    xh = (x - mu) * rs
    dg = dy * g.astype(f64)
    expected_dx = rs * (dg - dg.mean(1, keepdims=True) - xh * (dg * xh).mean(1, keepdims=True))
    y, m, r, dx, part, dgb = nan(n, C), nan(n), nan(n), nan(n, C), nan(blocks, 2, C), nan(2, C)
    module.get_function("ln_forward<128>")((-(-n // 8),), (256,), (y, m, r, x, g, b, i32(n), f32(eps)), seed=seed)
    module.get_function("ln_backward<128>")((blocks,), (256,), (dx, part, dy, x, g, m, r, i32(n)), seed=seed)
    module.get_function("column_sum")((2 * C // 32,), (32, 8), (dgb, part, i32(blocks), i32(2 * C)), seed=seed)
    return [(y, xh * g + b), (dx, expected_dx), (dgb, np.stack([(dy * xh).sum(0), dy.sum(0, dtype=f64)]))]


def numbers(module, seed=0, dtype=f32, n=77):
    x = data((n,))[0].astype(dtype)
    y, total = nan(n, dtype=dtype), np.zeros(1, dtype)
    expected = np.exp(x.astype(f64) - x.max()) / np.sqrt(1 + np.abs(x.astype(f64)))
    name = {f32: "float", f64: "double"}[dtype]
    module.get_function(f"numbers<{name}>")((1,), (32,), (y, total, x, i32(n)), seed=seed)
    return [(y, expected), (total, expected.sum(keepdims=True))]


def doubles(module, seed=0):
    return numbers(module, seed, f64)


def saxpy(module, seed=0, n=1000):
    x, y = data((n,), (n,))
    expected = y + 2.5 * x.astype(f64)
    module.get_function("saxpy")((-(-n // 256),), (256,), (y, x, f32(2.5), i32(n)), seed=seed)
    return [(y, expected)]


def last_block_sum(module, seed=0, n=2000, blocks=5):
    x, = data((n,))
    out, part, ticket = nan(1), nan(blocks), np.zeros(1, np.uint32)
    module.get_function("last_block_sum")((blocks,), (256,), (out, part, ticket, x, i32(n)), seed=seed)
    return [(out, x.sum(dtype=f64, keepdims=True)), (ticket, [0])]


def warp_tricks(module, seed=0, n=300):
    x = np.random.default_rng(0).integers(-5, 6, n, dtype=i32)
    out = np.full(n, 2**31 - 1, i32)
    module.get_function("warp_tricks")((2,), (256,), (out, x, i32(n)), seed=seed)
    lanes = np.zeros(-(-n // 32) * 32, i32)
    lanes[:n] = x
    warps = lanes.reshape(-1, 32)
    halves = np.repeat(warps.reshape(-1, 2, 16).sum(2), 16, axis=1)
    return [(out, (warps * 1000 + (warps > 0).sum(1, keepdims=True) + 100 * halves).ravel()[:n])]


def histogram(module, seed=0, n=1500):
    x = np.random.default_rng(0).integers(0, 256, n, dtype=np.uint8)
    out = np.zeros(256, i32)
    module.get_function("histogram")((3,), (256,), (out, x, i32(n)), seed=seed)
    return [(out, np.bincount(x, minlength=256))]


def pipe_scale(module, seed=0, tiles=5):
    x, = data((tiles * 1024,))
    y = nan(tiles * 1024)
    module.get_function("pipe_scale")((2,), (256,), (y, x, f32(3.0), i32(x.size)), seed=seed)
    return [(y, 3.0 * x.astype(f64))]


class Case(NamedTuple):
    """A launch: its kernels' file, the function above, and how far it may be off, relative to the largest expected value."""
    file: str
    run: callable
    rtol: float


NAMES = {"assembly": ("assemble<float,128>", "assemble_tiled<128,16>"),
         "assembly_wmma": ("assemble_tf32<64,16>",),
         "attention": ("attn_partial<64>", "attn_combine<64>"),
         "layernorm": ("ln_forward<128>", "ln_backward<128>"),
         "misc": (), "numbers": ("numbers<float>", "numbers<double>"), "pipe": ()}
CASES = {"assemble": Case("assembly", assemble, 2e-5), "tiled": Case("assembly", tiled, 2e-5),
         "tf32": Case("assembly_wmma", tf32, 5e-3), "attention": Case("attention", attention, 2e-5),
         "layernorm": Case("layernorm", layernorm, 2e-5),
         "numbers": Case("numbers", numbers, 2e-6), "doubles": Case("numbers", doubles, 1e-14),
         "saxpy": Case("misc", saxpy, 1e-6), "last_block_sum": Case("misc", last_block_sum, 1e-5),
         "warp_tricks": Case("misc", warp_tricks, 0), "histogram": Case("misc", histogram, 0),
         "pipe_scale": Case("pipe", pipe_scale, 1e-6)}


def source(file):
    """The text of a sample kernel."""
    return (KERNELS / f"{file}.cu").read_text()


def wrong(computed, expected, rtol):
    """Whether a result is off by more than rtol of the largest expected value anywhere; NaN is."""
    return not np.allclose(computed, expected, rtol=0, atol=rtol * np.abs(expected).max())
