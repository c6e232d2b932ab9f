# %% [markdown]
# # 5. Training by hand: data, one step, the optimizer, a run
#
# **Question.** What is training, without autograd and without a framework?
#
# **You need** the idea of a gradient ([notebook 4](04_gradient_checking.ipynb)) and of a convolution; CEA itself
# ([notebook 2](02_hyper_adapter.ipynb)) only in section 2. **Minutes:** 20.
#
# **The answer**: a loop of ten lines over one array of numbers. The picture below is what it ends with, given time.
#
# 1. Training data is computed, not collected: drawn scenes and degradations that are formulas.
# 2. All parameters are one flat array with named views, so a norm, a clip or an update is one line.
# 3. AdamW is four lines; its first step has size $\eta$ in every parameter that has a gradient, whatever the gradient's size.
# 4. A network that cannot learn one patch by heart has a bug; this one can, and is no restorer for that.
# 5. Ten lines are all of training: the library's `train` ends with the same bits.
# 6. A table, degradation by degradation, says what 200 steps do, and what the shipped weights do.
#
# `close` means: equal up to rounding in float64. Folded cells (click on the three dots) draw pictures, or hold a text's claim.

# %% jupyter={"source_hidden": true}
import os
import tempfile
from functools import partial
from pathlib import Path

# Before NumPy: the batch is small, a second thread gains nothing, and the same number of threads gives the same bits.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from workbench import row

from tinycea import degradations, evaluation, feed, nafnet, optim, training, zoo
from tinycea.ops import cpu
from tinycea.ops import reference as ops
from tinycea.restoration import restore_rgb
from tinycea.scenes import Scene, dead_leaves, photographs

rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)


def psnr(image, clean):
    """Peak signal-to-noise ratio in dB, of values in [0, 1]: section 1."""
    return -10 * np.log10(np.mean((image.astype(np.float64) - clean)**2))


shipped, shipped_config = zoo.load_model(zoo.WEIGHTS)
photo = photographs("test")["chelsea"][60:200, 90:230]
noisy = degradations.noise(photo, np.random.default_rng(0))
images = noisy, restore_rgb(noisy, shipped, shipped_config), photo
row("What the loop ends with, on a photograph that it never saw", images,
    ("noisy", "restored", "clean"), [f"{psnr(image, photo):.1f} dB" for image in images[:2]] + ["the reference"], 5.8)

# %% [markdown]
# ## 1. Dead leaves, and what is done to them
#
# A *dead-leaves* scene is a heap of opaque disks that hide each other (Lee et al. 2001). With radii of density $\propto r^{-3}$
# every octave of sizes covers the same area, and the picture has edges at all scales as photographs do.
# [`dead_leaves`](../tinycea/scenes.py) returns the image $J$ with values in $[0,1]$, and a depth map $d$.
#
# A *degradation* is a formula with randomness ([`degradations.py`](../tinycea/degradations.py)). Noise adds a normal number
# $\varepsilon$ of standard deviation $\sigma = 25/255$ to every value and cuts the sum to 8 bits, as a camera does. Haze mixes in
# the light $A$ of the air, the more the farther ($t$ is the share of light that comes through):
#
# $$I = \tfrac{1}{255} \big\lfloor 255 \operatorname{clip}(J + \varepsilon) \big\rfloor, \qquad\qquad
# I = J\, t + A\, (1 - t), \quad t = e^{-\beta \min(d,\, 0.7)} .$$

# %%
scene = dead_leaves(160, np.random.default_rng(10))
J = scene.image

draw = np.random.default_rng(1)
noisy = np.floor(255 * np.clip(J + 25 / 255 * draw.standard_normal(J.shape, np.float32), 0, 1)) / 255

draw = np.random.default_rng(2)
beta, A = draw.uniform(1, 2), draw.uniform(0.6, 0.9)
t = np.exp(-beta * np.minimum(scene.depth, 0.7))[..., None]
hazy = J * t + A * (1 - t)

