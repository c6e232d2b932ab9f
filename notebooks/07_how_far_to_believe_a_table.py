# %% [markdown]
# # 7. How far to believe a table
#
# **Question.** Two rows of a table differ by a tenth of a decibel. Is one network better, or was it lucky?
#
# **You need** variance and covariance; nothing of CEA. **Minutes:** 15.
#
# **The answer**: less far than its intervals say. The picture below makes a world where the truth is known and two networks are
# alike, trains "five seeds", tests on "three photographs", and asks an honest bootstrap for its 95 % interval, again and again.
#
# 1. Runs that differ in nothing but the seed differ in their decibels. Without that spread, a difference means nothing.
# 2. Pairing removes whatever two networks have in common; the identity for the variance of a difference says how much.
# 3. The interval is a bootstrap of ten lines, over seeds and photographs.
# 4. It is too narrow where either are few. How much, we compute where the truth is known, and then lengthen its arms.
#
# The table is that of the comparison which [notebook 8](08_does_it_hold.ipynb) reads. Each line of its file
# ([`data/results.sh`](../data/results.sh)) is one training: one of several *adapters* in the same backbone, on one *suite* of
# degradations, from one seed. It holds the PSNR in dB for each photograph and each *entry* of the suite. With one seed, all
# adapters saw the same batches. Folded cells (click on the three dots) draw pictures and tables, or hold a text's claim.

# %% jupyter={"source_hidden": true}
import os
from functools import partial

os.environ["OPENBLAS_NUM_THREADS"] = "1"                    # before NumPy: as many threads, the same bits

import matplotlib.pyplot as plt
import numpy as np
from workbench import RIVALS, contest

from tinycea.lab import comparison

close = partial(np.allclose, rtol=1e-10, atol=1e-12)
lines, seeds, T = contest()                                 # T: view -> suite -> adapter -> dB (seeds, photographs, entries)
view = next(iter(T))
adapters = (*RIVALS, "cea")
shape = {suite: found["cea"].shape for suite, found in T[view].items()}
print("seeds, photographs, entries:", "; ".join(f"{suite} {S}, {F}, {E}" for suite, (S, F, E) in shape.items()))

draw, worlds = np.random.default_rng(0), 60
tables = draw.normal(size=(worlds, 5, 1)) + draw.normal(size=(worlds, 1, 3))    # parts of the seeds and of the photographs
found = np.array([(table.mean(), *comparison.interval(table)) for table in tables])
missed = (found[:, 1] > 0) | (found[:, 2] < 0)
figure, axis = plt.subplots(figsize=(8, 2.3))
for group, style, text in ((~missed, "oC0", "holds the truth"), (missed, "DC1", "misses it")):
    mean, low, high = found[group].T
    axis.errorbar(np.flatnonzero(group), mean, (mean - low, high - mean), fmt=style[0], color=style[1:], ms=3, label=text)
axis.axhline(0, color="0.3", lw=1, ls="-")
axis.set(xlabel="world", ylabel="difference (dB)", xticks=[], ylim=(-5.5, 3),
         title=f"Of {worlds} intervals that say 95 %, {missed.sum()} miss the truth, 0: {100 * missed.mean():.0f} %, not 5 %")
axis.legend(loc="lower right", ncols=2)
plt.show()

# %% [markdown]
# ## 1. Why one seed proves nothing
#
# A seed decides the initial weights, the drawn scenes and every batch. None of this is part of the question. Each dot is one
# training run, with the mean over the test photographs and entries:

# %% jupyter={"source_hidden": true}
figure, axes = plt.subplots(1, len(seeds), figsize=(2 + 1.9 * len(seeds), 2.6), sharey=True, squeeze=False)
for axis, (suite, found) in zip(axes[0], T[view].items()):
    for place, adapter in enumerate(adapters):
        runs = found[adapter].mean((1, 2))
        axis.plot(runs, np.full(len(runs), place), ".", color="0.5", label="one seed")
        axis.plot(runs.mean(), place, "|", color="C1", ms=12, mew=2, label="mean of the seeds")
    axis.set(title=suite, xlabel="PSNR (dB)", yticks=range(len(adapters)), yticklabels=adapters)
