# %% [markdown]
# # 1. Token assembly: a residual that every token puts together itself
#
# **The question.** A photograph stands under three colored lamps. How can one pixel get its own correction out of three colors?
# **You need** matrix products, rank, softmax, the chain rule. **Minutes:** 15. **The answer** is the first picture.
#
# A network sees an image as $N$ *tokens*, the rows of $X$ of shape $(N,C)$; a residual layer changes them, $Y = X + \Delta X$.
# Continuous Expert Assembly (CEA, [arXiv 2605.06127](https://arxiv.org/abs/2605.06127)) builds $\Delta X$ like this:
#
# ![The layer: what is learned is orange, what the image writes is blue](../data/layer.svg)
#
# This notebook is its upper half, from $X$ to $Y$, with $A$ and $U$ given; in [notebook 2](02_hyper_adapter.ipynb) the image
# writes them. Every equation has its NumPy and an `assert` beside it; `close` means: equal up to rounding in float64.
#
# A token is a pixel: three *key* numbers say, with some noise, how much of each lamp it gets (less than none is possible), and
# its color follows, as 13 numbers. Here $A$ picks the keys, and $U$ is minus the lamps' colors. So each token subtracts what it
# got.

# %%
import os
from functools import cache, partial

import matplotlib.pyplot as plt
import numpy as np

from tinycea import ablations, cea, check_gradients
from tinycea.lab import mechanism
from tinycea.ops import reference as ops
from tinycea.plots import show
from tinycea.scenes import Scene, photographs, pyramid

rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)
plt.rcParams["image.interpolation"] = "nearest"
SIDE, CUT = 64, {"chelsea": (4, 26, 337), "astronaut": (0, 24, 180)}        # pixels; top, left, and a seed for each photograph


@cache
def photograph(name, kind="lamps"):
    """Tokens X (N,16), clean colors J (N,3), and the colors t (3,3) of three lamps (or of three regions' stains)."""
    top, left, seed = CUT[name]
    task, rng = mechanism.TASKS[kind], np.random.default_rng(seed)
    J = pyramid(Scene(photographs("test")[name]), SIDE)[2].image[top:top + SIDE, left:left + SIDE]
    J = 0.2 * (J - J.mean((0, 1))) / J.std()                # as the tasks of `tinycea mechanism` ask
    a = mechanism.AMOUNTS[task.amounts](mechanism.fields(1, SIDE, 3, rng))
    X, J, a = (part.reshape(SIDE**2, -1).astype(float) for part in (mechanism.tokens(task, J[None], a, rng), J, a))
    return X, J, np.linalg.lstsq(a, mechanism.color(X) - J)[0]


def by_hand(t):
    return np.eye(3, 16), -np.hstack((np.zeros((3, 3)), t @ mechanism.LIFT))


def seen(colors):
    return np.clip(colors.reshape(SIDE, SIDE, 3) + 0.5, 0, 1)


def dB(colors, J):
    return -10 * np.log10(max(np.mean((colors - J)**2), 1e-6))          # beyond 60 dB there is nothing to see


X, J, t = photograph("chelsea")
A, U = by_hand(t)
S = X @ A.T
Y = X + S @ U

# %%
figure, axes = plt.subplots(1, 6, figsize=(9, 2))
show(axes[0], seen(mechanism.color(X)), f"X: {dB(mechanism.color(X), J):.1f} dB")
for r, axis in enumerate(axes[1:4]):
    show(axis, S[:, r].reshape(SIDE, SIDE), f"$s_{{n{r + 1}}}$, and $u_{r + 1}$", cmap="PuOr", vmin=-3, vmax=3)
    axis.add_patch(plt.Rectangle((3, 3), 16, 16, fc=np.clip(mechanism.color(U[r]) + 0.5, 0, 1), ec="black"))