# %% jupyter={"source_hidden": true}
# Check: the library has these formulas, and each of its degradations does nothing at strength 0.
assert np.allclose(noisy, degradations.noise(J, np.random.default_rng(1)), atol=1e-6)              # float32
assert np.allclose(hazy, degradations.haze(J, np.random.default_rng(2), depth=scene.depth), atol=1e-6)
for name, formula in degradations.DEGRADATIONS.items():
    assert np.array_equal(formula(scene, np.random.default_rng(3), 0), J)

# %% [markdown]
# How far an image $I$ is from the clean $J$ is told in decibels: from the mean squared error (MSE) over its $n$ values, the *peak
# signal-to-noise ratio*. Each factor of 10 in the MSE is 10 dB; noise alone, before the cut, has $-20 \log_{10} \sigma$.
#
# $$\mathrm{PSNR} = -10 \log_{10} \mathrm{MSE}, \qquad \mathrm{MSE} = \frac1n \sum_i (I_i - J_i)^2 .$$

# %% jupyter={"source_hidden": true}
assert np.isclose(psnr(noisy, J), evaluation.psnr(noisy.astype(np.float32), J))
entries = ("noise25", "rain", "haze", "low", "haze+rain")
images = [degradations.apply(scene, entry, np.random.default_rng(7)) for entry in entries]
row("One drawn scene under five formulas", (J, *images), ("clean", *entries),
    ["the reference"] + [f"{psnr(image, J):.1f} dB" for image in images])

# %% [markdown]
# ## 2. One training step through the flat buffer
#
# A *recipe* holds everything a run is made of. Its data: crops of 64 × 64 pixels, half from dead leaves, half from photographs,
# in other light and each with one degradation, weak or strong; one in ten with none. The network is the toy model, a small
# NAFNet with a CEA layer after each of its three stages. Its parameters are one array `p.flat`. `p["intro.weight"]` is a *view*:
# the same memory under a name and a shape
# ([`Params`](../tinycea/params.py)). The gradient is a second array of the same layout.

# %%
recipe = training.Recipe(steps=200, scenes=8, chunks=1)
degraded, clean = feed.batch(recipe, step=0)                    # (6, 64, 64, 3) each

config = zoo.network(recipe.adapter)
p = nafnet.init(config, np.random.default_rng([recipe.seed, feed.INIT]))
g = p.zeros_like()
print(f"{p.flat.size} parameters under {len(p)} names")
assert all(np.shares_memory(value, p.flat) for value in p.values())
assert sum(value.size for value in p.values()) == p.flat.size and not np.shares_memory(p.flat, g.flat)

# %% [markdown]
# **The loss** is minus the PSNR, averaged over the $B$ images $\hat y_b$ of a batch, $n$ values each. A floor $\epsilon = 3 \cdot
# 10^{-4}$ under the MSE says that beyond 35 dB there is little to win: else the clean patches, whose MSE can go to zero, would be
# all that counts. Its gradient follows from $\partial \log_{10} x / \partial x = 1/(x \ln 10)$:
#
# $$L = \frac1B \sum_b 10 \log_{10}\!\big(\mathrm{MSE}_b + \epsilon\big), \qquad
# \frac{\partial L}{\partial \hat y_b} = \frac{20}{B\, n \ln 10} \cdot \frac{\hat y_b - y_b}{\mathrm{MSE}_b + \epsilon} .$$
#
# The network's backward takes it and adds every parameter's gradient into the views of `g`. [`gradient`](../tinycea/training.py)
# is the lines below, with the faster arithmetic of [`ops/cpu`](../tinycea/ops/cpu.py). A run adds one thing: the gradient of an
# image that leaves worse than it came is multiplied by `CARE` = 4. A restorer shall do no harm.

# %%
restored, cache = nafnet.centered(degraded, p, config, ops)     # centered: the network works on 2 x - 1
yhat, y = restored.astype(np.float64), clean.astype(np.float64)
B, n = len(y), y[0].size
mse = np.mean((yhat - y)**2, axis=(1, 2, 3), keepdims=True)
L = np.mean(10 * np.log10(mse + recipe.floor))
dL = 20 / (B * n * np.log(10)) * (yhat - y) / (mse + recipe.floor)
nafnet.centered_backward(dL.astype(np.float32), cache, g)
norm = np.sqrt(np.dot(g.flat, g.flat))

