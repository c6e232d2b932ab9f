# %% [markdown]
# # 0. Write the backward: a photograph cleaned by gradients of your own
#
# **The question.** Three colored lamps hang over a photograph. Nobody knows their colors. A layer of 1,120 numbers can take them
# off, once it is taught; to teach it takes its derivative. Can you write that, without a framework?
#
# **You need** the chain rule, products of matrices, what a softmax is, and some NumPy. **Minutes:** 20 to 40; steps 1 to 3 take
# ten.
#
# **How it goes.** Eight steps. Each has a picture, an equation and a function with blanks: replace every `...`. The cell below
# it holds your gradient against finite differences and says what is missing or wrong. In the end your derivative teaches the
# layer: a photograph comes out clean, and beside it the one of a rival with twice the numbers stays gray. It is fine to run
# everything first: with blanks no cell fails. Stuck? [`solutions.py`](solutions.py) has every line,
# [`workbench.py`](workbench.py) what checks and draws.
#
# **The picture of the answer**, by the library's own derivative, in ten seconds:

# %%
from math import sqrt
from unittest.mock import patch

import numpy as np
import solutions
import workbench
from tqdm.auto import tqdm
from workbench import C, N, R, check, compare, d, h, merge, passed, split

from tinycea import cea, optim
from tinycea.lab import mechanism
from tinycea.ops import cpu
from tinycea.params import Params

p = workbench.taught()                                    # teaches the layer, and its rival
compare("the layer", p)

# %% [markdown]
# This photograph comes out best of six; the mean is over twelve smaller ones, none of them seen in training. A token (a pixel)
# holds 16 numbers: how much light of each lamp it gets, with noise, and its color, spread over 13. The rival, a *token MLP*, sees
# one token at a time. It cannot know the lamps' colors, and answers with the mean of what may be. The layer looks at all tokens
# first.
#
# ## The layer, forward
#
# ![Learned matrices are orange, what the image writes is blue](../data/layer.svg)
#
# $$\begin{aligned}
# \hat X &= \mathrm{Norm}(X), \qquad K = \hat X W_K, \qquad V = \hat X W_V \\
# P &= \operatorname{softmax}_n(Q K^\top / \sqrt d), \qquad Z = P V \\
# A &= Z W_A, \qquad U = Z W_U \\
# S &= X A^\top / \sqrt C, \qquad Y = X + S\, U / \sqrt R
# \end{aligned}$$
#
# One image has $N$ tokens of $C$ channels. $R$ learned queries $Q$ average the tokens into $R$ summaries $Z$, and these write,
# for this one image, $R$ routing bases $A$ and $R$ residual directions $U$. $Q$, $K$ and $V$ are split into $h$ heads of $d$
# columns each: `split` makes $(N, hd)$ into $(h, N, d)$, `merge` puts it back. `T.mT` transposes the last two axes, for $h$
# matrices at once.
#
# Every piece returns its result and a *cache*: what its backward will need.

# %%
def normalize(X, w, b):
    std = sqrt(X.var() + 1e-6)                  # one mean, one std for the image
    Xbar = (X - X.mean()) / std
    return w * Xbar + b, (Xbar, std, w)


def linear(Z, W):
    return Z @ W, (Z, W)


def scores(Q, K):
    return Q @ K.mT / sqrt(K.shape[-1]), (Q, K)


def softmax(L):
    E = np.exp(L - L.max(-1, keepdims=True))
    P = E / E.sum(-1, keepdims=True)
    return P, (P,)


def average(P, V):
    return P @ V, (P, V)


def affinity(X, A):
    return X @ A.mT / sqrt(A.shape[1]), (X, A)


def combine(X, S, U):
    return X + S @ U / sqrt(len(U)), (X, S, U)


def layer(X, w, b, W_K, W_V, Q, W_A, W_U):
    Xhat, c_norm = normalize(X, w, b)
    K, c_K = linear(Xhat, W_K)
    V, c_V = linear(Xhat, W_V)
    L, c_L = scores(split(Q), split(K))
    P, c_P = softmax(L)
    Z, c_Z = average(P, split(V))
    A, c_A = linear(merge(Z), W_A)
    U, c_U = linear(merge(Z), W_U)
    S, c_S = affinity(X, A)
    Y, c_Y = combine(X, S, U)
    return Y, (c_norm, c_K, c_V, c_L, c_P, c_Z, c_A, c_U, c_S, c_Y)


photo, restored = workbench.test(p)             # the photograph's tokens (128,128,16), before and after the library's layer
Y, cache = layer(photo.reshape(-1, 16), *p.values())
assert np.allclose(Y.reshape(photo.shape), restored, atol=1e-4)

