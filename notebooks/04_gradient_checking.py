# %% [markdown]
# # 4. Gradient checking: how a derivative written by hand is held against its forward
#
# **Question.** Every backward of this project was derived on paper, so each may be wrong. A wrong gradient rarely crashes: the
# loss still falls, only slower. How does one trust a derivative made by hand?
#
# **You need** the chain rule, Taylor series, and the idea of a backward ([notebook 1](01_token_assembly.ipynb), section 5).
# **Minutes:** 20.
#
# **The answer**, in the picture below: a second way to the same number that needs the forward alone. Take off from the loss what
# the gradient predicts. What remains falls as $h^2$ if the gradient is right, and as $h$ if it is not.
#
# 1. A difference quotient has one best step size, the complex step has none. Check in float64.
# 2. A random direction checks all entries of an argument with two evaluations; a joint one over all arguments misses bugs.
# 3. The upstream gradient must be random: ones hide a broken softmax.
# 4. With the right gradient the Taylor remainder falls as $h^2$, with a wrong one as $h$.
# 5. `tinycea.gradcheck` does all of this for any pair of functions, also for yours.
#
# A *pair* is a forward `y, cache = op(x, ...)` and its backward `dx, ... = op_backward(dy, cache)`, where
# $dy = \partial L/\partial y$ is the *upstream* gradient of some number $L$ and `dx` is $\partial L/\partial x$. $\epsilon$ is
# the distance from 1 to the next larger floating-point number: $2^{-52} \approx 2 \cdot 10^{-16}$ in float64,
# $2^{-23} \approx 10^{-7}$ in float32. $\langle a, b \rangle$ is the sum of all products of entries. `close` means: equal up to
# rounding in float64. Folded cells (click on the three dots) draw pictures, or hold a text's claim.

# %% jupyter={"source_hidden": true}
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from tinycea import cases, gradcheck
from tinycea.ops import reference as ops

rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)


def dot(a, b):
    return np.sum(a * b)


def rms(a):
    return np.sqrt(np.mean(np.square(a, dtype=np.float64)))


def single(*shape):
    """Random numbers that float32 holds exactly, so that both precisions get the same problem."""
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


N, C = 5, 8
x, w, weight, bias = single(N, C), single(N, C), single(C), single(C)
directions = rng.normal(size=(8, N, C))
directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)            # of length 1
directions = directions.astype(np.float32).astype(np.float64)


def loss(x):
    """L = <w, y> + <y, y> / 2 with y = layernorm(x), in the precision of x, which may be complex."""
    real = x.real.dtype
    y, _ = ops.layernorm(x, weight.astype(real), bias.astype(real))
    return dot(w.astype(real), y) + dot(y, y) / 2


y, cache = ops.layernorm(x, weight, bias)
dx, *_ = ops.layernorm_backward(w + y, cache)
normal, rstd, _ = cache
g = (w + y) * weight
dropped = (g - g.mean(-1, keepdims=True)) * rstd            # without LayerNorm's last term, - normal * mean(g normal)
claims = {"right": dx, "wrong by 0.1 %": 1.001 * dx, "a term dropped": dropped}
assert close(dropped - normal * (g * normal).mean(-1, keepdims=True) * rstd, dx)


def remainders(claim, h):
    return np.array([loss(x + h * v) - loss(x) - h * dot(claim, v) for v in directions])


h_taylor = np.logspace(-8, -0.5, 61)
remainder = {name: np.array([rms(remainders(claim, h)) for h in h_taylor]) for name, claim in claims.items()}
floor = np.finfo(np.float64).eps * abs(loss(x))

figure, axis = plt.subplots(figsize=(7, 2.7))
for (name, values), marker in zip(remainder.items(), "os^"):
    axis.loglog(h_taylor, values, marker=marker, markersize=3, label=name)
axis.axhline(floor, color="0.4", linestyle=":", label="rounding, eps |L|")
axis.set(xlabel="step h (units of x)", ylabel="Taylor remainder (units of L)",
         title="A wrong gradient bends the remainder from slope 2 to slope 1")
figure.legend(loc="outside right center")
plt.show()