# %% jupyter={"source_hidden": true}
# Check: the library has these lines; and which parameters of the blocks and adapters have a gradient at the start.
loss, c_loss = ops.psnr_loss(yhat, y, recipe.floor)
assert close(L, loss) and close(dL, ops.psnr_loss_backward(1.0, c_loss)[0])
by_hand = g.flat.copy()
assert np.isclose(training.gradient(degraded, clean, p, config, cpu, g, recipe.floor), L, rtol=1e-5)
assert np.linalg.norm(g.flat - by_hand) < 1e-4 * np.linalg.norm(by_hand)   # float32, sums in another order
assert np.isclose(norm, np.sqrt(sum(np.sum(value.astype(np.float64)**2) for value in g.values())), rtol=1e-5)
awake = {name.split(".")[-1] for name, value in g.items()
         if np.any(value) and name.split(".")[0] not in ("intro", "ending", "downs", "ups")}
print(f"{np.mean(g.flat != 0):.0%} of the parameters have a gradient; in blocks and adapters: {', '.join(sorted(awake))}")
assert awake == {"beta", "gamma", "W_U"}

# %% [markdown]
# At the start most parameters have no gradient: NAFNet multiplies each block's branches by $\beta$ and $\gamma$, which start at
# zero as $W_U$ does. The first step moves these and what lies outside the blocks; then the rest wakes up
# ([notebook 2](02_hyper_adapter.ipynb), claim 6).
#
# **Is the gradient right?** In float64, with every parameter moved off its start so that nothing is zero, the derivative of the
# whole network along a direction $v$ must equal a central difference. One named array at a time: a direction in all of them at
# once would see little but the largest gradients ([notebook 4](04_gradient_checking.ipynb), section 2).
#
# $$\langle \nabla L, v \rangle \approx \frac{L(p + h v) - L(p - h v)}{2h} .$$
#
# **Clipping.** A batch with an almost clean image has a small MSE, which the loss divides by, and so a large gradient. If its
# norm exceeds a limit $c$ (here 1), the whole array is scaled down; the direction stays:
#
# $$g \leftarrow g \cdot \min\!\Big(1, \frac{c}{\lVert g \rVert}\Big) .$$

# %% jupyter={"source_hidden": true}
# Check: the gradient of each of the arrays; the library's clip.
p64 = nafnet.init(config, np.random.default_rng(0), np.float64)
p64.flat += 0.1 * rng.normal(size=p64.flat.size)
g64, h = p64.zeros_like(), 1e-5
images = [pixels[:2, :16, :16].astype(np.float64) for pixels in (degraded, clean)]
training.gradient(*images, p64, config, cpu, g64)


def error_along(name):
    """Relative error of one named array's gradient, along a random direction."""
    v, values = rng.normal(size=p64[name].shape), []
    for step in (h, -h):
        q = p64.copy()
        q[name][...] += step * v / np.linalg.norm(v)
        values.append(training.gradient(*images, q, config, cpu, q.zeros_like()))
    numeric = (values[0] - values[1]) / (2 * h)
    return abs(np.sum(g64[name] * v) / np.linalg.norm(v) - numeric) / abs(numeric)


errors = {name: error_along(name) for name in p64}
worst = max(errors, key=errors.get)
print(f"{len(errors)} arrays, each along a direction of its own; relative error: median {np.median(list(errors.values())):.0e}")
assert errors[worst] < 1e-4, worst

clipped = g.flat * min(1, recipe.clip / norm)
before = optim.clip_by_norm(g.flat, recipe.clip)
assert np.isclose(before, norm) and np.allclose(g.flat, clipped, atol=1e-8)
assert np.linalg.norm(g.flat) < 1.001 * recipe.clip