# %% [markdown]
# Backward reads this list from the bottom up. Always: `dY` is $\partial L / \partial Y$, how the loss changes with each entry of
# $Y$, and it has $Y$'s shape. Each backward gets it and returns the same for each input.
#
# ## 1. The residual
#
# $S$ holds $R = 4$ maps. Where map $r$ is red the token adds direction $u_r$, where it is blue it subtracts it. The color of
# $u_r$, as red, green and blue, is below.

# %%
*_, (_, S, U) = cache
colors = mechanism.color(U)                     # of each direction, as (red, green, blue)
workbench.row("Four maps: how much of its color each token adds or subtracts", S.T.reshape(4, 128, 128),
              [f"r = {r + 1}" for r in range(4)], ["({:+.1f}, {:+.1f}, {:+.1f})".format(*c) for c in colors],
              cmap="RdBu_r", vmin=-abs(S).max(), vmax=abs(S).max())

# %% [markdown]
# $$Y = X + \frac{S\, U}{\sqrt R} \qquad\text{entry by entry:}\qquad y_{nc} = x_{nc} + \frac1{\sqrt R} \sum_r s_{nr}\, u_{rc}$$
#
# $s_{nr}$ moves $y_{nc}$ by $u_{rc}/\sqrt R$, for every $c$. The chain rule sums over what it moves:
# $ds_{nr} = \sum_c dy_{nc}\, u_{rc} / \sqrt R$. As a product of matrices? And $du_{rc}$, which is felt at every token $n$?

# %%
def combine_backward(dY, cache):
    X, S, U = cache                                 # (N,C), (N,R), (R,C)
    dX = dY                                         # the skip connection
    # two lines
    dS = ...
    dU = ...
    return dX, dS, dU


# %%
check(combine, combine_backward, X=(N, C), S=(N, R), U=(R, C))

# %% [markdown]
# ## 2. The affinity

# %%
workbench.along()

# %% [markdown]
# $$S = \frac{X A^\top}{\sqrt C} \qquad\text{entry by entry:}\qquad s_{nr} = \frac1{\sqrt C} \sum_c x_{nc}\, a_{rc}$$
#
# A token's affinity to basis $r$ changes along $a_r$. A token has $R$ affinities, so $dx_n$ is a sum of the $a_r$. By how much of
# each?

# %%
def affinity_backward(dS, cache):
    X, A = cache                                    # (N,C), (R,C)
    # two lines
    dX = ...
    dA = ...
    return dX, dA


# %%
check(affinity, affinity_backward, X=(N, C), A=(R, C))

# %% [markdown]
# ## 3. A learned matrix
#
# From here on the shapes nearly write the lines. Dashed is what you look for.

# %%
workbench.matrix()

# %% [markdown]
# $$T = Z W \qquad\text{entry by entry:}\qquad t_{rc} = \sum_{d} z_{rd}\, w_{dc}$$
#
# The layer does this four times, for $K$, $V$, $A$ and $U$. You write it once.

# %%
def linear_backward(dT, cache):
    Z, W = cache                                    # (R,D), (D,C)
    # two lines
    dZ = ...
    dW = ...
    return dZ, dW


# %%
check(linear, linear_backward, Z=(R, h * d), W=(h * d, C))

# %% [markdown]
# The first half is done: with these three, a layer whose $Z$ is given could learn. What is left is how the image writes $Z$.
#
# ## 4. The summary

# %%
P, V = cache[5]
where = np.log10(P[:, 0]).reshape(4, 128, 128)
low, high = np.quantile(where, (0.01, 0.99))
workbench.row("Where query 1 looks, in each head: a bright pixel has a large share in z",
              where, [f"head {i + 1}" for i in range(4)], vmin=low, vmax=high)

# %% [markdown]
# $$Z = P V \qquad\text{entry by entry:}\qquad z_{rd} = \sum_n p_{rn}\, v_{nd}$$
#
# Each head has its own $P$, $V$ and $Z$, stacked: write `.mT` for the transpose, and one line serves all heads.

# %%
def average_backward(dZ, cache):
    P, V = cache                                    # (h,R,N), (h,N,d)
    # two lines
    dP = ...
    dV = ...
    return dP, dV


# %%
check(average, average_backward, P=(h, R, N), V=(h, N, d))

# %% [markdown]
# ## 5. The softmax

# %%
workbench.shares()

