# %% [markdown]
# # 6. What the maps say, and what an image would lose without them
#
# **Question.** CEA's argument is that each token takes its mix of residuals by its own affinities $s_{nr}$, so that regions of a
# photograph may be treated differently. Drawn as images, the affinities look like an explanation. Are they one?
#
# **You need** CEA ([notebook 2](02_hyper_adapter.ipynb)), variance, least squares. **Minutes:** 15.
#
# **The answer**, in the picture below: what maps show is one thing, what the photograph loses without them another. Both can be
# measured, and only the second says what the network uses. (Right: a detail; the PSNR is of the whole.)
#
# 1. The layer's output does not depend on the sign of the maps, nor on their basis.
# 2. A map that follows the regions is no finding until it is held against the clean photograph, and against random directions in
#    the same features.
# 3. Give every token the mean affinities: what is lost then is what they were worth.
#
# Every number is computed from the weights in the package. Folded cells (click on the three dots) draw pictures, or hold a text's
# claim.

# %% jupyter={"source_hidden": true}
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

os.environ["OPENBLAS_NUM_THREADS"] = "1"                    # before NumPy: as many threads, the same bits

import matplotlib.pyplot as plt
import numpy as np
from scipy.linalg import subspace_angles
from scipy.ndimage import uniform_filter
from workbench import jpeg, regions

from tinycea import ablations, degradations, evaluation, nafnet, zoo
from tinycea.ops import cpu
from tinycea.ops import reference as ops
from tinycea.params import under
from tinycea.plots import show
from tinycea.restoration import restore_rgb
from tinycea.scenes import Scene, photographs

rng = np.random.default_rng(0)
close = partial(np.allclose, rtol=1e-10, atol=1e-12)

p, config = zoo.load_model(zoo.WEIGHTS)
stage, m = config.adapted()[-1], config.multiple()          # of the last CEA layer; images are padded to multiples of m
pixels = config.unshuffle * config.stages()[stage][0] // config.width           # one of its tokens is so many pixels wide
R, NAMES = config.adapter.rank, ("noise25", "rain", "blur")


