"""Every operation as its definition in plain NumPy, any float dtype, each backward right under its forward.

Letters: B images, H x W pixels, n over N = H W tokens, c over C channels, r over R rank components, d over D probe channels,
h over heads; `dx` is always dL/dx, of x's shape. Images are channels-last (B,H,W,C), tokens (B,N,C) a view of them.
A forward returns (y, cache), the cache a plain tuple; its backward takes (dy, cache) and returns a gradient per input, in order.
Derivations: notebooks/01_token_assembly (affinity, combine), 02_hyper_adapter (layernorm, probe), 03_linear_attention
(fast_weight).
"""
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..runtime import InputError

# ---- where arrays live -------------------------------------------------------------------------------------------------

def to_device(x):
    """The NumPy array as this backend computes with it: itself, but for a GPU."""
    return x


def to_host(x):
    """Back again: a NumPy array."""
    return x


# ---- linear maps over channels ---------------------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """y = x W + b. x (...,I), weight (I,O), bias (O,) or None -> y (...,O)."""
    y = x.reshape(-1, x.shape[-1]) @ weight                                     # one product for all tokens of all images
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], -1), (x, weight, bias)


def linear_backward(dy, cache):
    """dx = dy W^T, dW = x^T dy, db = sum of dy over all but channels (None without bias)."""
    x, weight, bias = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return (drows @ weight.T).reshape(x.shape), rows.T @ drows, None if bias is None else drows.sum(0)


def conv1x1(x, weight, bias=None, linear=linear):
    """1 x 1 convolution: `linear`, or a backend's, with the weight in PyTorch's layout (O,I,1,1). x (B,H,W,I) -> (B,H,W,O)."""
    return linear(x, weight[:, :, 0, 0].T, bias)


def conv1x1_backward(dy, cache, linear_backward=linear_backward):
    """`linear_backward`, dW back in (O,I,1,1)."""
    dx, dweight, dbias = linear_backward(dy, cache)
    return dx, dweight.T[:, :, None, None], dbias


# ---- normalization ---------------------------------------------------------------------------------------------------

def _norm(x, weight, bias, eps, over):
    centered = x - x.mean(over, keepdims=True)
    rstd = 1 / np.sqrt((centered * centered).mean(over, keepdims=True) + eps)
    xhat = centered * rstd
    return xhat * weight + bias, (xhat, rstd, weight)


def _norm_gradients(dy, cache, over):
    xhat, rstd, weight = cache
    g = dy * weight
    dx = (g - g.mean(over, keepdims=True) - xhat * (g * xhat).mean(over, keepdims=True)) * rstd
    rest = tuple(range(dy.ndim - 1))
    return dx, (dy * xhat).sum(rest), dy.sum(rest)


def layernorm(x, weight, bias, eps=1e-6):
    """Normalize each token over its channels: y = w (x - mean)/sqrt(var + eps) + b (Ba et al. 2016; eps as NAFNet). x (...,C)."""
    return _norm(x, weight, bias, eps, -1)


def layernorm_backward(dy, cache):
    """With g = dy w: dx = (g - mean(g) - xhat mean(g xhat)) / std; dw = sum dy xhat, db = sum dy."""
    return _norm_gradients(dy, cache, -1)


def groupnorm(x, weight, bias, eps=1e-6):
    """Normalize each image over all its tokens and channels, then a weight and a bias per channel. x (B,...,C).

    GroupNorm with one group (Wu and He 2018): tokens keep their lengths relative to each other.
    """
    return _norm(x, weight, bias, eps, tuple(range(1, x.ndim)))


def groupnorm_backward(dy, cache):
    """As `layernorm_backward`, its means over the image."""
    return _norm_gradients(dy, cache, tuple(range(1, dy.ndim)))


def norm_conv1x1(x, norm_weight, norm_bias, weight, bias, norm=layernorm):
    """A 1 x 1 convolution of the normalized x: `layernorm`, or a backend's own, then `conv1x1`. x (B,H,W,I) -> (B,H,W,O)."""
    u, c_norm = norm(x, norm_weight, norm_bias)
    y, c_conv = conv1x1(u, weight, bias)
    return y, (c_norm, c_conv)


def norm_conv1x1_backward(dy, cache, norm_backward=layernorm_backward):
    """The two backwards in turn."""
    c_norm, c_conv = cache
    du, dweight, dbias = conv1x1_backward(dy, c_conv)
    return *norm_backward(du, c_norm), dweight, dbias


# ---- convolutions ----------------------------------------------------------------------------------------------------