axes[2].set_xlabel("orange −3 … violet +3")
show(axes[4], seen(mechanism.color(S @ U)), r"$\Delta X = SU$")
show(axes[5], seen(mechanism.color(Y)), f"Y: {dB(mechanism.color(Y), J):.1f} dB")
figure.suptitle("Each pixel asks how much of each lamp it got, and subtracts just that", fontsize=10)
plt.show()
assert dB(mechanism.color(Y), J) > dB(mechanism.color(X), J) + 15

# %% [markdown]
# ## 1. From a residual layer to a low-rank one
#
# The plainest residual layer has one matrix $W$ of $C \times C$ numbers. If $W$ is a product of two thin factors, $W = A^\top U$
# with $A$ and $U$ of shape $(R,C)$, it costs $2RC$ numbers. Read token by token, it is a sum over $r$: token $x_n$ asks each row
# $a_r$ of $A$ "how much of you is in me?" and adds the row $u_r$ of $U$ in that amount:
#
# $$Y = X + X (A^\top U) = X + (X A^\top)\, U, \qquad
# y_n = x_n + \sum_{r=1}^{R} s_{nr}\, u_r, \quad s_{nr} = \langle x_n, a_r \rangle = \sum_{c=1}^{C} x_{nc}\, a_{rc} .$$
#
# The rows of $A$ are *routing bases*, those of $U$ *residual directions*, and $s_{nr}$ is the *affinity* of token $n$ to
# component $r$. It has a sign: a token may add a direction or subtract it.

# %%
(N, C), R = X.shape, len(A)
assert close(Y, X + X @ (A.T @ U))
for n in range(100):
    s_n = [sum(X[n, c] * A[r, c] for c in range(C)) for r in range(R)]
    assert close(X[n] + sum(s_n[r] * U[r] for r in range(R)), Y[n])

# %% [markdown]
# ## 2. The layer of CEA: factors of the image's own, and two scales
#
# A low-rank layer whose $A$ and $U$ are parameters (LoRA is one) does the same to every image. But the next photograph stands
# under other lamps:

# %%
X_2, J_2, t_2 = photograph("astronaut")
tries = {"a second photograph": 0 * X_2, "with the cat's A, U": X_2 @ A.T @ U, "with its own": X_2 @ A.T @ by_hand(t_2)[1]}
figure, axes = plt.subplots(1, 3, figsize=(7, 2.6))
for axis, (name, update) in zip(axes, tries.items()):
    show(axis, seen(mechanism.color(X_2 + update)), f"{name}: {dB(mechanism.color(X_2 + update), J_2):.1f} dB")
figure.suptitle("What cleans one photograph does not clean another: A and U must be the image's own", fontsize=10)
plt.show()
none, static, own = (dB(mechanism.color(X_2 + update), J_2) for update in tries.values())
assert own > none + 15 and static < none + 3

# %% [markdown]
# So in CEA both carry an index $b$, that of the image. It also divides by $\sqrt C$ and $\sqrt R$ (our choice: the paper's
# abstract gives no scales):
#
# $$s_{bnr} = \frac{1}{\sqrt C} \sum_c x_{bnc}\, a_{brc}, \qquad
# y_{bnc} = x_{bnc} + \frac{1}{\sqrt R} \sum_r s_{bnr}\, u_{brc} .$$
#
# A sum of $C$ products of *independent* numbers of variance 1 has variance $C$, so that $s_{nr}$ has variance 1 after division by
# $\sqrt C$; in the same way $\sqrt R$ keeps the sum over components at the size of one of them. From here on $A$ is $\sqrt C$ and
# $U$ is $\sqrt R$ times what it was. [`assembly`](../tinycea/ops/reference.py) is
# [`affinity`](../tinycea/ops/reference.py), then [`combine`](../tinycea/ops/reference.py).

# %%
A, U = np.sqrt(C) * A, np.sqrt(R) * U
assert close(ops.affinity(X, A)[0], S) and close(ops.combine(X, S, U)[0], Y)

