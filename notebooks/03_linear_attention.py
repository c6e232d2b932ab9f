# %% [markdown]
# # 3. Linear attention: the same layer, read as a memory that an image writes and its tokens read
#
# **The question.** Continuous Expert Assembly (CEA) is attention without the softmax: what does that buy, and what does it cost?
# **You need** notebooks 1 and 2, Taylor series, singular values. **Minutes:** 25. **The answer** begins with the first picture:
# without a softmax, all that an image writes is *one matrix* $M = A^\top U / \sqrt{CR}$, and one can read in it.
#
# A token is three keys (how much of each lamp) and a color. One unit of a lamp of color $t$ is the token of that key and that
# color; $M$ has read the lamp if it takes this token's color away. So solve for the three colors that $M$ would take away
# exactly. The same learned layer looks at two photographs under different lamps. `close` means: equal up to rounding in float64.

# %%
import os
from functools import partial
from math import factorial
from time import perf_counter

os.environ["OPENBLAS_NUM_THREADS"] = "1"                    # one core for section 3; NumPy reads it at import

import matplotlib.pyplot as plt
import numpy as np
from tqdm.auto import tqdm

from tinycea import ablations
from tinycea.lab import mechanism
from tinycea.ops import reference as ops
from tinycea.plots import show
from tinycea.scenes import Scene, photographs, pyramid

plt.rcParams["image.interpolation"] = "nearest"
rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)
SIDE, task = 64, mechanism.TASKS["lamps"]


def photograph(name, top, left, seed):
    """Tokens (1,64,64,16), and the colors t (3,3) of the lamps, as in notebook 1."""
    light = np.random.default_rng(seed)
    J = pyramid(Scene(photographs("test")[name]), SIDE)[2].image[top:top + SIDE, left:left + SIDE]
    J = 0.2 * (J - J.mean((0, 1))) / J.std()
    a = mechanism.fields(1, SIDE, 3, light)
    x = mechanism.tokens(task, J[None], a, light).astype(np.float64)
    return x, np.linalg.lstsq(a.reshape(-1, 3), (mechanism.color(x) - J).reshape(-1, 3))[0]


def seen(tokens):
    return np.clip(mechanism.color(tokens).reshape(SIDE, SIDE, 3) + 0.5, 0, 1)


def write(x, p, config):
    """What a layer does: y, A, U and the matrix M of one photograph."""
    y, cache = ablations.forward(x, p, config, ops)
    A, U = (ablations.anatomy(cache)[factor][0] for factor in "AU")
    return y, A, U, A.T @ U / np.sqrt(A.size)               # C R numbers in A


learned = {name: np.array(value, np.float64) for name, value in mechanism.teach(task, mechanism.CEA, 1000).items()}
cases = [photograph("chelsea", 4, 26, 337), photograph("astronaut", 0, 24, 180)]

# %%
figure, axes = plt.subplots(2, 4, figsize=(8, 4.4), width_ratios=(1, 1, 1, 0.7))
for row, (x, t) in zip(axes, cases):
    y, _, _, M = write(x, learned, mechanism.CEA)
    L = mechanism.LIFT.astype(np.float64)                   # a unit of lamp t comes out as t (1 + L M_cc L^T) + M_kc L^T
    read = -M[:3, 3:] @ L.T @ np.linalg.inv(np.eye(3) + L @ M[3:, 3:] @ L.T)
    show(row[0], seen(x), "X")
    show(row[1], M, "M: what goes in, to what comes out", cmap="PuOr", vmin=-0.3, vmax=0.3)
    row[1].axhline(2.5, color="black", lw=0.8)
    row[1].axvline(2.5, color="black", lw=0.8)
    row[1].set(ylabel="color in | keys", xlabel="keys | color out")
    show(row[2], seen(y), "Y = X + XM")
    show(row[3], np.clip(0.5 + np.stack((read, t), 1), 0, 1), "read | true")
    row[3].set(xlabel="one lamp per row")
    assert np.corrcoef(read.ravel(), t.ravel())[0, 1] > 0.95 and close(y, x + x @ M)
for axis in axes.flat:
    axis.grid(False)
figure.suptitle("One layer, two photographs, two matrices: M has read the colors of each one's lamps", fontsize=10)
plt.show()