def _pad1(x):
    return np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def conv3x3(x, weight, bias):
    """3 x 3 cross-correlation, zero padding 1: y[h,w,o] = b[o] + sum over i,j,c of x[h+i-1, w+j-1, c] w[o,c,i,j].

    x (B,H,W,I), weight (O,I,3,3), bias (O,) -> y (B,H,W,O).
    """
    windows = sliding_window_view(_pad1(x), (3, 3), (1, 2))                     # (B,H,W,I,3,3), a view
    return np.tensordot(windows, weight, ((3, 4, 5), (1, 2, 3))) + bias, (windows, weight)


def conv3x3_backward(dy, cache):
    """dx is dy convolved with the kernel flipped and its channels exchanged; dw correlates dy with the input windows."""
    windows, weight = cache
    dx, _ = conv3x3(dy, weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3), 0)
    return dx, np.tensordot(dy, windows, ((0, 1, 2), (0, 1, 2))), dy.sum((0, 1, 2))


def depthwise3x3(x, weight, bias):
    """3 x 3 cross-correlation of each channel with its own kernel, zero padding 1. x (B,H,W,C), weight (C,1,3,3), bias (C,)."""
    _, H, W, _ = x.shape
    padded = _pad1(x)
    y = np.zeros_like(x) + bias
    for i, j in np.ndindex(3, 3):
        y += padded[:, i:i + H, j:j + W] * weight[:, 0, i, j]
    return y, (padded, weight)


def depthwise3x3_backward(dy, cache):
    """dx is dy with the kernel flipped; dw[c,i,j] = sum of dy times the input shifted by (i,j)."""
    padded, weight = cache
    _, H, W, _ = dy.shape
    dx, _ = depthwise3x3(dy, weight[:, :, ::-1, ::-1], 0)
    dweight = np.empty_like(weight)
    for i, j in np.ndindex(3, 3):
        dweight[:, 0, i, j] = (dy * padded[:, i:i + H, j:j + W]).sum((0, 1, 2))
    return dx, dweight, dy.sum((0, 1, 2))