# %% [markdown]
# ## 1. Three quotients and their errors
#
# The subject is LayerNorm, $y = \mathrm{layernorm}(x)$, which brings each token of $x$ to mean 0 and variance 1
# ([`layernorm`](../tinycea/ops/reference.py)). To speak of *a* derivative we need one number. Take, with a random $w$,
#
# $$L(y) = \langle w, y \rangle + \tfrac12 \langle y, y \rangle, \qquad dy = \frac{\partial L}{\partial y} = w + y .$$
#
# (Why: sections 3 and 4.) Along a direction $v$ of $x$'s shape the backward claims that $L$ has the slope
#
# $$L' = \frac{d}{dh} L(x + h v) \Big|_{h=0} = \Big\langle \frac{\partial L}{\partial x}, v \Big\rangle =
# \langle dx, v \rangle .$$
#
# Write $L(h)$ for $L(x + hv)$; its Taylor series is $L(h) = L + h L' + \tfrac{h^2}{2} L'' + \tfrac{h^3}{6} L''' + \dots$ Three
# ways to get $L'$ out of values of $L$, and what each leaves over:
#
# $$\frac{L(h) - L(0)}{h} \approx L' + \frac h2 L'', \qquad
# \frac{L(h) - L(-h)}{2h} \approx L' + \frac{h^2}{6} L''', \qquad
# \frac{\operatorname{Im} L(ih)}{h} \approx L' - \frac{h^2}{6} L''' .$$
#
# The first is the *forward*, the second the *central* difference: its even terms cancel. The third, the *complex step*, moves $x$
# along the imaginary axis. There $h$ becomes $ih$, so the term $L$ is real, $ihL'$ imaginary, $-\tfrac{h^2}{2} L''$ real,
# $-\tfrac{ih^3}{6} L'''$ imaginary: $L'$ is read off the imaginary part, and no two numbers are subtracted. What a quotient
# leaves over is its *truncation error*.

# %%
def forward(h, v, x=x):
    return (loss(x + h * v) - loss(x)) / h


def central(h, v, x=x):
    return (loss(x + h * v) - loss(x - h * v)) / (2 * h)


def complex_step(h, v, x=x):
    i = np.zeros((), np.result_type(x, np.complex64)) + 1j                      # as precise as x
    return loss(x + i * h * v).imag / h


# %% jupyter={"source_hidden": true}
# Check: the slope that the backward claims, and what each way leaves over, by the formulas.
def slope_at(x, v):
    """What the backward says: <dx, v>."""
    y, cache = ops.layernorm(x, weight, bias)
    dx, *_ = ops.layernorm_backward(w + y, cache)
    return dot(dx, v)


exact = np.array([slope_at(x, v) for v in directions])
difference = [(loss(x + 1e-5 * v) - loss(x - 1e-5 * v)) / 2e-5 for v in directions]
assert np.allclose(exact, difference, rtol=1e-8)

t = 1e-3
before, after = (np.array([slope_at(x + s * v, v) for v in directions]) for s in (-t, t))
second = (after - before) / (2 * t)                         # L'' and L''' along each direction
third = (after - 2 * exact + before) / t**2

h = 1e-3
for method, truncation in ((forward, h / 2 * second), (central, h**2 / 6 * third), (complex_step, -h**2 / 6 * third)):
    error = np.array([method(h, v) for v in directions]) - exact
    assert rms(error - truncation) < 0.01 * rms(truncation)

# %% [markdown]
# So a smaller step is better, until rounding takes over. $L$ is known only to about $\epsilon |L|$, and the quotient divides this
# by $h$:
#
# $$E_{\text{forward}}(h) \approx \frac h2 |L''| + \frac{\epsilon |L|}{h}, \qquad
# E_{\text{central}}(h) \approx \frac{h^2}{6} |L'''| + \frac{\epsilon |L|}{h} .$$
#
# One term rises with $h$, the other falls: a V on logarithmic axes. It is lowest where the derivative of $E$ is zero:
#
# $$h_{\text{forward}} = \sqrt{\frac{2 \epsilon |L|}{|L''|}} \sim \sqrt\epsilon, \quad E = h\, |L''| \sim \sqrt\epsilon, \qquad
# h_{\text{central}} = \Big( \frac{3 \epsilon |L|}{|L'''|} \Big)^{1/3} \sim \epsilon^{1/3}, \quad
# E = \tfrac12 h^2 |L'''| \sim \epsilon^{2/3} .$$
#
# The complex step subtracts nothing, so it has no second term. Measured, as a root mean square over eight directions, relative to
# that of the exact slopes:

# %% jupyter={"source_hidden": true}
# Check: the formulas against a search over a fine grid, and against the measurement.
L0, L2, L3 = abs(loss(x)), rms(second), rms(third)
best = {}
for dtype in (np.float32, np.float64):
    eps = np.finfo(dtype).eps
    h_f, h_c = np.sqrt(2 * eps * L0 / L2), np.cbrt(3 * eps * L0 / L3)
    best["forward", dtype], best["central", dtype] = (h_f, h_f * L2), (h_c, h_c**2 * L3 / 2)
    grid = np.logspace(-12, 0, 100_001)
    for E, (h, smallest) in ((grid / 2 * L2 + eps * L0 / grid, best["forward", dtype]),
                             (grid**2 / 6 * L3 + eps * L0 / grid, best["central", dtype])):
        assert np.isclose(E.min(), smallest, rtol=1e-6) and np.isclose(grid[E.argmin()], h, rtol=1e-3)