# %% [markdown]
# $$p_n = \frac{e^{l_n}}{\sum_m e^{l_m}}, \qquad
# \frac{\partial p_n}{\partial l_m} = \begin{cases} p_n (1 - p_n) & m = n \\ -\, p_n\, p_m & m \ne n \end{cases}$$
#
# Put it into $dl_m = \sum_n dp_n\, \partial p_n / \partial l_m$ and take out the factor $p_m$. What remains is $dp_m$ minus
# something that is the same for all $m$.

# %%
def softmax_backward(dP, cache):
    (P,) = cache                                    # (h,R,N), each row sums to 1
    # one line
    dL = ...
    return dL


# %%
check(softmax, softmax_backward, L=(h, R, N))

# %% [markdown]
# ## 6. The scores

# %%
workbench.one_head()

# %% [markdown]
# $$L = \frac{Q K^\top}{\sqrt d} \qquad\text{entry by entry:}\qquad l_{rn} = \frac1{\sqrt d} \sum_{j=1}^{d} q_{rj}\, k_{nj}$$

# %%
def scores_backward(dL, cache):
    Q, K = cache                                    # (h,R,d), (h,N,d)
    # two lines
    dQ = ...
    dK = ...
    return dQ, dK


# %%
check(scores, scores_backward, Q=(h, R, d), K=(h, N, d))

# %% [markdown]
# ## 7. The norm

# %%
workbench.projected()

# %% [markdown]
# $$\hat X = w \circ \bar X + b, \qquad \bar X = \frac{X - \operatorname{mean}}{\operatorname{std}}$$
#
# $w$ and $b$ have one number for each channel, used by every token: their gradients are sums over tokens. Through $\bar X$ goes
# $g = d\hat X \circ w$. Adding a constant to $X$ changes nothing, so take the mean off $g$. Scaling $X$ changes nothing, so take
# off the part along $\bar X$: that is $\bar X$ times the mean of all $g \circ \bar X$. What is left is divided by std.

# %%
def normalize_backward(dXhat, cache):
    Xbar, std, w = cache                        # (N,C), one number, (C,)
    # three lines, or four with g
    dw = ...
    db = ...
    dX = ...
    return dX, dw, db


# %%
check(normalize, normalize_backward, X=(N, C), w=(C,), b=(C,))

# %% [markdown]
# ## 8. The layer
#
# Now everything from the bottom up. Only one thing is new. **What is used twice collects a sum.** Count in the drawing how many
# arrows leave a box, or in `layer` how often a name is read:
#
# $$\frac{\partial L}{\partial Z} = \text{through } A + \text{through } U, \qquad
# \frac{\partial L}{\partial \hat X} = \text{through } K + \dots, \qquad
# \frac{\partial L}{\partial X} = \;?$$

# %%
def layer_backward(dY, cache):
    c_norm, c_K, c_V, c_L, c_P, c_Z, c_A, c_U, c_S, c_Y = cache
    dX_skip, dS, dU = combine_backward(dY, c_Y)
    dX_S, dA = affinity_backward(dS, c_S)
    dZ_U, dW_U = linear_backward(dU, c_U)
    dZ_A, dW_A = linear_backward(dA, c_A)
    # one line
    dZ = ...
    dP, dV = average_backward(split(dZ), c_Z)
    dQ, dK = scores_backward(softmax_backward(dP, c_P), c_L)
    dXhat_V, dW_V = linear_backward(merge(dV), c_V)
    dXhat_K, dW_K = linear_backward(merge(dK), c_K)
    # one line
    dXhat = ...
    dX_norm, dw, db = normalize_backward(dXhat, c_norm)
    # one line
    dX = ...
    return dX, dw, db, dW_K, dW_V, merge(dQ), dW_A, dW_U


# %%
check(layer, layer_backward, after=passed, X=(N, C), w=(C,), b=(C,),
      W_K=(C, h * d), W_V=(C, h * d), Q=(R, h * d), W_A=(h * d, C), W_U=(h * d, C))

# %% [markdown]
# ## Teach it
#
# Each step shows four small pictures under lamps of new colors. The loss is the mean square of what the layer gets wrong,
# $L = \frac1{n} \sum (\text{color}(Y) - J)^2$. Your backward turns $\partial L / \partial Y$ into the gradient of all
# 1,120 numbers, and AdamW, the optimizer of [notebook 5](05_training_by_hand.ipynb), moves them.

# %%
lamps = mechanism.TASKS["lamps"]