X_b = np.stack((X, X_2))                                    # a batch is so many images, nothing is shared
A_b, U_b = (np.stack(pair) for pair in ((A, A), (U, np.sqrt(R) * by_hand(t_2)[1])))
S_b = np.einsum("bnc,brc->bnr", X_b, A_b) / np.sqrt(C)
Y_b = X_b + np.einsum("bnr,brc->bnc", S_b, U_b) / np.sqrt(R)
assert close(Y_b, ops.assembly(X_b, X_b, A_b, U_b)[0]) and close(Y_b[0], Y)

# %% [markdown]
# The factors of an untrained layer are not independent numbers of variance 1: $U$ is zero, and $A$ is made of *means* of tokens,
# which are smaller than the tokens. With random tokens of variance 1:

# %%
config = ablations.CEAConfig()
x, p = rng.normal(size=(8, 32, 32, 24)), {name: np.empty(shape) for name, shape in ablations.shapes(24, config).items()}
cea.init(p, rng)
untrained = ablations.anatomy(ablations.forward(x, p, config, ops)[1])
independent, _ = ops.affinity(x[0].reshape(-1, 24), rng.normal(size=(500, 24)))
print(f"standard deviation of s: independent {independent.std():.2f}, untrained layer {untrained['S'].std():.2f}")
assert abs(independent.std() - 1) < 0.1 and untrained["S"].std() < 0.8 and not untrained["U"].any()

# %% [markdown]
# ## 3. Rank: what such an update can and cannot do
#
# With one component only the first lamp goes out, with two the second, with three all of them.

# %%
figure, axes = plt.subplots(1, 4, figsize=(9, 2.3), width_ratios=(1, 1, 1, 1.6))
axes[3].axhline(1e-12, color="0.6", lw=1)
for rank, marker in zip((1, 2, 3), "osD"):
    DX = S[:, :rank] @ U[:rank] / np.sqrt(R)
    show(axes[rank - 1], seen(mechanism.color(X + DX)), f"R = {rank}: {dB(mechanism.color(X + DX), J):.1f} dB")
    axes[3].semilogy(range(1, C + 1), np.linalg.svd(DX, compute_uv=False) + 1e-15, marker=marker, ms=4, label=f"R = {rank}")
    assert np.linalg.matrix_rank(DX) == rank
axes[3].set(xlabel="index", xticks=(1, 4, 8, 12, 16), ylabel=r"singular value of $\Delta X$", title="below the line: rounding")
axes[3].legend()
figure.suptitle("R components put out R lamps: an update has at most R nonzero singular values", fontsize=10)
plt.show()

# %% [markdown]
# $\Delta X = S U / \sqrt R$ is a product through a bottleneck of $R$ columns, and every token's residual is a combination of the
# rows of $U$: projecting it onto their span changes nothing. With $\Pi = U^\top (U U^\top)^{-1} U$,
#
# $$\operatorname{rank}(\Delta X) \le R, \qquad \Delta X\, \Pi = \Delta X .$$

# %%
assert close(DX @ U.T @ np.linalg.solve(U @ U.T, U), DX)

# %% [markdown]
# ## 4. What "signed" means: three rules for the same tokens
#
# Mixtures of experts turn affinities into *shares*. CEA takes them as they are. Two tasks tell the rules apart: lamps ask "how
# much, and of what sign"; stains in three regions, one each, ask "which one". Every rule gets the three directions that are best
# for its weights (least squares), and of five scales of $s$ the best.

# %%
def weighed(S, rule):
    return S if rule == "signed" else ops.topk_softmax(S[None], {"softmax": S.shape[1], "top-1": 1}[rule])[0][0]


@cache
def best(kind, rule, R=3):
    """Colors (N,3) of the photograph, restored as well as R components and this rule allow."""
    X, J, _ = photograph("chelsea", kind)
    colors, found = mechanism.color(X), []
    for sharp in (0.25, 0.5, 1, 2, 4):
        w = weighed(sharp * X[:, :R], rule)
        found.append(colors + w @ np.linalg.lstsq(w, J - colors)[0])
    return max(found, key=lambda colors: dB(colors, J))