methods = {"forward": forward, "central": central, "complex step": complex_step}
steps = {np.float32: np.logspace(-6, 0, 25), np.float64: np.logspace(-16, 0, 65)}
curves = {}
for dtype in steps:
    for name, method in methods.items():
        found = [[method(dtype(h), v, x.astype(dtype)) for v in directions.astype(dtype)] for h in steps[dtype]]
        assert found[0][0].dtype == dtype                                       # nothing slipped into float64
        curves[name, dtype] = np.array([rms(row - exact) / rms(exact) for row in np.array(found, np.float64)])

figure, axes = plt.subplots(1, 2, figsize=(9, 2.7), sharey=True)
for axis, dtype in zip(axes, steps):
    for name, marker in zip(methods, "os^"):
        axis.loglog(steps[dtype], curves[name, dtype], marker=marker, markersize=3, label=name)
    axis.set(title=f"{dtype.__name__}: the best difference has {4 if dtype == np.float32 else 10} digits",
             xlabel="step h (units of x)")
    axis.plot(*np.transpose([(best[name, dtype][0], best[name, dtype][1] / rms(exact)) for name in ("forward", "central")]),
              "k+", ms=11, mew=2, label="lowest points, by the formulas")
    axis.locator_params(axis="x", numticks=7)
axes[0].set_ylabel("relative error of the slope")
figure.suptitle("A difference has one best step; the complex step is good at any small one", fontsize=10)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
plt.show()


def fit(h, error, low, high):
    """Slope of log error against log h for low <= h <= high."""
    inside = (low <= h) & (h <= high)
    return np.polyfit(np.log(h[inside]), np.log(error[inside]), 1)[0]


h = steps[np.float64]
sides = [("forward", "truncation", 1e-5, 1e-1, 1), ("forward", "rounding", 1e-14, 1e-9, -1),
         ("central", "truncation", 1e-3, 1e-1, 2), ("central", "rounding", 1e-14, 1e-7, -1),
         ("complex step", "truncation", 1e-5, 1e-1, 2)]
for name, side, low, high, expected in sides:
    found = fit(h, curves[name, np.float64], low, high)
    assert abs(found - expected) < 0.1
for name, dtype in best:
    error = curves[name, dtype]
    h_best, predicted = best[name, dtype]
    smallest, h_found, predicted = error.min(), steps[dtype][error.argmin()], predicted / rms(exact)
    assert 0.1 < smallest / predicted < 10 and 0.1 < h_found / h_best < 10

assert curves["complex step", np.float64][h < 1e-7].max() < 1e-14
assert 1e-5 < curves["central", np.float32].min() < 1e-3
assert np.isclose(complex_step(1e-100, directions[0]), exact[0], rtol=1e-14)    # a step as small as you like

# %% [markdown]
# - **Check in float64.** In float32 even the best central difference of this small op is wrong in the fifth digit, and a gradient
#   that is wrong by 0.001 % would look just as good.
# - **The complex step is the best of the three, where it works**: the code must be *analytic*, built from functions with a Taylor
#   series in a complex variable. $|y|$, a conjugate or a comparison such as `maximum` is not, and NumPy does not complain: it
#   returns a wrong number. With $|y|^2$ in place of $y^2$ our $L$ loses the derivative of its second term.
#
# So [`gradcheck.py`](../tinycea/gradcheck.py) takes the central difference in float64, which asks nothing of the forward, with a
# step of $10^{-4}$ along directions of length 1. That is to the right of the best step found above, on purpose: truncation is
# smooth and known, while rounding grows with the op. It also subtracts entry by entry, before it sums, which loses fewer digits:
# with $a = y(x + hv)$ and $b = y(x - hv)$
#
# $$L(a) - L(b) = \Big\langle w + \frac{a + b}{2},\; a - b \Big\rangle .$$

# %% jupyter={"source_hidden": true}
# Check: with |y|^2 only the first term's derivative is left; step and subtraction with 20,000 tokens, where L is large.
y_moved, _ = ops.layernorm(x + 1e-20j * directions[0], weight, bias)
right, wrong = ((dot(w, y_moved) + second_term / 2).imag / 1e-20 for second_term in (dot(y_moved, y_moved),
                                                                                     np.sum(np.abs(y_moved)**2)))
