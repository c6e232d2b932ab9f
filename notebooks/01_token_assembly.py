# %% [markdown]
# # 1. Token assembly: a residual that every token puts together itself
#
# A network sees an image as $N$ *tokens*: feature vectors of $C$ numbers, one for each pixel (or each little square of pixels),
# the rows of a matrix $X$ of shape $(N,C)$. A residual layer changes them by an update, $Y = X + \Delta X$. This notebook builds
# the update of Continuous Expert Assembly (CEA, [arXiv 2605.06127](https://arxiv.org/abs/2605.06127)) from the simplest one, in
# five claims:
#
# 1. A low-rank layer adds up $R$ directions, each weighted by a dot product.
# 2. CEA is that layer with factors $A$ and $U$ of the image's own.
# 3. The update has rank at most $R$ and never leaves the span of $U$.
# 4. Signed affinities, softmax and top-k are three different rules; only the signed one can subtract, and only the first two are
#    continuous.
# 5. The backward is four matrix products, two for each product of the forward.
#
# Every equation has its lines of NumPy and an `assert` beside it. `close` means: equal up to rounding in float64.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from tinycea import check_gradients
from tinycea.ops import reference as ops

rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)

# %% [markdown]
# ## 1. From a residual layer to a low-rank one
#
# The plainest residual layer has one matrix $W$ of $C \times C$ numbers. If $W$ is a product of two thin factors, $W = A^\top U$
# with $A$ and $U$ of shape $(R,C)$, it costs $2RC$ numbers instead of $C^2$:
#
# $$Y = X + X W = X + X (A^\top U) = X + (X A^\top)\, U .$$

# %%
N, C, R = 100, 16, 3
X = rng.normal(size=(N, C))
A, U = rng.normal(size=(R, C)), rng.normal(size=(R, C))
Y = X + X @ (A.T @ U)
assert close(Y, X + (X @ A.T) @ U)

# %% [markdown]
# Read token by token, this is a sum over $r$. Token $x_n$ asks each row $a_r$ of $A$ "how much of you is in me?" and adds the row
# $u_r$ of $U$ in that amount:
#
# $$y_n = x_n + \sum_{r=1}^{R} s_{nr}\, u_r, \qquad s_{nr} = \langle x_n, a_r \rangle = \sum_{c=1}^{C} x_{nc}\, a_{rc} .$$
#
# The rows of $A$ are *routing bases*, those of $U$ *residual directions*, and $s_{nr}$ is the *affinity* of token $n$ to
# component $r$. It is a number with a sign: a token may add a direction or subtract it.

# %%
for n in range(N):
    y_n = X[n].copy()
    for r in range(R):
        s_nr = sum(X[n, c] * A[r, c] for c in range(C))
        y_n += s_nr * U[r]
    assert close(y_n, Y[n])

# %% [markdown]
# ## 2. The layer of CEA: two scales, factors of the image's own
#
# CEA divides by $\sqrt C$ and $\sqrt R$. To see why, take tokens of one length, $\hat X = \mathrm{LayerNorm}(X)$, whose entries
# have mean 0 and variance 1. (The layer of [notebook 2](02_hyper_adapter.ipynb) takes its affinities of $X$ itself, so that a
# token which carries twice as much of a degradation gets twice the update.)
#
# $$S = \frac{\hat X A^\top}{\sqrt C}, \qquad Y = X + \frac{S\, U}{\sqrt R} .$$
#
# A sum of $C$ products of independent numbers of variance 1 has variance $C$, so that $s_{nr}$ has variance 1 after division by
# $\sqrt C$; in the same way $\sqrt R$ keeps the sum over components at the size of one of them. (The scales are our choice, the
# abstract of the paper does not give them.)
#
# In the library these are [`affinity`](../tinycea/ops/reference.py) and [`combine`](../tinycea/ops/reference.py).

# %%
Xhat, _ = ops.layernorm(X, np.ones(C), np.zeros(C))
assert close(Xhat, (X - X.mean(1, keepdims=True)) / np.sqrt(X.var(1, keepdims=True) + 1e-6))

