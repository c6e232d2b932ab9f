"""The arithmetic as run on a CPU: reference's doors; what a profile shows to be slow is overridden here, with what that saves.

Four ideas carry all of it. Work goes in tiles, so that temporaries stay small and in the cache. Sums over rows or columns are
products with a vector, which BLAS does. NumPy's inner loop over the C channels of one token is too short to be fast: up to 64
rows are joined, so that it runs over many. And products are associative: whatever is small is multiplied first.
"""
import ctypes
import math
import sys
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import as_strided

from . import reference
from .reference import *  # noqa: F403

TILE = 2**18                                  # numbers in a tile: 1 MB in float32; smaller tiles cost more calls than they save


def keep_memory():
    """Ask glibc, for this process, not to hand freed arrays back to the system; every step would fault the same pages in again.

    Training and restoring files call it. Saves 8,100 page faults and a quarter of the processor time of a training step.
    Elsewhere than on Linux it does nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        # M_MMAP_THRESHOLD, its largest value; M_TRIM_THRESHOLD; M_ARENA_MAX: else every thread has memory of its own, handed back
        for option, value in ((-3, 2**25), (-1, 2**30), (-8, 1)):
            mallopt(option, value)


# ---- tiles, joined rows, sums ----------------------------------------------------------------------------------------

def _cut(n, size):
    """range(n) in equal slices of about `size` (at least 1), the last one shorter."""
    size = -(-n // max(1, round(n / max(1, size))))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _tiles(B, N, width):
    """(images, rows) slices that cut B images of N rows of `width` numbers into tiles: several whole images, or part of one."""
    if N * width <= TILE:
        return [(b, slice(0, N)) for b in _cut(B, TILE // (N * width))]
    return [(slice(b, b + 1), n) for b in range(B) for n in _cut(N, TILE // width)]


def _joined(vector, n):
    """The vector as often as n rows can be joined to long ones: inner loops over up to 64 C numbers instead of C."""
    return np.tile(vector, math.gcd(n, 64))


def _scaled(rows, scale, out):
    """Rows (n,C) times one factor per channel (C,), into out (n,C)."""
    s = _joined(scale, len(rows))
    np.multiply(rows.reshape(-1, s.size), s, out=out.reshape(-1, s.size))
    return out


def _biased(y, bias):
    """y (...,C) with the bias (C,) added in place."""
    b = _joined(bias, y.size // y.shape[-1])
    long = y.reshape(-1, b.size)
    long += b
    return y


def _sum(rows):
    """(n,C) -> (C,)"""
    return np.ones(len(rows), rows.dtype) @ rows


def _gram(a, b):
    """a^T b of each image, (B,n,I), (B,n,O) -> (B,I,O), in pieces of 256 rows, which stay in cache. Two thirds of the time."""
    k = math.gcd(a.shape[1], 256)
    if k < 64:
        return a.swapaxes(1, 2) @ b
    a, b = (m.reshape(len(m), -1, k, m.shape[2]) for m in (a, b))
    return (a.swapaxes(2, 3) @ b).sum(1)


def _alone(value):
    """The sums of all parts of an image, asked by an op that holds one; here it holds the whole. See restoration.banded."""
    return [value]


# ---- linear maps over channels ---------------------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """The bias is added in place, in joined rows."""
    y = x.reshape(-1, x.shape[-1]) @ weight
    if bias is not None:
        _biased(y, bias)
    return y.reshape(*x.shape[:-1], -1), (x, weight, bias)


def linear_backward(dy, cache):
    x, weight, bias = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return (drows @ weight.T).reshape(x.shape), _gram(rows[None], drows[None])[0], None if bias is None else _sum(drows)


conv1x1 = partial(reference.conv1x1, linear=linear)
conv1x1_backward = partial(reference.conv1x1_backward, linear_backward=linear_backward)


# ---- normalization ---------------------------------------------------------------------------------------------------

def _normalize(rows, xhat, rstd, eps=1e-6):
    """Fill xhat (n,C) and rstd (n,1) of rows (n,C); means are products with 1/C, a tenth of the time of `mean`."""
    mean = np.full((rows.shape[1], 1), 1 / rows.shape[1], rows.dtype)
    np.subtract(rows, rows @ mean, out=xhat)
    rstd[:] = 1 / np.sqrt(xhat * xhat @ mean + eps)
    xhat *= rstd


def groupnorm(x, weight, bias, eps=1e-6, gather=_alone):
    """The scale 1/std goes into the weight: x - mean is kept, xhat never formed. Half the time."""
    w, b = (_joined(v, x[0].size // x.shape[-1]) for v in (weight, bias))
    rows = x.reshape(len(x), -1)
    n, total = map(sum, zip(*gather((rows.shape[1], rows.sum(1, keepdims=True)))))
    centered = rows - total / n
    rstd = 1 / np.sqrt(sum(gather(np.einsum("bn,bn->b", centered, centered))) / n + eps)
    y = centered.reshape(len(x), -1, w.size) * (rstd[:, None, None] * w)
    y += b
    return y.reshape(x.shape), (centered, rstd, weight)


def groupnorm_backward(dy, cache):
    """The means of g and g xhat over an image are products of w with sums over its tokens, which dw and db need anyway."""
    centered, rstd, weight = cache
    B, C = len(dy), weight.size
    rows, ones = dy.reshape(B, -1, C), np.ones((1, dy[0].size // C), dy.dtype)
    sum_product, sum_dy = ((ones @ d)[:, 0] for d in (rows * centered.reshape(rows.shape), rows))           # (B,C)
    rstd = rstd[:, None]
    sum_product *= rstd
    mean_product, mean = (s @ weight[:, None] / centered.shape[1] for s in (sum_product, sum_dy))
    w = _joined(weight, ones.size)
    dx = (rows.reshape(B, -1, w.size) * w).reshape(B, -1)
    dx -= mean
    dx -= centered * (mean_product * rstd)
    dx *= rstd
    return dx.reshape(dy.shape), sum_product.sum(0), sum_dy.sum(0)


def norm_conv1x1(x, norm_weight, norm_bias, weight, bias):
    """(xhat w + b) W + c = xhat (w W) + (b W + c): scale and bias go into the small matrix. 7 % of a training step."""
    C = x.shape[-1]
    rows, W = x.reshape(-1, C), weight[:, :, 0, 0].T
    xhat, rstd = np.empty((len(rows), C), x.dtype), np.empty((len(rows), 1), x.dtype)
    for s in _cut(len(rows), TILE // C):
        _normalize(rows[s], xhat[s], rstd[s])
    y, _ = linear(xhat, norm_weight[:, None] * W, norm_bias @ W + bias)
    return y.reshape(*x.shape[:-1], -1), (xhat, rstd, norm_weight, norm_bias, W)


def norm_conv1x1_backward(dy, cache):
    """All parameters' gradients come from G = xhat^T dy and the sum of dy; the mean of g = dL/dxhat is taken off its matrix."""
    xhat, rstd, w, b, W = cache
    rows, C = dy.reshape(len(xhat), -1), len(w)
    G, dbias = _gram(xhat[None], rows[None])[0], _sum(rows)
    wW, mean = w[:, None] * W, np.full((C, 1), 1 / C, dy.dtype)
    g = rows @ (wW - wW.mean(0)).T
    for s in _cut(len(rows), TILE // C):
        product = g[s] * xhat[s]
        g[s] -= np.multiply(xhat[s], product @ mean, out=product)
        g[s] *= rstd[s]
    dW = w[:, None] * G + np.outer(b, dbias)
    return g.reshape(*dy.shape[:-1], C), (G * W).sum(1), W @ dbias, dW.T[:, :, None, None], dbias


# ---- convolutions ----------------------------------------------------------------------------------------------------

def _padded(x, b, h):
    """Rows h of images b with a neighbor on every side, zero outside the image: (b,h+2,W+2,C), and its strides."""
    _, H, W, C = x.shape
    first, stop = max(h.start - 1, 0), min(h.stop + 1, H)
    padded = np.zeros((b.stop - b.start, h.stop - h.start + 2, W + 2, C), x.dtype)
    padded[:, first - h.start + 1:stop - h.start + 1, 1:-1] = x[b, first:stop]
    return padded, padded.strides


def _triples(x, b, h):
    """Every pixel of h, of the rows above and below too, with its left and right neighbor -> [(b,hW,3C)], a kernel row each."""
    padded, (image, row, pixel, channel) = _padded(x, b, h)
    B, H, W, C = padded.shape
    triples = as_strided(padded, (B, H, W - 2, 3 * C), (image, row, pixel, channel)).copy()
    return [triples[:, i:i + H - 2].reshape(B, -1, 3 * C) for i in range(3)]


def conv3x3(x, weight, bias):
    """Three products, one per row of the kernel: three copies of a tile instead of nine of the images."""
    B, H, W, C = x.shape
    y = np.empty((B, H, W, len(weight)), x.dtype)
    matrices = weight.transpose(2, 3, 1, 0).reshape(3, 3 * C, -1)
    for b, h in _tiles(B, H, 3 * W * C):
        top, middle, bottom = (rows @ matrix for rows, matrix in zip(_triples(x, b, h), matrices))
        top += middle
        top += bottom
        np.add(top.reshape(y[b, h].shape), bias, out=y[b, h])
    return y, (x, weight)


def conv3x3_backward(dy, cache):
    x, weight = cache
    B, H, W, C = x.shape
    dx, _ = conv3x3(dy, weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3), 0)
    dmatrices = np.zeros((3, 3 * C, len(weight)), x.dtype)
    for b, h in _tiles(B, H, 3 * W * C):
        drows = dy[b, h].reshape(b.stop - b.start, -1, len(weight))
        for dmatrix, rows in zip(dmatrices, _triples(x, b, h)):
            dmatrix += _gram(rows, drows).sum(0)
    return dx, dmatrices.reshape(3, 3, C, -1).transpose(3, 2, 0, 1), _sum(dy.reshape(-1, len(weight)))