assert close(right, exact[0]) and close(wrong, dot(ops.layernorm_backward(w, cache)[0], directions[0]))
assert abs(wrong - right) > 0.1

x_many, w_many = rng.normal(size=(2, 20_000, C))
y_many, cache_many = ops.layernorm(x_many, weight, bias)
dx_many, *_ = ops.layernorm_backward(w_many + y_many, cache_many)
v = rng.normal(size=(20_000, C))
v /= np.linalg.norm(v)
errors = {}
for h in (1e-6, 1e-5, 1e-4):
    a, b = (ops.layernorm(x_many + s * h * v, weight, bias)[0] for s in (1, -1))
    subtracted = dot(w_many, a) + dot(a, a) / 2 - (dot(w_many, b) + dot(b, b) / 2)
    product = dot(w_many + (a + b) / 2, a - b)
    errors[h] = [abs(found / (2 * h) / dot(dx_many, v) - 1) for found in (subtracted, product)]
assert errors[1e-6][1] < errors[1e-6][0] / 10
assert gradcheck.STEP == 1e-4 and errors[1e-4][1] < 1e-8    # the tolerance of gradcheck is 1e-6
assert rms([central(1e-4, v) - e for v, e in zip(directions, exact)]) < 1e-8 * rms(exact)      # small op

# %% [markdown]
# ## 2. One direction per argument
#
# A gradient of $n$ entries takes $2n$ evaluations when each entry is moved on its own; one direction $v$ takes two, whatever $n$.
# Does it see an error $e$ in the gradient? For a random $v$ of length 1 the mean of $\langle e, v \rangle^2$ is the same in all
# directions of $e$, so
#
# $$\operatorname{mean} \langle e, v \rangle^2 = \frac{|e|^2}{n}, \qquad
# \operatorname{mean} \langle dx, v \rangle^2 = \frac{|dx|^2}{n} .$$
#
# An error of 1 % of the gradient's length is about 1 % of its slope, wherever it sits. `gradcheck` takes four directions, so that
# no unlucky one decides, and where there are few entries it compares the whole *Jacobian* $J_{ij} = \partial y_i / \partial x_j$.
#
# **Why not move all arguments at once?** Take a linear map $y = xW + b$ and a direction
# $(v_x, v_W, v_b)$:
#
# $$L' = \langle dx, v_x \rangle + \langle dW, v_W \rangle + \langle db, v_b \rangle .$$
#
# The sum is as large as its largest term. Say that the first of six inputs is a frequency in Hz, about $10^7$, and that its
# weights are about $10^{-7}$ to match. Then $y$ is of ordinary size, but $dW = x^\top dy$ is about $10^7$ times larger than
# $db = \sum dy$, and an error in $db$ is lost in the eighth digit: the joint check passes a backward that drops $db$.

# %% jupyter={"source_hidden": true}
# Check: both means, for one wrong entry; three backwards, the right one, one with db 50 % too large and one that drops it.
e = np.zeros_like(dx)
e[3, 2] = 0.01 * np.linalg.norm(dx)                         # one wrong entry out of 40
many = rng.normal(size=(100_000, N, C))
many /= np.linalg.norm(many, axis=(1, 2), keepdims=True)
seen_e, seen_dx = ((many * a).sum((1, 2)) for a in (e, dx))
assert np.isclose(np.mean(seen_e**2), dot(e, e) / e.size, rtol=0.03)
assert np.isclose(np.mean(seen_dx**2), dot(dx, dx) / dx.size, rtol=0.03)
assert np.isclose(rms(seen_e) / rms(seen_dx), 0.01, rtol=0.03)

inputs = {"x": rng.normal(size=(9, 6)), "weight": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}
inputs["x"][:, 0] *= 1e7                                    # in Hz
inputs["weight"][0] /= 1e7
ends = np.cumsum([value.size for value in inputs.values()])


def pack(arrays):
    return np.concatenate([array.ravel() for array in arrays])


def unpack(z):
    return [part.reshape(value.shape) for part, value in zip(np.split(z, ends[:-1]), inputs.values())]


print(f"relative error:{'joint':>16s}" + "".join(f"{name:>12s}" for name in inputs))
for factor in (1, 1.5, 0):
    def backward(dy, cache):
        dx, dweight, dbias = ops.linear_backward(dy, cache)
        return dx, dweight, factor * dbias

    joint, = gradcheck.check_gradients(lambda z: ops.linear(*unpack(z)), lambda dy, cache: pack(backward(dy, cache)),
                                       {"z": pack(inputs.values())})
    rows = {row.argument: row for row in gradcheck.check_gradients(ops.linear, backward, inputs)}
    print(f"db times {factor:<6}{joint.relative_error:16.0e}" + "".join(f"{row.relative_error:12.0e}" for row in rows.values()))
    assert joint.passed and joint.relative_error < 1e-6     # the joint check passes all three
    assert rows["x"].passed and rows["weight"].passed
    assert rows["bias"].passed == (factor == 1) and (rows["bias"].relative_error > 0.3) == (factor != 1)