S = Xhat @ A.T / np.sqrt(C)
Y = X + S @ U / np.sqrt(R)

# %%
assert close(S, ops.affinity(Xhat, A)[0])
assert close(Y, ops.combine(X, S, U)[0])

a = rng.normal(size=64)                                     # one routing basis, a hundred thousand tokens
tokens, _ = ops.layernorm(rng.normal(size=(100_000, 64)), np.ones(64), np.zeros(64))
many = tokens @ a / np.sqrt(64)
print(f"standard deviation of the affinities: {many.std():.3f}, of the entries of a: {a.std(ddof=1):.3f}")
assert np.isclose(many.std(), a.std(ddof=1), rtol=0.01)

# %% [markdown]
# What makes it CEA: $A$ and $U$ are no parameters. They are written anew for each image $b$ (by the hyper-adapter of
# [the next notebook](02_hyper_adapter.ipynb)), so they carry an index $b$. A parameter $A$ would be a static low-rank layer, such
# as LoRA:
#
# $$s_{bnr} = \frac{1}{\sqrt C} \sum_c \hat x_{bnc}\, a_{brc}, \qquad
# y_{bnc} = x_{bnc} + \frac{1}{\sqrt R} \sum_r s_{bnr}\, u_{brc} .$$
#
# [`assembly`](../tinycea/ops/reference.py) computes both at once. The same token gets another residual in another image:

# %%
B = 2
X_b = rng.normal(size=(B, N, C))
X_b[1, 0] = X_b[0, 0]                                       # the first token of both images is the same
Xhat_b, _ = ops.layernorm(X_b, np.ones(C), np.zeros(C))
A_b, U_b = rng.normal(size=(B, R, C)), rng.normal(size=(B, R, C))
S_b = np.einsum("bnc,brc->bnr", Xhat_b, A_b) / np.sqrt(C)
Y_b = X_b + np.einsum("bnr,brc->bnc", S_b, U_b) / np.sqrt(R)

# %%
assert close(Y_b, ops.assembly(X_b, Xhat_b, A_b, U_b)[0])
for b in range(B):                                          # a batch is so many images, nothing is shared
    assert close(Y_b[b], X_b[b] + (Xhat_b[b] @ A_b[b].T / np.sqrt(C)) @ U_b[b] / np.sqrt(R))
assert np.abs((Y_b - X_b)[0, 0] - (Y_b - X_b)[1, 0]).max() > 0.1

# %% [markdown]
# ## 3. Rank: what such an update can and cannot do
#
# $\Delta X = S U / \sqrt R$ is a product through a bottleneck of $R$ columns. So its rank is at most $R$, and every token's
# residual is a combination of the rows of $U$: projecting it onto their span changes nothing. With
# $\Pi = U^\top (U U^\top)^{-1} U$,
#
# $$\operatorname{rank}(\Delta X) \le R, \qquad \Delta X\, \Pi = \Delta X .$$

# %%
DX = S @ U / np.sqrt(R)
projection = U.T @ np.linalg.solve(U @ U.T, U)
assert np.linalg.matrix_rank(DX) == R
assert close(DX @ projection, DX)

# %%
figure, axes = plt.subplots()
for rank, marker in zip((1, 3, 8, 16), "osD^"):
    A_r, U_r = rng.normal(size=(2, rank, C))
    update = ops.combine(0 * X, ops.affinity(Xhat, A_r)[0], U_r)[0]
    axes.semilogy(np.arange(1, C + 1), np.linalg.svd(update, compute_uv=False), marker=marker, label=f"R = {rank}")
axes.set(xlabel="index of the singular value", ylabel="singular value of the update",
         title=f"An update through R components has R singular values above zero (N = {N}, C = {C})")
axes.legend()
plt.show()

# %% [markdown]
# The last curve falls at the end, too: normalized tokens sum to zero over their channels, so they span only $C - 1 = 15$
# dimensions.