KINDS, RULES, gain = ("lamps", "regions"), ("signed", "softmax", "top-1"), {}
figure, axes = plt.subplots(2, 4, figsize=(8, 4.5))
for row, kind in zip(axes, KINDS):
    X_k, J_k, _ = photograph("chelsea", kind)
    show(row[0], seen(mechanism.color(X_k)), f"{kind}: {dB(mechanism.color(X_k), J_k):.1f} dB")
    for axis, rule in zip(row[1:], RULES):
        gain[kind, rule] = dB(best(kind, rule), J_k)
        show(axis, seen(best(kind, rule)), f"{rule}: {gain[kind, rule]:.1f} dB")
figure.suptitle("Signed answers “how much”, a softmax “which one”", fontsize=10)
plt.show()
assert gain["lamps", "signed"] > max(gain["lamps", "softmax"], gain["lamps", "top-1"]) + 5
assert gain["regions", "softmax"] > gain["regions", "signed"] + 1

# %% [markdown]
# $$\Delta x_n = \sum_r w_{nr} u_r, \qquad
# w_{nr} = s_{nr} \;\text{(signed)}, \quad
# w_{nr} = \frac{e^{s_{nr}}}{\sum_{q} e^{s_{nq}}} \;\text{(softmax)}, \quad
# w_{nr} = \frac{[r \in \text{top } k]\; e^{s_{nr}}}{\sum_{q \in \text{top } k} e^{s_{nq}}} \;\text{(top-k)} .$$
#
# Shares are positive and sum to 1. So, unless the directions cancel, opposite tokens cannot get opposite residuals, and one that
# needs nothing gets something. But shares clean a noisy key, where signed affinities pass its noise on. Top-k is not even
# continuous: for a token between two components a step of $10^{-9}$ changes the winner.

# %%
E = np.exp(S)
largest = S == S.max(1, keepdims=True)
assert close(weighed(S, "softmax"), E / E.sum(1, keepdims=True)) and close(weighed(S, "top-1"), largest)
assert close(weighed(-S, "signed"), -weighed(S, "signed"))
assert all((weighed(S, rule) >= 0).all() and close(weighed(S, rule).sum(1), 1) for rule in RULES[1:])

here, there = np.array([[1 + 1e-9, 1, 0]]), np.array([[1, 1 + 1e-9, 0]])
jump = {rule: np.linalg.norm((weighed(here, rule) - weighed(there, rule)) @ U) for rule in RULES}
print({rule: f"{value:.0e}" for rule, value in jump.items()}, "is how far the residual jumps")
assert jump["top-1"] > 0.1 and jump["softmax"] < 1e-8 and jump["signed"] < 1e-8

# %% [markdown]
# **Try it.** In a running JupyterLab: choose the task, the rule and the rank. (Elsewhere one case is drawn.)

# %%
def look(kind="lamps", rule="signed", R=2):
    figure, axis = plt.subplots(figsize=(3.2, 3.2))
    colors = best(kind, rule, R)
    show(axis, seen(colors), f"{kind}, {rule}, R = {R}: {dB(colors, photograph('chelsea', kind)[1]):.1f} dB")
    plt.show()


try:
    from ipywidgets import interact
except ImportError:
    interact = None
if interact and "JPY_SESSION_NAME" in os.environ:           # set by Jupyter's server: somebody is looking
    interact(look, kind=list(KINDS), rule=list(RULES), R=(1, 3))
else:
    look()

# %% [markdown]
# ## 5. The gradient, index by index, then as matrices
#
# Let $L$ be any number computed from $Y$, and write $dY$ for $\partial L / \partial Y$ (here `dx` is always
# $\partial L/\partial x$, of $x$'s shape). What will $dU$ look like? Start from $U = 0$ and ask for the clean photograph,
# $L = \frac12 |Y - Y^*|^2$: the direction downhill is already minus the lamps' colors.