# %% [markdown]
# ## 3. Ones as upstream hide a broken softmax
#
# It is tempting to sum the outputs, $L = \sum y$, that is, to send ones upstream. Take the softmax over $R$ affinities,
# $T_{nr} = e^{s_{nr}} / \sum_q e^{s_{nq}}$, and the LayerNorm with weight 1 and bias 0, here called $\hat x$. Their rows sum to a
# constant, whatever the input, $\sum_r T_{nr} = 1$ and $\sum_c \hat x_{nc} = 0$. So with ones upstream the gradient is zero, as
# their backwards ([notebook 2](02_hyper_adapter.ipynb)) say:
#
# $$dS = T \circ \big( dT - \operatorname{rowsum}(dT \circ T) \big) \;\overset{dT = 1}{=}\; T \circ (1 - 1) = 0, \qquad
# dx = \frac{1}{\operatorname{std}} \Big( g - \operatorname{mean} g - \hat x \operatorname{mean}(g \circ \hat x) \Big)
# \;\overset{g = 1}{=}\; \frac{1 - 1 - 0}{\operatorname{std}} = 0 .$$
#
# Any backward that returns zero for ones passes:

# %% jupyter={"source_hidden": true}
# Check: the rows' sums, and the two equations above, for random upstream and for ones.
R = 5
S = rng.normal(size=(2, 7, R))
T, _ = ops.topk_softmax(S, R)                               # top-k with k = R is the softmax
xhat, _ = ops.layernorm(x, np.ones(C), np.zeros(C))
ones, std = np.ones(C), np.sqrt(x.var(-1, keepdims=True) + 1e-6)
assert close(T.sum(-1), 1) and close(xhat.sum(-1), 0)
for dT, g in ((rng.normal(size=T.shape), rng.normal(size=x.shape)), (np.ones(T.shape), np.ones(x.shape))):
    dS = T * (dT - (dT * T).sum(-1, keepdims=True))
    dx_one = (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True)) / std
    assert close(dS, ops.topk_softmax_backward(dT, (T,))) and close(dx_one, ops.layernorm_backward(g, (xhat, 1 / std, ones))[0])
assert close(dS, 0) and close(dx_one, 0)                    # the last ones were ones


def softmax(S):
    return ops.topk_softmax(S, R)[0]


def normalize(x):
    return ops.layernorm(x, ones, np.zeros(C))[0]


# %%
backwards = {
    "softmax, right": (softmax, S, lambda dT: ops.topk_softmax_backward(dT, (T,))),
    "softmax, always zeros": (softmax, S, lambda dT: 0 * dT),
    "softmax, mean for weighted sum": (softmax, S, lambda dT: T * (dT - dT.mean(-1, keepdims=True))),
    "layernorm, right": (normalize, x, lambda dy: ops.layernorm_backward(dy, (xhat, 1 / std, ones))[0]),
    "layernorm, last term dropped": (normalize, x, lambda g: (g - g.mean(-1, keepdims=True)) / std),
}

# %% jupyter={"source_hidden": true}
print(f"{'backward minus difference, rms:':32s}{'dy = ones':>12s}{'dy random':>12s}")
for name, (op, value, backward) in backwards.items():
    found = []
    for dy in (np.ones(value.shape), rng.normal(size=value.shape)):
        difference = []
        for v in rng.normal(size=(8, *value.shape)):
            v /= np.linalg.norm(v)
            quotient = dot(dy, op(value + 1e-4 * v) - op(value - 1e-4 * v)) / 2e-4
            difference.append(dot(backward(dy), v) - quotient)
        found.append(rms(difference))
    print(f"{name:32s}{found[0]:12.0e}{found[1]:12.0e}")
    assert found[0] < 1e-10                                 # with ones, all of them pass
    assert found[1] < 1e-7 if "right" in name else found[1] > 1e-3