# %% [markdown]
# ## 1. From softmax attention to CEA
#
# *Attention* lets a *query* look up a mix of *values*: the more it resembles a value's *key*, the more of the value enters. Here
# the tokens are the queries, the rows $a_r$ of $A$ the keys, the rows $u_r$ of $U$ the values. Softmax attention returns a
# mean (Vaswani et al. 2017, eq. 1):
#
# $$y_n = \frac{\sum_r e^{s_{nr}}\, u_r}{\sum_r e^{s_{nr}}}, \qquad s_{nr} = \frac{\langle x_n, a_r \rangle}{\sqrt C} .$$
#
# The exponential only measures how similar a token and a key are. Put any function $\operatorname{sim}(x, a)$ in its place. If it
# is a dot product of *features*, $\operatorname{sim}(x,a) = \langle \phi(x), \phi(a) \rangle$, the token can be taken out of both
# sums, and what is left inside them does not depend on the token (Katharopoulos et al. 2020, eq. 4 and 5):
#
# $$y(x) = \frac{\sum_r \operatorname{sim}(x, a_r)\, u_r}{\sum_r \operatorname{sim}(x, a_r)}
# = \frac{\phi(x)^\top \big( \sum_r \phi(a_r)\, u_r^\top \big)}{\phi(x)^\top \sum_r \phi(a_r)} .$$
#
# This is *linear attention*: the matrix in the big brackets and the vector below it are made once, then read by all tokens.

# %%
N, C, R = 60, 4, 5
X = rng.normal(size=(N, C)) / 1.5
A, U = rng.normal(size=(2, R, C))
S, _ = ops.affinity(X, A)


def kernel_attention(phi, X, A, U):
    matrix = sum(np.outer(key, u) for key, u in zip(phi(A), U))
    vector = phi(A).sum(0)
    return (phi(X) @ matrix) / (phi(X) @ vector)[:, None]


def pair_by_pair(sim, X, A, U):
    similar = np.array([[sim(x, a) for a in A] for x in X])
    return similar @ U / similar.sum(1, keepdims=True)


attention = ops.topk_softmax(S[None], R)[0][0] @ U          # k = R: a softmax over all pairs
assert close(attention, pair_by_pair(lambda x, a: np.exp(x @ a / np.sqrt(C)), X, A, U))

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
    assert close(taylor(K, X) @ taylor(K, A).T, sum(S**k / factorial(k) for k in range(K + 1)))
direct = pair_by_pair(lambda x, a: sum((x @ a / np.sqrt(C))**k / factorial(k) for k in range(5)), X, A, U)
assert close(kernel_attention(partial(taylor, 4), X, A, U), direct)

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
    errors = [np.abs(kernel_attention(partial(taylor, K), X, A / shrink, U) - softmax).max() for K in orders]
    axes.semilogy(orders, errors, marker=marker, label=f"largest |s| = {np.abs(scores).max():.2f}")
    assert errors[8] < 0.02 * errors[2] and (shrink == 1 or errors[8] < 1e-4)
axes.set(xlabel="order K of the feature map", ylabel="largest error of an output entry",
         title="Taylor features turn linear attention into softmax attention")
axes.legend()
plt.show()

# %% [markdown]
# $C^K$ features are too many. So take the simplest, $\phi(x) = x$. The similarity is then the signed dot product; its sum over
# $r$ may be zero or negative, so it is no use as a normalizer: leave it out, and put constant scales in its place. What remains
# is the update of CEA, the first-order term of softmax attention's numerator:
#
# $$\begin{aligned}
# \Delta x_n &= \frac{1}{\sqrt{CR}}\; x_n^\top \sum_r a_r\, u_r^\top = \frac{1}{\sqrt R} \sum_r s_{nr}\, u_r, \\
# \sum_r e^{s_{nr}}\, u_r &= \sum_r u_r + \underbrace{\sum_r s_{nr}\, u_r}_{\text{CEA}} + \frac12 \sum_r s_{nr}^2\, u_r + \dots
# \end{aligned}$$
#
# For small affinities $\varepsilon s$ softmax attention as a whole is linear in them but for a constant, the mean $\bar u$:
#
# $$\frac{\sum_r e^{\varepsilon s_{nr}}\, u_r}{\sum_r e^{\varepsilon s_{nr}}} = \bar u +
# \frac{\varepsilon}{R} \sum_r s_{nr} (u_r - \bar u) + O(\varepsilon^2) .$$
#
# So a softmax adds $\bar u$ to every token, whatever it is, and uses the values only as far as they differ from each other. CEA
# adds no constant and takes the values as they are.