axes[0, 0].invert_yaxis()
figure.legend(*(part[:2] for part in axes[0, 0].get_legend_handles_labels()), loc="outside lower center", ncols=2)
figure.suptitle("Where the dots of two adapters mix, one seed of each tells nothing", fontsize=10)
plt.show()

for suite, found in T[view].items():
    table = np.array([found[adapter].mean((1, 2)) for adapter in adapters])                    # (adapters, seeds)
    place = 1 + (table > table[-1]).sum(0)
    print(f"{suite:10s} spread over seeds {np.sqrt(table.var(1, ddof=1).mean()):.2f} dB, of the adapters' means "
          f"{table.mean(1).std(ddof=1):.2f} dB; CEA's place: {', '.join(map(str, place))}")

# %% [markdown]
# The first two numbers are standard deviations (the spread over seeds as the root of the mean variance). Where they are alike, a
# single seed mostly measures itself. The place is CEA's among all, from each seed alone.
#
# **Pairing.** Some of the scatter is common to all adapters: an easy photograph is easy for everyone, and perhaps a lucky seed is
# lucky for everyone. A difference $a - b$ taken seed by seed, or photograph by photograph, loses the common part:
#
# $$\operatorname{Var}(a - b) = \operatorname{Var} a + \operatorname{Var} b - 2 \operatorname{Cov}(a, b) .$$
#
# Without pairs (the seeds of $a$ in another order than those of $b$) the covariance would be zero. Pairing helps where it is
# positive. With a negative one the paired differences scatter *more*, and then this is the truth about them.

# %%
def pairing(a, b):
    """Standard deviations of a - b: paired, and as if a and b had nothing to do with each other."""
    va, vb, cab = a.var(ddof=1), b.var(ddof=1), np.cov(a, b)[0, 1]
    assert close((a - b).var(ddof=1), va + vb - 2 * cab)
    return np.sqrt((a - b).var(ddof=1)), np.sqrt(va + vb)


# %% jupyter={"source_hidden": true}
print(f"{'rival - CEA':12s}{'over seeds':>22s}{'over photographs':>26s}\n"
      f"{'sd in dB':12s}" + f"{'paired':>12s}{'unpaired':>12s}" * 2)
for suite, found in T[view].items():
    columns = []
    for axis in (0, 1):
        keep = (1 - axis, 2)                                # the mean over all the others
        pairs = [pairing(found[rival].mean(keep), found["cea"].mean(keep)) for rival in RIVALS]
        columns += [np.sqrt(np.mean(np.square(column))) for column in zip(*pairs)]
    print(f"{suite:12s}" + "".join(f"{value:12.3f}" for value in columns))

# %% [markdown]
# The right half is why every test uses the same photographs for all. The left half says what the same batches bought.
#
# ## 2. The bootstrap over seeds and photographs
#
# Let $d_{sf} = \bar T_a[s, f] - \bar T_{\mathrm{CEA}}[s, f]$ be the paired differences, $S$ seeds by $F$ photographs ($\bar T$ is
# the mean over the entries), and $\bar d$ their mean. How far might $\bar d$ be from the mean over *all* seeds and all such
# photographs? The *bootstrap* (Efron 1979) lets the sample stand for the world it came from: draw as many seeds and as many
# photographs anew, with replacement (some twice, others not at all), take the mean, repeat 10000 times. The middle 95 % of these
# means are the interval, all of [`interval`](../tinycea/lab/comparison.py):
#
# $$d^*_b = \frac{1}{SF} \sum_{i=1}^{S} \sum_{j=1}^{F} d_{s_i f_j}, \qquad
# s_i \text{ and } f_j \text{ drawn anew for each } b, \qquad
# \big[\, q_{2.5\%}(d^*),\; q_{97.5\%}(d^*) \,\big] .$$

# %%
suite = list(seeds)[-1]
d = (T[view][suite]["descriptor"] - T[view][suite]["cea"]).mean(-1)       # (seeds, photographs)
S, F = d.shape