# %% [markdown]
# This is why $L$ has a random $w$ in it: its upstream gradient $w + y$ favors no pattern that an op could be blind to.
#
# ## 4. The Taylor remainder: from slope 2 to slope 1
#
# Let $\hat g$ be what the backward claims and $g$ the true gradient. Take off from $L$ what $\hat g$ predicts:
#
# $$L(x + hv) - L(x) - h \langle \hat g, v \rangle = h \langle g - \hat g, v \rangle + \frac{h^2}{2} L'' + O(h^3) .$$
#
# If $\hat g = g$, only the $h^2$ is left: halve the step and the *remainder* falls to a quarter, a line of slope 2 on logarithmic
# axes. If $\hat g$ is wrong, the first term wins for small $h$: slope 1. The two are equal at
#
# $$h^* = \frac{2\, |\langle g - \hat g, v \rangle|}{|L''|} ,$$
#
# so a small mistake has slope 2 above $h^*$ and slope 1 below. The test needs no tolerance for the size of the gradient; it looks
# at a shape: the picture at the top.

# %% jupyter={"source_hidden": true}
# Check: the equation for one step, the slopes, and where the line bends.
for name, claim in claims.items():
    delta = np.array([dot(dx - claim, v) for v in directions])
    expected = 1e-3 * delta + 1e-3**2 / 2 * second
    assert rms(remainders(claim, 1e-3) - expected) < 0.01 * rms(expected)

crossing = 2 * rms([dot(0.001 * dx, v) for v in directions]) / rms(second)
found = {"right": fit(h_taylor, remainder["right"], 1e-5, 1e-1),
         "a term dropped": fit(h_taylor, remainder["a term dropped"], 1e-6, 1e-2),
         "0.1 %, above h*": fit(h_taylor, remainder["wrong by 0.1 %"], 10 * crossing, 1),
         "0.1 %, below h*": fit(h_taylor, remainder["wrong by 0.1 %"], 1e-7, crossing / 10)}
