# %% [markdown]
# # 2. The hyper-adapter: how an image writes its own A and U
#
# [Notebook 1](01_token_assembly.ipynb) took the routing bases $A$ and the residual directions $U$ as given. Here a small network
# writes them: it looks at all $N$ tokens of one image by *cross-attention* and makes from what it saw one row of $A$ and one row
# of $U$ for each of $R$ components. The claims:
#
# 1. A learned query turns an image of any size into one vector: a weighted mean of its tokens.
# 2. One summary per component, not one for all: with equal queries, or one summary and the same matrices, the rank is 1.
# 3. Heads let one summary take different channels from different places, at no extra multiply-adds.
# 4. The softmax's backward is a centering, and $\operatorname{rowsum}(dP \circ P) = \operatorname{rowsum}(dZ \circ Z)$ makes it
#    cheap.
# 5. The backward of the whole layer is its forward read from the bottom up; $\hat X$ collects three gradients.
# 6. With $W_U = 0$ the layer starts as the identity and still learns from its first step; with $W_A = 0$ as well it would never
#    start.
#
# `close` means: equal up to rounding in float64; $\circ$ is the entrywise product, rowsum the sum over the last axis.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from tinycea import ablations, cea, gradcheck
from tinycea.ops import reference as ops
from tinycea.scenes import photographs

rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)

# %% [markdown]
# ## 1. A probe that looks at an image
#
# A query $q$ (a vector of $D$ learned numbers) scores every token's *key* $k_n$ by a dot product. A softmax over the tokens turns
# the scores $l_n$ into shares, and the summary is the mean of the tokens' *values* $v_n$ with these shares:
#
# $$l_n = \frac{\langle q, k_n \rangle}{\sqrt D}, \qquad p_n = \frac{e^{l_n}}{\sum_m e^{l_m}}, \qquad z = \sum_n p_n v_n .$$
#
# With $R$ queries as the rows of $Q$ this is $P = \mathrm{softmax}(Q K^\top / \sqrt D)$ of shape $(R,N)$, $Z = P V$ of shape
# $(R,D)$: [`probe`](../tinycea/ops/reference.py) (Vaswani et al. 2017 with learned queries). However large the image, $Z$ has the
# same size.

# %%
N, D, R = 50, 8, 3
Q, K, V = (rng.normal(size=(n, D)) for n in (R, N, N))

l = Q @ K.T / np.sqrt(D)
E = np.exp(l - l.max(1, keepdims=True))                     # a softmax does not change when a constant is taken off
P = E / E.sum(1, keepdims=True)
Z = P @ V

# %%
Z_library, (*_, P_library) = ops.probe(Q, K[None], V[None], heads=1)
assert close(Z, Z_library[0]) and close(P, P_library[0, 0])
assert close(P.sum(1), 1) and (P > 0).all()

# %% [markdown]
# What such a query sees is easiest to understand where a token is a color. Take each pixel's centered color as its key and the
# color itself as its value. Three queries point to bright, to red and to blue; the swatch is the summary $z$, the mean color of
# what each of them looked at.

# %%
photo = photographs("test")["astronaut"][::4, ::4].astype(np.float64)
colors = photo.reshape(-1, 3)
look = np.array([[1, 1, 1], [1, -0.5, -0.5], [-0.5, -0.5, 1]])      # bright, red, blue
z, (*_, shares) = ops.probe(40 * look, (colors - colors.mean(0))[None], colors[None], heads=1)

figure, axes = plt.subplots(1, 4, figsize=(9, 2.2))
axes[0].imshow(photo)
axes[0].set(title="the image", xticks=[], yticks=[])
for axis, name, p, color in zip(axes[1:], ("bright", "red", "blue"), shares[0, 0], z[0]):
    axis.imshow(np.log10(p).reshape(photo.shape[:2]), vmin=-8, vmax=-3)
    axis.set(title=f'where "{name}" looks', xticks=[], yticks=[])
    axis.add_patch(plt.Rectangle((4, 4), 26, 26, color=np.clip(color, 0, 1), ec="white"))
