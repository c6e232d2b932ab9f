# %% [markdown]
# # 3. Linear attention: the same layer, read as a memory that an image writes and its tokens read
#
# *Attention* lets a *query* look up a mix of *values*: each value comes with a *key*, and the more the query resembles a key, the
# more of its value enters the mix. In Continuous Expert Assembly (CEA) the tokens are the queries, the rows $a_r$ of $A$ are the
# keys and the rows $u_r$ of $U$ are the values, $R$ pairs in all. The claims:
#
# 1. Softmax attention is attention with the kernel $e^{\langle x, a\rangle/\sqrt C}$. Take $\phi$ = identity for its feature map
#    and drop the normalizer: that is CEA.
# 2. The pairs can be written into one matrix $M$, the *fast weight*, by $R$ outer products, and then be read by $N$ tokens.
# 3. Of the two orders of the product, $M$ first needs fewer multiply-adds below $C = 2NR/(N+R)$ channels, about $2R$; measured
#    times cross at about $3R$ for $R = 8$ and nearer $2R$ for $R = 32$.
# 4. Without the softmax the update is linear and odd in the token, and a change of basis of its factors leaves it as it is; with
#    it, none of this holds.
# 5. What the missing normalizer costs is a bound on the size. The scales $1/\sqrt C$ and $1/\sqrt R$ answer for it on average.
#
# $A$ and $U$ are random here, or written by the layer itself in section 4; `close` means: equal up to rounding in float64.

# %%
import os
from functools import partial
from math import factorial
from time import perf_counter

os.environ["OPENBLAS_NUM_THREADS"] = "1"                    # one core for section 3; NumPy reads it at import

import matplotlib.pyplot as plt
import numpy as np

from tinycea import ablations, cea
from tinycea.ops import reference as ops

rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)

# %% [markdown]
# ## 1. From softmax attention to CEA
#
# **Softmax attention.** The output for a token is a mean of the values. The share of $u_r$ grows with the affinity $s_{nr}$ of
# the token to the key (Vaswani et al. 2017, eq. 1). Tokens are normalized as in [notebook 1](01_token_assembly.ipynb):
#
# $$y_n = \frac{\sum_r e^{s_{nr}}\, u_r}{\sum_r e^{s_{nr}}}, \qquad s_{nr} = \frac{\langle \hat x_n, a_r \rangle}{\sqrt C} .$$

# %%
N, C, R = 60, 4, 5
Xhat, _ = ops.layernorm(rng.normal(size=(N, C)), np.ones(C), np.zeros(C))
A, U = rng.normal(size=(2, R, C))

attention = np.empty((N, C))
for n in range(N):
    e = [np.exp(sum(Xhat[n, c] * A[r, c] for c in range(C)) / np.sqrt(C)) for r in range(R)]
    attention[n] = sum(e[r] * U[r] for r in range(R)) / sum(e)

# %%
S, _ = ops.affinity(Xhat, A)
assert close(attention, ops.topk_softmax(S[None], R)[0][0] @ U)     # k = R: a softmax over all pairs

# %% [markdown]
# **A kernel.** The exponential only measures how similar a token and a key are. Put any function $\operatorname{sim}(x, a)$ in
# its place. If it is a dot product of *features*, $\operatorname{sim}(x,a) = \langle \phi(x), \phi(a) \rangle$, the token can be
# taken out of both sums, and what is left inside them does not depend on the token any more (Katharopoulos et al. 2020, eq. 4 and
# 5):
#
# $$y(x) = \frac{\sum_r \operatorname{sim}(x, a_r)\, u_r}{\sum_r \operatorname{sim}(x, a_r)}
# = \frac{\phi(x)^\top \big( \sum_r \phi(a_r)\, u_r^\top \big)}{\phi(x)^\top \sum_r \phi(a_r)} .$$
#
# The matrix in the big brackets and the vector below it are made once, then read by all tokens: that is why this is called
# *linear* attention. Its cost grows with the number of queries plus the number of keys, no longer with their product.

# %%
def kernel_attention(phi, X, A, U):
    matrix = sum(np.outer(key, u) for key, u in zip(phi(A), U))
    vector = phi(A).sum(0)
    return (phi(X) @ matrix) / (phi(X) @ vector)[:, None]


def pair_by_pair(sim, X, A, U):
    similar = np.array([[sim(x, a) for a in A] for x in X])
    return similar @ U / similar.sum(1, keepdims=True)


assert close(attention, pair_by_pair(lambda x, a: np.exp(x @ a / np.sqrt(C)), Xhat, A, U))