def _shifted(x, b, h):
    """The nine shifts of rows h of images b, each row of W C numbers in one: (b,h,3,3,WC), a view of a padded copy."""
    padded, (image, row, pixel, channel) = _padded(x, b, h)
    B, H, W, C = padded.shape
    return as_strided(padded, (B, H - 2, 3, 3, (W - 2) * C), (image, row, row, pixel, channel), writeable=False)


def depthwise3x3(x, weight, bias):
    """einsum multiplies and adds in one pass over rows of W C numbers: a fifth of the time."""
    B, H, W, C = x.shape
    y = np.empty((B, H, W * C), x.dtype)
    taps, bias = np.tile(weight[:, 0].transpose(1, 2, 0), W), np.tile(bias, W)        # (3,3,WC), (WC,)
    for b, h in _tiles(B, H, W * C):
        np.einsum("bhijk,ijk->bhk", _shifted(x, b, h), taps, out=y[b, h])
        y[b, h] += bias
    return y.reshape(x.shape), (x, weight)


def depthwise3x3_backward(dy, cache):
    """One padded copy for both: dw, too, is a sum of products with dy shifted, the other way round."""
    x, weight = cache
    B, H, W, C = x.shape
    dx, dtaps = np.empty((B, H, W * C), x.dtype), np.zeros((3, 3, W * C), x.dtype)
    taps = np.tile(weight[:, 0, ::-1, ::-1].transpose(1, 2, 0), W)
    for b, h in _tiles(B, H, W * C):
        shifted, rows = _shifted(dy, b, h), x[b, h].reshape(-1, h.stop - h.start, W * C)
        np.einsum("bhijk,ijk->bhk", shifted, taps, out=dx[b, h])
        for i, j in np.ndindex(3, 3):
            dtaps[2 - i, 2 - j] += np.einsum("bhk,bhk->k", shifted[:, :, i, j], rows)
    return dx.reshape(x.shape), dtaps.reshape(9, W, C).sum(1).T.reshape(weight.shape), _sum(dy.reshape(-1, C))