draw = np.random.default_rng(0)
drawn_seeds, drawn_photos = draw.integers(S, size=(10_000, S)), draw.integers(F, size=(10_000, F))
means = [d[np.ix_(drawn_seeds[b], drawn_photos[b])].mean() for b in range(10_000)]
ours = np.quantile(means, (0.025, 0.975))
assert close(ours, comparison.interval(d))
print(f"{suite}, descriptor minus CEA: {d.mean():+.3f} dB, 95 % interval [{ours[0]:+.3f}, {ours[1]:+.3f}]")

# %% jupyter={"source_hidden": true}
# Check: a drawing only decides how often each run counts. With v_b the shares of the seeds and w_b those of the photographs, all
# drawings of many tables are one product, v_b^T d w_b.
def shares(n, draws, rng):
    """How much each of n counts in each drawing of n, with replacement: (draws, n), rows that sum to 1."""
    drawn = rng.integers(n, size=(draws, n))
    return (drawn[:, :, None] == np.arange(n)).mean(1)


def intervals(tables, draws=2000):
    """Bootstrap intervals of many tables (E, seeds, photographs) at once: (2, E)."""
    rng = np.random.default_rng(0)
    v, w = (shares(n, draws, rng) for n in tables.shape[1:])
    weights = np.einsum("bs,bf->bsf", v, w).reshape(draws, -1)
    return np.quantile(weights @ tables.reshape(len(tables), -1).T, (0.025, 0.975), axis=0)


assert close(intervals(d[None], 10_000)[:, 0], ours)

# %% [markdown]
# **Why photographs are drawn, and not crops.** Drawing among many crops of few photographs gives pleasantly short intervals, and
# wrong ones: 48 crops of one cat are not 48 pictures of the world. A world where we know the truth: three photographs, each with
# a difference of its own (standard deviation 1 dB) around a true mean of 0, and 48 crops of each that scatter around it by 2 dB.

# %% jupyter={"source_hidden": true}
# Check: drawn as crops, and as photographs.
rng = np.random.default_rng(1)
photo_part, crop_part = rng.normal(0, 1, (1000, 3, 1)), rng.normal(0, 2, (1000, 3, 48))
world = photo_part + crop_part


def coverage(tables, truth=0.0):
    low, high = intervals(tables)
    return np.mean((low <= truth) & (truth <= high))


as_crops = coverage(world.reshape(1000, 1, 144))
as_photos = coverage(world.mean(-1)[:, None])
print(f"how many of 1000 intervals hold the truth: drawing 144 crops {as_crops:.0%}, drawing 3 photographs {as_photos:.0%}")
assert as_crops < as_photos - 0.15 and as_photos < 0.9

# %% [markdown]
# But drawing photographs does not give 95 % either.
#
# ## 3. How often does the interval hold the truth?
#
# **An extreme case by hand.** Let all seeds agree, so that only the photographs are drawn. Of three numbers $d_1 < d_2 < d_3$ the
# drawing $(d_1, d_1, d_1)$ comes up with probability $(1/3)^3$, which is more than 2.5 %. So the "95 %" interval reaches from the
# smallest to the largest of them and no further. If each is as likely above as below the truth $\delta$, independently, the truth
# lies outside only if all three are on one side:
#
# $$\Big(\frac13\Big)^3 = 3.7\,\% > 2.5\,\% \;\Rightarrow\; \big[ d_1, d_3 \big], \qquad
# P\big(d_1 \le \delta \le d_3\big) = 1 - 2 \cdot \Big(\frac12\Big)^3 = 75\,\% .$$

# %% jupyter={"source_hidden": true}
# Check: this case, 2000 times.
only_photos = np.repeat(rng.normal(0, 1, (2000, 1, 3)), 5, 1)       # (experiments, seeds, photographs), all seeds alike
low, high = intervals(only_photos)
assert close(low, only_photos.min((1, 2))) and close(high, only_photos.max((1, 2)))
assert close(comparison.interval(only_photos[0]), (low[0], high[0]))
assert abs(coverage(only_photos) - 0.75) < 0.03

