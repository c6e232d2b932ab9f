# %% [markdown]
# # 2. The hyper-adapter: how an image writes its own A and U
#
# **The question.** In [notebook 1](01_token_assembly.ipynb) somebody told the layer the lamps' colors. How does a photograph find
# them itself? **You need** notebook 1, softmax, the chain rule. **Minutes:** 20. **The answer** is the first picture: a few
# learned questions, each a *query*, take weighted means of the photograph.
#
# ![The layer: what is learned is orange, what the image writes is blue](../data/layer.svg)
#
# This notebook is the lower half of the drawing. First every matrix is set by hand, so that one can say what it is for
# ([`by_hand`](../tinycea/lab/mechanism.py)); at the end the same layer learns. `close` means: equal up to rounding in float64;
# $\circ$ is the entrywise product, rowsum the sum over the last axis.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from tqdm.auto import tqdm

from tinycea import ablations, adapters, cea, gradcheck, nafnet
from tinycea.lab import mechanism
from tinycea.ops import reference as ops
from tinycea.plots import show
from tinycea.scenes import Scene, photographs, pyramid

plt.rcParams["image.interpolation"] = "nearest"
rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)
SIDE, task = 64, mechanism.TASKS["lamps"]


def double(p):
    return {name: np.array(value, np.float64) for name, value in p.items()}


def seen(tokens):
    return np.clip(mechanism.color(tokens).reshape(SIDE, SIDE, 3) + 0.5, 0, 1)


def dB(tokens):
    return -10 * np.log10(np.mean((mechanism.color(tokens).reshape(J.shape) - J)**2))


light = np.random.default_rng(337)                          # the cat of notebook 1, under the same lamps
J = pyramid(Scene(photographs("test")["chelsea"]), SIDE)[2].image[4:4 + SIDE, 26:26 + SIDE]
J = 0.2 * (J - J.mean((0, 1))) / J.std()
a = mechanism.fields(1, SIDE, 3, light)
cat = mechanism.tokens(task, J[None], a, light).astype(np.float64)
a = a.reshape(-1, 3)
t = np.linalg.lstsq(a, (mechanism.color(cat) - J).reshape(-1, 3))[0]        # the lamps' colors, which nobody tells the layer

hand, config = mechanism.by_hand(task)
hand = double(hand)
cleaned, cache = ablations.forward(cat, hand, config, ops)
written = ablations.anatomy(cache)
P, U = written["P"][0, 0], written["U"][0]
names = ["".join("+" if q > 0 else "−" for q in row[:3]) for row in hand["Q"]]

# %%
figure, axes = plt.subplots(1, 6, figsize=(9, 1.9))
show(axes[0], seen(cat), f"X: {dB(cat):.1f} dB")
for axis, r in zip(axes[1:5], (0, 1, 6, 7)):
    show(axis, np.log10(len(a) * P[r]).reshape(SIDE, SIDE), f"query {names[r]}", cmap="PuOr", vmin=-2, vmax=2)
    axis.add_patch(plt.Rectangle((3, 3), 16, 16, fc=np.clip(0.5 + 0.3 * mechanism.color(U[r]), 0, 1), ec="black"))
show(axes[5], seen(cleaned), f"Y: {dB(cleaned):.1f} dB")
figure.suptitle("A query looks (violet) where its mix of lamps shines; the square is the direction written for it", fontsize=10)
plt.show()
assert dB(cleaned) > dB(cat) + 10
assert (np.sign(P @ a) == np.sign(hand["Q"][:, :3])).all()  # each query sees more of its lamps, less of the others

# %% [markdown]
# ## 1. A probe that looks at an image
#
# There are eight queries, one for each choice of three signs. A query $q$ (a vector of $D$ numbers) scores every token's *key*
# $k_n$ by a dot product. A softmax over the tokens turns the scores $l_n$ into shares, and the summary is the mean of the tokens'
# *values* $v_n$ with these shares:
#
# $$l_n = \frac{\langle q, k_n \rangle}{\sqrt D}, \qquad p_n = \frac{e^{l_n}}{\sum_m e^{l_m}}, \qquad z = \sum_n p_n v_n .$$
#
# With $R$ queries as the rows of $Q$ this is $P = \mathrm{softmax}(Q K^\top / \sqrt D)$ of shape $(R,N)$, $Z = P V$ of shape
# $(R,D)$: [`probe`](../tinycea/ops/reference.py) (Vaswani et al. 2017 with learned queries). However large the image, $Z$ has the
# same size. Here $K = V = \hat X$: a summary holds the mean key and color of where its query looked. The photograph averages
# out, and the lamps stay.