# %% [markdown]
# **Features of the exponential.** From $e^s = \sum_k s^k / k!$ and
# $\langle x, a \rangle^k = \langle x^{\otimes k}, a^{\otimes k} \rangle$, where $x^{\otimes k}$ lists all $C^k$ products of $k$
# entries of $x$, the features are all these products, up to order $K$. With $x' = x / C^{1/4}$, so that
# $\langle x', a' \rangle = s$:
#
# $$\phi_K(x) = \Big[\, 1,\;\; x',\;\; \tfrac{x' \otimes x'}{\sqrt{2!}},\;\; \dots,\;\; \tfrac{x'^{\otimes K}}{\sqrt{K!}} \,\Big],
# \qquad \langle \phi_K(x), \phi_K(a) \rangle = \sum_{k=0}^{K} \frac{s^k}{k!} .$$

# %%
def taylor(K, X):
    power, features = np.ones((len(X), 1)), []
    for k in range(K + 1):
        features.append(power / np.sqrt(factorial(k)))
        power = np.einsum("nf,nc->nfc", power, X / C**0.25).reshape(len(X), -1)
    return np.concatenate(features, 1)


for K in range(6):
    assert taylor(K, A).shape == (R, sum(C**k for k in range(K + 1)))
    assert close(taylor(K, Xhat) @ taylor(K, A).T, sum(S**k / factorial(k) for k in range(K + 1)))
direct = pair_by_pair(lambda x, a: sum((x @ a / np.sqrt(C))**k / factorial(k) for k in range(5)), Xhat, A, U)
assert close(kernel_attention(partial(taylor, 4), Xhat, A, U), direct)

# %% [markdown]
# What was cut off the series is small as soon as $k!$ outgrows $|s|^k$:
#
# $$\Big| e^s - \sum_{k=0}^{K} \frac{s^k}{k!} \Big| \le e^{|s|}\, \frac{|s|^{K+1}}{(K+1)!} .$$
#
# So linear attention with $\phi_K$ becomes softmax attention as $K$ grows, the sooner the smaller the affinities (here made
# smaller by halving the keys).

# %%
for K in range(20):
    cut = np.abs(np.exp(S) - sum(S**k / factorial(k) for k in range(K + 1)))
    assert (cut <= np.exp(np.abs(S)) * np.abs(S)**(K + 1) / factorial(K + 1) + 1e-14).all()

figure, axes = plt.subplots()
orders = range(9)
for shrink, marker in ((1, "o"), (2, "s"), (4, "D")):
    scores = S / shrink
    softmax = ops.topk_softmax(scores[None], R)[0][0] @ U
    errors = [np.abs(kernel_attention(partial(taylor, K), Xhat, A / shrink, U) - softmax).max() for K in orders]
    axes.semilogy(orders, errors, marker=marker, label=f"largest |s| = {np.abs(scores).max():.2f}")
    assert errors[8] < 0.02 * errors[2] and (shrink == 1 or errors[8] < 1e-4)
axes.set(xlabel="order K of the feature map", ylabel="largest error of an output entry",
         title=f"Taylor features turn linear attention into softmax attention (N = {N}, C = {C}, R = {R})")
axes.legend()
plt.show()

# %% [markdown]
# An odd order is a bad choice where affinities are large and negative: $1 + s$ is negative below $-1$, and the normalizer, a sum
# of such terms, can come close to zero. An even order stays positive:
#
# $$\sum_{k=0}^{K} \frac{s^k}{k!} > 0 \;\text{ for all } s \text{ if } K \text{ is even}, \qquad
# 1 + s < 0 \;\text{ for } s < -1 .$$

# %%
line = np.linspace(-5, 5, 1001)
for K in range(9):
    series = sum(line**k / factorial(k) for k in range(K + 1))
    assert (series > 0).all() == (K % 2 == 0)
assert (S < -1).any()

# %% [markdown]
# **Cheaper features.** $C^K$ features are too many. Katharopoulos et al. take as many as there are channels, and only keep them
# positive (eq. 7):
#
# $$\phi(x) = \operatorname{elu}(x) + 1 = \begin{cases} x + 1 & x > 0 \\ e^x & x \le 0 \end{cases} .$$
#
# It is another kernel, so another layer; it does not approximate the exponential.

# %%
def elu_plus_1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


linear_attention = kernel_attention(elu_plus_1, Xhat, A, U)
assert close(linear_attention, pair_by_pair(lambda x, a: elu_plus_1(x) @ elu_plus_1(a), Xhat, A, U))
assert (elu_plus_1(Xhat) @ elu_plus_1(A).T > 0).all()
assert np.abs(linear_attention - attention).max() > 0.1

# %% [markdown]
# **The identity, without a normalizer.** Now take $\phi(x) = x$. The similarity is the signed dot product. Its sum over $r$ may
# be zero or negative, so it is no use as a normalizer: leave it out, and put constant scales in its place. What remains is the
# update of CEA:
#
# $$\Delta x_n = \frac{1}{\sqrt{CR}}\; \hat x_n^\top \sum_r a_r\, u_r^\top = \frac{1}{\sqrt R} \sum_r s_{nr}\, u_r .$$