# %%
Y_star = X.copy()
Y_star[:, 3:] = J @ mechanism.LIFT
downhill = -(S.T @ (X - Y_star)) / N                        # minus the gradient at U = 0, derived below
figure, axes = plt.subplots(2, 3, figsize=(4, 1.7))
for row, name, colors in zip(axes, ("$-dU$", "minus\nlamp"), (mechanism.color(downhill), -t)):
    for axis, color in zip(row, colors):
        show(axis, np.clip(color + 0.5, 0, 1)[None, None], aspect="auto")
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
figure.suptitle("The first gradient of U already shows the lamps", fontsize=10)
plt.show()
assert np.corrcoef(mechanism.color(downhill).ravel(), -t.ravel())[0, 1] > 0.95

# %% [markdown]
# The chain rule sums over every place where a variable is used. For one image
# $y_{nc} = x_{nc} + \frac{1}{\sqrt R} \sum_r s_{nr} u_{rc}$:
#
# - $u_{rc}$ is used by all tokens $n$, in channel $c$ alone, with the factor $s_{nr}/\sqrt R$. So
#   $\;du_{rc} = \sum_n dy_{nc}\, s_{nr} / \sqrt R$.
# - $s_{nr}$ is used by token $n$ alone, in all channels $c$, with the factor $u_{rc}/\sqrt R$. So
#   $\;ds_{nr} = \sum_c dy_{nc}\, u_{rc} / \sqrt R$.
# - $x_{nc}$ is used once here, with the factor 1, and once in $s_{nr} = \sum_c x_{nc} a_{rc} / \sqrt C$, by all components $r$.
# - $a_{rc}$ is used there by all tokens $n$.
#
# A sum over a shared index is a matrix product. The index that is summed over stands inside, the result's indices outside:
#
# $$dS = \frac{dY\, U^\top}{\sqrt R}, \qquad dU = \frac{S^\top dY}{\sqrt R}, \qquad
# dA = \frac{dS^\top X}{\sqrt C}, \qquad dX = dY + \frac{dS\, A}{\sqrt C} .$$

# %%
X, S, N = X[:70], S[:70], 70                                # enough tokens to loop over
A, U, dY = A + rng.normal(size=(R, C)), U + rng.normal(size=(R, C)), rng.normal(size=(N, C))
S = X @ A.T / np.sqrt(C)
dS = dY @ U.T / np.sqrt(R)
dU = S.T @ dY / np.sqrt(R)
dA = dS.T @ X / np.sqrt(C)
dX = dY + dS @ A / np.sqrt(C)

# %%
dU_loop, dS_loop = np.zeros((R, C)), np.zeros((N, R))
for n, r, c in np.ndindex(N, R, C):
    dU_loop[r, c] += dY[n, c] * S[n, r] / np.sqrt(R)
    dS_loop[n, r] += dY[n, c] * U[r, c] / np.sqrt(R)
assert close(dS, dS_loop) and close(dU, dU_loop)

_, cache_Y = ops.assembly(X[None], X[None], A[None], U[None])
dX_skip, dX_S, dA_library, dU_library = ops.assembly_backward(dY[None], cache_Y)
assert close(dX, (dX_skip + dX_S)[0]) and close(dA, dA_library[0]) and close(dU, dU_library[0])

# %% [markdown]
# The witness is a difference quotient: move one argument by $\pm h$ and see how much $L$ changes
# ([notebook 4](04_gradient_checking.ipynb) explains the checker).

# %%
rows = check_gradients(ops.assembly, ops.assembly_backward, {"x": X_b[:, :7], "tokens": X_b[:, 7:14], "A": A_b, "U": U_b})
print(rows)
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
T, cache_T = ops.topk_softmax(S[None], 1)
assert np.abs(ops.topk_softmax_backward(rng.normal(size=T.shape), cache_T)).max() < 1e-15
T, cache_T = ops.topk_softmax(S[None], 2)
assert np.abs(ops.topk_softmax_backward(rng.normal(size=T.shape), cache_T)).max() > 0.01

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

# %% [markdown]
# **Next:** [notebook 2](02_hyper_adapter.ipynb) lets the photograph find its lamps itself. The code:
# [`cea`](../tinycea/cea.py). The idea of low-rank updates: LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685).