# %% [markdown]
# **A model of the scatter.** In general a difference has a part of the seed, a part of the photograph, and a rest, independent
# with standard deviations $\sigma_\alpha$, $\sigma_\beta$, $\sigma_\varepsilon$:
#
# $$d_{sf} = \delta + \alpha_s + \beta_f + \varepsilon_{sf} .$$
#
# In our lines the variance of the means over the photographs is $\sigma_\alpha^2 + \sigma_\varepsilon^2 / F$, that of the means
# over the seeds $\sigma_\beta^2 + \sigma_\varepsilon^2 / S$, and what is left after taking both off estimates
# $\sigma_\varepsilon^2$: solve for the three (estimates may be negative, which stands for zero). Then draw 2000 tables with these
# spreads and a known truth: how often does the interval hold it? First for 5 seeds, 3 photographs and made-up spreads. The last
# column is the remedy: by what factor the two arms would have to be longer to hold the truth in 95 % of the cases.

# %% jupyter={"source_hidden": true}
# Check: the estimates where the spreads are known; the coverage does not depend on the truth.
def components(d):
    """Estimates of the three variances from tables (..., seeds, photographs)."""
    S, F = d.shape[-2:]
    rest = d - d.mean(-1, keepdims=True) - d.mean(-2, keepdims=True) + d.mean((-2, -1), keepdims=True)
    rest = (rest**2).sum((-2, -1)) / ((S - 1) * (F - 1))
    return np.array([d.mean(-1).var(-1, ddof=1) - rest / F, d.mean(-2).var(-1, ddof=1) - rest / S, rest])


def simulate(sd_seed, sd_photo, sd_rest, S=5, F=3, count=2000, seed=2):
    """Tables (count, S, F) of the model with truth 0."""
    rng = np.random.default_rng(seed)
    parts = (sd_seed, (count, S, 1)), (sd_photo, (count, 1, F)), (sd_rest, (count, S, F))
    return sum(rng.normal(0, sd, shape) for sd, shape in parts)


assert np.allclose(components(simulate(3, 2, 1, count=20_000)).mean(1), (9, 4, 1), rtol=0.05)

differences = {(suite, view): {rival: found[rival] - found["cea"] for rival in RIVALS}
               for view in T for suite, found in T[view].items()}
spread = {}
for case, found in differences.items():
    variances = np.mean([components(table.mean(-1)) for table in found.values()], 0)
    spread[case] = np.sqrt(np.maximum(variances, 0))


def stretch(tables, truth=0.0):
    """The factor on both arms of the intervals that would make 95 % of them hold the truth."""
    mean, (low, high) = tables.mean((1, 2)), intervals(tables)
    arm = np.where(truth < mean, mean - low, high - mean)
    return np.quantile(np.abs(mean - truth) / arm, 0.95)


covered, factor = {}, {}
cases = {"only seeds differ": (1, 0, 0), "only photographs differ": (0, 1, 0), "both differ alike": (1, 1, 0),
         "only a rest": (0, 0, 1)}
print(f"{'standard deviations in dB:':26s}{'seeds':>8s}{'photos':>8s}{'rest':>8s}{'coverage':>10s}{'stretch':>9s}")
for case, sds in (cases | spread).items():
    S, F, _ = shape[case[0]] if case in spread else (5, 3, 1)
    tables = simulate(*sds, S, F)
    covered[case], factor[case] = coverage(tables), stretch(tables)
    print(f"{case if case in cases else ', '.join(case):26s}" + "".join(f"{sd:8.3f}" for sd in sds)
          + f"{covered[case]:10.1%}{factor[case]:9.2f}")
assert all(covered[case] < 0.93 for case in list(cases)[:3])
assert covered["only photographs differ"] < covered["only seeds differ"] < 0.9
assert abs(coverage(2 + simulate(1, 1, 0), 2) - covered["both differ alike"]) < 1e-9        # whatever the truth is