# %% [markdown]
# ## 3. AdamW from its equations
#
# AdamW (Loshchilov and Hutter 2019) keeps two running means for each parameter: $m$ of the gradient and $v$ of its square. Both
# start at zero, so in step $t$ they lack the weight $\beta^t$; dividing by $1 - \beta^t$ mends that. Then each parameter moves by
# the learning rate $\eta$ times a number of size about 1, and shrinks by the share $\eta \lambda$:
#
# $$\begin{aligned}
# m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, & v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, \\
# \hat m_t &= \frac{m_t}{1 - \beta_1^t}, \quad \hat v_t = \frac{v_t}{1 - \beta_2^t}, &
# w_t &= w_{t-1} - \eta \Big( \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} + \lambda\, w_{t-1} \Big) .
# \end{aligned}$$
#
# $\beta_1 = 0.9$, $\beta_2 = 0.99$, $\epsilon = 10^{-8}$. All of it is entrywise, so it knows no layer
# ([`adamw`](../tinycea/ops/reference.py)).

# %%
lr, decay = 0.01, 0.1 * optim.decay_mask(p64)
w, m, v = p64.flat.copy(), 0, 0
w_library, m_library, v_library = p64.flat.copy(), np.zeros(w.size), np.zeros(w.size)
for t in (1, 2, 3):
    gradient = rng.normal(size=w.size)
    m = 0.9 * m + 0.1 * gradient
    v = 0.99 * v + 0.01 * gradient**2
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
    w = w - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * w)

    ops.adamw(w_library, gradient, m_library, v_library, t, lr, decay)
    assert close(w, w_library) and close(m, m_library) and close(v, v_library)

# %% [markdown]
# **The first step.** At $t = 1$ the corrected means are $\hat m = g$ and $\hat v = g^2$, so without decay
#
# $$w_1 - w_0 = -\eta\, \frac{g}{|g| + \epsilon} \approx -\eta\, \operatorname{sign}(g) .$$
#
# A parameter with a gradient of $10^{-4}$ moves as far as one with $10^{4}$. So one rate can suit layers of very different scale,
# and the first steps, when $v$ knows a single gradient, want a small rate.
#
# **Decay** is decoupled: it does not pass through $m$ and $v$ (exercise 2 shows the difference), and a mask spares biases, norms,
# $\beta$ and $\gamma$, for which small is not simpler. With a gradient of zero the others shrink by $1 - \eta\lambda$ in each
# step:
#
# $$g = 0 \;\Rightarrow\; w_1 = (1 - \eta\, \lambda)\, w_0 .$$

# %% jupyter={"source_hidden": true}
# Check: the first step, for gradients of eight orders of magnitude; what decays, and by how much.
gradient = 10.0**rng.uniform(-4, 4, 1000) * rng.choice((-1, 1), 1000)
w = np.zeros(1000)
ops.adamw(w, gradient, np.zeros(1000), np.zeros(1000), 1, lr, 0)
assert close(w, -lr * gradient / (np.abs(gradient) + 1e-8))
assert np.allclose(w, -lr * np.sign(gradient), rtol=2e-4)

mask = optim.decay_mask(p64)
named = p64.zeros_like()
named.flat[:] = mask
spared = {"norm" if "norm" in name else name.split(".")[-1] for name, value in named.items() if not value.any()}
w, zero = p64.flat.copy(), np.zeros(mask.size)
ops.adamw(w, zero, zero.copy(), zero.copy(), 1, lr, 0.1 * mask)
assert close(w, np.where(mask == 1, 1 - lr * 0.1, 1) * p64.flat) and spared == {"bias", "norm", "beta", "gamma"}