# %%
update = X @ sum(np.outer(A[r], U[r]) for r in range(R)) / np.sqrt(C * R)
assert close(update, S @ U / np.sqrt(R)) and close(update, ops.combine(np.zeros((N, C)), S, U)[0])
order = [taylor(K, X) @ taylor(K, A).T @ U for K in (0, 1)]
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
# token is one read. Write by write, the cat comes out of the lamps:

# %%
x, t = cases[0]
y, A, U, M = write(x, learned, mechanism.CEA)
(R, C), N = A.shape, SIDE**2
X, Y = x.reshape(N, C), y.reshape(N, C)

M_r = np.zeros((C, C))
figure, axes = plt.subplots(1, R + 1, figsize=(9, 2.1))
show(axes[0], seen(X), "no write")
for r, axis in enumerate(axes[1:]):
    M_r += np.outer(A[r], U[r]) / np.sqrt(C * R)            # a write
    show(axis, seen(X + X @ M_r), f"{r + 1} written")       # N reads
figure.suptitle("No component is a lamp: the four pairs clean the photograph only together", fontsize=10)
plt.show()

# %% [markdown]
# $$M = \frac{1}{\sqrt{CR}} \sum_r a_r\, u_r^\top = \frac{A^\top U}{\sqrt{CR}}, \qquad y_n = x_n + M^\top x_n .$$
#
# The library writes and reads in [`fast_weight`](../tinycea/ops/reference.py). [`assembly`](../tinycea/ops/reference.py) takes
# either this order or the one of notebook 1, whichever has fewer multiply-adds. For 12 pairs and only 3 tokens that is the other.

# %%
assert close(M_r, M) and np.linalg.matrix_rank(M) <= R
Y_library, (*_, M_library) = ops.fast_weight(X, X, A, U)
assert close(Y, Y_library) and close(M, M_library)
A_wide, U_wide = np.vstack((A, A, A)), np.vstack((U, U, U))
for tokens, order in ((N, "fast weight first"), (3, "tokens first")):
    Y_library, cache = ops.assembly(X[:tokens], X[:tokens], A_wide, U_wide)
    assert cache[0] == order and close(Y_library - X[:tokens], np.sqrt(3) * (Y - X)[:tokens])

# %% [markdown]
# ## 3. What linear buys: the order of a product
#
# "Linear" is often said to mean: linear in the number of tokens. That is no gain *here*: a softmax over $R$ fixed keys takes
# $2NRC$ multiply-adds and $NR$ exponentials, linear in $N$ as well. (Quadratic is attention among the $N$ tokens themselves.)
# What it buys: the pairs can be summed into $M$ *before* any token is seen. Then a read costs the same for any $R$; $M$ folds
# into a linear map that follows, $Y W = X\, (I + M) W$; and one may choose the cheaper of two orders. A product of an $(I,J)$
# matrix with a $(J,K)$ matrix takes $IJK$ *multiply-adds*, so
#
# $$\begin{aligned}
# \text{tokens first:} \quad & (X A^\top)\, U && NRC + NRC = 2NRC \text{ multiply-adds} \\
# \text{fast weight first:} \quad & X\, (A^\top U) && RC^2 + NC^2 \text{ multiply-adds} \\
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


def softmaxed(x, xhat, A, U):
    return ops.combine(x, ops.topk_softmax(ops.affinity(xhat, A)[0], A.shape[1])[0].view(Counted), U)[0]


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
    assert count(softmaxed, x[None], xhat[None], A[None], U[None]) == madds[0]             # a softmax: linear in N, no choice

W = rng.normal(size=(16, 5))
assert close(Y @ W, X @ ((np.eye(16) + M) @ W))             # the layer disappears in the next one

# %% [markdown]
# Multiply-adds are not time. So measure the bare products too: float32, one core, the fastest of 45 runs in which the two orders
# take turns.

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
    return seconds.min(2).T


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
others = {rank: crossing(rank * some, *measure(N, rank, (rank * some).astype(int))) for rank in tqdm((8, 32))}
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
axes[1].axvline(measured, color="0.4", ls=(0, (7, 3)), lw=1, label=f"measured: C = {measured:.0f}")
axes[0].set_title("counted")
axes[1].set_title("measured")
for axis in axes:
    axis.legend(loc="upper left")
figure.suptitle(f"Below about 2R channels the fast weight is the cheaper order (N = {N}, R = {R})", fontsize=10)
plt.show()