figure.colorbar(axes[3].images[0], ax=axes[1:], label="log10 of the share p", shrink=0.9)
plt.show()

# %%
assert (z[0] @ look.T).argmax(0).tolist() == [0, 1, 2]      # the summary of "bright" is the brightest of the three, and so on
assert ((colors.min(0) <= z[0]) & (z[0] <= colors.max(0))).all()     # a mean lies within what it averages

# %% [markdown]
# ## 2. Why one summary per component
#
# The factors are linear in the summaries, row by row: $\;A = Z W_A,\; U = Z W_U$ with $W_A, W_U$ of shape $(D,C)$. All components
# share both matrices, so what distinguishes component $r$ is its query alone. Three consequences, each executed:
#
# $$\text{all } q_r \text{ equal} \;\Rightarrow\; \operatorname{rank}(A^\top U) = 1, \qquad
# Q = 0 \;\Rightarrow\; z_r = \tfrac1N \sum_n v_n, \qquad
# Q \to \Pi Q \;\Rightarrow\; (A, U) \to (\Pi A, \Pi U) .$$
#
# - If all queries are equal, all summaries are, and $A^\top U = R\, a^\top u$: one component, $R$ times.
# - If the queries are zero, everything is the plain mean: the layer knows only the image's average, like a global descriptor.
# - If the queries change places (a permutation $\Pi$), the components do, and the sum over them stays as it is.

# %%
C = 6
W_A, W_U = rng.normal(size=(2, D, C))


def factors(Q):
    Z = ops.probe(Q, K[None], V[None], 1)[0][0]
    return Z, Z @ W_A, Z @ W_U


_, A, U = factors(np.tile(Q[:1], (R, 1)))
assert np.linalg.matrix_rank(A.T @ U) == 1
Z, A, U = factors(0 * Q)
assert close(Z, np.tile(V.mean(0), (R, 1)))
_, A, U = factors(Q)
_, A_moved, U_moved = factors(Q[[2, 0, 1]])
assert np.linalg.matrix_rank(A.T @ U) == R
assert close(A_moved, A[[2, 0, 1]]) and close(A_moved.T @ U_moved, A.T @ U)

# %% [markdown]
# The alternative, one summary for all components, would need matrices of its own for each of them to tell them apart,
# $R \cdot D \cdot C$ numbers instead of $D \cdot C$ for each factor; and all its rows would be functions of the same $D$ numbers.
# Queries cost $R \cdot D$.
#
# ## 3. Heads
#
# $h$ heads split the $D$ channels into $h$ blocks of $D/h$. Each block has a softmax of its own (and the scale $\sqrt{D/h}$), and
# the blocks of the result are put side by side again:
#
# $$P_i = \operatorname{softmax}\!\Big(\frac{Q_i K_i^\top}{\sqrt{D/h}}\Big), \qquad
# Z = [\,P_1 V_1 \;\big|\; \dots \;\big|\; P_h V_h\,] .$$
#
# The products have $R N D$ multiply-adds with any $h$; only the number of softmaxes grows.