# %%
update = Xhat @ sum(np.outer(A[r], U[r]) for r in range(R)) / np.sqrt(C * R)
assert close(update, S @ U / np.sqrt(R))

# %%
assert close(update, ops.combine(np.zeros((N, C)), S, U)[0])

# %% [markdown]
# It is the first-order term of softmax attention's numerator. For small affinities $\varepsilon s$ softmax attention as a whole
# is linear in them but for a constant, the mean $\bar u$ of the values:
#
# $$\sum_r e^{s_{nr}}\, u_r = \sum_r u_r + \underbrace{\sum_r s_{nr}\, u_r}_{\text{CEA}} + \frac12 \sum_r s_{nr}^2\, u_r +
# \dots, \qquad
# \frac{\sum_r e^{\varepsilon s_{nr}}\, u_r}{\sum_r e^{\varepsilon s_{nr}}} = \bar u +
# \frac{\varepsilon}{R} \sum_r s_{nr} (u_r - \bar u) + O(\varepsilon^2) .$$
#
# So a softmax adds $\bar u$ to every token, whatever it is, and uses the values only as far as they differ from each other. CEA
# adds no constant and takes the values as they are.

# %%
order = [taylor(K, Xhat) @ taylor(K, A).T @ U for K in (0, 1)]
assert close(order[0], U.sum(0)) and close(order[1] - order[0], np.sqrt(R) * update)
assert close(np.exp(S) @ U, sum(S**k @ U / factorial(k) for k in range(30)))

mean = U.mean(0)
left_out = []
for eps in (1e-2, 1e-3):
    exact = ops.topk_softmax(eps * S[None], R)[0][0] @ U
    left_out.append(np.abs(exact - (mean + eps / R * S @ (U - mean))).max())
ratio = left_out[0] / left_out[1]
print(f"what is left out shrinks {ratio:.1f} times when the affinities shrink 10 times: it is quadratic")
assert 95 < ratio < 105

# %% [markdown]
# ## 2. The fast weight: R writes, N reads
#
# The ordinary weights of a network change slowly, by training. $M$ is a weight matrix too, but one image writes it, and the next
# image writes another: a *fast weight* (Schmidhuber 1992; Schlag et al. 2021). Each pair is one write, an outer product, and each
# token is one read:
#
# $$M = \frac{1}{\sqrt{CR}} \sum_r a_r\, u_r^\top = \frac{A^\top U}{\sqrt{CR}}, \qquad y_n = x_n + M^\top \hat x_n .$$

# %%
N, C, R = 100, 10, 6
X = rng.normal(size=(N, C))
Xhat, _ = ops.layernorm(X, np.ones(C), np.zeros(C))
A, U = rng.normal(size=(2, R, C))

M = np.zeros((C, C))
for r in range(R):                                          # R writes
    M += np.outer(A[r], U[r]) / np.sqrt(C * R)
Y = np.array([X[n] + M.T @ Xhat[n] for n in range(N)])      # N reads
assert close(M, A.T @ U / np.sqrt(C * R)) and np.linalg.matrix_rank(M) == R

# %% [markdown]
# The library writes and reads in [`fast_weight`](../tinycea/ops/reference.py). [`assembly`](../tinycea/ops/reference.py) takes
# either this order or the one of notebook 1, and says which in its cache. In `ops/reference.py` that is whichever has fewer
# multiply-adds; `ops/cpu.py` has another rule (section 3). Here the fast weight is cheaper; with only 6 tokens it is not.

# %%
Y_library, (*_, M_library) = ops.fast_weight(X, Xhat, A, U)
assert close(Y, Y_library) and close(M, M_library)
for tokens, order in ((N, "fast weight first"), (6, "tokens first")):
    few = slice(tokens)
    Y_library, cache = ops.assembly(X[few], Xhat[few], A, U)
    assert cache[0] == order and close(Y[few], Y_library)

# %% [markdown]
# ## 3. Two orders of one product
#
# A product of an $(I,J)$ matrix with a $(J,K)$ matrix takes $IJK$ *multiply-adds* (one product, added to a sum). Matrix products
# may be regrouped, but the two groupings do not cost the same:
#
# $$\begin{aligned}
# \text{tokens first:} \quad & (\hat X A^\top)\, U && NRC + NRC = 2NRC \text{ multiply-adds} \\
# \text{fast weight first:} \quad & \hat X\, (A^\top U) && RC^2 + NC^2 \text{ multiply-adds} \\
# \text{equal at} \quad & C = C^* = \frac{2NR}{N+R} .
# \end{aligned}$$
#
# With many more tokens than components, $C^*$ is just below $2R$. To count what `ops/reference.py` really does, take an array
# that adds up its own matrix products:

# %%
class Counted(np.ndarray):
    madds = 0

    def __matmul__(self, other):
        Counted.madds += self.size * other.shape[-1]        # I J entries on the left, K columns on the right
        return super().__matmul__(other)


def count(function, *arrays):
    Counted.madds = 0
    function(*(array.view(Counted) for array in arrays))
    return Counted.madds


def tokens_first(x, xhat, A, U):
    return ops.combine(x, ops.affinity(xhat, A)[0], U)[0]


def fast_weight_first(x, xhat, A, U):
    return ops.fast_weight(x, xhat, A, U)[0]


N, R = 48, 16                                               # C* = 24 is a whole number
crossover = 2 * N * R / (N + R)
for C in (8, 23, 24, 25, 64):
    x, xhat = rng.normal(size=(2, N, C))
    A, U = rng.normal(size=(2, R, C))
    assert close(tokens_first(x, xhat, A, U), fast_weight_first(x, xhat, A, U))
    madds = [count(order, x, xhat, A, U) for order in (tokens_first, fast_weight_first)]
    assert madds == [2 * N * R * C, R * C**2 + N * C**2]
    assert np.sign(madds[0] - madds[1]) == np.sign(crossover - C)
    assert count(ops.assembly, x, xhat, A, U) == min(madds)

# %% [markdown]
# Multiply-adds are not time. So measure the bare products too: float32, one core, medians of 45 runs in which the two orders take
# turns.

# %%
def measure(N, R, channels, runs=45):
    seconds = np.empty((len(channels), 2, runs))
    for row, C in zip(seconds, channels):
        xhat = rng.normal(size=(N, C)).astype(np.float32)
        A, U = rng.normal(size=(2, R, C)).astype(np.float32)
        for run in range(runs):
            start = perf_counter()
            first = (xhat @ A.T) @ U
            between = perf_counter()
            second = xhat @ (A.T @ U)
            row[:, run] = between - start, perf_counter() - between
        assert np.allclose(first, second, rtol=1e-4, atol=1e-5 * np.abs(first).max())
    return np.median(seconds, 2).T


def crossing(channels, first, second):
    after = max(1, np.argmax(second > first))               # the first C at which tokens first is faster
    ends = slice(after - 1, after + 1)
    return np.exp(np.interp(0, np.log(second / first)[ends], np.log(channels)[ends]))


N, R = 16384, 16
channels = np.array([8, 12, 16, 24, 32, 40, 48, 64, 96, 128])
madds = np.array([2 * N * R * channels, R * channels**2 + N * channels**2])
seconds = measure(N, R, channels)
far = madds.max(0) / madds.min(0) > 3.9                     # a busy machine must not fail here
assert channels[far].tolist() == [8, 128]
assert np.array_equal((seconds[0] < seconds[1])[far], (madds[0] < madds[1])[far])

counted = 2 * N * R / (N + R)
measured = crossing(channels, *seconds)
some = np.array([1, 1.5, 2, 2.5, 3, 3.5, 4, 6])
others = {rank: crossing(rank * some, *measure(N, rank, (rank * some).astype(int))) for rank in (8, 32)}
for rank, C in sorted((others | {R: measured}).items()):
    print(f"R = {rank:2d}: counted crossover at C = {2 * N / (N + rank):.2f} R, measured at {C / rank:.1f} R")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
units = "millions of multiply-adds", "milliseconds"
for axis, values, unit in zip(axes, (madds / 1e6, 1000 * seconds), units):
    axis.loglog(channels, values[0], marker="o", label="tokens first")
    axis.loglog(channels, values[1], marker="s", label="fast weight first")
    axis.axvline(counted, color="0.4", ls=":", label=f"counted: C = {counted:.0f}")
    axis.set(xlabel="channels C", ylabel=unit, xticks=[8, 16, 32, 64, 128], xticklabels=[8, 16, 32, 64, 128])
    axis.minorticks_off()
axes[1].axvline(measured, color="0.4", ls="-", lw=1, label=f"measured: C = {measured:.0f}")
axes[0].set_title("counted")
axes[1].set_title("measured")
for axis in axes:
    axis.legend(loc="upper left")
figure.suptitle(f"Below about 2R channels the fast weight is the cheaper order (N = {N}, R = {R})", fontsize=10)
plt.show()

