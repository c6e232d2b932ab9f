"""The arithmetic on a GPU: reference's doors on CuPy arrays.

What is not overridden here is reference's own code, which NumPy hands to CuPy. Sums over tokens are fused with what reads the
tokens: raw kernels, one file each under kernels/, with its equation, grid and bytes in its head. Plain matrix products are
cuBLAS's. Every sum has two stages in a fixed order, so the same seed gives the same bytes. From one thread per number to the
fused kernel: notebooks/09_one_kernel.
"""
import math
from functools import cache, partial
from importlib.resources import files

import cupy as cp
import numpy as np

from ..runtime import InputError
from . import reference
from .reference import *  # noqa: F403

TYPES = {"float32": "float", "float64": "double"}
HALF = {"assembly": (0, 1, 2), "assembly_backward": (0, 2, 3)}                  # arguments that may be float16, all or none


# ---- launching -------------------------------------------------------------------------------------------------------

def source(file):
    """CUDA C++ of a file of kernels, what they share put in front."""
    common, own = ((files(__package__) / "kernels" / name).read_text() for name in ("common.cuh", f"{file}.cu"))
    return f'#line 1 "common.cuh"\n{common}\n#line 1 "{file}.cu"\n{own}'


@cache
def _kernel(file, name, device):
    """A kernel, compiled on first use for a device: CUDA's template name, such as "layernorm<float, 48>"."""
    half = "#include <cuda_fp16.h>\n" if "__half" in name else ""
    return cp.RawModule(code=half + source(file), options=("-std=c++17",), name_expressions=[name]).get_function(name)


def _launch(kernel, template, grid, block, outputs, *inputs):
    """Launch `kernel` ("file" or "file.kernel"), with its template arguments after the type.

    outputs: arrays it writes; inputs: arrays it reads, and numbers. CuPy checks nothing and ignores strides. So the first
    output's type picks the instance, and everything must be of it; outputs must be contiguous, inputs are made so; an int becomes
    an int, a float a number of that type. Where HALF allows float16, what is not stored in it is float32. InputError for anything
    else.
    """
    file, name = kernel.split(".") if "." in kernel else (kernel, kernel)
    stored = outputs[0].dtype
    half = HALF.get(name, ()) if stored == np.float16 else ()
    dtype = np.dtype(np.float32) if half else stored
    if dtype.name not in TYPES:
        raise InputError(f"{name} takes float32 or float64 arrays, not {dtype}")
    arguments = []
    for i, a in enumerate((*outputs, *inputs)):
        if isinstance(a, cp.ndarray):
            expected = stored if i in half else dtype
            if a.dtype != expected:
                raise InputError(f"{name} got {a.dtype} {a.shape} as argument {i}: expected {expected}")
            if i < len(outputs) and not a.flags.c_contiguous:
                raise InputError(f"{name} writes to argument {i}, which is not contiguous")
            arguments.append(cp.ascontiguousarray(a))
        elif isinstance(a, int) and 0 <= a < 2**31:
            arguments.append(np.int32(a))
        elif isinstance(a, float):
            arguments.append(dtype.type(a))
        else:
            raise InputError(f"{name} got {a!r} as argument {i}: expected an array on the GPU, a float, or an integer below 2^31")
    instance = ", ".join([TYPES[dtype.name], *map(str, template), *(["__half"] if half else [])])
    _kernel(file, f"{name}<{instance}>", cp.cuda.Device().id)(grid, block, tuple(arguments))


def _expect(*shaped):
    """InputError unless each (array, shape) fits: a kernel would read past the end where NumPy complains.

    `_launch` refuses other things.
    """
    for array, shape in shaped:
        if isinstance(array, cp.ndarray) and array.shape != shape:
            raise InputError(f"an array of shape {array.shape} came where {shape} is expected")


def _blocks(pieces):
    """Blocks of a grid that walks over so many pieces of work: at most four for each multiprocessor."""
    return min(pieces, 4 * cp.cuda.Device().attributes["MultiProcessorCount"])