# %% [markdown]
# **The schedule** ([`warmup_cosine`](../tinycea/optim.py)) raises $\eta$ linearly during the share $w$ of the run, then lowers it
# along half a cosine. With the progress $s \in (0,1]$ and the floor $\eta_0 = 10^{-7}$:
#
# $$\eta(s) = \eta_{\max} \frac{s}{w} \;\;(s < w), \qquad
# \eta(s) = \eta_0 + (\eta_{\max} - \eta_0)\, \frac{1 + \cos\!\big(\pi \frac{s - w}{1 - w}\big)}{2} \;\;(s \ge w) .$$
#
# The adapters get a tenth of this rate (`adapter_lr`): CEA's update is a product of learned factors, among them $W_V$ twice, and
# soon too large.

# %% jupyter={"source_hidden": true}
# Check: the library's schedule is this one.
s = np.arange(1, 2401) / 2400                   # the 2400 steps of `tinycea train`, 50 of them warm-up
warm = 50 / 2400
eta = np.where(s < warm, recipe.lr * s / warm,
               1e-7 + (recipe.lr - 1e-7) * (1 + np.cos(np.pi * (s - warm) / (1 - warm))) / 2)
assert close(eta, [optim.warmup_cosine(progress, warm, recipe.lr) for progress in s])

# %% [markdown]
# ## 4. Overfitting one patch
#
# Before a long run, a short one that must succeed: the same pair of 48 × 48 pixels again and again. The network has more
# parameters than the patch has values, so it can learn them by heart; if the PSNR stalls, something is broken. The second curve
# is another noisy patch of the same scene, which it never trains on.

# %% jupyter={"source_hidden": true}
def rates_of(p):
    """Of each parameter, relative to the schedule's: adapters learn at a tenth."""
    rates = p.zeros_like()
    for name, value in rates.items():
        value[...] = recipe.adapter_lr if name.startswith("adapters.") else 1
    return rates.flat


J = dead_leaves(256, np.random.default_rng(1)).image
I = degradations.noise(J, np.random.default_rng(2))
one, other = ((I[None, y:y + 48, x:x + 48], J[None, y:y + 48, x:x + 48]) for y, x in ((100, 100), (20, 180)))

steps = 250
q = nafnet.init(config, np.random.default_rng(0))
dq, m, v, rates = q.zeros_like(), np.zeros_like(q.flat), np.zeros_like(q.flat), rates_of(q)
heart, unseen = [], []
for step in range(1, steps + 1):
    heart.append(-training.gradient(*one, q, config, cpu, dq))
    if step % 5 == 1:
        unseen.append(training.mean_psnr(*other, q, config, cpu))
    optim.clip_by_norm(dq.flat, 1.0)
    ops.adamw(q.flat, dq.flat, m, v, step, optim.warmup_cosine(step / steps, 0.1, 4e-3) * rates, 0)

figure, axis = plt.subplots(figsize=(7, 2.6))
axis.plot(heart, label="the patch it trains on")
axis.plot(np.arange(0, steps, 5), unseen, label="another patch of the scene")
axis.axhline(psnr(*one), color="0.4", ls=":", label="the noisy input")
axis.set(xlabel="step", ylabel="PSNR (dB)",
         title=f"{q.flat.size} parameters learn one patch of {one[1].size} values by heart, and little for the next")
axis.legend(loc="lower right", bbox_to_anchor=(1, 0.14))
plt.show()
print(f"trained patch: {psnr(*one):.1f} dB noisy, {heart[-1]:.1f} dB in the end; "
      f"other patch: {psnr(*other):.1f} dB noisy, {unseen[-1]:.1f} dB in the end")
assert heart[-1] > heart[0] + 20 and unseen[-1] < psnr(*one) + 12

# %% [markdown]
# ## 5. A short real run
#
# The same step, each time with a new batch. Batch number `step` is a function of the seed and the step alone (its generator is
# `default_rng([seed, BATCHES, step])`), so nothing depends on what was drawn before. The figure is live: run the two cells.

# %% jupyter={"source_hidden": true}
figure, axis = plt.subplots(figsize=(7, 2.6))
dots, = axis.plot([], [], ".", color="0.6", label="one batch")
mean, = axis.plot([], [], label="mean of 25")
axis.set(xlim=(0, recipe.steps), ylim=(12, 26), xlabel="step", ylabel="minus the loss (dB)",
         title="The mean rises slowly under the scatter of the batches")