# %% [markdown]
# Left of the crossing the fast weight is the cheaper order, right of it the tokens come first. Where the measured curves cross
# depends on $R$. On one core of an AMD EPYC with OpenBLAS, with nothing else running, it was at about $3R$ for $R = 8$, the
# default rank of the library, at about $2.3R$ for $R = 16$ and near $2R$ for $R = 32$ (one run is printed above; a busy machine,
# or another one, gives other numbers). At $C = 3R$ the fast weight takes 1.5 times as many multiply-adds in the same time:
# products that are only 8 columns wide are slow for their size. So [`assembly`](../tinycea/ops/cpu.py) of `ops/cpu.py` does not
# count: it takes the fast weight below $C = 3R$, as measured, if there are also more than $C$ tokens. That rule fits $R = 8$; at
# $R = 32$ counting is closer.
#
# ## 4. What the identity keeps and a softmax breaks
#
# Freeze $A$ and $U$ and call the update $f(\hat X; A, U)$. Let $\Pi$ be a permutation matrix of the pairs, $G$ any invertible
# matrix of $R \times R$ numbers. Then
#
# $$\begin{aligned}
# \text{permutation:} \quad & f(\hat X;\, \Pi A,\, \Pi U) = f(\hat X;\, A,\, U) \\
# \text{gauge freedom:} \quad & f(\hat X;\, G A,\, G^{-\top} U) = f(\hat X;\, A,\, U) \\
# \text{oddness:} \quad & f(-\hat X;\, A,\, U) = -f(\hat X;\, A,\, U) \\
# \text{linearity:} \quad & f(2 \hat X + \hat X';\, A,\, U) = 2 f(\hat X;\, A,\, U) + f(\hat X';\, A,\, U) \\
# \text{rank:} \quad & \operatorname{rank} f(\hat X;\, A,\, U) \le R .
# \end{aligned}$$
#
# *Gauge freedom* is the physicists' name for a change of description that changes nothing observable:
# $(\hat X A^\top G^\top)(G^{-\top} U) = \hat X A^\top U$. Only the product $A^\top U$ matters, not the single pairs. A
# permutation is such a change, with $G = \Pi = \Pi^{-\top}$, and the softmax over $r$ respects it too; but since it compares
# single pairs, not any other $G$ in general.

# %%
N, C, R = 35, 12, 4


def signed(Xhat, A, U):
    return ops.combine(0 * Xhat, ops.affinity(Xhat, A)[0], U)[0]


def softmax(Xhat, A, U):
    return ops.combine(0 * Xhat, ops.topk_softmax(ops.affinity(Xhat, A)[0], R)[0], U)[0]


def relative(left, right):
    return np.abs(left - right).max() / np.abs(right).max()


Xhat, other = ops.layernorm(rng.normal(size=(2, 1, N, C)), np.ones(C), np.zeros(C))[0]
A, U = rng.normal(size=(2, 1, R, C))
PI = np.eye(R)[[2, 0, 3, 1]]
G = np.eye(R) + 0.5 * rng.normal(size=(R, R))

table = {}
for f in (signed, softmax):
    y = f(Xhat, A, U)
    singular = np.linalg.svd(y[0], compute_uv=False)
    for name, error in (("permutation", relative(f(Xhat, PI @ A, PI @ U), y)),
                        ("gauge freedom", relative(f(Xhat, G @ A, np.linalg.inv(G).T @ U), y)),
                        ("oddness", relative(f(-Xhat, A, U), -y)),
                        ("linearity", relative(f(2 * Xhat + other, A, U), 2 * y + f(other, A, U))),
                        ("rank", singular[R] / singular[0])):
        table.setdefault(name, []).append(error)

# %% [markdown]
# The softmax can be neither odd nor linear, since it does not vanish at zero (unless the values cancel). A token without any
# affinity gets nothing from CEA, and the mean direction from a softmax:
#
# $$f_{\text{signed}}(0) = 0, \qquad f_{\text{softmax}}(0) = \frac{1}{\sqrt R}\, \frac1R \sum_r u_r .$$

# %%
assert close(signed(0 * Xhat, A, U), 0)
assert close(softmax(0 * Xhat, A, U), U[0].mean(0) / np.sqrt(R))

# %% [markdown]
# Now the whole layer $Y = \mathrm{CEA}(X)$ of [`cea.py`](../tinycea/cea.py), in which the probe of
# [notebook 2](02_hyper_adapter.ipynb) writes $A$ and $U$. The probe sums over all tokens, so it does not see their order. Let
# $\sigma$ be a shuffle of the tokens:
#
# $$A(\sigma X) = A(X), \quad U(\sigma X) = U(X), \qquad \mathrm{CEA}(\sigma X) = \sigma\, \mathrm{CEA}(X) .$$
#
# The first two say that the factors are *invariant*, the last that the layer is *equivariant*: its output is shuffled in the same
# way. Pixels have neighbors only in the convolutions around it. But the layer is neither odd nor linear in $X$, since the image
# writes $A$ and $U$ as well:
#
# $$\mathrm{CEA}(-X) \ne -\mathrm{CEA}(X) .$$
#
# Only the probe's softmax is to blame for the first: with $Q = 0$, where it takes plain means, $A$ and $U$ of $-X$ are $-A$ and
# $-U$, and the layer is odd. And through the image's norm the update is of degree one, $\mathrm{CEA}(2X) = 2\,\mathrm{CEA}(X)$:
# $X$ times a map $M$ that depends on the tokens' directions and relative lengths alone.