def _tile(M, dtype):
    """Tokens in a tile, so that two (tokens,M) arrays and a piece of the tokens fit into 48 kB; 0 where not even a warp's do."""
    tokens = min(512, 8192 // M) // dtype.itemsize
    return 1 << tokens.bit_length() - 1 if tokens >= 32 else 0


def _shares(C):
    """Rows of warps that share a tile's tokens between them (`Warps::SHARES` in common.cuh)."""
    return 4 // min(4, -(-C // 32))


def _column_sum(part):
    """(B,rows,...) -> (B,...), the sum over rows."""
    B, rows, *shape = part.shape
    out = cp.empty((B, *shape), part.dtype)
    columns = math.prod(shape)
    _launch("column_sum", (), (-(-columns // 32), B), (32, 8), [out], part, rows, columns)
    return out


def to_device(x):
    """A NumPy array's copy on the GPU."""
    return cp.asarray(x)


def to_host(x):
    """A GPU array's copy in NumPy."""
    return cp.asnumpy(x)


# ---- normalization ---------------------------------------------------------------------------------------------------

def layernorm(x, weight, bias, eps=1e-6):
    C = x.shape[-1]
    _expect((weight, (C,)), (bias, (C,)))
    n = x.size // C
    y, mean, rstd = cp.empty(x.shape, x.dtype), cp.empty(n, x.dtype), cp.empty(n, x.dtype)
    _launch("layernorm", (C,), (_blocks(-(-n // 8)),), (256,), [y, mean, rstd], x, weight, bias, n, float(eps))
    return y, (x, weight, mean, rstd)


def layernorm_backward(dy, cache):
    x, weight, mean, rstd = cache
    _expect((dy, x.shape))
    C, n = weight.size, mean.size
    blocks = _blocks(-(-n // 8))
    dx, part = cp.empty(x.shape, x.dtype), cp.empty((1, blocks, 2, C), x.dtype)
    _launch("layernorm.layernorm_backward", (C,), (blocks,), (256,), [dx, part], dy, x, weight, mean, rstd, n)
    return dx, *_column_sum(part)[0]


norm_conv1x1 = partial(reference.norm_conv1x1, norm=layernorm)
norm_conv1x1_backward = partial(reference.norm_conv1x1_backward, norm_backward=layernorm_backward)


# ---- convolutions ----------------------------------------------------------------------------------------------------

def gated_depthwise3x3(x, weight, bias):
    B, H, W, channels = x.shape
    C = channels // 2
    _expect((weight, (2 * C, 1, 3, 3)), (bias, (2 * C,)), (x, (B, H, W, 2 * C)))
    y = cp.empty((B, H, W, C), x.dtype)
    _launch("depthwise.gated_depthwise", (), _pixel_grid(B * H * W, C), (32, 8), [y], x, weight, bias, B * H * W, H, W, C)
    return y, (x, weight, bias)


def gated_depthwise3x3_backward(dy, cache):
    x, weight, bias = cache
    B, H, W, channels = x.shape
    C = channels // 2
    _expect((dy, (B, H, W, C)))
    grid = _pixel_grid(B * H * W, C)
    df, dx, part = cp.empty(x.shape, x.dtype), cp.empty(x.shape, x.dtype), cp.empty((1, grid[0], 2, 10, C), x.dtype)
    _launch("depthwise.gated_depthwise_backward", (), grid, (32, 8), [df, part], dy, x, weight, bias, B * H * W, H, W, C)
    flipped = weight[:, :, ::-1, ::-1]
    _launch("depthwise", (), _pixel_grid(B * H * W, channels), (32, 8), [dx], df, flipped, B * H * W, H, W, channels)
    sums = _column_sum(part)[0].swapaxes(1, 2).reshape(channels, 10)
    return dx, sums[:, :9].reshape(weight.shape), sums[:, 9]


def scale_channels(x, scale):
    B, H, W, C = x.shape
    _expect((scale, (B, 1, 1, C)))
    y = cp.empty(x.shape, x.dtype)
    _launch("scale", (), (*_pixel_grid(H * W, C), B), (32, 8), [y], x, scale, H * W, C)
    return y, (x, scale)


def scale_channels_backward(dy, cache):
    x, scale = cache
    _expect((dy, x.shape))
    B, H, W, C = x.shape
    grid = *_pixel_grid(H * W, C), B
    dx, part = cp.empty(x.shape, x.dtype), cp.empty((B, grid[0], C), x.dtype)
    _launch("scale.scale_backward", (), grid, (32, 8), [dx, part], dy, x, scale, H * W, C)
    return dx, _column_sum(part).reshape(scale.shape)


def _pixel_grid(pixels, channels):
    return _blocks(-(-pixels // 8)), -(-channels // 32)


# ---- Continuous Expert Assembly --------------------------------------------------------------------------------------

def summarize(xhat, W_K, W_V, Q, heads):
    """As cpu's: K and V are never formed. `probe` then reads the tokens once for all heads of all queries."""
    (B, N, C), (R, D) = xhat.shape, Q.shape
    q = Q.reshape(R, heads, D // heads).swapaxes(0, 1)                          # (h,R,D/h)
    w_K, w_V = (W.reshape(C, heads, D // heads).swapaxes(0, 1) for W in (W_K, W_V))       # (h,C,D/h)
    queries = (q @ w_K.swapaxes(1, 2) * (D // heads)**-0.5).reshape(-1, C)         # (hR,C)
    M, tokens = heads * R, _tile(heads * R, xhat.dtype)
    if not tokens:
        Z, cache = reference.summarize(xhat, W_K, W_V, Q, heads)
        return Z, (tokens, cache)
    blocks = _blocks(-(-N // tokens))
    top, total = cp.empty((B, blocks, M), xhat.dtype), cp.empty((B, blocks, M), xhat.dtype)
    part = cp.empty((B, blocks * _shares(C), M, C), xhat.dtype)
    means, lse = cp.empty((B, M, C), xhat.dtype), cp.empty((B, M), xhat.dtype)
    _launch("probe", (C, M, tokens), (blocks, B), (128,), [top, total, part], queries, xhat, N)
    _launch("probe.probe_combine", (C,), (M, B), (128,), [means, lse], top, total, part, blocks)
    z = means.reshape(B, heads, R, C) @ w_V                                      # (B,h,R,D/h)
    return z.swapaxes(1, 2).reshape(B, R, D), (tokens, xhat, q, w_K, w_V, queries, means, lse)


def summarize_backward(dZ, cache):
    tokens, *cache = cache
    if not tokens:
        return reference.summarize_backward(dZ, *cache)
    xhat, q, w_K, w_V, queries, means, lse = cache
    (B, N, C), (h, R, d), M = xhat.shape, q.shape, len(queries)
    dz = dZ.reshape(B, R, h, d).swapaxes(1, 2)                                  # (B,h,R,D/h)
    dw_V = (means.reshape(B, h, R, C).swapaxes(2, 3) @ dz).sum(0)
    dmeans = (dz @ w_V.swapaxes(1, 2)).reshape(B, M, C)
    center = (dmeans * means).sum(-1)                                             # (B,hR), = rowsum(dP P)
    blocks = _blocks(-(-N // tokens))
    dxhat, part = cp.empty(xhat.shape, xhat.dtype), cp.empty((1, B * blocks * _shares(C), M, C), xhat.dtype)
    _launch("probe.probe_backward", (C, M, tokens), (blocks, B), (128,), [dxhat, part], dmeans, center, queries, xhat, lse, N)
    dqueries = _column_sum(part)[0].reshape(h, R, C) * d**-0.5
    dq, dw_K = dqueries @ w_K, dqueries.swapaxes(1, 2) @ q
    return dxhat, *(dw.swapaxes(0, 1).reshape(C, h * d) for dw in (dw_K, dw_V)), dq.swapaxes(0, 1).reshape(R, h * d)


def attention(cache):
    """P (B,h,R,N) of a `summarize`, for plots: computed again from the saved denominators."""
    tokens, *cache = cache
    if not tokens:
        return reference.attention(*cache)
    xhat, q, _, _, queries, _, lse = cache
    return cp.exp(queries @ xhat.swapaxes(1, 2) - lse[..., None]).reshape(len(xhat), *q.shape[:2], -1)


def _assembly_kernels(C, R, dtype):
    """Who does the assembly: (file, tokens of a tile forward, and backward, shares of a tile's sums); None where no tile fits.

    Tensor cores where R is large, and the pieces fit into registers and shared memory.
    """
    if (dtype == np.float32 and R >= 32 and C % 16 == R % 16 == 0 and C + R <= 160
            and int(cp.cuda.Device().compute_capability) >= 80):
        return "assembly_tf32", 64, 32, 1
    tokens = _tile(R, np.result_type(dtype, np.float32))
    return ("assembly", tokens, tokens, _shares(C)) if tokens else None


def assembly(x, xhat, A, U):
    """Tokens first, S in shared memory; reference's two products where R is too large for that.

    The tokens may be stored in float16, x, xhat and Y alike, with A and U in float32, and so is all arithmetic: half the bytes to
    move. (bfloat16 would be one more instance of the kernel, but neither NumPy nor CuPy has that type.)
    """
    (B, N, C), R = x.shape, A.shape[1]
    _expect((xhat, x.shape), (A, (B, R, C)), (U, (B, R, C)))
    kernels = _assembly_kernels(C, R, x.dtype)
    if kernels is None:
        Y, cache = reference.assembly(x, xhat, A, U)
        return Y, (kernels, cache)
    file, tokens, _, _ = kernels
    y = cp.empty(x.shape, x.dtype)
    _launch(file, (C, R, tokens), (_blocks(-(-N // tokens)), B), (128,), [y], x, xhat, A, U, N, (C * R)**-0.5)
    return y, (kernels, xhat, A, U)


def assembly_backward(dY, cache):
    kernels, *cache = cache
    if kernels is None:
        return reference.assembly_backward(dY, *cache)
    file, _, tokens, shares = kernels
    xhat, A, U = cache
    _expect((dY, xhat.shape))
    (B, N, C), R = xhat.shape, A.shape[1]
    blocks = _blocks(-(-N // tokens))
    dxhat, part = cp.empty(xhat.shape, xhat.dtype), cp.empty((B, blocks * shares, 2, R, C), A.dtype)
    _launch(f"{file}.{file}_backward", (C, R, tokens), (blocks, B), (128,), [dxhat, part], dY, xhat, A, U, N, (C * R)**-0.5)
    dA, dU = _column_sum(part).swapaxes(0, 1)
    return dY, dxhat, dA, dU


# ---- the optimizer ---------------------------------------------------------------------------------------------------

def adamw(w, g, m, v, step, lr, decay, betas=(0.9, 0.99), eps=1e-8):
    """`reference.adamw` in one pass over memory."""
    b1, b2 = betas
    _expect(*((a, w.shape) for a in (g, m, v)))
    lr, decay = (cp.broadcast_to(cp.asarray(a, w.dtype), w.shape) for a in (lr, decay))
    _launch("adamw", (), (_blocks(-(-w.size // 256)),), (256,), [w, m, v], g, lr, decay, w.size,
            b1, b2, 1 - b1**step, 1 - b2**step, eps)