figure, axis = plt.subplots(figsize=(7, 2.6))
numbers = (2, 3, 5, 10, 30, 100)
for case, marker in zip(cases, "osD^"):
    axis.plot(numbers, [coverage(simulate(*cases[case], F=n, count=1000)) for n in numbers], marker=marker, label=case)
axis.axhline(0.95, color="0.4", lw=0.8, ls="-")
axis.set(xlabel="photographs", ylabel="share that holds the truth", xscale="log", xticks=numbers, xticklabels=numbers,
         title="With 5 seeds, more photographs cure what photographs scatter, and no more")
axis.minorticks_off()
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# **Why.** The expected variance of the drawings can be computed. A share $v_s$ in a drawing of $S$ has $\mathbb E \sum_s v_s^2 =
# (2 - \frac1S)/S$, where equal shares would have $1/S$. Put into $d^* = v^\top d\, w$, next to the true variance of the mean:
#
# $$\begin{aligned}
# \operatorname{Var} \bar d &= \frac{\sigma_\alpha^2}{S} + \frac{\sigma_\beta^2}{F} + \frac{\sigma_\varepsilon^2}{SF}, \\
# \mathbb E \operatorname{Var} d^* &= \Big(1 - \frac1S\Big) \frac{\sigma_\alpha^2}{S} +
# \Big(1 - \frac1F\Big) \frac{\sigma_\beta^2}{F}
# + \Big[ \Big(2 - \frac1S\Big) \Big(2 - \frac1F\Big) - 1 \Big] \frac{\sigma_\varepsilon^2}{SF} .
# \end{aligned}$$
#
# For 5 and 3 the three factors are $\frac45$, $\frac23$ and 2: too little of the seeds, still less of the photographs, and twice
# the rest, which is drawn once with the seeds and once more with the photographs (Owen 2007).

# %% jupyter={"source_hidden": true}
# Check: the three factors, and both variances in simulation.
S, F = 5, 3
rng = np.random.default_rng(5)
v, w = shares(S, 2000, rng), shares(F, 2000, rng)
assert np.isclose((v**2).sum(1).mean(), (2 - 1 / S) / S, rtol=0.02)
factors = 1 - 1 / S, 1 - 1 / F, (2 - 1 / S) * (2 - 1 / F) - 1
assert close(factors, (4 / 5, 2 / 3, 2))
for i, true in enumerate((1 / S, 1 / F, 1 / (S * F))):
    tables = simulate(*np.eye(3)[i])
    drawn = np.einsum("bs,esf,bf->eb", v, tables, w, optimize=True)
    assert np.isclose(drawn.var(1).mean(), factors[i] * true, rtol=0.05)
    assert np.isclose(tables.mean((1, 2)).var(), true, rtol=0.1)

# %% [markdown]
# And even with the right variance the quantiles would be too close, since the variance of so few is itself a guess. Two limits
# remain that no formula mends: the spreads put in were estimated from the same few runs, and the test photographs were not drawn
# at random from anything.
#
# ## 4. What that leaves of the table
#
# If the interval of a difference holds 0, these runs do not tell who is ahead. Count the rest twice, with the intervals as they
# are, and with both arms stretched by the factor of section 3 for the suite and the view (never shortened). What the table says,
# with these doubts in mind, is [notebook 8](08_does_it_hold.ipynb).

# %% jupyter={"source_hidden": true}
def decided(found, longer=1.0):
    """How many rivals are behind CEA, ahead of it, or neither, by intervals with arms so many times longer."""
    signs = []
    for table in found.values():
        mean, (low, high) = table.mean(), comparison.interval(table.mean(-1))
        low, high = mean - longer * (mean - low), mean + longer * (high - mean)
        signs.append(0 if low <= 0 <= high else np.sign(mean))
    return " / ".join(str(signs.count(sign)) for sign in (-1, 1, 0))


print(f"of {len(RIVALS)} rivals: behind CEA / ahead of CEA / undecided\n{'':12s}"
      + "".join(f"{name:>13s}{'stretched':>13s}" for name in T))