# %%
H, W = 5, 7
x = rng.normal(size=(1, H, W, C))
sigma = rng.permutation(H * W)


def shuffled(x):
    return x.reshape(1, H * W, C)[:, sigma].reshape(x.shape)


p = {name: rng.normal(size=shape) / 2 for name, shape in cea.shapes(C, rank=R).items()}
p["norm.weight"], p["norm.bias"] = np.ones(C), np.zeros(C)  # with these, the norm is odd; the probe is not
for affinity in ("signed", "softmax"):
    config = ablations.CEAConfig(rank=R, affinity=affinity)
    y, cache = ablations.forward(x, p, config, ops)
    y_shuffled, cache_shuffled = ablations.forward(shuffled(x), p, config, ops)
    y_minus, _ = ablations.forward(-x, p, config, ops)
    before, after = ablations.anatomy(cache), ablations.anatomy(cache_shuffled)
    for name, error in (("layer: A, U under a shuffle", max(relative(after[k], before[k]) for k in "AU")),
                        ("layer: Y under a shuffle", relative(y_shuffled - shuffled(x), shuffled(y - x))),
                        ("layer: oddness", relative(y_minus + x, x - y))):
        table.setdefault(name, []).append(error)

signed_layer = partial(ablations.forward, config=ablations.CEAConfig(rank=R), ops=ops)
uniform = p | {"Q": np.zeros_like(p["Q"])}
assert close(signed_layer(-x, uniform)[0], -signed_layer(x, uniform)[0])
assert relative(signed_layer(2 * x, p)[0], 2 * signed_layer(x, p)[0]) < 1e-5             # but for the 1e-6 under the norm's root

# %% [markdown]
# All of it in one table: the relative error of each equation, which is rounding where it holds. For the rank it is the singular
# value of index $R + 1$ relative to the first.

# %%
print(f"{'':28s}{'signed':>8s}{'softmax':>10s}")
for name, errors in table.items():
    print(f"{name:28s}{errors[0]:8.0e}{errors[1]:10.0e}")

holds = {name: [error < 1e-10 for error in errors] for name, errors in table.items()}
breaks = {name: [error > 1e-2 for error in errors] for name, errors in table.items()}
for name in table:
    signed_keeps = name != "layer: oddness"
    softmax_keeps = signed_keeps and name not in ("gauge freedom", "oddness", "linearity")
    assert holds[name] == [signed_keeps, softmax_keeps]
    assert breaks[name] == [not signed_keeps, not softmax_keeps]

# %% [markdown]
# ## 5. What the missing normalizer costs
#
# A softmax divides by what it summed up, so its output is a mean of the values, as large as one of them at most. A plain sum
# grows with the number of its terms. For tokens with entries of variance 1 and independent $a_{rc}$, $u_{rc}$ of variance 1, an
# entry of the update without scales has variance $C$ from the dot product, times $R$ from the sum over the pairs; constants can
# take the place of the normalizer:
#
# $$\operatorname{std}\Big( \sum_r \langle \hat x, a_r \rangle\, u_{rc} \Big) = \sqrt{CR}, \qquad
# \operatorname{std}\Big( \frac{1}{\sqrt{CR}} \sum_r \langle \hat x, a_r \rangle\, u_{rc} \Big) = 1 .$$

# %%
def spreads(C, R, images=64, tokens=100):
    """Standard deviation of the update: without scales, with both, and of a softmax over r."""
    Xhat, _ = ops.layernorm(rng.normal(size=(images, tokens, C)), np.ones(C), np.zeros(C))
    A, U = rng.normal(size=(2, images, R, C))
    S, _ = ops.affinity(Xhat, A)
    plain, soft = Xhat @ A.swapaxes(1, 2) @ U, ops.topk_softmax(S, R)[0] @ U
    return plain.std(), ops.combine(0 * Xhat, S, U)[0].std(), soft.std()


sizes = 2 ** np.arange(3, 9)
spread = {"C": np.array([spreads(C, 8) for C in sizes]), "R": np.array([spreads(64, R) for R in sizes])}
slopes = {letter: np.polyfit(np.log(sizes), np.log(values), 1)[0] for letter, values in spread.items()}
for letter, (plain, scaled, soft) in slopes.items():
    print(f"exponent of {letter}: without scales {plain:+.3f}, with scales {scaled:+.3f}, softmax {soft:+.3f}")
    assert abs(plain - 0.5) < 0.03 and abs(scaled) < 0.03