# %%
Q, (N, D), R = hand["Q"], cat.reshape(-1, 16).shape, len(hand["Q"])
K = V = ops.groupnorm(cat.reshape(1, N, D), hand["norm.weight"], hand["norm.bias"])[0][0]
l = Q @ K.T / np.sqrt(D)
E = np.exp(l - l.max(1, keepdims=True))                     # a softmax does not change when a constant is taken off
P = E / E.sum(1, keepdims=True)
Z = P @ V

# %%
Z_library, (*_, P_library) = ops.probe(Q, K[None], V[None], heads=1)
assert close(Z, Z_library[0]) and close(P, P_library[0, 0]) and close(P.sum(1), 1) and (P > 0).all()
assert np.corrcoef(mechanism.color(Z).ravel(), (P @ a @ t).ravel())[0, 1] > 0.9     # a summary's color is that of its lamps

# %% [markdown]
# The factors are linear in the summaries, row by row: $\;A = Z W_A,\; U = Z W_U$ with $W_A, W_U$ of shape $(D,C)$. By hand, $W_A$
# keeps the key (and undoes the queries' overlap), $W_U$ minus the color.
#
# ## 2. Why one summary per component
#
# All components share $W_A$ and $W_U$, so what distinguishes component $r$ is its query alone:

# %%
def layer(Q, **other):
    y, cache = ablations.forward(cat, hand | {"Q": Q} | other, config, ops)
    return y, ablations.anatomy(cache)


order = rng.permutation(R)
tries = {"eight queries": layer(Q), "in another order": layer(Q[order]), "eight equal ones": layer(np.tile(Q[:1], (R, 1))),
         "Q = 0": layer(0 * Q)}
figure, axes = plt.subplots(1, 4, figsize=(8, 2.5))
for axis, (name, (y, _)) in zip(axes, tries.items()):
    show(axis, seen(y), f"{name}: {dB(y):.1f} dB")
figure.suptitle("Queries may change places, but must differ: alike, they make one component, R times", fontsize=10)
plt.show()

# %% [markdown]
# $$Q \to \Pi Q \;\Rightarrow\; (A, U) \to (\Pi A, \Pi U), \qquad
# \text{all } q_r \text{ equal} \;\Rightarrow\; \operatorname{rank}(A^\top U) = 1, \qquad
# Q = 0 \;\Rightarrow\; z_r = \tfrac1N \sum_n v_n .$$
#
# The second holds because $W_A$ and $W_U$ are shared. One summary $z$ for all components would do if each had *matrices of its
# own*: $a_r = z W_A^{(r)}$ gives rank $R$ again, for $R \cdot D \cdot C$ numbers instead of $D \cdot C$ and $R \cdot D$ of $Q$.

# %%
product = {name: found["A"][0].T @ found["U"][0] for name, (_, found) in tries.items()}
assert close(product["in another order"], product["eight queries"])
assert np.linalg.matrix_rank(product["eight equal ones"]) == 1 < np.linalg.matrix_rank(product["eight queries"])
assert close(ops.probe(0 * Q, K[None], V[None], 1)[0][0], V.mean(0))
own_A, own_U = (Z[0] @ rng.normal(size=(R, D, D)) for _ in range(2))        # one summary, R matrices for each factor
assert np.linalg.matrix_rank(own_A.T @ own_U) == R

# %% [markdown]
# NAFNet, around the layer, has a summary of the image already: *simple channel attention* (SCA) is the plain mean, $Q = 0$, from
# which the image writes one factor per channel. It can dim a color everywhere, but not tell one token from another.
#
# ![NAFNet's block: two residual branches; SCA makes one factor per channel from the image's mean](02_nafblock.svg)
#
# **Heads.** $h$ heads cut the $D$ channels into blocks, each with a softmax of its own: one summary may take its first channels
# from here, its last from there. $Z = [\,P_1 V_1 \,|\, \dots \,|\, P_h V_h\,]$ with
# $P_i = \operatorname{softmax}(Q_i K_i^\top / \sqrt{D/h})$.