print("slopes: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), f"  h* = {crossing:.4f}")
assert abs(found["right"] - 2) < 0.05 and abs(found["a term dropped"] - 1) < 0.05
assert abs(found["0.1 %, above h*"] - 2) < 0.15 and abs(found["0.1 %, below h*"] - 1) < 0.05
assert remainder["right"][0] < 10 * floor                   # at h = 1e-8 nothing but rounding is left

# %% [markdown]
# Below $h \approx 10^{-7}$ the remainder is rounding, and its slope means nothing. `gradcheck` fits the slope to the four steps
# $2, 4, 8, 16 \cdot 10^{-4}$, ignores remainders that rounding explains, and asks for at least 1.95.
#
# **Why $L$ needs its second term.** Let an op be linear in its argument, and $y + hu$ its moved output. With
# $L = \langle w, y \rangle$ the remainder would be zero: nothing to fit. The half square gives it one,
#
# $$L(y + hu) - L(y) - h \langle w + y, u \rangle = \frac{h^2}{2} \langle u, u \rangle .$$

# %% jupyter={"source_hidden": true}
# Check: this equation, for a linear op.
W, v = rng.normal(size=(C, 3)), rng.normal(size=(C, 3))
u, y_W, w_W = x @ v, x @ W, rng.normal(size=(N, 3))
for step in (1e-1, 1e-2):
    moved = ops.linear(x, W + step * v)[0]
    linear_part = dot(w_W, moved) - dot(w_W, y_W) - step * dot(w_W, u)
    with_square = linear_part + (dot(moved, moved) - dot(y_W, y_W)) / 2 - step * dot(y_W, u)
    assert abs(linear_part) < 1e-12
    assert np.isclose(with_square, step**2 / 2 * dot(u, u), rtol=1e-9)

# %% [markdown]
# ## 5. An op of your own
#
# RMSNorm is LayerNorm without the mean: divide each token by its root mean square, then weigh the channels. For one token
#
# $$y_c = w_c\, \hat x_c, \qquad \hat x_c = r\, x_c, \qquad r = \Big( \tfrac1C \sum_c x_c^2 + \varepsilon \Big)^{-1/2}, \qquad
# \varepsilon = 10^{-6} .$$
#
# **Backward.** $w_c$ is used by every token $n$, so $dw_c = \sum_n dy_{nc}\, \hat x_{nc}$. Let $g_c = dy_c w_c$ be the gradient
# of $\hat x_c$. $x_c$ acts directly, with the factor $r$, and through $r$:
#
# $$\frac{\partial r}{\partial x_c} = -\frac{r^3 x_c}{C}
# \quad\Longrightarrow\quad
# \frac{\partial \hat x_k}{\partial x_c} = r\, \delta_{kc} - \frac{r^3 x_k x_c}{C} =
# r \Big( \delta_{kc} - \frac{\hat x_k \hat x_c}{C} \Big) ,$$
#
# with $\delta_{kc} = 1$ if $k = c$ and 0 otherwise. Summing over $k$ with $g_k$:
#
# $$dx_c = \sum_k g_k \frac{\partial \hat x_k}{\partial x_c} = r \Big( g_c - \hat x_c\, \tfrac1C \sum_k g_k \hat x_k \Big) .$$

# %%
def rmsnorm(x, w):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    xhat = x * r
    return w * xhat, (xhat, r, w)


def rmsnorm_backward(dy, cache):
    xhat, r, w = cache
    g = dy * w
    return r * (g - xhat * (g * xhat).mean(-1, keepdims=True)), (dy * xhat).sum(0)


# %% jupyter={"source_hidden": true}
# Check: token by token, as derived. (By the same hand: the judge comes next.)
dy = rng.normal(size=(N, C))
y_rms, (xhat_rms, r, _) = rmsnorm(x, weight)
dx_rms, dw_rms = rmsnorm_backward(dy, (xhat_rms, r, weight))
dw_loop = np.zeros(C)
for n in range(N):
    r_n = (sum(x[n, c]**2 for c in range(C)) / C + 1e-6)**-0.5
    assert close(y_rms[n], weight * r_n * x[n])
    jacobian = r_n * np.eye(C) - r_n**3 * np.outer(x[n], x[n]) / C
    assert close(jacobian, r_n * (np.eye(C) - np.outer(xhat_rms[n], xhat_rms[n]) / C))
    assert close((dy[n] * weight) @ jacobian, dx_rms[n])
    dw_loop += dy[n] * xhat_rms[n]
assert close(dw_loop, dw_rms)

# %% [markdown]
# The judge is [`check_gradients`](../tinycea/gradcheck.py), one call with the pair and a dict of its arguments. Then break it:
# each line of `bugs` is a common mistake that leaves the gradient's shape right.

# %%
square = {"x": rng.normal(size=(6, 6)), "w": rng.normal(size=6)}             # square: dx.T fits
rows = gradcheck.check_gradients(rmsnorm, rmsnorm_backward, square)
print(rows)
assert all(row.passed for row in rows)

# %%
bugs = {                                                   # from right gradients and the cache to wrong ones
    "dw 0.1 % too large": lambda dx, dw, dy, xhat, r, w: (dx, 1.001 * dw),
    "dw 0.001 % too large": lambda dx, dw, dy, xhat, r, w: (dx, 1.00001 * dw),
    "sign of the second term": lambda dx, dw, dy, xhat, r, w: (2 * r * dy * w - dx, dw),
    "dx transposed": lambda dx, dw, dy, xhat, r, w: (dx.T, dw),
    "dw of one row, not of all": lambda dx, dw, dy, xhat, r, w: (dx, (dy * xhat)[0]),
    "your own": lambda dx, dw, dy, xhat, r, w: (dx + 1e-4 * xhat, dw),          # edit this line
}

# %% jupyter={"source_hidden": true}
def with_bug(bug):
    return lambda dy, cache: bug(*rmsnorm_backward(dy, cache), dy, *cache)


print(f"{'bug':26s}{'argument':10s}{'relative error':>14s}{'slope':>8s}   caught by")
caught = {}
for name, bug in bugs.items():
    failed = [row for row in gradcheck.check_gradients(rmsnorm, with_bug(bug), square) if not row.passed]
    assert failed, f"{name}: not caught"
    row = max(failed, key=lambda row: row.relative_error)
    caught[name] = [criterion for criterion, wrong in (("derivative", not row.relative_error <= 1e-6),
                                                       ("slope", not row.taylor_slope >= 1.95)) if wrong]
    numbers = f"{row.relative_error:14.0e}{row.taylor_slope:8.2f}"
    print(f"{name:26s}{row.argument:10s}{numbers}   {', '.join(caught[name])}")
    assert row.argument == ("w" if name.startswith("dw") else "x") or name == "your own"
assert caught["dw 0.1 % too large"] == ["derivative", "slope"]
assert caught["dw 0.001 % too large"] == ["derivative"]

# %% [markdown]
# Edit a line, or write a bug of your own into the last one, and run the two cells again. The 0.001 % shows why there are two
# criteria: its bend lies at a step $h^*$ below those that are tried, so its slope is still near 2, but the derivatives disagree.
# Exercise 2 has the opposite case.
#
# A gradient of the wrong shape, `check_gradients` refuses at once. So make sizes pairwise different, as
# [`cases`](../tinycea/cases.py) does for tinycea's own pairs: all ops, CEA, its rivals and the network. The checker is checked as
# well: [`broken`](../tinycea/cases.py) has four pairs that must fail. The command `tinycea gradcheck` prints a line for each.

# %% jupyter={"source_hidden": true}
# Check: the report of that command.
report = cases.report("reference")
pairs = [row for row in report if row["verdict"] == "ok"]
print(f"{len(pairs)} pairs, {sum(row['arguments'] for row in pairs)} arguments, all passed; "
      f"{len(report) - len(pairs)} broken on purpose, all caught")
assert all(row["passed"] for row in report)
assert len(pairs) == len(list(cases.cases(ops)))
assert [row["verdict"] for row in report if row not in pairs] == 4 * ["caught"]

# %% [markdown]
# ## Exercises
#
# **1.** SiLU is $y = x\, \sigma(x)$ with the sigmoid $\sigma(x) = 1/(1 + e^{-x})$. Derive its backward, write the pair and check
# it. (The solution is folded below; it runs with the notebook.)

# %% jupyter={"source_hidden": true}
# Solution
# sigma' = sigma (1 - sigma), so dy/dx = sigma + x sigma (1 - sigma).
def silu(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, (x, s)


def silu_backward(dy, cache):
    x, s = cache
    return dy * s * (1 + x * (1 - s))


rows = gradcheck.check_gradients(silu, silu_backward, {"x": rng.normal(size=(3, 5))})
assert all(row.passed for row in rows)
rows = gradcheck.check_gradients(silu, lambda dy, cache: dy * cache[1], {"x": rng.normal(size=7)})      # x sigma' dropped
assert not any(row.passed for row in rows)

# %% [markdown]
# **2.** The loss `l1_loss` below is the mean of $|\mathrm{pred} - \mathrm{target}|$, and its backward is right. Check it where
# all these errors are $10^{-7}$, and where they are exactly 0. Which criterion fails, and why? Where must one look instead?

# %% jupyter={"source_hidden": true}
# Solution
# The absolute value has a kink at 0. An error smaller than the step (1e-4 times the direction's entry) changes its sign on the
# way, so the quotient mixes both slopes, -1 and +1: no gradient agrees with it. At exactly 0 the central difference is 0 by
# symmetry, and so is the backward (sign(0) = 0): they agree, but |h v| falls as h, not as h^2, and only the slope tells. Neither
# is a bug; a check must stay away from kinks by more than a step.
def l1_loss(pred, target):
    error = pred - target
    return np.abs(error).mean(), error


def l1_loss_backward(dy, error):
    dpred = np.sign(error) * dy / error.size
    return dpred, -dpred


target = rng.normal(size=(1, 2, 3, 5))
zeros = np.zeros(target.shape)
for name, error in {"1e-7": zeros + 1e-7, "0": zeros, "0.1 and more": 0.1 + rng.random(target.shape)}.items():
    row, _ = gradcheck.check_gradients(l1_loss, l1_loss_backward, {"pred": target + error, "target": target})
    numbers = f"relative error {row.relative_error:.0e}, slope {row.taylor_slope:.2f}"
    print(f"errors of {name}: {numbers}, passed: {row.passed}")
    assert row.passed == (name == "0.1 and more")
    assert (row.relative_error < 1e-6) == (name != "1e-7")
    assert (row.taylor_slope < 1.05) == (name != "0.1 and more")

# %% [markdown]
# **3.** [`probe`](../tinycea/ops/reference.py) takes a `max` of its logits, and a maximum is a comparison. Does the complex step
# work all the same? Try it, and hold `probe_backward` to 13 digits.

# %% jupyter={"source_hidden": true}
# Solution
# It does. The maximum is only taken off before the exponential, and a softmax forgets any constant, also a complex one: however
# the maximum picks, the result is the same function of the logits, and that one is analytic.
arrays = {"Q": rng.normal(size=(3, 8)), "K": rng.normal(size=(2, 7, 8)), "V": rng.normal(size=(2, 7, 8))}
Z, cache = ops.probe(*arrays.values(), 2)
w_Z = rng.normal(size=Z.shape)
for name, gradient in zip(arrays, ops.probe_backward(w_Z + Z, cache)):
    v = rng.normal(size=(4, *arrays[name].shape))
    slopes = np.array([dot(gradient, v_k) for v_k in v])
    moved = [ops.probe(*(arrays | {name: arrays[name] + 1e-30j * v_k}).values(), 2)[0] for v_k in v]
    numeric = np.array([(dot(w_Z, Z_k) + dot(Z_k, Z_k) / 2).imag / 1e-30 for Z_k in moved])
    assert np.linalg.norm(slopes - numeric) < 1e-13 * np.linalg.norm(slopes)

# %% [markdown]
# ## What to read next
#
# - [Notebook 5](05_training_by_hand.ipynb): the same check on a whole network, and what is done with a gradient.
# - W. Squire, G. Trapp (1998), "Using complex variables to estimate derivatives of real functions": the complex step.
# - A. Griewank, A. Walther (2008), *Evaluating Derivatives*: what the frameworks do instead.