# %% [markdown]
# Where the measured curves cross depends on $R$: on one core of an AMD EPYC with OpenBLAS, nothing else running, at about $3R$
# for $R = 8$, the library's default, and near $2R$ for $R = 32$ (one run is printed above; a busy machine gives other numbers).
# Products that are only 8 columns wide are slow for their size. So [`assembly`](../tinycea/ops/cpu.py) of `ops/cpu.py` does not
# count: it takes the fast weight below $C = 3R$, if there are also more than $C$ tokens.
#
# ## 4. What the identity keeps and a softmax breaks
#
# Freeze $A$ and $U$ as the cat wrote them, and show the layer the negative, $-X$: keys and colors change sign.

# %%
x = cases[0][0]
_, A, U, M = write(x, learned, mechanism.CEA)
(R, C), N, A, U = A.shape, SIDE**2, A[None], U[None]


def signed(X, A, U):
    return ops.combine(0 * X, ops.affinity(X, A)[0], U)[0]


def softmax(X, A, U):
    return ops.combine(0 * X, ops.topk_softmax(ops.affinity(X, A)[0], A.shape[1])[0], U)[0]


X = x.reshape(1, N, C)
figure, axes = plt.subplots(1, 4, figsize=(8, 2.4))
for pair, f in zip((axes[:2], axes[2:]), (signed, softmax)):
    for axis, sign, name in zip(pair, (1, -1), ("X", "-X")):
        show(axis, seen(f(sign * X, A, U)), f"{f.__name__}: f({name})")
figure.suptitle("The signed update of the negative is the negative update; a softmax's is not", fontsize=10)
plt.show()

# %% [markdown]
# Call the update $f(X; A, U)$. Let $\Pi$ be a permutation matrix of the pairs, $G$ any invertible matrix of $R \times R$ numbers.
#
# $$\begin{aligned}
# \text{permutation:} \quad & f(X;\, \Pi A,\, \Pi U) = f(X;\, A,\, U) \\
# \text{gauge freedom:} \quad & f(X;\, G A,\, G^{-\top} U) = f(X;\, A,\, U) \\
# \text{oddness:} \quad & f(-X;\, A,\, U) = -f(X;\, A,\, U) \\
# \text{linearity:} \quad & f(2 X + X';\, A,\, U) = 2 f(X;\, A,\, U) + f(X';\, A,\, U) \\
# \text{rank:} \quad & \operatorname{rank} f(X;\, A,\, U) \le R .
# \end{aligned}$$
#
# *Gauge freedom* is the physicists' name for a change of description that changes nothing observable:
# $(X A^\top G^\top)(G^{-\top} U) = X A^\top U$. Only the product $A^\top U$ matters, so one must not read much into a single map
# $s_{nr}$. A permutation is such a change, and the softmax respects it too; but since it compares single pairs, no other $G$ in
# general. Nor does it vanish at zero: a token without any affinity gets the mean direction.

# %%
def relative(left, right):
    return np.abs(left - right).max() / np.abs(right).max()


other = cases[1][0].reshape(1, N, C)
PI = np.eye(R)[[2, 0, 3, 1]]
G = np.eye(R) + 0.5 * rng.normal(size=(R, R))
table = {}
for f in (signed, softmax):
    y = f(X, A, U)
    singular = np.linalg.svd(y[0], compute_uv=False)
    for name, error in (("permutation", relative(f(X, PI @ A, PI @ U), y)),
                        ("gauge freedom", relative(f(X, G @ A, np.linalg.inv(G).T @ U), y)),
                        ("oddness", relative(f(-X, A, U), -y)),
                        ("linearity", relative(f(2 * X + other, A, U), 2 * y + f(other, A, U))),
                        ("rank", singular[R] / singular[0])):
        table.setdefault(name, []).append(error)
assert close(signed(0 * X, A, U), 0) and close(softmax(0 * X, A, U), U[0].mean(0) / np.sqrt(R))