# %%
assert np.linalg.matrix_rank(Xhat) == C - 1 and np.linalg.matrix_rank(update) == C - 1

# %% [markdown]
# ## 4. What "signed" means: three rules for the same tokens
#
# Mixtures of experts turn affinities into *shares*: a softmax makes them positive and sum to 1, top-k keeps only the $k$ largest.
# CEA takes them as they are:
#
# $$\Delta x_n = \sum_r w_{nr} u_r, \qquad
# w_{nr} = s_{nr} \;\text{(signed)}, \quad
# w_{nr} = \frac{e^{s_{nr}}}{\sum_{q} e^{s_{nq}}} \;\text{(softmax)}, \quad
# w_{nr} = \frac{[r \in \text{top } k]\; e^{s_{nr}}}{\sum_{q \in \text{top } k} e^{s_{nq}}} \;\text{(top-k)} .$$
#
# The library has both other rules for comparison, in [`topk_softmax`](../tinycea/ops/reference.py): softmax is top-k with
# $k = R$.

# %%
E = np.exp(S)
softmax = E / E.sum(1, keepdims=True)
k = 1
largest = S >= np.sort(S, 1)[:, [-k]]
topk = np.where(largest, E, 0) / np.where(largest, E, 0).sum(1, keepdims=True)

# %%
assert close(softmax, ops.topk_softmax(S[None], R)[0])
assert close(topk, ops.topk_softmax(S[None], k)[0])

# %% [markdown]
# With $C = 2$ all of it fits into a picture. Tokens stand on a grid; the three thick arrows are the residual directions, and here
# each routing basis equals its direction ($a_r = u_r$). Each thin arrow is a token's residual.

# %%
grid = np.stack(np.meshgrid(np.linspace(-2, 2, 10), np.linspace(-2, 2, 10)), -1).reshape(-1, 2)
angles = np.radians([20, 95, 160])
U_2 = np.stack((np.cos(angles), np.sin(angles)), 1)
S_2 = grid @ U_2.T / np.sqrt(2)
weights = {"signed (CEA)": S_2, "softmax": ops.topk_softmax(S_2[None], 3)[0][0],
           "top-1": ops.topk_softmax(S_2[None], 1)[0][0]}

figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True)
for axis, (rule, w) in zip(axes, weights.items()):
    residual = w @ U_2
    axis.quiver(*grid.T, *residual.T, angles="xy", scale_units="xy", scale=4, width=0.005, color="0.35")
    axis.quiver(np.zeros(3), np.zeros(3), *U_2.T, angles="xy", scale_units="xy", scale=1, width=0.018, color="#D55E00")
    for r, u in enumerate(U_2):
        axis.annotate(f"$u_{r + 1}$", 1.25 * u, ha="center", va="center")
    axis.set(title=rule, xlabel="channel 1", aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
axes[0].set_ylabel("channel 2")
plt.show()

# %% [markdown]
# - **Signed**: a linear field. Opposite tokens get opposite residuals, tokens far from the origin get large ones, and a token at
#   the origin gets none.
# - **Softmax**: every residual is an average of $u_1, u_2, u_3$, so none points downward, not even for the tokens at the bottom:
#   they can only choose what hurts least.
# - **Top-1**: three constant residuals, and a jump where the winner changes.

# %%
residual = {rule: w @ U_2 for rule, w in weights.items()}
assert close(residual["signed (CEA)"][::-1], -residual["signed (CEA)"])        # the grid, read backward, is the grid mirrored
assert (residual["softmax"][:, 1] > 0).all() and (weights["softmax"] > 0).all() and close(weights["softmax"].sum(1), 1)
assert len(np.unique(residual["top-1"].round(9), axis=0)) == 3
print(f"share of negative affinities on random data: {np.mean(S_b < 0):.2f}")
assert 0.4 < np.mean(S_b < 0) < 0.6

# %% [markdown]
# The jump is a true discontinuity. On the line between the sectors of $u_1$ and $u_2$ a step of $10^{-9}$ across it turns the
# residual:

# %%
bisector = U_2[0] + U_2[1]
across = U_2[0] - U_2[1]
here, there = (bisector + sign * 1e-9 * across for sign in (1, -1))
jump = {}
for rule, top in (("softmax", 3), ("top-1", 1)):
    w = ops.topk_softmax((np.stack((here, there)) @ U_2.T / np.sqrt(2))[None], top)[0][0]
    jump[rule] = np.linalg.norm((w[0] - w[1]) @ U_2)
jump["signed"] = np.linalg.norm((here - there) @ U_2.T / np.sqrt(2) @ U_2)
print(jump)
assert jump["top-1"] > 1 and jump["softmax"] < 1e-8 and jump["signed"] < 1e-8

# %% [markdown]
# ## 5. The gradient, index by index, then as matrices
#
# Let $L$ be any number computed from $Y$, and write $dY$ for $\partial L / \partial Y$ (in this project `dx` is always
# $\partial L/\partial x$, of $x$'s shape). The chain rule sums over every place where a variable is used. For one image:
#
# $$y_{nc} = x_{nc} + \frac{1}{\sqrt R} \sum_r s_{nr} u_{rc} .$$
#
# - $u_{rc}$ is used by all tokens $n$, in channel $c$ alone, with the factor $s_{nr}/\sqrt R$. So
#   $\;du_{rc} = \sum_n dy_{nc}\, s_{nr} / \sqrt R$.
# - $s_{nr}$ is used by token $n$ alone, in all channels $c$, with the factor $u_{rc}/\sqrt R$. So
#   $\;ds_{nr} = \sum_c dy_{nc}\, u_{rc} / \sqrt R$.
# - $x_{nc}$ is used once, with the factor 1: $\;dx_{nc} = dy_{nc}$.

# %%
dY = rng.normal(size=(N, C))
dU_loop, dS_loop = np.zeros((R, C)), np.zeros((N, R))
for n, r, c in np.ndindex(N, R, C):
    dU_loop[r, c] += dY[n, c] * S[n, r] / np.sqrt(R)
    dS_loop[n, r] += dY[n, c] * U[r, c] / np.sqrt(R)

# %% [markdown]
# A sum over a shared index is a matrix product. The index that is summed over stands inside, and the result's indices stand
# outside:
#
# $$dX = dY, \qquad dS = \frac{dY\, U^\top}{\sqrt R}, \qquad dU = \frac{S^\top dY}{\sqrt R} .$$

# %%
dS = dY @ U.T / np.sqrt(R)
dU = S.T @ dY / np.sqrt(R)
assert close(dS, dS_loop) and close(dU, dU_loop)

# %%
dx_lib, dS_lib, dU_lib = ops.combine_backward(dY, ops.combine(X, S, U)[1])
assert close(dx_lib, dY) and close(dS_lib, dS) and close(dU_lib, dU)

# %% [markdown]
# The same for $s_{nr} = \sum_c \hat x_{nc} a_{rc} / \sqrt C$: each $\hat x_{nc}$ is used by all components $r$, each $a_{rc}$ by
# all tokens $n$:
#
# $$d\hat X = \frac{dS\, A}{\sqrt C}, \qquad dA = \frac{dS^\top \hat X}{\sqrt C} .$$

# %%
dXhat = dS @ A / np.sqrt(C)
dA = dS.T @ Xhat / np.sqrt(C)

# %%
dXhat_lib, dA_lib = ops.affinity_backward(dS, ops.affinity(Xhat, A)[1])
assert close(dXhat_lib, dXhat) and close(dA_lib, dA)
_, cache = ops.assembly(X[None], Xhat[None], A[None], U[None])
for mine, library in zip((dY, dXhat, dA, dU), ops.assembly_backward(dY[None], cache)):
    assert close(mine, library[0])

# %% [markdown]
# One entry against a difference quotient, by hand: move $a_{25}$ by $\pm h$ and see how much $L = \langle dY, Y \rangle$ changes.
# The layer is linear in $A$, so the quotient is exact but for rounding.
#
# $$\frac{\partial L}{\partial a_{25}} \approx \frac{L(a_{25} + h) - L(a_{25} - h)}{2h} .$$

# %%
def loss(A):
    return np.sum(dY * (X + (Xhat @ A.T / np.sqrt(C)) @ U / np.sqrt(R)))


h, step = 1e-4, np.zeros((R, C))
step[2, 5] = h
quotient = (loss(A + step) - loss(A - step)) / (2 * h)
print(f"by hand {dA[2, 5]:.9f}, difference quotient {quotient:.9f}")
assert np.isclose(dA[2, 5], quotient, rtol=1e-6)

# %% [markdown]
# And all four arguments, along random directions, with the library's checker ([notebook 4](04_gradient_checking.ipynb) explains
# it):

# %%
small = {"x": X_b[:, :7], "xhat": Xhat_b[:, :7], "A": A_b, "U": U_b}
rows = check_gradients(ops.assembly, ops.assembly_backward, small)
for row in rows:
    print(f"{row.argument:5s} {row.analytic:+.6f} {row.numeric:+.6f}   relative error {row.relative_error:.0e}")
assert all(row.passed for row in rows)

# %% [markdown]
# ## Exercises
#
# **1.** How many numbers does an update of rank $R$ really have? $A$ and $U$ hold $2RC$, but many pairs give the same
# $M = A^\top U$. Compute the rank of the Jacobian of $(A,U) \mapsto A^\top U$ at a random point and explain why it is
# $R(2C - R)$. (The solution is folded below; it runs with the notebook.)

# %% jupyter={"source_hidden": true}
# Solution
# dM = dA^T U + A^T dU: one column of the Jacobian per entry of A and of U. Replacing A by G A and U by G^-T U, with any
# invertible G of R x R numbers, leaves M as it is: R^2 of the 2 R C directions are lost.
basis = np.eye(R * C).reshape(R * C, R, C)
jacobian = np.concatenate([(basis.swapaxes(1, 2) @ U).reshape(R * C, -1), (A.T @ basis).reshape(R * C, -1)])
assert np.linalg.matrix_rank(jacobian) == R * (2 * C - R)

# %% [markdown]
# **2.** With top-1 the winner's share is always 1. What gradient do the affinities get? What does that mean for a router trained
# with top-1 and this rule alone?

# %% jupyter={"source_hidden": true}
# Solution
# None: the share 1 = e^s / e^s does not depend on s, so the router never learns. Practical routers keep the softmax's share
# of all experts as the winner's weight, or keep two.
T, cache = ops.topk_softmax(S[None], 1)
assert np.abs(ops.topk_softmax_backward(rng.normal(size=T.shape), cache)).max() < 1e-15
T, cache = ops.topk_softmax(S[None], 2)
assert np.abs(ops.topk_softmax_backward(rng.normal(size=T.shape), cache)).max() > 0.01

# %% [markdown]
# **3.** Give every component a learned gate $\gamma_r$: $\;Y = X + (S \operatorname{diag}(\gamma))\, U / \sqrt R$. Derive
# $d\gamma$, $dS$ and $dU$ index by index, write them as matrices, and check them with `check_gradients`.

# %% jupyter={"source_hidden": true}
# Solution
# y_nc = x_nc + sum_r s_nr gamma_r u_rc / sqrt R. gamma_r is used by all n and c: dgamma_r = sum_n s_nr (dY U^T)_nr / sqrt R.
def gated(X, S, U, gamma):
    return X + (S * gamma) @ U / np.sqrt(len(U)), (S, U, gamma)


def gated_backward(dY, cache):
    S, U, gamma = cache
    dT = dY @ U.T / np.sqrt(len(U))                         # gradient of S * gamma
    return dY, dT * gamma, (S * gamma).T @ dY / np.sqrt(len(U)), (dT * S).sum(0)


rows = check_gradients(gated, gated_backward, {"X": X[:7], "S": S[:7], "U": U, "gamma": rng.normal(size=R)})
assert all(row.passed for row in rows)