# ---- gates -----------------------------------------------------------------------------------------------------------

def simple_gate(x):
    """einsum has the cheaper inner loop for rows this short: two thirds of the time."""
    halves = x.reshape(-1, 2, x.shape[-1] // 2)
    return np.einsum("nc,nc->nc", halves[:, 0], halves[:, 1]).reshape(*x.shape[:-1], -1), (halves,)


def simple_gate_backward(dy, cache):
    """Written where it belongs in one call: half the time."""
    (halves,) = cache
    return np.einsum("nkc,nc->nkc", halves[:, ::-1], dy.reshape(-1, dy.shape[-1])).reshape(*dy.shape[:-1], -1)


gated_depthwise3x3 = partial(reference.gated_depthwise3x3, conv=depthwise3x3, sg=simple_gate)
gated_depthwise3x3_backward = partial(reference.gated_depthwise3x3_backward, conv=depthwise3x3_backward, sg=simple_gate_backward)


def global_average_pool(x, gather=_alone):
    """A product with ones instead of a sum over two axes: a tenth of the time."""
    B, H, W, C = x.shape
    parts = gather((H * W, (np.full((1, H * W), 1 / (H * W), x.dtype) @ x.reshape(B, H * W, C))[:, None]))
    return sum(mean * (n / sum(n for n, _ in parts)) for n, mean in parts), (x.shape,)


# ---- Continuous Expert Assembly --------------------------------------------------------------------------------------

def summarize(xhat, W_K, W_V, Q, heads, gather=_alone):
    """K and V are never formed: per head, Q (xhat W_K)^T = (Q W_K^T) xhat^T and P (xhat W_V) = (P xhat) W_V. Half the time."""
    B, N, C = xhat.shape
    R, D = Q.shape
    q = Q.reshape(R, heads, D // heads).swapaxes(0, 1)                          # (h,R,D/h)
    w_K, w_V = (W.reshape(C, heads, D // heads).swapaxes(0, 1) for W in (W_K, W_V))       # (h,C,D/h)
    queries = (q @ w_K.swapaxes(1, 2) * (D // heads)**-0.5).reshape(-1, C)       # (hR,C): what each head of a query looks for
    E = xhat @ queries.T                                                           # (B,N,hR)
    k = math.gcd(N, 64)
    top = np.max(gather(E.reshape(B, N // k, -1).max(1).reshape(B, k, -1).max(1)), 0)     # (B,hR)
    shift = np.abs(top).max() > 30                                              # else exp neither overflows nor vanishes
    total, means = np.zeros((B, 1, heads * R), E.dtype), np.zeros((B, heads * R, C), E.dtype)
    for b, n in _tiles(B, N, heads * R):
        e = E[b, n]
        if shift:
            e -= top[b][:, None]
        np.exp(e, out=e)
        total[b] += np.ones((1, e.shape[1]), e.dtype) @ e
        means[b] += _gram(e, xhat[b, n])
    total, means = map(sum, zip(*gather((total, means))))
    share = 1 / total.swapaxes(1, 2)                                            # P^T = E^T share
    means *= share                                                              # P xhat
    z = means.reshape(B, heads, R, C) @ w_V                                     # (B,h,R,D/h)
    return z.swapaxes(1, 2).reshape(B, R, D), (xhat, q, w_K, w_V, queries, E, share, means)


def summarize_backward(dZ, cache):
    """With means = P xhat: dP = dmeans xhat^T, and rowsum(dP P) = rowsum(dmeans means)."""
    xhat, q, w_K, w_V, queries, E, share, means = cache
    (B, N, C), (h, R, d) = xhat.shape, q.shape
    dz = dZ.reshape(B, R, h, d).swapaxes(1, 2)                                  # (B,h,R,D/h)
    dw_V = (means.reshape(B, h, R, C).swapaxes(2, 3) @ dz).sum(0)
    dmeans = (dz @ w_V.swapaxes(1, 2)).reshape(B, h * R, C) * share             # with P's share of E
    center = (dmeans * means).sum(-1, keepdims=True)                             # (B,hR,1)
    dxhat, dqueries = np.empty_like(xhat), -(center / share * means).sum(0)     # dlogits = P (dP - center): its second half here,
    for b, n in _tiles(B, N, h * R):
        dlogits = xhat[b, n] @ dmeans[b].swapaxes(1, 2)                         # its first half there
        dlogits *= E[b, n]
        np.matmul(E[b, n], dmeans[b] - center[b] * queries, out=dxhat[b, n])
        dxhat[b, n] += dlogits @ queries
        dqueries += _gram(dlogits, xhat[b, n]).sum(0)
    dqueries = dqueries.reshape(h, R, C) * d**-0.5
    dq, dw_K = dqueries @ w_K, dqueries.swapaxes(1, 2) @ q
    return dxhat, *(dw.swapaxes(0, 1).reshape(C, h * d) for dw in (dw_K, dw_V)), dq.swapaxes(0, 1).reshape(R, h * d)


def attention(cache):
    """P (B,h,R,N) of a `summarize`."""
    _, q, _, _, _, E, share, _ = cache
    return (E * share.swapaxes(1, 2)).swapaxes(1, 2).reshape(len(E), *q.shape[:2], -1)


def assembly(x, xhat, A, U):
    """Reference's, but BLAS is slower with R = 8 columns than with C: there the fast weight is ahead up to C = 3 R, not 2 R
    (with 16 or 32 columns nearer 2 R: notebooks/03_linear_attention)."""
    R, C = A.shape[-2:]
    return reference._assembly(x, xhat, A, U, C < 3 * R and C < x.shape[-2])