# %% [markdown]
# Now the whole layer $\mathrm{CEA}(X)$, in which the probe of [notebook 2](02_hyper_adapter.ipynb) writes $A$ and $U$. With
# $\sigma$ a shuffle of the tokens:
#
# $$\begin{aligned}
# A(\sigma X) &= A(X), & U(\sigma X) &= U(X), & \mathrm{CEA}(\sigma X) &= \sigma\, \mathrm{CEA}(X), \\
# \mathrm{CEA}(2X) &= 2\, \mathrm{CEA}(X), & \mathrm{CEA}(-X) &\ne -\mathrm{CEA}(X) . &&
# \end{aligned}$$
#
# - The probe sums over all tokens and does not see their order; neighbors exist only in the convolutions around the layer.
# - The image's norm makes $A$ and $U$ blind to the scale of $X$, so the update is of degree one.
# - Oddness would need $A$ and $U$ of $-X$ to be $-A$ and $-U$. The probe's softmax breaks that. With $Q = 0$, where it takes
#   plain means, the layer *is* odd, though $A$ and $U$ depend on $X$; as long as the norm's bias is zero, as at the start.
# - $M = W_A^\top W_V^\top (\hat X^\top P^\top P \hat X) W_V W_U / \sqrt{CR}$ holds $W_V$ twice and, besides $P$, $\hat X$ twice.
#   Affinities of $\hat X$, as in the layer's first form, would bring in a third: doubling $\hat X$ then makes eight times the
#   update where $Q = 0$, not four.

# %%
sigma = rng.permutation(N)
big = 1e4 * x                                               # the norm's 1e-6 under the root does not count


def shuffled(x):
    return x.reshape(1, N, C)[:, sigma].reshape(x.shape)


for affinity in ("signed", "softmax"):
    config = ablations.CEAConfig(rank=R, affinity=affinity)

    def delta(x, **changed):
        return ablations.forward(x, learned | {"norm.bias": np.zeros(C)} | changed, config, ops)[0] - x

    before, after = (write(z, learned, config) for z in (x, shuffled(x)))
    mean = {"Q": np.zeros_like(learned["Q"])}
    for name, error in (("layer: A, U under a shuffle", max(relative(after[i], before[i]) for i in (1, 2))),
                        ("layer: Y under a shuffle", relative(delta(shuffled(x)), shuffled(delta(x)))),
                        ("layer: degree one", relative(delta(2 * big), 2 * delta(big))),
                        ("layer: oddness", relative(delta(-x), -delta(x))),
                        ("layer, Q = 0: oddness", relative(delta(-x, **mean), -delta(x, **mean))),
                        ("the same, with a bias", relative(delta(-x, **mean, **{"norm.bias": np.ones(C)}),
                                                           -delta(x, **mean, **{"norm.bias": np.ones(C)})))):
        table.setdefault(name, []).append(error)

wide = {name: 2 * learned[name] for name in ("norm.weight", "norm.bias")}               # doubles X̂
M_of = {name: write(x, learned | changed, mechanism.CEA)[3] for name, changed in
        (("", {}), ("W_V", {"W_V": 2 * learned["W_V"]}), ("Q = 0", mean), ("Q = 0, X̂", mean | wide), ("X̂", wide))}
assert close(M_of["W_V"], 4 * M_of[""]) and close(M_of["Q = 0, X̂"], 4 * M_of["Q = 0"])
assert relative(M_of["X̂"], 4 * M_of[""]) > 0.01            # with a softmax in the probe there is no degree in X̂
first_form = ablations.CEAConfig(rank=R, norm="token", tokens="Xhat")
once, twice = (ablations.forward(x, learned | mean | changed, first_form, ops)[0] - x for changed in ({}, wide))
assert close(twice, 8 * once)

# %% [markdown]
# All of it in one table: the relative error of each equation, which is rounding where it holds. For the rank it is the singular
# value of index $R + 1$ relative to the first.

# %%
print(f"{'':28s}{'signed':>8s}{'softmax':>10s}")
for name, errors in table.items():
    print(f"{name:28s}{errors[0]:8.0e}{errors[1]:10.0e}")

never = "layer: oddness", "the same, with a bias"
only_signed = "gauge freedom", "oddness", "linearity", "layer: degree one"
for name, errors in table.items():
    for error, keeps in zip(errors, (name not in never, name not in never + only_signed)):
        assert error < 1e-9 if keeps else error > 1e-3, (name, error)

# %% [markdown]
# ## 5. What the missing normalizer costs
#
# A softmax divides by what it summed up, so its output is a mean of the values, as large as one of them at most. A plain sum
# grows with the number of its terms. Constant scales answer for that on average:

# %%
def spreads(C, R, images=64, tokens=100):
    """Standard deviation of the update: without scales, with both, and of a softmax over r."""
    X = rng.normal(size=(images, tokens, C))
    A, U = rng.normal(size=(2, images, R, C))
    S, _ = ops.affinity(X, A)
    plain, soft = X @ A.swapaxes(1, 2) @ U, ops.topk_softmax(S, R)[0] @ U
    return plain.std(), ops.combine(0 * X, S, U)[0].std(), soft.std()


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
# For independent $x_{nc}$, $a_{rc}$, $u_{rc}$ of variance 1 an entry of the update without scales has variance $C$ from the dot
# product, times $R$ from the sum over the pairs:
#
# $$\operatorname{std}\Big( \sum_r \langle x, a_r \rangle\, u_{rc} \Big) = \sqrt{CR}, \qquad
# \operatorname{std}\Big( \frac{1}{\sqrt{CR}} \sum_r \langle x, a_r \rangle\, u_{rc} \Big) = 1 .$$
#
# The softmax *shrinks* with $R$, since a mean of many independent values is small. (A layer's own factors are not independent of
# variance 1, see notebook 1; $W_U = 0$ starts it from no update at all.)
#
# **What the scales do not give is a bound.** The most that is sure follows from the Cauchy-Schwarz inequality; $\|M\|$ is the
# largest factor by which $M$ stretches a vector (its first singular value):
#
# $$|\Delta x_n| = |M^\top x_n| \le \|M\|\, |x_n| \le \frac{|x_n|}{\sqrt{CR}} \sum_r |a_r|\,|u_r| .$$
#
# Whoever writes larger keys gets a larger update, without limit. A softmax *saturates*: with larger keys it only chooses more
# sharply, and what it returns is never longer than the longest value. With a factor $\tau$ on all keys,
#
# $$f_{\text{signed}}(X;\, \tau A,\, U) = \tau\, f_{\text{signed}}(X;\, A,\, U), \qquad
# \sqrt R\; \big| f_{\text{softmax}}(x_n;\, \tau A,\, U) \big| \le \max_r |u_r| .$$

# %%
lengths, length_x = (np.linalg.norm(rows[0], axis=1) for rows in (signed(X, A, U), X))
length_a, length_u = np.linalg.norm(A[0], axis=1), np.linalg.norm(U[0], axis=1)
stretch = np.linalg.norm(M, 2)
print(f"longest update, relative to its token: {(lengths / length_x).max():.2f}; |M| = {stretch:.2f}; "
      f"sum of |a||u| / sqrt(CR) = {length_a @ length_u / np.sqrt(C * R):.2f}")
assert (lengths <= stretch * length_x * (1 + 1e-12)).all() and stretch <= length_a @ length_u / np.sqrt(C * R)

print(f"longest |u_r| = {length_u.max():.2f}; mean length of the output, times the square root of R:")
for tau in 2**np.arange(0, 9, 2):
    once, sharp = (np.sqrt(R) * np.linalg.norm(f(X, tau * A, U)[0], axis=1) for f in (signed, softmax))
    print(f"tau = {tau:3d}   signed {once.mean():7.2f}   softmax {sharp.mean():5.2f}")
    assert close(signed(X, tau * A, U), tau * signed(X, A, U)) and (sharp <= length_u.max() * (1 + 1e-12)).all()

# %% [markdown]
# No image can write arbitrarily large keys: a summary $z_r$ is a mean of values $v_n = W_V^\top \hat x_n$, so no longer than the
# longest of them; and after the image's norm (weight 1, bias 0) no token is longer than the whole image, $\sqrt{NC}$. With one
# head the weights alone bound the factors, for every image; but nothing except training keeps the weights small:
#
# $$|a_r| \le \sqrt{NC}\, \|W_V\|\, \|W_A\|, \qquad |u_r| \le \sqrt{NC}\, \|W_V\|\, \|W_U\| .$$

# %%
plain = learned | {"norm.weight": np.ones(C), "norm.bias": np.zeros(C)}
for size in (1, 1e6):                                       # the norm forgets how large the features are
    _, A_size, U_size, _ = write(size * x, plain, ablations.CEAConfig(rank=R, heads=1))
    for factor, name in ((A_size, "W_A"), (U_size, "W_U")):
        longest = np.linalg.norm(factor, axis=1).max()
        assert longest <= np.sqrt(N * C) * np.linalg.norm(plain["W_V"], 2) * np.linalg.norm(plain[name], 2)

# %% [markdown]
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
assert close(signed(X, A_new[None], U_new[None]), signed(X, A, U))
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

# %% [markdown]
# **Next:** [notebook 4](04_gradient_checking.ipynb) checks derivatives that were made by hand. Linear attention:
# [arXiv 2006.16236](https://arxiv.org/abs/2006.16236); fast weights: [arXiv 2102.11174](https://arxiv.org/abs/2102.11174).