axis.legend(loc="lower right")
live = display(figure, display_id=True)
plt.close(figure)                                           # or it would be shown a second time


def draw(losses):
    dots.set_data(np.arange(1, len(losses) + 1), -np.array(losses))
    if len(losses) >= 25:
        mean.set_data(np.arange(25, len(losses) + 1), -np.convolve(losses, np.full(25, 1 / 25), "valid"))
    live.update(figure)


# %%
p = nafnet.init(config, np.random.default_rng([recipe.seed, feed.INIT]))
g, m, v = p.zeros_like(), p.zeros_like().flat, p.zeros_like().flat
decay, rates, losses = recipe.decay * optim.decay_mask(p), rates_of(p), []
for step in range(recipe.steps):
    degraded, clean = feed.batch(recipe, step)
    losses.append(training.gradient(degraded, clean, p, config, cpu, g, recipe.floor, training.CARE))
    optim.clip_by_norm(g.flat, recipe.clip)
    rate = optim.warmup_cosine((step + 1) / recipe.steps, recipe.warmup / recipe.steps, recipe.lr)
    ops.adamw(p.flat, g.flat, m, v, step + 1, rate * rates, decay)
    if (step + 1) % 25 == 0:
        draw(losses)
first, last = -np.mean(losses[:25]), -np.mean(losses[-25:])
print(f"mean of the first 25 batches {first:.2f} dB, of the last 25 {last:.2f} dB")
assert last > first + 0.5

# %% [markdown]
# **These ten lines are all of training.** [`train`](../tinycea/training.py) adds what a person wants around them: a process that
# makes the batches ahead, a log, pictures, a table, a way to resume. None of it may change a number: its weights are ours.

# %% jupyter={"source_hidden": true}
# Check: bit for bit.
with tempfile.TemporaryDirectory() as folder:
    training.train(Path(folder) / "run", steps=recipe.steps, scenes=recipe.scenes, chunks=1)
    library, _ = zoo.load_model(Path(folder) / "run" / "model.safetensors")
assert np.array_equal(library.flat, p.flat)

# %% [markdown]
# ## 6. What it is good for
#
# The first picture's photograph, which no run ever trained on, whole, under each degradation: restored by our 200 steps, and by
# the weights in the package, a larger network taught for hours. Where the last column is no higher than the first, these weights
# leave the photograph as it is: a network that is also taught on clean, dark and misty photographs learns when to do nothing.

# %% jupyter={"source_hidden": true}
photo = photographs("test")["chelsea"]
table = {}
print(f"{'PSNR in dB':12s} {'degraded':>10s} {'200 steps':>10s} {'shipped':>10s}")
for entry in degradations.suite(recipe.suite):
    worse = degradations.apply(Scene(photo), entry, np.random.default_rng(0))
    table[entry] = [psnr(image, photo) for image in (worse, restore_rgb(worse, p, config),
                                                     restore_rgb(worse, shipped, shipped_config))]
    print(f"{entry:12s}" + "".join(f" {value:10.2f}" for value in table[entry]))
assert table["noise25"][2] > table["noise25"][0] + 3 and table["noise25"][1] > table["noise25"][0]

# %% [markdown]
# ## Exercises
#
# **1.** Two machines share a batch of 6: each computes the gradient of its 3 images. What must they exchange to take the same
# step as one machine with all 6? Check it. (The solution is folded below; it runs with the notebook.)

# %% jupyter={"source_hidden": true}
# Solution
# The loss is a mean over images, and no op mixes the images of a batch: so the gradient is the mean of the halves' gradients.
# They exchange one flat array (an all-reduce); m, v and w then stay equal on both without being sent.
images = [pixels.astype(np.float64) for pixels in feed.batch(recipe, step=0)]
whole, left, right = (p64.zeros_like() for _ in range(3))
training.gradient(*images, p64, config, cpu, whole)
training.gradient(*(pixels[:3] for pixels in images), p64, config, cpu, left)
training.gradient(*(pixels[3:] for pixels in images), p64, config, cpu, right)
assert np.linalg.norm((left.flat + right.flat) / 2 - whole.flat) < 1e-10 * np.linalg.norm(whole.flat)