def down2x2(x, weight, bias):
    """2 x 2 convolution with stride 2: each patch becomes a token. x (B,2H,2W,I), even sides, weight (O,I,2,2) -> (B,H,W,O)."""
    B, H, W, C = x.shape
    patches = x.reshape(B, H // 2, 2, W // 2, 2, C)                             # (B,H,i,W,j,I)
    return np.tensordot(patches, weight, ((2, 4, 5), (2, 3, 1))) + bias, (patches, weight)


def down2x2_backward(dy, cache):
    """Patches do not overlap, so dx is one product per patch."""
    patches, weight = cache
    B, H, _, W, _, C = patches.shape
    dx = np.tensordot(dy, weight, (3, 0)).transpose(0, 1, 4, 2, 5, 3)           # (B,H,i,W,j,I)
    dweight = np.tensordot(dy, patches, ((0, 1, 2), (0, 1, 3))).transpose(0, 3, 1, 2)
    return dx.reshape(B, 2 * H, 2 * W, C), dweight, dy.sum((0, 1, 2))


# ---- rearrangements and gates ----------------------------------------------------------------------------------------

def pixel_shuffle(x, factor=2):
    """Channels become pixels, in PyTorch's order: y[fh+i, fw+j, c] = x[h, w, c f^2 + i f + j]. (B,H,W,C f^2) -> (B,fH,fW,C)."""
    B, H, W, C = x.shape
    y = x.reshape(B, H, W, C // factor**2, factor, factor).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(B, H * factor, W * factor, C // factor**2), (factor,)


def pixel_shuffle_backward(dy, cache):
    """The inverse permutation."""
    return pixel_unshuffle(dy, *cache)[0]


def pixel_unshuffle(x, factor=2):
    """Pixels become channels, the inverse of `pixel_shuffle`. (B,fH,fW,C) -> (B,H,W,C f^2)."""
    B, H, W, C = x.shape
    y = x.reshape(B, H // factor, factor, W // factor, factor, C).transpose(0, 1, 3, 5, 2, 4)
    return y.reshape(B, H // factor, W // factor, C * factor**2), (factor,)


def pixel_unshuffle_backward(dy, cache):
    """The inverse permutation."""
    return pixel_shuffle(dy, *cache)[0]


def simple_gate(x):
    """y = a b, where a and b are the two halves of x's channels (NAFNet, Chen et al. 2022). (...,2C) -> (...,C)."""
    a, b = np.split(x, 2, -1)
    return a * b, (a, b)


def simple_gate_backward(dy, cache):
    """da = dy b, db = dy a."""
    a, b = cache
    return np.concatenate((dy * b, dy * a), -1)


def gated_depthwise3x3(x, weight, bias, conv=depthwise3x3, sg=simple_gate):
    """`depthwise3x3`, then `simple_gate`, or a backend's own. x (B,H,W,2C), weight (2C,1,3,3), bias (2C,) -> (B,H,W,C)."""
    f, c_conv = conv(x, weight, bias)
    y, c_gate = sg(f)
    return y, (c_conv, c_gate)


def gated_depthwise3x3_backward(dy, cache, conv=depthwise3x3_backward, sg=simple_gate_backward):
    """The two backwards in turn."""
    c_conv, c_gate = cache
    return conv(sg(dy, c_gate), c_conv)


def global_average_pool(x):
    """Mean over pixels. (B,H,W,C) -> (B,1,1,C)."""
    return x.mean((1, 2), keepdims=True), (x.shape,)


def global_average_pool_backward(dy, cache):
    """Each pixel gets an equal share 1/(HW)."""
    (shape,) = cache
    return np.broadcast_to(dy / (shape[1] * shape[2]), shape)


def scale_channels(x, scale):
    """y = x s, one factor per image and channel (the product of NAFNet's SCA). x (B,H,W,C), scale (B,1,1,C)."""
    return x * scale, (x, scale)


def scale_channels_backward(dy, cache):
    """dx = dy s, ds = sum over pixels of dy x."""
    x, scale = cache
    return dy * scale, (dy * x).sum((1, 2), keepdims=True)


# ---- Continuous Expert Assembly --------------------------------------------------------------------------------------

def probe(Q, K, V, heads):
    """Cross-attention of R rank queries over N tokens: P = softmax over n of Q K^T / sqrt(D/h), Z = P V, per head.

    Q (R,D), K and V (B,N,D), D a multiple of `heads` -> Z (B,R,D): one summary of the image per rank component.
    The cache ends with P (B,h,R,N). Source: Vaswani et al. 2017, eq. 1, with learned queries.
    """
    R, D = Q.shape
    B, N, _ = K.shape
    q = Q.reshape(R, heads, D // heads).transpose(1, 0, 2)                      # (h,R,D/h)
    k = K.reshape(B, N, heads, D // heads).transpose(0, 2, 1, 3)                # (B,h,N,D/h)
    v = V.reshape(B, N, heads, D // heads).transpose(0, 2, 1, 3)                # (B,h,N,D/h)
    logits = q @ k.swapaxes(-1, -2) * (D // heads)**-0.5                        # (B,h,R,N)
    P = np.exp(logits - logits.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    z = P @ v                                                                   # (B,h,R,D/h)
    return z.transpose(0, 2, 1, 3).reshape(B, R, D), (q, k, v, z, P)


def probe_backward(dZ, cache):
    """dV = P^T dZ, dP = dZ V^T, dlogits = P (dP - rowsum(dP P)) / sqrt(D/h); dQ = dlogits K, dK = dlogits^T Q.

    Since Z = P V, rowsum(dP P) = rowsum(dZ Z): R D/h products per head instead of R N.
    """
    q, k, v, z, P = cache
    B, h, N, d = k.shape
    R = q.shape[1]
    dz = dZ.reshape(B, R, h, d).transpose(0, 2, 1, 3)                           # (B,h,R,D/h)
    dv = P.swapaxes(-1, -2) @ dz
    dP = dz @ v.swapaxes(-1, -2)
    dlogits = P * (dP - (dz * z).sum(-1, keepdims=True)) * d**-0.5
    dq = (dlogits @ k).sum(0)                                                   # (h,R,D/h)
    dk = dlogits.swapaxes(-1, -2) @ q
    return (dq.transpose(1, 0, 2).reshape(R, h * d), dk.transpose(0, 2, 1, 3).reshape(B, N, h * d),
            dv.transpose(0, 2, 1, 3).reshape(B, N, h * d))


def summarize(xhat, W_K, W_V, Q, heads):
    """What R rank queries see: K = xhat W_K, V = xhat W_V, Z = `probe`(Q, K, V). xhat (B,N,C), W (C,D), Q (R,D) -> Z (B,R,D)."""
    K, c_K = linear(xhat, W_K)
    V, c_V = linear(xhat, W_V)
    Z, c_Z = probe(Q, K, V, heads)
    return Z, (c_K, c_V, c_Z)


def summarize_backward(dZ, cache):
    """Through the probe, then both maps: xhat fed K and V, so its gradients add."""
    c_K, c_V, c_Z = cache
    dQ, dK, dV = probe_backward(dZ, c_Z)
    dxhat_V, dW_V, _ = linear_backward(dV, c_V)
    dxhat_K, dW_K, _ = linear_backward(dK, c_K)
    return dxhat_V + dxhat_K, dW_K, dW_V, dQ


def attention(cache):
    """P (B,h,R,N), what `summarize` weighted the tokens with."""
    return cache[-1][-1]


def affinity(xhat, A):
    """Signed affinities S = xhat A^T / sqrt(C): no softmax, no top-k. xhat (B,N,C), A (B,R,C) -> S (B,N,R)."""
    A = A * A.shape[-1]**-0.5
    return xhat @ A.swapaxes(-1, -2), (xhat, A)


def affinity_backward(dS, cache):
    """dxhat = dS A / sqrt(C), dA = dS^T xhat / sqrt(C)."""
    xhat, A = cache                                                             # this A is A / sqrt(C)
    return dS @ A, dS.swapaxes(-1, -2) @ xhat * A.shape[-1]**-0.5


def combine(x, S, U):
    """Y = X + S U / sqrt(R): each token adds up its own residual. x (B,N,C), S (B,N,R), U (B,R,C)."""
    U = U * U.shape[-2]**-0.5
    return x + S @ U, (S, U)


def combine_backward(dY, cache):
    """dx = dY, dS = dY U^T / sqrt(R), dU = S^T dY / sqrt(R)."""
    S, U = cache                                                                # this U is U / sqrt(R)
    return dY, dY @ U.swapaxes(-1, -2), S.swapaxes(-1, -2) @ dY * U.shape[-2]**-0.5


def fast_weight(x, xhat, A, U):
    """The same Y, the other way round: M = A^T U / sqrt(C R) is written once per image, then every token reads xhat M.

    Linear attention with the identity as feature map (Katharopoulos et al. 2020; fast weights, Schmidhuber 1992). M (B,C,C).
    """
    R, C = A.shape[-2:]
    M = A.swapaxes(-1, -2) @ U * (C * R)**-0.5
    return x + xhat @ M, (xhat, A, U, M)


def fast_weight_backward(dY, cache):
    """dxhat = dY M^T, dM = xhat^T dY, dA = U dM^T / sqrt(C R), dU = A dM / sqrt(C R)."""
    xhat, A, U, M = cache
    R, C = A.shape[-2:]
    dM = xhat.swapaxes(-1, -2) @ dY * (C * R)**-0.5
    return dY, dY @ M.swapaxes(-1, -2), U @ dM.swapaxes(-1, -2), A @ dM


def assembly(x, xhat, A, U):
    """Y = X + (xhat A^T / sqrt(C)) U / sqrt(R), in the cheaper order. x and xhat (B,N,C), A and U (B,R,C) -> Y (B,N,C).

    Tokens first (`affinity`, `combine`) takes 2 N R C multiply-adds, the fast weight first R C^2 + N C^2; fewer win.
    """
    N, (R, C) = x.shape[-2], A.shape[-2:]
    return _assembly(x, xhat, A, U, R * C * C + N * C * C < 2 * N * R * C)


def _assembly(x, xhat, A, U, fast):
    if fast:
        Y, cache = fast_weight(x, xhat, A, U)
        return Y, ("fast weight first", cache)
    S, c_S = affinity(xhat, A)
    Y, c_Y = combine(x, S, U)
    return Y, ("tokens first", (c_S, c_Y))


def assembly_backward(dY, cache):
    """Gradients of x, xhat, A, U along the order the forward took."""
    order, cache = cache
    if order == "fast weight first":
        return fast_weight_backward(dY, cache)
    c_S, c_Y = cache
    dx, dS, dU = combine_backward(dY, c_Y)
    dxhat, dA = affinity_backward(dS, c_S)
    return dx, dxhat, dA, dU


def topk_softmax(S, k):
    """Ablation: softmax over the k largest of a token's R affinities, the others zero; k = R is the plain softmax.

    S (B,N,R), 1 <= k <= R; affinities equal to the k-th are all kept. Source: the gate of Shazeer et al. 2017, without its noise.
    """
    kept = np.where(S >= np.partition(S, -k, -1)[..., -k, None], S, -np.inf)
    T = np.exp(kept - kept.max(-1, keepdims=True))
    T /= T.sum(-1, keepdims=True)
    return T, (T,)


def topk_softmax_backward(dT, cache):
    """dS = T (dT - rowsum(dT T)): zero where T is zero."""
    (T,) = cache
    return T * (dT - (dT * T).sum(-1, keepdims=True))


def token_mean(S):
    """Ablation: every token gets the image's mean affinities, so the residual no longer depends on the token. S (B,N,R)."""
    return np.broadcast_to(S.mean(1, keepdims=True), S.shape), ()


def token_mean_backward(dS, cache):
    """The mean is a symmetric projection, so its backward is itself."""
    return token_mean(dS)[0]


# ---- what CEA is compared with ----------------------------------------------------------------------------------------

def _bilinear(n, size, like):
    """(n,size): the weights of `size` cells at each of n pixels, a hat around the pixel's place; centers align, edges repeat."""
    place = np.clip((np.arange(n) + 0.5) * size / n - 0.5, 0, size - 1)
    return np.asarray(np.maximum(0, 1 - abs(place[:, None] - np.arange(size))), like.dtype, like=like)


def resize(x, H, W):
    """Bilinear resizing, y = R x C^T in each channel (PyTorch's interpolate without align_corners). x (B,h,w,C) -> (B,H,W,C)."""
    B, h, w, C = x.shape
    R, columns = _bilinear(H, h, x), _bilinear(W, w, x)
    return columns @ (R @ x.reshape(B, h, w * C)).reshape(B, H, w, C), (R, columns)


def resize_backward(dy, cache):
    """dx = R^T dy C."""
    R, columns = cache
    B, H, _, C = dy.shape
    drows = columns.T @ dy                                                      # (B,H,w,C)
    return (R.T @ drows.reshape(B, H, -1)).reshape(B, R.shape[1], -1, C)


def keep_topk(p, k):
    """The k largest entries along the last axis, the others zero; entries equal to the k-th are all kept. p (...,E)."""
    kept = p >= np.partition(p, -k, -1)[..., -k, None]
    return p * kept, (kept,)


def keep_topk_backward(dy, cache):
    """dp = dy where kept."""
    (kept,) = cache
    return dy * kept


def gate_experts(S, G):
    """Each expert's r affinities times its gate. S (B,N,E r), G (B,N,E), or (B,1,E) for all tokens -> (B,N,E r)."""
    B, N, _ = S.shape
    return (S.reshape(B, N, G.shape[-1], -1) * G[..., None]).reshape(S.shape), (S, G)


def gate_experts_backward(dT, cache):
    """dS = dT G, dG = sum of dT S over the expert's affinities, and over tokens where they share a gate."""
    S, G = cache
    dG = (dT * S).reshape(*S.shape[:2], G.shape[-1], -1).sum(-1)
    return gate_experts(dT, G)[0], dG.sum(1, keepdims=True) if G.shape[1] == 1 else dG


def load_balance(p):
    """CV^2/2 of the experts' loads: the variance over e of I_e = sum of p (...,E), over twice the square of its mean -> scalar.

    Source: the importance loss of Shazeer et al. 2017. Zero when all experts are used alike.
    """
    load = p.reshape(-1, p.shape[-1]).sum(0)
    return ((load / load.mean() - 1)**2).mean() / 2, (p.shape, load)


def load_balance_backward(dy, cache):
    """With z = I / mean(I): dI = (z - mean(z^2)) / (E mean(I)), the same for all that were added."""
    shape, load = cache
    z = load / load.mean()
    return np.broadcast_to((z - (z * z).mean()) * (dy / (load.size * load.mean())), shape)


# ---- losses ----------------------------------------------------------------------------------------------------------

def psnr_loss(pred, target, eps=1e-8):
    """Minus the mean PSNR in dB: mean over images of 10 log10(MSE + eps), peak 1 (NAFNet's loss). pred, target (B,H,W,C)."""
    if pred.shape != target.shape:
        raise InputError(f"pred has shape {pred.shape} and target {target.shape}: expected the same")
    error = pred - target
    mse = (error * error).mean((1, 2, 3), keepdims=True) + eps
    return 10 * np.log10(mse).mean(), (error, mse)


def psnr_loss_backward(dy, cache):
    """dpred = (10/ln 10) 2 error / ((MSE + eps) count), count over the whole batch; dtarget = -dpred."""
    error, mse = cache
    dpred = error / mse * (float(dy) * 20 / (math.log(10) * error.size))
    return dpred, -dpred


# ---- the optimizer ---------------------------------------------------------------------------------------------------

def adamw(w, g, m, v, step, lr, decay, betas=(0.9, 0.99), eps=1e-8):
    """One update of the flat parameters w in place, and of the moments m and v (Loshchilov and Hutter 2019, algorithm 2).

    m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  w <- w - lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + decay w)
    step: t, counted from 1. lr, decay: numbers, or arrays like w (such as the decay times `optim.decay_mask`).
    """
    b1, b2 = betas
    m += (1 - b1) * (g - m)
    v += (1 - b2) * (g * g - v)
    update = m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps)
    w -= lr * (update + decay * w)