assert np.allclose(spread["C"][:, 0], np.sqrt(sizes * 8), rtol=0.1)
assert np.allclose(spread["R"][:, 0], np.sqrt(64 * sizes), rtol=0.1)
assert np.allclose(spread["C"][:, 1], 1, rtol=0.1) and np.allclose(spread["R"][:, 1], 1, rtol=0.1)
assert abs(slopes["C"][2]) < 0.05 and slopes["R"][2] < -0.3

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for axis, (letter, values), fixed in zip(axes, spread.items(), ("R = 8", "C = 64")):
    for column, name, marker in zip(values.T, ("without scales", "scaled (CEA)", "softmax"), "osD"):
        axis.loglog(sizes, column, marker=marker, label=name)
    axis.set(xlabel={"C": "channels C", "R": "pairs R"}[letter], title=fixed, xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
axes[0].set_ylabel("standard deviation of the update")
figure.suptitle("Two constant scales keep the update at one size for any C and R", fontsize=10)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
plt.show()

# %% [markdown]
# The softmax *shrinks* with $R$, since a mean of many independent values is small; CEA's scale does not.
#
# **What the scales do not give is a bound.** They hold for random pairs, on average. The most that is sure follows from the
# Cauchy-Schwarz inequality $|\langle x, a\rangle| \le |x|\,|a|$: a LayerNorm with weight 1 and bias 0 gives a token the length
# $\sqrt C$ (the small constant under its root makes it a little less), and so
#
# $$|\hat x_n| \le \sqrt C \quad\Longrightarrow\quad |s_{nr}| \le |a_r| \quad\Longrightarrow\quad
# |\Delta x_n| \le \frac{1}{\sqrt R} \sum_r |a_r|\,|u_r| .$$

# %%
Xhat, _ = ops.layernorm(rng.normal(size=(1, 5000, C)), np.ones(C), np.zeros(C))
S, _ = ops.affinity(Xhat, A)
length_a, length_u = np.linalg.norm(A[0], axis=1), np.linalg.norm(U[0], axis=1)
lengths = np.linalg.norm(signed(Xhat, A, U)[0], axis=1)
bound = length_a @ length_u / np.sqrt(R)
print(f"longest update of 5000 tokens: {lengths.max():.2f}, its bound: {bound:.2f}")
assert (np.linalg.norm(Xhat[0], axis=1) <= np.sqrt(C)).all()
assert (np.abs(S[0]) <= length_a).all() and (lengths <= bound).all()

along = Xhat[0, 0] * 3                                      # a key along the token reaches the bound on s
assert np.isclose(ops.affinity(Xhat[0, :1], along[None])[0][0, 0], np.linalg.norm(along), rtol=1e-5)

# %% [markdown]
# The bound contains the $a_r$: whoever writes larger keys gets a larger update, without limit. A softmax *saturates*: with larger
# keys it only chooses more sharply, and what it returns is never longer than the longest value. With a factor $t$ on all keys,
#
# $$f_{\text{signed}}(\hat X;\, tA,\, U) = t\, f_{\text{signed}}(\hat X;\, A,\, U), \qquad
# \sqrt R\; \big| f_{\text{softmax}}(\hat x_n;\, tA,\, U) \big| \le \max_r |u_r| .$$

# %%
print(f"longest |u_r| = {length_u.max():.2f}; mean length of the output, times the square root of R:")
for t in (1, 2, 4, 8, 16, 32, 64):
    once, sharp = (np.sqrt(R) * np.linalg.norm(f(Xhat, t * A, U)[0], axis=1) for f in (signed, softmax))
    print(f"t = {t:2d}   signed {once.mean():7.2f}   softmax {sharp.mean():5.2f}")
    assert close(signed(Xhat, t * A, U), t * signed(Xhat, A, U))
    assert (sharp <= length_u.max() * (1 + 1e-12)).all()
assert sharp.mean() < 3 * np.linalg.norm(np.sqrt(R) * softmax(Xhat, A, U)[0], axis=1).mean()

# %% [markdown]
# In the whole layer, no image can write arbitrarily large keys: a summary $z_r$ is a mean of values $v_n = W_V^\top \hat x_n$ and
# so no longer than the longest of them; and after the image's norm no token is longer than the whole image, $\sqrt{NC}$. With one
# head, and with $\|W\|$ for the largest factor by which $W$ stretches a vector
# (its first singular value), the weights alone bound the factors, for every image:
#
# $$|a_r| \le \sqrt{NC}\, \|W_V\|\, \|W_A\|, \qquad |u_r| \le \sqrt{NC}\, \|W_V\|\, \|W_U\| .$$
#
# But nothing except training keeps the weights small. With $W_U = 0$ ([notebook 2](02_hyper_adapter.ipynb), section 6) the layer
# starts from no update at all.

# %%
stretch = {name: np.linalg.norm(p[name], 2) for name in ("W_V", "W_A", "W_U")}
for size in (1, 1e6):                                       # the norm forgets how large the features are
    _, cache = ablations.forward(size * x, p, ablations.CEAConfig(rank=R, heads=1), ops)
    for name, factor in ablations.anatomy(cache).items():
        if name in "AU":
            longest = np.linalg.norm(factor[0], axis=1).max()
            assert longest <= np.sqrt(H * W * C) * stretch["W_V"] * stretch[f"W_{name}"]

# %% [markdown]
#
# ## Exercises
#
# **1.** Keys interfere: reading the sum of outer products $M = \sum_r a_r u_r^\top$ with a key gives a mix of all values,
# $M^\top a_q = \sum_r \langle a_r, a_q \rangle u_r$. The *delta rule* (Schlag et al. 2021) writes only what is not known yet,
# $M \leftarrow M + a\,(u - M^\top a)^\top$ with keys of length 1. Show that the last key then reads exactly its value, and
# compare the plain sum, with orthogonal keys and with others.

# %% jupyter={"source_hidden": true}
# Solution
# After the write M^T a + (u - M^T a) <a, a> = u, since <a, a> = 1. The plain sum reads u_q + sum over r != q of
# <a_r, a_q> u_r, which is u_q for orthogonal keys (for others only if the rest happens to cancel).
keys = A[0] / np.linalg.norm(A[0], axis=1, keepdims=True)
orthogonal = np.linalg.qr(A[0].T)[0].T
for a_r, is_orthogonal in ((keys, False), (orthogonal, True)):
    delta, plain = np.zeros((2, C, C))
    for a, u in zip(a_r, U[0]):
        delta += np.outer(a, u - delta.T @ a)
        plain += np.outer(a, u)
        assert close(delta.T @ a, u)
    assert close(plain.T @ a, u) == is_orthogonal and close(plain, delta) == is_orthogonal

# %% [markdown]
# **2.** Gauge freedom lets us choose the nicest factors. From the singular value decomposition of $A^\top U$ make $A'$ and $U'$
# whose rows are orthogonal and whose lengths agree, $|a'_r| = |u'_r|$, and that give the same $Y$. Which $G$ leads there?

# %% jupyter={"source_hidden": true}
# Solution
# A^T U = P diag(sigma) Q^T with R singular values that are not zero: give each side the square root of sigma.
# Both factors then have the same matrix of dot products, diag(sigma). The rows of A' lie in the span of those
# of A, so A' = G A has one solution G.
left, sigma_r, right = np.linalg.svd(A[0].T @ U[0])
A_new, U_new = np.sqrt(sigma_r[:R, None]) * left.T[:R], np.sqrt(sigma_r[:R, None]) * right[:R]
assert close(A_new @ A_new.T, np.diag(sigma_r[:R])) and close(U_new @ U_new.T, np.diag(sigma_r[:R]))
assert close(signed(Xhat, A_new[None], U_new[None]), signed(Xhat, A, U))
G = A_new @ np.linalg.pinv(A[0])
assert close(G @ A[0], A_new) and close(np.linalg.inv(G).T @ U[0], U_new)

# %% [markdown]
# **3.** Count the multiply-adds of the backward in both orders, from the formulas in the docstrings of `affinity_backward`,
# `combine_backward` and `fast_weight_backward`. At which $C$ do they cross? Check your count with `Counted`.

# %% jupyter={"source_hidden": true}
# Solution
# Tokens first: dS = dY U^T, dU = S^T dY, dxhat = dS A, dA = dS^T xhat, each N R C: 4 N R C.
# Fast weight first: dM = xhat^T dY and dxhat = dY M^T, each N C^2; dA = U dM^T and dU = A dM, each R C^2:
# 2 (N + R) C^2.
# Both are twice the forward, so they cross at the same C* = 2 N R / (N + R).
N, R = 48, 16
for C in (8, 23, 24, 25, 64):
    x, xhat, dY = rng.normal(size=(3, N, C)).view(Counted)
    A, U = rng.normal(size=(2, R, C)).view(Counted)
    madds = []
    for fast in (False, True):
        _, cache = ops._assembly(x, xhat, A, U, fast)
        Counted.madds = 0
        ops.assembly_backward(dY, cache)
        madds.append(Counted.madds)
    assert madds == [4 * N * R * C, 2 * N * C**2 + 2 * R * C**2]
    assert np.sign(madds[0] - madds[1]) == np.sign(24 - C)