def train(layer_backward, steps, progress=tqdm):
    """The layer's numbers, learned in so many steps with this backward."""
    (crops, amounts), rng = mechanism.bank(lamps), np.random.default_rng(0)
    p = Params(cea.shapes(16, rank=4))
    cea.init(p, rng)
    g, m, v, decay = p.zeros_like(), np.zeros_like(p.flat), np.zeros_like(p.flat), 1e-4 * optim.decay_mask(p)
    for step in progress(range(1, steps + 1)):
        J, a = (kind[rng.integers(len(kind), size=4)] for kind in (crops, amounts))
        g.flat[:] = 0
        for X, truth in zip(mechanism.tokens(lamps, J, a, rng).reshape(4, -1, 16), J.reshape(4, -1, 3)):
            Y, cache = layer(X, *p.values())
            error = mechanism.color(Y) - truth
            dY = np.zeros_like(Y)
            dY[:, 3:] = error @ mechanism.LIFT * np.float32(2 / J.size)
            for name, gradient in zip(p, layer_backward(dY, cache)[1:]):
                g[name] += gradient                         # the gradient of a batch is the sum of its images'
        optim.clip_by_norm(g.flat, 1.0)
        cpu.adamw(p.flat, g.flat, m, v, step, optim.warmup_cosine(step / steps, 0.05, 0.03), decay)
    return p


# %%
if passed["layer_backward"]:
    compare("yours", train(layer_backward, steps=2000))
else:
    print("The training waits for layer_backward. Then this cell takes about fifteen seconds and shows\n"
          "the picture at the top again, by a layer that learned from your gradients.")

# %% [markdown]
# What happened: your lines said for each of 1,120 numbers in which direction the error falls, 2,000 times. Nobody told the layer
# what a lamp is. The rival had a right derivative as well; no derivative helps a token that cannot see the others.
#
# ## Exercises
#
# Their solutions are the folded cells.
#
# **1.** Wrong, and it learns all the same. Take the row sum out of the softmax's backward. What does `check` say? What do 500
# steps of training say, against 500 with the right one? Would you have found this bug without a check?

# %% jupyter={"source_hidden": true}
# Solution
# It still gains: much of a wrong gradient often points downhill. Only the comparison with a right one, or with finite
# differences, shows it.
def no_row_sum(dP, cache):
    (P,) = cache
    return P * dP


check(softmax, no_row_sum, L=(h, R, N))
assert not passed["no_row_sum"]
right = workbench.mean_psnr(train(solutions.layer_backward, 500, progress=iter))
with patch.object(solutions, "softmax_backward", no_row_sum):
    wrong = workbench.mean_psnr(train(solutions.layer_backward, 500, progress=iter))
print(f"right: {right:.1f} dB, without the row sum: {wrong:.1f} dB")
assert right > wrong > 15

# %% [markdown]
# **2.** The residual the other way round: first the matrix $M = A^\top U / \sqrt{CR}$, then $Y = X + X M$. It is the same $Y$.
# Write its backward, from $dY$ to $dX$, $dA$ and $dU$, in four lines, and check it.

# %% jupyter={"source_hidden": true}
# Solution
def fast(X, A, U):
    M = A.mT @ U / sqrt(A.size)                             # A has R C entries
    return X + X @ M, (X, A, U, M)


def fast_backward(dY, cache):
    X, A, U, M = cache
    dX = dY + dY @ M.mT                                     # X is used twice
    dM = X.mT @ dY / sqrt(A.size)
    dA = U @ dM.mT
    dU = A @ dM
    return dX, dA, dU


check(fast, fast_backward, X=(N, C), A=(R, C), U=(R, C))
assert passed["fast_backward"]

# %% [markdown]
# **3.** A layer whose affinities compete: take a softmax of $S$ over $r$ before they weigh the directions. Which of your
# functions do you need, in which order? Write the pair `soft(X, A)` and check it. Do a token's affinities still tell *how much*
# of a lamp it gets?

# %% jupyter={"source_hidden": true}
# Solution
# affinity_backward after softmax_backward. A token's shares sum to 1: raise one affinity and the others must give way.
def soft(X, A):
    S, c_S = affinity(X, A)
    T, c_T = softmax(S)
    return T, (c_S, c_T)


def soft_backward(dT, cache):
    c_S, c_T = cache
    return solutions.affinity_backward(solutions.softmax_backward(dT, c_T), c_S)


check(soft, soft_backward, X=(N, C), A=(R, C))
assert passed["soft_backward"]

# %% [markdown]
# ## What to read next
#
# - [`cea.py`](../tinycea/cea.py): your `layer` and `layer_backward`, for batches, in seven statements each.
# - [Notebook 1](01_token_assembly.ipynb) and [notebook 2](02_hyper_adapter.ipynb): the same layer with its proofs.
# - [Notebook 4](04_gradient_checking.ipynb): what a check like the one above can miss.
# - `tinycea mechanism`: this task with ten rivals ([the table](../data/results/layer/mechanism.txt)).