# %%
h = 2
blocks = [slice(i * D // h, (i + 1) * D // h) for i in range(h)]
Z_heads = np.concatenate([ops.probe(Q[:, i], K[None, :, i], V[None, :, i], 1)[0][0] for i in blocks], 1)
assert close(Z_heads, ops.probe(Q, K[None], V[None], h)[0][0])

# %% [markdown]
# One head must take all channels from the same tokens. Let token 3 match the first block of the query and token 7 the second: two
# heads fetch one half of the value from each, one head can only mix.

# %%
K_test = np.zeros((N, D))
K_test[3, blocks[0]] = K_test[7, blocks[1]] = 1
q = np.full((1, D), 100.0)
two_heads, one_head = (ops.probe(q, K_test[None], V[None], heads)[0][0, 0] for heads in (2, 1))
assert close(two_heads, np.concatenate((V[3, blocks[0]], V[7, blocks[1]])))
assert close(one_head, (V[3] + V[7]) / 2)

# %% [markdown]
# ## 4. The backward of softmax attention
#
# **The softmax alone.** From $p_n = e^{l_n} / \sum_m e^{l_m}$, with $\delta_{nm} = 1$ if $n = m$ and 0 otherwise:
#
# $$\frac{\partial p_n}{\partial l_m} = p_n (\delta_{nm} - p_m)
# \qquad\Longrightarrow\qquad
# dl_m = \sum_n dp_n\, p_n (\delta_{nm} - p_m) = p_m \Big( dp_m - \sum_n dp_n\, p_n \Big) .$$
#
# In words: take the $p$-weighted mean off $dp$, then weigh with $p$. For rows:
# $dl = P \circ (dP - \operatorname{rowsum}(dP \circ P))$.

# %%
p, dp = P[0], rng.normal(size=N)
jacobian = np.diag(p) - np.outer(p, p)
dl = p * (dp - np.sum(dp * p))
assert close(dl, dp @ jacobian)

difference = np.empty((N, N))                               # the Jacobian by central differences, one column per logit
for m, step in enumerate(1e-5 * np.eye(N)):
    up, down = np.exp(l[0] + step), np.exp(l[0] - step)
    difference[:, m] = (up / up.sum() - down / down.sum()) / 2e-5
assert np.allclose(jacobian, difference, atol=1e-10)

# %% [markdown]
# **The products around it.** $Z = P V$ gives $dV = P^\top dZ$ and $dP = dZ\, V^\top$ as in notebook 1, and
# $l = Q K^\top / \sqrt D$ gives $dQ = dl\, K / \sqrt D$, $dK = dl^\top Q / \sqrt D$. Both need $dl / \sqrt D$, so that it gets a
# name of its own, the one it has in [`probe_backward`](../tinycea/ops/reference.py):
#
# $$d\mathrm{logits} = P \circ (dP - \operatorname{rowsum}(dP \circ P)) / \sqrt D, \qquad dQ = d\mathrm{logits}\, K, \qquad
# dK = d\mathrm{logits}^\top Q .$$
#
# **The identity.** The mean that is taken off need not be computed from $N$ terms, because
#
# $$\sum_n dP_{rn} P_{rn} = \sum_n \Big( \sum_d dZ_{rd} V_{nd} \Big) P_{rn} = \sum_d dZ_{rd} \sum_n P_{rn} V_{nd} =
# \sum_d dZ_{rd} Z_{rd} ,$$
#
# that is, $\operatorname{rowsum}(dP \circ P) = \operatorname{rowsum}(dZ \circ Z)$: $R D$ multiply-adds instead of $R N$, and it
# is known before any token is looked at. A kernel that never stores $P$ lives on this.

# %%
Z = P @ V
dZ = rng.normal(size=(R, D))
dV = P.T @ dZ
dP = dZ @ V.T
assert close((dP * P).sum(1), (dZ * Z).sum(1))

dlogits = P * (dP - (dZ * Z).sum(1, keepdims=True)) / np.sqrt(D)
dQ = dlogits @ K
dK = dlogits.T @ Q

# %%
dQ_library, dK_library, dV_library = ops.probe_backward(dZ[None], ops.probe(Q, K[None], V[None], 1)[1])
assert close(dQ, dQ_library) and close(dK, dK_library[0]) and close(dV, dV_library[0])
rows = gradcheck.check_gradients(lambda *arrays: ops.probe(*arrays, 2), ops.probe_backward,
                                 {"Q": Q, "K": rng.normal(size=(2, 5, D)), "V": rng.normal(size=(2, 5, D))})
print({row.argument: f"{row.relative_error:.0e}" for row in rows}, "relative errors against central differences")
assert all(row.passed for row in rows)

# %% [markdown]
# ## 5. The full layer, forward and backward
#
# One image, one head, every line under its equation. The library's [`cea`](../tinycea/cea.py) is the same for batches and heads;
# the switches of the ablation are in [`ablations.py`](../tinycea/ablations.py).
#
# $$\begin{aligned}
# \hat X &= \mathrm{Norm}(X) = w \circ \frac{X - \operatorname{mean}}{\operatorname{std}} + b \\
# K &= \hat X W_K, \quad V = \hat X W_V, \quad P = \operatorname{softmax}(Q K^\top / \sqrt D), \quad Z = P V \\
# A &= Z W_A, \quad U = Z W_U \\
# S &= X A^\top / \sqrt C, \quad Y = X + S U / \sqrt R
# \end{aligned}$$
#
# The norm takes one mean and one standard deviation of the whole image. So $A$ and $U$ do not change with the image's scale, and
# doubling $X$ doubles $Y$.

# %%
H, W = 5, 7
x = rng.normal(size=(1, H, W, C))
p = {name: rng.normal(size=shape) / 2 for name, shape in cea.shapes(C, rank=R, heads=1, probe_channels=D).items()}
w, b, W_K, W_V, Q, W_A, W_U = (p[name] for name in ("norm.weight", "norm.bias", "W_K", "W_V", "Q", "W_A", "W_U"))

X = x.reshape(H * W, C)
std = np.sqrt(X.var() + 1e-6)
X_normal = (X - X.mean()) / std
Xhat = w * X_normal + b

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
config = ablations.CEAConfig(rank=R, heads=1, probe_channels=D)         # no switch is set: the same layer
written = ablations.anatomy(ablations.forward(x, p, config, ops)[1])
assert all(close(mine, written[name].squeeze()) for name, mine in (("A", A), ("U", U), ("S", S), ("P", P)))

# %% [markdown]
# **Backward: the same lines from the bottom up.** A variable that was used more than once collects a sum. $Z$ was used for $A$
# and $U$; $\hat X$ for $K$ and $V$; $X$ for the skip connection, for $S$ and for the norm.
#
# $$\begin{aligned}
# dS &= dY\, U^\top / \sqrt R, & dU &= S^\top dY / \sqrt R, & dA &= dS^\top X / \sqrt C \\
# dW_U &= Z^\top dU, & dW_A &= Z^\top dA, & dZ &= dU\, W_U^\top + dA\, W_A^\top \\
# dV &= P^\top dZ, & d\mathrm{logits} &= P \circ (dZ\, V^\top - \operatorname{rowsum}(dZ \circ Z)) / \sqrt D \\
# dQ &= d\mathrm{logits}\, K, & dK &= d\mathrm{logits}^\top Q \\
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
dlogits = P * (dZ @ V.T - (dZ * Z).sum(1, keepdims=True)) / np.sqrt(D)
dQ = dlogits @ K
dK = dlogits.T @ Q

dW_K = Xhat.T @ dK
dW_V = Xhat.T @ dV
dXhat = dK @ W_K.T + dV @ W_V.T

# %% [markdown]
# **Through the norm.** Let $g = d\hat X \circ w$ be the gradient of the normalized image
# $\bar X = (X - \operatorname{mean})/\operatorname{std}$, $NC$ numbers. The normalization forgets their mean and their length, so
# the gradient must have no part along either: project both out, $\mathbf 1$ and $\bar X$, and divide by the standard deviation.
# Written out ([`groupnorm_backward`](../tinycea/ops/reference.py)):
#
# $$dX = \frac{1}{\operatorname{std}} \Big( g - \tfrac1{NC} \sum_{nc} g_{nc}
#     - \bar X\, \tfrac1{NC} \sum_{nc} g_{nc} \bar x_{nc} \Big), \qquad
# dw = \sum_n d\hat x_n \circ \bar x_n, \qquad db = \sum_n d\hat x_n .$$

# %%
dw = (dXhat * X_normal).sum(0)
db = dXhat.sum(0)
g = dXhat * w
dX_norm = (g - g.mean() - X_normal * (g * X_normal).mean()) / std
dX = dY + dS @ A / np.sqrt(C) + dX_norm                     # the skip connection, the affinities, and the way through the norm

assert close(dX_norm.sum(), 0)                              # no part along 1: adding a constant to all changes nothing
left = (g * X_normal).sum() * 1e-6 / std**3                 # none along the image, but for what the 1e-6 under the root leaves
assert close((dX_norm * X_normal).sum(), left)

# %%
grads = {name: np.zeros_like(value) for name, value in p.items()}
dx = cea.cea_backward(dY.reshape(x.shape), cache, grads)
by_hand = {"norm.weight": dw, "norm.bias": db, "W_K": dW_K, "W_V": dW_V, "Q": dQ, "W_A": dW_A, "W_U": dW_U}
assert close(dx.reshape(X.shape), dX)
assert by_hand.keys() == grads.keys() and all(close(by_hand[name], grads[name]) for name in grads)

# %% [markdown]
# Both agree, but both were derived by the same hand. The third witness only evaluates the forward:

# %%
rows = gradcheck.check_gradients(*gradcheck.module(lambda x, p: cea.cea(x, p, 1, ops), cea.cea_backward, x, p))
for row in rows:
    print(f"{row.argument:12s} {row.analytic:+.8f} {row.numeric:+.8f}   relative error {row.relative_error:.0e}")
assert all(row.passed for row in rows)

# %% [markdown]
# ## 6. What happens at zero initialization, step by step
#
# $W_U$ starts at zero, so a fresh layer in a trained (or half-built) network disturbs nothing:
#
# $$W_U = 0 \;\Rightarrow\; U = 0 \;\Rightarrow\; Y = X .$$
#
# Does it learn? Read the backward above with $U = 0$: $dS = 0$, so $dA = 0$; $dU = S^\top dY/\sqrt R$ is not zero, so
# $dW_U = Z^\top dU$ is not; but $dZ = dU\,W_U^\top + dA\,W_A^\top = 0$, and with it everything in the probe. In the first step
# only $W_U$ moves; from the second step on, all do.

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
for name, marker in zip(p, "osD^vPX"):
    axes.semilogy([row[name] or np.nan for row in history], marker=marker, label=name)
axes.set(xlabel="step", ylabel="norm of the gradient", title="At step 0 only W_U has a gradient; it wakes the others")
figure.legend(loc="outside right center")
plt.show()

# %% [markdown]
# If $W_A$ were zero as well, then $S = 0$ and $U = 0$, so $dU = S^\top dY / \sqrt R = 0$ and $dA = 0$: every gradient of the
# layer vanishes, for any data. Zero a product in one factor only.

# %%
p["W_A"][:], p["W_U"][:] = 0, 0
y, cache = cea.cea(x, p, heads=1, ops=ops)
grads = {name: np.zeros_like(value) for name, value in p.items()}
dx = cea.cea_backward(rng.normal(size=x.shape), cache, grads)
assert all(np.abs(value).max() == 0 for value in grads.values())

# %% [markdown]
# ## Exercises
#
# **1.** Add one and the same vector to all keys. How does $P$ change? What must therefore be true of $\sum_n dk_n$? Check it on a
# batch of your own.

# %% jupyter={"source_hidden": true}
# Solution
# <q, k_n + t> = <q, k_n> + <q, t>: the same constant for all tokens, which a softmax forgets. L does not change along t, so the
# gradients of the keys sum to zero.
Q, K, V = rng.normal(size=(R, D)), rng.normal(size=(2, 9, D)), rng.normal(size=(2, 9, D))
Z, cache = ops.probe(Q, K, V, 2)
assert close(Z, ops.probe(Q, K + rng.normal(size=D), V, 2)[0])
_, dK, _ = ops.probe_backward(rng.normal(size=Z.shape), cache)
assert close(dK.sum(1), 0) and np.abs(dK).max() > 0.01

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