def look(image):
    """Tokens (h,w,C) and affinities (h,w,R) of the last CEA layer, and its A (R,C)."""
    layer = nafnet.anatomies(nafnet.centered(image[None], p, config, cpu)[1])[stage]
    (h, w), width = (n // pixels for n in image.shape[:2]), -(-image.shape[1] // m) * m // pixels
    tokens, S = (layer[name].reshape(-1, width, layer[name].shape[-1])[:h, :w].astype(float) for name in ("tokens", "S"))
    return tokens, S, layer["A"][0]


def region(mask):
    """The number of each token's region (h,w)."""
    h, w = (n // pixels for n in mask.shape[:2])
    return mask.argmax(-1)[::pixels, ::pixels][:h, :w]


def changed(change):
    """The CPU's ops, but change(A, U) is done to the factors of every CEA layer."""
    return SimpleNamespace(**vars(cpu) | {"assembly": lambda x, tokens, A, U: cpu.assembly(x, tokens, *change(A, U))})


averaged = replace(config, adapter=replace(config.adapter, level="image"))      # section 3
variants = {"as trained": (config, cpu), "affinities averaged": (averaged, cpu),
            "no update": (config, changed(lambda A, U: (A, 0 * U)))}

patchworks = []                                             # of each photograph, two drawings of the regions
for title, photo in photographs("test").items():
    for seed in (0, 1):
        image, mask, _ = degradations.patchwork(Scene(photo), np.random.default_rng(seed), NAMES)
        patchworks.append((f"{title} {seed}", image, mask, photo))
_, image, mask, clean = patchworks[-2]
S = look(image)[1]
restored = {name: restore_rgb(image, p, *variant) for name, variant in variants.items()}
dB = {name: evaluation.psnr(y, clean) for name, y in restored.items()}

# %% jupyter={"source_hidden": true}
limit, maps = np.quantile(np.abs(S), 0.99), min(R, 8)
figure, axes = plt.subplots(2, 3 + maps // 2, figsize=(9, 2.9))
show(axes[0, 0], image, "degraded", f"{evaluation.psnr(image, clean):.1f} dB")
regions(axes[1, 0], mask, NAMES)
for r, axis in enumerate(axes[:, 1:-2].flat):
    show(axis, S[..., r], f"r = {r + 1}", cmap="PuOr", vmin=-limit, vmax=limit)
figure.colorbar(axes[0, 1].images[0], ax=axes[:, 1:-2], label="affinity s", shrink=0.8)
for axis, name in zip(axes[:, -2:].flat, variants):
    show(axis, restored[name][150:230, 120:240], name.removeprefix("affinities "), f"{dB[name]:.1f} dB")
show(axes[1, -1], clean[150:230, 120:240], "clean", "a detail")
for axis in axes.flat:
    axis.grid(False)
figure.suptitle("Maps look like an explanation; what this photograph loses if each is averaged is another matter: "
                f"{dB['as trained'] - dB['affinities averaged']:.1f} dB", fontsize=10)
jpeg(figure)

# %% [markdown]
# ## 1. A map has no sign and no name
#
# Orange is negative, white zero, violet positive. Negate $W_A$ and $W_U$: then $A$ and $U$ change their signs, $S$ does, and the
# product does not. More generally, any invertible $G$ of $R \times R$ numbers can be put between the factors
# ([notebook 3](03_linear_attention.ipynb)):
#
# $$X (-A)^\top (-U) = X A^\top U, \qquad X (G A)^\top (G^{-\top} U) = X A^\top U .$$
#
# So the maps are one basis of a space: only what is true of the whole space is a finding, and no component is an expert for rain.
# (The layer's $A$ and $U$ share $Z$, which fixes their basis up to order and one sign; but nothing in the training asks for a
# basis that means something.)

# %%
G = np.linalg.qr(rng.normal(size=(R, R)))[0].astype(np.float32)                 # orthogonal: its inverse transposed is itself
for change in (lambda A, U: (-A, -U), lambda A, U: (G @ A, G @ U)):
    assert np.allclose(restore_rgb(image, p, config, changed(change)), restored["as trained"], atol=1e-4)

# %% [markdown]
# ## 2. Do the maps know the regions?
#
# **One by one.** For each $r$ take the share of the map's variance that lies *between* the regions $k$ (with $N_k$ tokens of mean
# $\mu_{kr}$):
#
# $$\eta_r^2 = \frac{\sum_k N_k\, (\mu_{kr} - \mu_r)^2}{\sum_n (s_{nr} - \mu_r)^2} .$$
#
# It is 0 if all regions have the same mean and 1 if a map is constant in each. The control is the clean photograph with the same
# regions: whatever is seen there is the scene, not the degradation.

# %%
def between(maps, label):
    """Share of each map's variance that lies between the regions."""
    maps, label = maps.reshape(-1, maps.shape[-1]), label.ravel()
    mean = maps.mean(0)
    parts = [np.sum(label == k) * (maps[label == k].mean(0) - mean)**2 for k in range(label.max() + 1)]
    return sum(parts) / np.sum((maps - mean)**2, 0)


# %% jupyter={"source_hidden": true}
label, S_clean = region(mask), look(clean)[1]
eta, control = between(S, label), between(S_clean, label)
figure, axis = plt.subplots(figsize=(7, 1.9))
axis.bar(np.arange(1, R + 1) - 0.2, eta, 0.4, label="degraded in regions")
axis.bar(np.arange(1, R + 1) + 0.2, control, 0.4, color="0.7", label="the clean photograph")
axis.set(xlabel="r", ylabel="share between", xticks=range(1, R + 1), ylim=(0, 1.5 * max(*eta, *control)),
         title="Only what a blue bar has above its gray one can be the degradation")
axis.legend(loc="upper right", ncols=2)
plt.show()

# %% [markdown]
# **All together.** Bars belong to a basis. So fit a linear classifier by least squares (one column per region, 1 inside and 0
# outside) in half of the image, and test it in the other half; to it, $S$ and $S G$ are the same. The halves are blocks of 24 ×
# 24 tokens like a chessboard, and no window reaches across a border. It reads one token, or the mean of 9 × 9:
#
# $$\overline S = \frac{\overline{X} A^\top}{\sqrt C} .$$
#
# Averages too are a view of $C$ features from $R$ directions. So the affinities compete with $R$ random directions, with all of
# $X$, and with the clean photograph's affinities, from which a classifier can only learn what is usually where.

# %% jupyter={"source_hidden": true}
def window(maps):
    return uniform_filter(maps, (9, 9, 1))


def accuracy(maps, label, block=24, reach=4):
    """Share of the test blocks' tokens whose region a linear classifier, fitted in the other blocks, names."""
    y, x = np.mgrid[reach:len(label) - reach:3, reach:label.shape[1] - reach:3]
    inner = [(i % block >= reach) & (i % block < block - reach) for i in (y, x)]
    X, region = np.concatenate((maps[y, x], np.ones((*y.shape, 1))), -1), label[y, x]
    fit, test = (inner[0] & inner[1] & ((y // block + x // block) % 2 == half) for half in (0, 1))
    W = np.linalg.lstsq(X[fit], np.eye(len(NAMES))[region[fit]], rcond=None)[0]
    return np.mean((X[test] @ W).argmax(1) == region[test])


tokens, S, A = look(image)
C = tokens.shape[-1]
assert np.allclose(window(S), window(tokens) @ A.T / np.sqrt(C), atol=1e-4)
assert abs(accuracy(S @ G, label) - accuracy(S, label)) < 0.005

found, scores = [(*look(image)[:2], look(clean)[1], region(mask)) for _, image, mask, clean in patchworks], {}
for size, averages in (("one token", lambda maps: maps), ("mean of 9 × 9 tokens", window)):
    rows = []
    for tokens, S_image, S_clean, label in found:
        X = averages(tokens)
        chance = [accuracy(X @ rng.normal(size=(C, R)), label) for _ in range(20)]
        rows.append((accuracy(averages(S_image), label), np.mean(chance), accuracy(X, label),
                     accuracy(averages(S_clean), label), min(chance), max(chance)))
    scores[size] = np.array(rows)
    affinities, directions, everything, control, low, high = scores[size].mean(0)
    print(f"{size}: affinities {affinities:.1%}, {R} random directions {low:.1%} to {high:.1%}, all {C} features "
          f"{everything:.1%}, clean {control:.1%}")

figure, axes = plt.subplots(1, 2, figsize=(8, 2.5), sharey=True)
for axis, (size, rows) in zip(axes, scores.items()):
    place = np.arange(1, len(rows) + 1)
    axis.errorbar(place, rows[:, 1], (rows[:, 1] - rows[:, 4], rows[:, 5] - rows[:, 1]), fmt="s", mfc="white",
                  ms=4, label=f"{R} random directions\n(mean and range of 20)")
    for column, shift, marker, text in ((0, -0.25, "o", f"the {R} affinities"), (2, 0.25, "^", f"all {C} features"),
                                        (3, 0, "x", "affinities of\nthe clean photo")):
        axis.plot(place + shift, rows[:, column], ls="", marker=marker, ms=5, label=text)
    axis.axhline(1 / len(NAMES), color="0.4", ls=":", label="guessing")
    axis.set(title=size, xlabel="patchwork", xticks=place, ylim=(0.25, 1.02))
axes[0].set_ylabel("share of tokens told right")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
figure.suptitle("A map is telling only as far as it exceeds the white squares and the crosses", fontsize=10)
plt.show()

# %% [markdown]
# **How to read this.** Affinities above the crosses: the degradation is in them, not only the place. (The crosses lie above
# guessing, since a region may hold most of the table or the fur.) Affinities above the range of the random directions: the layer
# chose its directions to tell degradations apart. Within the range: the *features* know the degradation, and a map of almost any
# direction in them would look telling. Either way, nothing here says that the network *uses* it.
#
# ## 3. Taking the affinities away
#
# Replace each token's affinities by their mean over the image, $\bar s_r = \frac1N \sum_n s_{nr}$, with all weights as they are
# (`level="image"`). The update is linear in $S$, so every token then gets the mean of all updates; the layer becomes a shift of
# the image's channels:
#
# $$y_n = x_n + \frac{1}{\sqrt R} \sum_r \bar s_r\, u_r = x_n + \frac1N \sum_m (y^{\text{token}}_m - x_m) .$$
#
# For scale, the layers can also be silenced, $U = 0$, so that no token gets anything. PSNR of whole images, and of each region,
# against the layers as trained:

# %% jupyter={"source_hidden": true}
# Check: with averaged affinities every token gets the mean of all updates; the parameters are the same, read otherwise.
layer = {name: value.astype(np.float64) for name, value in under(p, f"adapters.{stage}").items()}
x = np.random.default_rng(3).normal(size=(1, 9, 11, C))
y_token, y_image = (ablations.forward(x, layer, which.adapter, ops)[0] for which in (config, averaged))
update = (y_token - x).mean((1, 2), keepdims=True)
assert close(y_image, x + update) and np.abs(y_token - x - update).max() > 1e-3
assert nafnet.shapes(averaged) == nafnet.shapes(config)

table, by_region = [], []
for _, image, mask, clean in patchworks:
    outputs = [restore_rgb(image, p, *variant) for variant in variants.values()]
    table.append([evaluation.psnr(y, clean) for y in outputs])
    by_region.append([[evaluation.psnr(y[mask.argmax(-1) == k], clean[mask.argmax(-1) == k]) for k in range(len(NAMES))]
                      for y in outputs])
table, by_region = np.array(table), np.array(by_region)
for i, name in list(enumerate(variants))[1:]:
    lost, parts = table[:, i] - table[:, 0], (by_region[:, i] - by_region[:, 0]).mean(0)
    print(f"{name}: {lost.mean():+.2f} dB, from {lost.min():+.2f} to {lost.max():+.2f}; by region "
          + ", ".join(f"{part} {value:+.2f}" for part, value in zip(NAMES, parts)))

# %% [markdown]
# What is lost is how much *these* weights rely on the layer. It does not say that a network trained without would be worse: that
# one would have arranged itself. The fair contest is between trained networks ([notebook 8](08_does_it_hold.ipynb)). These are a
# few patchworks, one set of weights and, for the maps, its last layer: enough to distrust a pretty map, too little for a law.

# %% [markdown]
# ## Exercises
#
# **1.** Which combination of maps follows the regions most, and how large is its $\eta^2$? Do $R$ random directions have one as
# good? (Two subspaces, and the angle between them. The solution is folded below; it runs with the notebook.)

# %% jupyter={"source_hidden": true}
# Solution
# Centered, the share of a combination's variance between regions is the squared cosine of its angle to the span of the regions'
# indicators. The best combination has the smallest angle between both spaces, and no change of basis moves it.
def best(maps, label):
    maps, inside = maps.reshape(label.size, -1), np.eye(len(NAMES))[label.ravel()]
    return np.cos(subspace_angles(maps - maps.mean(0), inside - inside.mean(0)).min())**2


_, image, mask, clean = patchworks[-2]                      # the first picture's
(tokens, S, _), label = look(image), region(mask)
at_random = [best(tokens @ rng.normal(size=(C, R)), label) for _ in range(5)]
print(f"largest bar {eta.max():.2f}, best combination {best(S, label):.2f}; of {R} random directions {np.mean(at_random):.2f}, "
      f"of the clean photograph's maps {best(S_clean, label):.2f}")
assert best(S, label) >= eta.max() - 1e-9 and np.isclose(best(S @ G, label), best(S, label))

# %% [markdown]
# **2.** Give each token the affinities of the token half an image away. How far are those from its own, compared with the image's
# mean, in squares? Predict it for two tokens that have nothing in common, then measure; and which costs the photograph more?

# %% jupyter={"source_hidden": true}
# Solution
# E |s - s'|^2 = 2 Var s (1 - their correlation): twice as far, in squares, where they have nothing in common.
flat = S.reshape(-1, R)
other, centered = np.roll(flat, len(flat) // 2, 0), flat - flat.mean(0)
ratio = np.sum((flat - other)**2) / np.sum(centered**2)
correlation = np.sum(centered * (other - flat.mean(0))) / np.sum(centered**2)
rolled = SimpleNamespace(**vars(cpu) | {"assembly": lambda x, tokens, A, U: cpu.assembly(
    x, np.roll(tokens, tokens.shape[1] // 2, 1), A, U)})
wrong = evaluation.psnr(restore_rgb(image, p, config, rolled), clean)
print(f"{ratio:.2f} times as far; " + ", ".join(f"{name} {value:.1f} dB" for name, value in (dB | {"rolled": wrong}).items()))
assert close(ratio, 2 * (1 - correlation))

# %% [markdown]
# **3.** Which component matters most? Silence one at a time in all layers and note what the photograph loses. Then mix the
# components by the orthogonal $G$ of section 1 and do it again. What have you learned about component 1?

# %% jupyter={"source_hidden": true}
# Solution
# Nothing: mixed, the layers do the same and the losses are others. What all components lose together is the layers' alone.
part, truth = image[:192, :192], clean[:192, :192]


def psnr_of(silent, mix):
    keep = np.float32(~np.isin(np.arange(R), silent))[:, None]
    return evaluation.psnr(restore_rgb(part, p, config, changed(lambda A, U: (mix @ A, keep * (mix @ U)))), truth)


losses = {}
for name, mix in (("as trained", np.eye(R, dtype=np.float32)), ("mixed", G)):
    losses[name] = [psnr_of([], mix) - psnr_of(silent, mix) for silent in (*range(R), range(R))]
    print(f"{name:10s} one by one " + " ".join(f"{dB:5.2f}" for dB in losses[name][:-1]) + f"   all {losses[name][-1]:.2f} dB")
assert np.isclose(losses["as trained"][-1], losses["mixed"][-1], atol=0.01)
assert not np.allclose(losses["as trained"][:-1], losses["mixed"][:-1], atol=0.01)

# %% [markdown]
# ## What to read next
#
# - [Notebook 7](07_how_far_to_believe_a_table.ipynb): how far to believe a difference in decibels.
# - `tinycea explain` makes [a page](../data/explain.html) of any photograph's maps, where a click silences one.
# - S. Jain, B. Wallace (2019), "Attention is not explanation", [arXiv 1902.10186](https://arxiv.org/abs/1902.10186); S.
#   Wiegreffe, Y. Pinter (2019), "Attention is not not explanation", [arXiv 1908.04626](https://arxiv.org/abs/1908.04626).