# %%
h = 2
blocks = [slice(i * D // h, (i + 1) * D // h) for i in range(h)]
Z_heads = np.concatenate([ops.probe(Q[:, i], K[None, :, i], V[None, :, i], 1)[0][0] for i in blocks], 1)
assert close(Z_heads, ops.probe(Q, K[None], V[None], h)[0][0])

# %% [markdown]
# ## 3. Why the rank collapses before training begins
#
# The layer adds $X M$ with one matrix $M = A^\top U / \sqrt{CR}$. How many directions has $M$ in an untrained layer? The
# *effective rank* counts them: the exponential of the entropy of the squared singular values, 1 where one has everything. Add one
# and the same vector to all tokens of the cat, and watch:

# %%
def effective_rank(M):
    energy = np.linalg.svd(M, compute_uv=False)**2
    share = energy[energy > 0] / energy.sum()
    return np.exp(-np.sum(share * np.log(share)))


def at_the_start(X, centered=False):
    """The mean token's share of the energy of X̂, and the effective rank of M; W_U (zero at the start) is drawn as W_A."""
    C, ranks = X.shape[-1], []
    for seed in range(10):
        p = {name: np.empty(shape) for name, shape in cea.shapes(C).items()}
        cea.init(p, np.random.default_rng(seed))
        Xhat, _ = ops.groupnorm(X.reshape(1, -1, C), p["norm.weight"], p["norm.bias"])
        mean = Xhat.mean(1, keepdims=True)
        Z, _ = ops.summarize(Xhat - mean if centered else Xhat, p["W_K"], p["W_V"], p["Q"], heads=4)
        W_U = np.random.default_rng(seed + 100).normal(0, C**-0.5, (C, C))
        ranks.append(effective_rank(p["W_A"].T @ Z[0].T @ Z[0] @ W_U))
    return np.sum(mean**2) / np.mean(np.sum(Xhat**2, -1)), np.mean(ranks)


size = nafnet.NAFNetConfig()
image = photographs("test")["chelsea"][None, :192, :192]
_, network = nafnet.centered(image, nafnet.init(size, np.random.default_rng(0)), size)
features = {stage: found["tokens"].astype(np.float64) for stage, found in nafnet.anatomies(network).items()}
curve = np.array([at_the_start(cat + common * rng.normal(size=16)) for common in (0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.5, 3)])
stages = np.array([at_the_start(X) for X in features.values()])

# %%
figure, axes = plt.subplots()
axes.plot(*curve[curve[:, 0].argsort()].T, marker="o", label="the cat's tokens, plus a constant vector")
axes.plot(*stages.T, ls="", marker="*", ms=11, label="features in an untrained NAFNet")
axes.set(xlabel="share of the mean token in the energy of X̂", ylabel="effective rank of M", ylim=(0.9, None),
         title="What all tokens have in common leaves M one direction, before anything is learned")
axes.legend()
plt.show()
assert curve[:, 1].max() > 2 and curve[curve[:, 0] > 0.9, 1].max() < 1.1 and stages[:, 1].max() < 1.5

# %% [markdown]
# Put $A = Z W_A$ and $U = Z W_U$ in. With $z_r = m + \delta_r$, where $m$ is the mean of all values,
#
# $$M = \frac{A^\top U}{\sqrt{CR}} = \frac{W_A^\top (Z^\top Z)\, W_U}{\sqrt{CR}}, \qquad
# Z^\top Z = R\, m m^\top + \sum_r \big( m \delta_r^\top + \delta_r m^\top + \delta_r \delta_r^\top \big) .$$
#
# An untrained query hardly prefers any token, so each $\delta_r$ is small, and where tokens share much $m$ is not: the first term
# rules, of rank one. The lamps' tokens have a mean near zero, and are spared. (Exercise 1 takes $m$ away.)

# %%
A, U = written["A"][0], written["U"][0]
Z = ops.summarize(K[None], hand["W_K"], hand["W_V"], Q, 1)[0][0]
M = A.T @ U / np.sqrt(D * R)
assert close(M, hand["W_A"].T @ (Z.T @ Z) @ hand["W_U"] / np.sqrt(D * R))
assert close(cleaned, cat + cat @ M)
m = V.mean(0)
delta = Z - m
assert close(Z.T @ Z, R * np.outer(m, m) + sum(np.outer(m, d) + np.outer(d, m) + np.outer(d, d) for d in delta))

# %% [markdown]
# ## 4. The backward of a softmax, and of a norm
#
# Both divide by something all entries share, so moving one input moves every output:

# %%
n, step = 12, 1e-5
example = rng.normal(size=n)


def softmax(l):
    return np.exp(l) / np.exp(l).sum()


def normalize(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def by_differences(f, x):
    """The Jacobian, one column per input."""
    return np.stack([(f(x + e) - f(x - e)) / (2 * step) for e in step * np.eye(len(x))], 1)


figure, axes = plt.subplots(1, 2, figsize=(6, 2.9))
for axis, (name, f, top) in zip(axes, (("softmax", softmax, 0.2), ("norm", normalize, 1))):
    axis.grid(False)
    axis.imshow(by_differences(f, example), cmap="PuOr", vmin=-top, vmax=top)
    axis.set(title=name, xlabel="moved input m", ylabel="output n", xticks=[], yticks=[])
figure.suptitle("An input raises its own output (violet), at the cost of the others (orange)", fontsize=10)
plt.show()

# %% [markdown]
# **The softmax.** From $p_n = e^{l_n} / \sum_m e^{l_m}$, with $\delta_{nm} = 1$ if $n = m$ and 0 otherwise:
#
# $$\frac{\partial p_n}{\partial l_m} = p_n (\delta_{nm} - p_m)
# \qquad\Longrightarrow\qquad
# dl_m = \sum_n dp_n\, p_n (\delta_{nm} - p_m) = p_m \Big( dp_m - \sum_n dp_n\, p_n \Big) .$$
#
# **The norm.** Let $\bar x_i = (x_i - \mu)/\sigma$ with $\sigma^2 = \frac1n \sum_i (x_i - \mu)^2 + 10^{-6}$, over all $n = NC$
# numbers of an image. The mean moves by $\partial\mu/\partial x_j = \frac1n$. Differentiate $\sigma^2$:
# $2 \sigma\, \partial\sigma/\partial x_j = \frac2n \sum_i (x_i - \mu)(\delta_{ij} - \frac1n) = \frac2n (x_j - \mu)$, since the
# deviations sum to zero; so $\partial\sigma/\partial x_j = \bar x_j / n$. By the quotient rule, and with a gradient $g$ of
# $\bar x$,
#
# $$\begin{aligned}
# \frac{\partial \bar x_i}{\partial x_j} &= \frac{\delta_{ij} - \frac1n}{\sigma} - \frac{x_i - \mu}{\sigma^2} \frac{\bar x_j}{n}
# = \frac1\sigma \Big( \delta_{ij} - \frac1n - \frac{\bar x_i \bar x_j}{n} \Big) \\
# dx_j &= \frac1\sigma \Big( g_j - \frac1n \sum_i g_i - \bar x_j\, \frac1n \sum_i g_i \bar x_i \Big) .
# \end{aligned}$$
#
# In words: what the norm forgets, the mean and the length, is projected out of the gradient.

# %%
p, bar = softmax(example), normalize(example)
jacobians = np.diag(p) - np.outer(p, p), (np.eye(n) - 1 / n - np.outer(bar, bar) / n) / np.sqrt(example.var() + 1e-6)
for f, jacobian in zip((softmax, normalize), jacobians):
    assert np.allclose(jacobian, by_differences(f, example), atol=1e-8)
g = rng.normal(size=n)
assert close(g @ jacobians[0], p * (g - np.sum(g * p)))
assert close(g @ jacobians[1], (g - g.mean() - bar * np.mean(g * bar)) / np.sqrt(example.var() + 1e-6))

# %% [markdown]
# **The products around the softmax.** $Z = P V$ gives $dV = P^\top dZ$ and $dP = dZ\, V^\top$. The scores before the scale,
# $T = Q K^\top$, get their own letter: $l = T / \sqrt D$, so $dT = dl / \sqrt D$ (the library's `dlogits`), $dQ = dT\, K$ and
# $dK = dT^\top Q$. The mean that the softmax takes off need not be computed from $N$ terms:
#
# $$\sum_n dP_{rn} P_{rn} = \sum_n \Big( \sum_d dZ_{rd} V_{nd} \Big) P_{rn} = \sum_d dZ_{rd} \sum_n P_{rn} V_{nd} =
# \sum_d dZ_{rd} Z_{rd} ,$$
#
# $$dT = P \circ (dP - \operatorname{rowsum}(dZ \circ Z)) / \sqrt D :$$
#
# $R D$ multiply-adds instead of $R N$. A kernel that never stores $P$ lives on this.

# %%
dZ = rng.normal(size=(R, D))
dV = P.T @ dZ
dP = dZ @ V.T
assert close((dP * P).sum(1), (dZ * Z).sum(1))

dT = P * (dP - (dZ * Z).sum(1, keepdims=True)) / np.sqrt(D)
dQ = dT @ K
dK = dT.T @ Q

# %%
dQ_library, dK_library, dV_library = ops.probe_backward(dZ[None], ops.probe(Q, K[None], V[None], 1)[1])
assert close(dQ, dQ_library) and close(dK, dK_library[0]) and close(dV, dV_library[0])

# %% [markdown]
# ## 5. The full layer, forward and backward
#
# One image, one head, every line under its equation; the drawing at the top is its picture.
# [`cea`](../tinycea/cea.py) is the same for batches and heads.
#
# $$\begin{aligned}
# \hat X &= \mathrm{Norm}(X) = w \circ \frac{X - \operatorname{mean}}{\operatorname{std}} + b \\
# K &= \hat X W_K, \quad V = \hat X W_V, \quad P = \operatorname{softmax}(Q K^\top / \sqrt D), \quad Z = P V \\
# A &= Z W_A, \quad U = Z W_U \\
# S &= X A^\top / \sqrt C, \quad Y = X + S U / \sqrt R
# \end{aligned}$$
#
# The norm takes one mean and one standard deviation of the whole image. So $A$ and $U$ are blind to its scale: doubling $X$
# doubles $Y$.

# %%
H, W, C, D, R = 5, 7, 6, 8, 3
x = rng.normal(size=(1, H, W, C))
p = {name: rng.normal(size=shape) / 2 for name, shape in cea.shapes(C, rank=R, heads=1, probe_channels=D).items()}
w, b, W_K, W_V, Q, W_A, W_U = (p[name] for name in ("norm.weight", "norm.bias", "W_K", "W_V", "Q", "W_A", "W_U"))

X = x.reshape(H * W, C)
std = np.sqrt(X.var() + 1e-6)
X_bar = (X - X.mean()) / std
Xhat = w * X_bar + b

K = Xhat @ W_K
V = Xhat @ W_V
E = np.exp(Q @ K.T / np.sqrt(D))
P = E / E.sum(1, keepdims=True)
Z = P @ V

A = Z @ W_A
U = Z @ W_U
S = X @ A.T / np.sqrt(C)
Y = X + S @ U / np.sqrt(R)

# %%
y, cache = cea.cea(x, p, heads=1, ops=ops)
assert close(Y, y.reshape(H * W, C))
twice, _ = cea.cea(2 * x, p, heads=1, ops=ops)
assert abs(twice - 2 * y).max() < 1e-5 * abs(y).max()       # but for the 1e-6 under the root

# %% [markdown]
# **Backward: the same lines from the bottom up.** A variable that was used more than once collects a sum. $Z$ was used for $A$
# and $U$; $\hat X$ for $K$ and $V$; $X$ for the skip connection, for $S$ and for the norm.
#
# $$\begin{aligned}
# dS &= dY\, U^\top / \sqrt R, & dU &= S^\top dY / \sqrt R, & dA &= dS^\top X / \sqrt C \\
# dW_U &= Z^\top dU, & dW_A &= Z^\top dA, & dZ &= dU\, W_U^\top + dA\, W_A^\top \\
# dV &= P^\top dZ, & dT &= P \circ (dZ\, V^\top - \operatorname{rowsum}(dZ \circ Z)) / \sqrt D \\
# dQ &= dT\, K, & dK &= dT^\top Q \\
# dW_K &= \hat X^\top dK, & dW_V &= \hat X^\top dV, & d\hat X &= dK\, W_K^\top + dV\, W_V^\top
# \end{aligned}$$

# %%
dY = rng.normal(size=Y.shape)
dS = dY @ U.T / np.sqrt(R)
dU = S.T @ dY / np.sqrt(R)
dA = dS.T @ X / np.sqrt(C)

dW_U = Z.T @ dU
dW_A = Z.T @ dA
dZ = dU @ W_U.T + dA @ W_A.T

dV = P.T @ dZ
dT = P * (dZ @ V.T - (dZ * Z).sum(1, keepdims=True)) / np.sqrt(D)
dQ = dT @ K
dK = dT.T @ Q

dW_K = Xhat.T @ dK
dW_V = Xhat.T @ dV
dXhat = dK @ W_K.T + dV @ W_V.T

# %% [markdown]
# **Through the norm**, by section 4, with $g = d\hat X \circ w$; $w$ and $b$ are used by every token.
# ([`groupnorm_backward`](../tinycea/ops/reference.py).)

# %%
dw = (dXhat * X_bar).sum(0)
db = dXhat.sum(0)
g = dXhat * w
dX_norm = (g - g.mean() - X_bar * (g * X_bar).mean()) / std
dX = dY + dS @ A / np.sqrt(C) + dX_norm                     # the skip connection, the affinities, and the way through the norm

# %%
grads = {name: np.zeros_like(value) for name, value in p.items()}
dx = cea.cea_backward(dY.reshape(x.shape), cache, grads)
by_hand = {"norm.weight": dw, "norm.bias": db, "W_K": dW_K, "W_V": dW_V, "Q": dQ, "W_A": dW_A, "W_U": dW_U}
assert close(dx.reshape(X.shape), dX)
assert by_hand.keys() == grads.keys() and all(close(by_hand[name], grads[name]) for name in grads)

# %% [markdown]
# The third witness only evaluates the forward:

# %%
rows = gradcheck.check_gradients(*gradcheck.module(lambda x, p: cea.cea(x, p, 1, ops), cea.cea_backward, x, p))
print(rows)
assert all(row.passed for row in rows)

# %% [markdown]
# ## 6. What happens at zero initialization, step by step
#
# $W_U$ starts at zero, so that a fresh layer disturbs nothing: $U = 0$ and $Y = X$. Does it learn?

# %%
p = {name: np.empty(shape) for name, shape in cea.shapes(C, rank=R, heads=1, probe_channels=D).items()}
cea.init(p, rng)
target = rng.normal(size=x.shape)
history = []
for step in range(6):
    y, cache = cea.cea(x, p, heads=1, ops=ops)
    if step == 0:
        assert np.array_equal(y, x)
    grads = {name: np.zeros_like(value) for name, value in p.items()}
    dx = cea.cea_backward(y - target, cache, grads)         # L = |y - target|^2 / 2
    history.append({name: np.linalg.norm(value) for name, value in grads.items()})
    for name in p:
        p[name] -= 0.003 * grads[name]                      # gradient descent

assert [name for name, norm in history[0].items() if norm > 0] == ["W_U"]
assert all(norm > 0 for norm in history[1].values())

# %%
figure, axes = plt.subplots()
styles = ["-", "--", "-.", ":", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)), (0, (9, 3))]
for name, marker, style in zip(p, "osD^vPX", styles):
    axes.semilogy([row[name] or np.nan for row in history], marker=marker, ls=style, label=name)
axes.set(xlabel="step", ylabel="norm of the gradient", title="At step 0 only W_U has a gradient; it wakes the others")
figure.legend(loc="outside right center")
plt.show()

# %% [markdown]
# Read the backward above with $U = 0$:
#
# $$\begin{aligned}
# dS &= dY\, U^\top / \sqrt R = 0, & dA &= 0, & dZ &= dU\, W_U^\top + dA\, W_A^\top = 0, \\
# dU &= S^\top dY / \sqrt R \ne 0, & dW_U &= Z^\top dU \ne 0, &&
# \end{aligned}$$
#
# and with $dZ$ everything in the probe. From the second step on, all move. Were $W_A$ zero as well, $S = 0$ would stop $dU$ too,
# forever: zero a product in one factor only.

# %%
p["W_A"][:], p["W_U"][:] = 0, 0
y, cache = cea.cea(x, p, heads=1, ops=ops)
grads = {name: np.zeros_like(value) for name, value in p.items()}
dx = cea.cea_backward(rng.normal(size=x.shape), cache, grads)
assert all(np.abs(value).max() == 0 for value in grads.values())

# %% [markdown]
# ## 7. What the layer learns
#
# Now nobody sets anything: [`teach`](../tinycea/lab/mechanism.py) shows a layer ($R = 4$, four heads) other photographs under
# other lamps, and descends along the gradients above, a thousand steps in a few seconds.

# %%
learned = {steps: double(mechanism.teach(task, mechanism.CEA, steps)) for steps in tqdm((30, 100, 1000))}
results = {steps: ablations.forward(cat, p, mechanism.CEA, ops) for steps, p in learned.items()}
found = ablations.anatomy(results[1000][1])

# %%
figure, axes = plt.subplots(2, 4, figsize=(8, 4.5))
for axis, (steps, (y, _)) in zip(axes[0], results.items()):
    show(axis, seen(y), f"{steps} steps: {dB(y):.1f} dB")
show(axes[0, 3], seen(cleaned), f"set by hand: {dB(cleaned):.1f} dB")
for r, axis in enumerate(axes[1]):
    S_r = found["S"][0, :, r]
    show(axis, S_r.reshape(SIDE, SIDE), f"$s_{{n{r + 1}}}$ and $u_{r + 1}$", cmap="PuOr", vmin=-1, vmax=1)
    axis.add_patch(plt.Rectangle((3, 3), 16, 16, fc=np.clip(0.5 + 0.25 * mechanism.color(found["U"][0, r]), 0, 1), ec="black"))
figure.suptitle("Learned, it beats the hand; each component is a mix of lamps, and only their sum counts", fontsize=10)
plt.show()
assert dB(results[1000][0]) > dB(cleaned) > dB(results[30][0])

# %% [markdown]
# ## 8. What no training gives the others
#
# Would a rival with more numbers do it? Count what it can know. A pixel's color is $c = J + \sum_k a_k t_k$, and the tints are
# drawn anew for every picture, $t_k \sim N(0, \tau^2 I)$.
#
# - *A token alone* (token MLP, fixed directions, experts per token) knows its amounts $a$, from its key, and $c$. What lies on
#   $J$ is then noise of variance $v = \tau^2 |a|^2$.
# - *One mean of all tokens* (descriptor, prompt, experts per image) tells $\bar c = \sum_k \bar a_k t_k$ as well, for contents
#   have mean 0. Take away what is to be expected of it, $(a \cdot \bar a)\, \bar c / |\bar a|^2$: of $v$ there remains
#   $\tau^2 (|a|^2 - (a \cdot \bar a)^2 / |\bar a|^2)$. One combination of the tints is known, the others are not.
#
# Colors of photographs have a covariance $\Sigma$. The best linear estimate of $J$ is Wiener's, $\Sigma\, (\Sigma + vI)^{-1}$
# times what was seen; its squared error per channel is $\operatorname{tr}\big(v\, \Sigma\, (\Sigma + vI)^{-1}\big) / 3$. Most
# of $\Sigma$ is gray, so gray is what it gives.


# %%
def at_best(kind, mean):
    """PSNR in dB of the best linear estimate that knows a token, and the mean of all if `mean` is 1; over the test pictures."""
    task, (_, J, a) = mechanism.TASKS[kind], mechanism.pictures(mechanism.TASKS[kind])
    a = a.reshape(len(a), -1, task.K).astype(float)
    a_bar, variances = a.mean(1, keepdims=True), np.linalg.eigvalsh(np.cov(J.reshape(-1, 3).T))
    known = mean * (a @ a_bar.mT)[..., 0]**2 / (a_bar**2).sum(-1)
    v = task.tint**2 * ((a**2).sum(-1) - known)[..., None]
    return -10 * np.log10((v * variances / (v + variances)).mean((1, 2))).mean()


print(f"{'dB':9s}{'token MLP':>10s}{'at best':>9s}{'descriptor':>12s}{'at best':>9s}{'CEA':>9s}")
for kind in ("regions", "lamps"):
    x_k, J_k, _ = mechanism.pictures(mechanism.TASKS[kind])
    reached = {}
    for name in ("token MLP", "descriptor", "CEA"):
        model = mechanism.MODELS[name]
        taught = mechanism.teach(mechanism.TASKS[kind], model, 1000)
        reached[name] = mechanism.psnr(adapters.family(model).forward(x_k, taught, model)[0], J_k).mean()
    alone, one = at_best(kind, 0), at_best(kind, 1)
    print(f"{kind:9s}{reached['token MLP']:10.1f}{alone:9.1f}{reached['descriptor']:12.1f}{one:9.1f}{reached['CEA']:9.1f}")
    assert alone - 1 < reached["token MLP"] < alone + 0.5 and reached["descriptor"] < one + 0.5
    assert reached["CEA"] > one + 4

# %% [markdown]
# Both learn what they can, and no size helps (`tinycea mechanism --long` tries three). On lamps the descriptor
# stays a token MLP: it would have to multiply the mean's color by $a \cdot \bar a$, which its scale per channel cannot say. CEA
# holds R combinations of the tints instead of one. What a softmax cannot say stands in notebook 1.

# %% [markdown]
# ## Exercises
#
# **1.** Subtract the mean token from what the probe sees, in the cat's tokens and in the network's features. What becomes of the
# effective rank of $M$? And of a layer with $Q = 0$?

# %% jupyter={"source_hidden": true}
# Solution
# m = 0, so only the sum of delta_r delta_r^T is left, of rank R - in general. The rank rises where there was a mean, and stays
# where there was none. With Q = 0 all delta_r are zero: the layer sees nothing and does nothing.
for name, X in ({"cat": cat} | features).items():
    before, after = at_the_start(X)[1], at_the_start(X, centered=True)[1]
    print(f"{name:12s} effective rank {before:.2f}, without the mean {after:.2f}")
    assert after > 1.2 * before if name in features else abs(after / before - 1) < 0.2
no_mean = K - K.mean(0)
assert abs(ops.probe(0 * Q, no_mean[None], no_mean[None], 1)[0]).max() < 1e-12

# %% [markdown]
# **2.** Give the softmax a learned sharpness, $p = \operatorname{softmax}(\tau\, l)$. Derive $d\tau$ and $dl$, write the pair and
# check it.

# %% jupyter={"source_hidden": true}
# Solution
# t = tau l is an intermediate variable: dt = P (dP - rowsum(dP P)); tau is used by all entries: dtau = sum dt l; dl = tau dt.
def sharp(tau, l):
    E = np.exp(tau * l - (tau * l).max(-1, keepdims=True))
    P = E / E.sum(-1, keepdims=True)
    return P, (tau, l, P)


def sharp_backward(dP, cache):
    tau, l, P = cache
    dt = P * (dP - (dP * P).sum(-1, keepdims=True))
    return np.sum(dt * l), tau * dt


rows = gradcheck.check_gradients(sharp, sharp_backward, {"tau": 1.3, "l": rng.normal(size=(3, 7))})
assert all(row.passed for row in rows)

# %% [markdown]
# **3.** A GPU cannot hold $P$ for a million tokens. Compute $z$ for one query in chunks of 10 tokens, keeping only three things
# between them: the largest logit so far, the sum of exponentials and the weighted sum of values. (This *online softmax* is how
# the probe can be run without ever storing an $N \times R$ matrix.)

# %% jupyter={"source_hidden": true}
# Solution
N = 50
q, K, V = rng.normal(size=D), rng.normal(size=(N, D)), rng.normal(size=(N, D))
top, total, weighted = -np.inf, 0.0, np.zeros(D)
for start in range(0, N, 10):
    l = K[start:start + 10] @ q / np.sqrt(D)
    higher = max(top, l.max())
    shrink, e = np.exp(top - higher), np.exp(l - higher)    # what was summed so far was relative to the old largest logit
    total, weighted, top = shrink * total + e.sum(), shrink * weighted + e @ V[start:start + 10], higher
assert close(weighted / total, ops.probe(q[None], K[None], V[None], 1)[0][0, 0])

# %% [markdown]
# **Next:** [notebook 3](03_linear_attention.ipynb) reads the three colors off the matrix $M$, and asks what a softmax over the
# components would change. The code: [`cea`](../tinycea/cea.py), sixteen lines. NAFNet:
# [arXiv 2204.04676](https://arxiv.org/abs/2204.04676); attention: [arXiv 1706.03762](https://arxiv.org/abs/1706.03762).