for suite in seeds:
    print(f"{suite:12s}" + "".join(f"{decided(found):>13s}{decided(found, max(1, factor[case])):>13s}"
                                   for case, found in differences.items() if case[0] == suite))

# %% [markdown]
# ## Exercises
#
# **1.** Someone lost the pairing and bootstraps each adapter's table by itself, with seeds and photographs of its own. How much
# wider is the interval of the difference, for each suite? What did the pairing buy? (The solution is folded below; it runs with
# the notebook.)

# %% jupyter={"source_hidden": true}
# Solution
# The unpaired interval keeps what all adapters have in common: above all how hard each photograph is.
draw = np.random.default_rng(4)
for suite, found in T[view].items():
    ratios = []
    for rival in RIVALS:
        drawn = []
        for adapter in (rival, "cea"):
            table = found[adapter].mean(-1)
            v, w = (shares(n, 10_000, draw) for n in table.shape)
            drawn.append(np.einsum("bs,sf,bf->b", v, table, w))
        unpaired = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
        ratios.append(np.ptp(unpaired) / np.ptp(comparison.interval((found[rival] - found["cea"]).mean(-1))))
    print(f"{suite:10s} the unpaired interval is {np.median(ratios):.1f} times as wide (median of {len(ratios)} rivals)")
    assert np.median(ratios) > 1

# %% [markdown]
# **2.** Eight adapters that are all equally good: their tables differ by chance alone. How often does at least one of seven look
# "significantly" different from the eighth, and how often does the one that happens to be the best look better than the worst?
# Simulate, with one spread for all and a photograph part that every adapter has for itself.

# %% jupyter={"source_hidden": true}
# Solution
# One rival fixed beforehand is the coverage of section 3 again. Seven looks find something several times as often, and the best
# against the worst is the most extreme of 28 pairs, chosen after looking. "The best of eight" needs new data, or wider intervals.
tables = np.stack([simulate(1, 1, 1, count=1000, seed=10 + i) for i in range(8)], 1)      # (experiments, 8, 5, 3)
outside = []
for rival in range(7):
    low, high = intervals(tables[:, rival] - tables[:, 7], 1000)
    outside.append((low > 0) | (high < 0))
means, everyone = tables.mean((2, 3)), np.arange(1000)
low, high = intervals(tables[everyone, means.argmax(1)] - tables[everyone, means.argmin(1)], 1000)
one, any_of_seven, best = np.mean(outside[0]), np.mean(np.any(outside, 0)), np.mean(low > 0)
print(f"one rival fixed beforehand {one:.0%}, any of seven {any_of_seven:.0%}, best against worst {best:.0%} of 1000 times")
assert 0.05 < one < any_of_seven < best

# %% [markdown]
# **3.** Many papers give an interval over seeds alone, on a fixed test set. How wide is it compared with the one over seeds and
# photographs, in the lines and in coverage? What question does it answer?

# %% jupyter={"source_hidden": true}
# Solution
# It answers: what would other seeds give on these photographs? For that its truth is the mean over these photographs,
# and it is right not to draw them. For the question of other photographs it is too narrow.
for suite in seeds:
    tables = [table.mean(-1) for table in differences[suite, view].values()]
    both = [np.ptp(comparison.interval(table)) for table in tables]
    alone = [np.ptp(comparison.interval(table.mean(1, keepdims=True))) for table in tables]
    print(f"{suite:10s} seeds alone: {np.median(np.divide(alone, both)):.2f} times the width (median)")
tables = simulate(1, 1, 0)
alone, both = coverage(tables.mean(2, keepdims=True)), covered["both differ alike"]
print(f"coverage of the truth about all photographs, spreads alike: seeds alone {alone:.0%}, seeds and photographs {both:.0%}")
assert alone < both - 0.05

# %% [markdown]
# ## What to read next
#
# - [Notebook 8](08_does_it_hold.ipynb): what the table says.
# - B. Efron (1979), "Bootstrap methods: another look at the jackknife".
# - A. Owen (2007), "The pigeonhole bootstrap", *Annals of Applied Statistics* 1: rows and columns drawn at once.