# %% [markdown]
# **2.** The older way adds $\lambda w$ to the gradient ("L2"), so that it passes through $m$ and $v$. Take one parameter whose
# gradient is pure noise of standard deviation 100. Run both ways from $w = 1$ and from $w = 0$ with the same noise for 1000 steps
# ($\eta = 10^{-3}$, $\lambda = 0.5$): which share of the initial distance is left, and why?

# %% jupyter={"source_hidden": true}
# Solution
# Decoupled: the update does not depend on w, so the distance shrinks by 1 - lr lambda in each step, whatever the noise.
# L2: lambda w is divided by sqrt(v), about 100, like all of the gradient: the decay is 100 times slower, and slowest for
# the parameters with the largest gradients.
lr, decay, steps, noise = 1e-3, 0.5, 1000, rng.normal(0, 100, 1000)
starts = np.array([1.0, 0.0])                               # two runs at once
decoupled, l2 = starts.copy(), starts.copy()
moments = np.zeros((4, 2))
for step in range(1, steps + 1):
    ops.adamw(decoupled, np.full(2, noise[step - 1]), *moments[:2], step, lr, decay)
    ops.adamw(l2, noise[step - 1] + decay * l2, *moments[2:], step, lr, 0)
left_decoupled, left_l2 = decoupled[0] - decoupled[1], l2[0] - l2[1]
print(f"left: decoupled {left_decoupled:.4f}, L2 {left_l2:.4f}")
assert close(left_decoupled, (1 - lr * decay)**steps) and 0.97 < left_l2 < 1

# %% [markdown]
# **3.** Why is the loss the mean of the logarithms of the MSE, and not the logarithm of the mean? Both give each image a weight,
# $\partial L / \partial \mathrm{MSE}_b$. Compute it for the batch of section 2.

# %% jupyter={"source_hidden": true}
# Solution
# Mean of logs: 10 / (B ln 10 MSE_b), so that a relative change counts alike in every image. Log of the mean:
# 10 / (ln 10 sum MSE), the same for all: times its MSE, an image counts as its share of the sum, printed below, and as the easy
# images get better the worst (haze, low light) take over.
mse = np.mean((yhat - y)**2, axis=(1, 2, 3))
means_of_logs, h = np.empty(B), 1e-6
log_of_mean = means_of_logs.copy()
for b in range(B):
    up, down = (mse * np.where(np.arange(B) == b, 1 + sign * h, 1) for sign in (1, -1))
    means_of_logs[b] = (10 * np.log10(up).mean() - 10 * np.log10(down).mean()) / (2 * h * mse[b])
    log_of_mean[b] = (10 * np.log10(up.mean()) - 10 * np.log10(down.mean())) / (2 * h * mse[b])
assert np.allclose(means_of_logs, 10 / (B * np.log(10) * mse), rtol=1e-6)
assert np.allclose(log_of_mean, 10 / (np.log(10) * mse.sum()), rtol=1e-6)
assert np.allclose(means_of_logs * mse, 10 / (B * np.log(10)), rtol=1e-6)       # weight times MSE: equal shares
print("share of each image in the log of the mean:", (mse / mse.sum()).round(2))

# %% [markdown]
# ## What to read next
#
# - [Notebook 6](06_what_the_maps_say.ipynb): what the CEA layers of a trained network do;
#   [notebook 7](07_how_far_to_believe_a_table.ipynb): how to compare two such runs, and how far to believe it.
# - I. Loshchilov, F. Hutter (2019), "Decoupled weight decay regularization", [arXiv
#   1711.05101](https://arxiv.org/abs/1711.05101): AdamW.
# - L. Chen et al. (2022), "Simple baselines for image restoration", [arXiv 2204.04676](https://arxiv.org/abs/2204.04676): NAFNet.
