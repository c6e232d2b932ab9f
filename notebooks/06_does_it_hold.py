# %% [markdown]
# # 6. Does it hold? A comparison, and how much of it is chance
#
# **Question.** The paper ([arXiv 2605.06127](https://arxiv.org/abs/2605.06127)) claims that Continuous Expert Assembly (CEA)
# beats prompts, descriptors and routed experts on average, and most clearly where degradations vary over the image or are
# composed. Its networks are large and its pictures real. Does the claim hold for toys: networks of 74 thousand parameters, and
# degradations that are formulas? And how could anyone tell?
#
# **You need** variance and covariance; CEA ([notebook 2](02_hyper_adapter.ipynb)) only in section 7. **Minutes:** 30.
#
# **The answer**, in the picture below: on these four suites it does not. CEA in its first form is behind every rival in the mean,
# often by less than the runs can tell. Where amounts of something unknown vary over the image it does: see
# [what the layer is for](../data/README.md).
#
# 1. Runs that differ in nothing but the seed differ in their decibels. Without that spread, a difference means nothing.
# 2. Pairing removes whatever two adapters have in common; the identity for the variance of a difference says how much.
# 3. The intervals of the table are a bootstrap of ten lines, over seeds and photographs.
# 4. Those intervals are too narrow: of five seeds and three photographs they cover the truth less often than 95 %. How often, we
#    compute where the truth is known.
# 5. A run is a function of its recipe: trained again, in other company, it gives the same decibels to the last digit.
# 6. What affinity maps show is one thing, what the network would lose without them another, and the second can be measured.
#
# Every number about the adapters is computed from the file of results. Folded cells (click on the three dots) draw pictures and
# tables, or hold a text's claim.

# %% jupyter={"source_hidden": true}
import os
import tempfile
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"                    # before NumPy: as many threads, the same bits

import matplotlib.pyplot as plt
import numpy as np

from tinycea import ablations, degradations, evaluation, nafnet, training, zoo
from tinycea.lab import comparison, instruments
from tinycea.ops import cpu
from tinycea.ops import reference as ops
from tinycea.params import under
from tinycea.restoration import restore_rgb
from tinycea.scenes import Scene, photographs

close = partial(np.allclose, rtol=1e-10, atol=1e-12)

lines = [line for line in comparison.finished("../data/results/headline") if line["recipe"].get("steps") in (1000, None)]


def finished_seeds(suite):
    """The seeds that every adapter has finished."""
    have = {adapter: set() for adapter in comparison.HEADLINE}
    for recipe in (line["recipe"] for line in lines):
        if recipe["suite"] == suite and recipe["adapter"] in have:
            have[recipe["adapter"]].add(recipe["seed"])
    return sorted(set.intersection(*have.values()))


seeds = {suite: found for suite in comparison.SUITES if len(found := finished_seeds(suite)) > 1}
known = (*comparison.HEADLINE, "degraded", *comparison.CLASSICAL)
main = [line for line in lines if line["recipe"]["suite"] in seeds and line["recipe"]["adapter"] in known
        and line["recipe"].get("seed") in (None, *seeds[line["recipe"]["suite"]])]
results = {view: comparison.rows(main, view) for view in evaluation.VIEWS}
print(f"{len(lines)} lines, {len(main)} of them used here; seeds:",
      "; ".join(f"{suite} {', '.join(map(str, found))}" for suite, found in seeds.items()))
by_view = {view: {(row["suite"], row["adapter"]): row for row in found} for view, found in results.items()}
rivals = [adapter for adapter in comparison.HEADLINE if adapter != "cea"]

figure, axes = plt.subplots(1, len(seeds), figsize=(2 + 1.9 * len(seeds), 3.4), sharey=True, squeeze=False)
for axis, suite in zip(axes[0], seeds):
    for view, shift, style in (("photographs", -0.15, "oC0"), ("crops", 0.15, "sC1")):
        found = np.array([by_view[view][suite, rival]["minus_cea"]["all"] for rival in rivals])
        arms = np.abs(found[:, 1:] - found[:, :1]).T
        axis.errorbar(found[:, 0], np.arange(len(rivals)) + shift, xerr=arms, fmt=style[0], color=style[1:], ms=4, capsize=2,
                      label=f"{view} (95 % bootstrap)")
    axis.axvline(0, color="0.3", lw=1, ls="-")
    axis.set(title=suite, xlabel="PSNR minus CEA's (dB)", yticks=range(len(rivals)), yticklabels=rivals)
axes[0, 0].invert_yaxis()
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
figure.suptitle("Right of the line the rival is ahead of CEA: in the mean, on every suite", fontsize=10)
plt.show()

leads = [by_view["photographs"][suite, rival]["minus_cea"]["all"][0] for suite in seeds for rival in rivals]
print(f"on whole photographs the rivals are ahead of CEA by {min(leads):.2f} to {max(leads):.2f} dB")
assert min(leads) > 0

# %% [markdown]
# ## 1. The lines
#
# What was done ([`compare`](../tinycea/lab/comparison.py), [`data/results.sh`](../data/results.sh)): each of eight adapters was
# put into the same backbone and trained on each of four suites of degradations with five seeds. With one seed, all adapters saw
# the very same batches. The rates of learning were chosen on the validation photographs; the three test photographs were looked
# at only to fill the table, and nothing was chosen by them.
#
# Each finished run is one line of `data/results/headline/runs.jsonl`: its recipe, what the network costs, and for each test
# photograph and each *entry* of the suite (a degradation, or several at once) the mean PSNR in dB over several random draws, for
# two *views*: whole photographs, and crops of 96 × 96 pixels. Lines without a network belong to the degraded input and to two
# classical restorers. Only the seeds that all eight adapters have finished count here.
#
# As arrays $T_a$ of decibels, with a row per seed $s$, a column per photograph $f$ and a layer per entry $e$; $\bar T_a$ is their
# mean over the entries. And the fairness of the contest, as far as it can be read off the lines:
#
# $$\left| \frac{\text{parameters of } a}{\text{parameters of CEA}} - 1 \right| \le 0.05 .$$

# %%
def arrays(view):
    """suite -> adapter -> PSNR in dB (seeds, photographs, entries)."""
    found = defaultdict(lambda: defaultdict(dict))
    for line in main:
        if "seed" in line["recipe"]:
            found[line["recipe"]["suite"]][line["recipe"]["adapter"]][line["recipe"]["seed"]] = comparison.matrix(line, view)
    return {suite: {adapter: np.array([found[suite][adapter][seed] for seed in seeds[suite]])
                    for adapter in comparison.HEADLINE} for suite in seeds}


T = {view: arrays(view) for view in evaluation.VIEWS}
photos = list(photographs("test"))
entries = {suite: degradations.suite(suite) for suite in seeds}

size = {line["recipe"]["adapter"]: line["parameters"] for line in main if "parameters" in line}
for adapter in comparison.HEADLINE:
    print(f"{adapter:14s} {size[adapter]:6d} parameters, {size[adapter] / size['cea'] - 1:+.1%}")
    assert abs(size[adapter] / size["cea"] - 1) <= 0.05

# %% [markdown]
# Who is who (all but the first follow the same three stages of the network): `wider` has no adapter and a wider backbone instead;
# `static` adds a low-rank map, the same for all images; `mlp` a small network per token; `descriptor` scales and shifts the
# channels by one vector per image; `prompt` mixes learned prompts; `experts-image` and `experts-token` route an image, or each
# token, to a few of several learned experts; `cea` is [notebook 2](02_hyper_adapter.ipynb). The definitions are in
# [`adapters.py`](../tinycea/adapters.py).
#
# ## 2. Why one seed proves nothing
#
# A seed decides the initial weights, the drawn scenes and every batch. None of this is part of the question. Each dot is one
# training run, with the mean over the test photographs and entries:

# %% jupyter={"source_hidden": true}
figure, axes = plt.subplots(1, len(seeds), figsize=(2 + 1.9 * len(seeds), 3.2), sharey=True, squeeze=False)
for axis, (suite, found) in zip(axes[0], T["photographs"].items()):
    for place, adapter in enumerate(comparison.HEADLINE):
        runs = found[adapter].mean((1, 2))
        axis.plot(runs, np.full(len(runs), place), ".", color="0.5", label="one seed")
        axis.plot(runs.mean(), place, "|", color="C1", ms=12, mew=2, label="mean of the seeds")
    axis.set(title=suite, xlabel="PSNR (dB)", yticks=range(len(comparison.HEADLINE)), yticklabels=comparison.HEADLINE)
axes[0, 0].invert_yaxis()
figure.legend(*(part[:2] for part in axes[0, 0].get_legend_handles_labels()), loc="outside lower center", ncols=2)
figure.suptitle("A seed alone moves an adapter past its neighbors", fontsize=10)
plt.show()

for suite, found in T["photographs"].items():
    table = np.array([found[adapter].mean((1, 2)) for adapter in comparison.HEADLINE])         # (adapters, seeds)
    place = 1 + (table > table[comparison.HEADLINE.index("cea")]).sum(0)
    best = [comparison.HEADLINE[i] for i in table.argmax(0)]
    print(f"{suite:10s} spread over seeds {np.sqrt(table.var(1, ddof=1).mean()):.2f} dB, of the adapters' means "
          f"{table.mean(1).std(ddof=1):.2f} dB; CEA's place: {', '.join(map(str, place))}; the best: {', '.join(best)}")

# %% [markdown]
# The first two numbers are standard deviations (the spread over seeds as the root of the mean variance). Where they are alike, a
# single seed mostly measures itself. The place is CEA's among the eight, from each seed alone. If it jumps, or the winners
# change, one seed would have told a story that the next one takes back.
#
# **Pairing.** Some of the scatter is common to all adapters: an easy photograph is easy for everyone, and perhaps a lucky seed is
# lucky for everyone. A difference $a - b$ taken seed by seed, or photograph by photograph, loses the common part:
#
# $$\operatorname{Var}(a - b) = \operatorname{Var} a + \operatorname{Var} b - 2 \operatorname{Cov}(a, b) .$$
#
# Without pairs (the seeds of $a$ in another order than those of $b$) the covariance would be zero and the variances would add up.
# Pairing helps where the covariance is positive. It is not bound to be: with a negative one the paired differences scatter
# *more*, and then this is the truth about them.

# %%
def pairing(a, b):
    """Standard deviations of a - b: paired, and as if a and b had nothing to do with each other."""
    va, vb, cab = a.var(ddof=1), b.var(ddof=1), np.cov(a, b)[0, 1]
    assert close((a - b).var(ddof=1), va + vb - 2 * cab)
    return np.sqrt((a - b).var(ddof=1)), np.sqrt(va + vb)


print("standard deviation of (adapter - CEA) in dB, root of the mean variance over the 7 rivals\n")
print(f"{'':12s}{'over seeds':>22s}{'over photographs':>26s}\n{'':12s}" + f"{'paired':>12s}{'unpaired':>12s}" * 2)
for suite, found in T["photographs"].items():
    columns = []
    for axis in (0, 1):
        keep = (1 - axis, 2)                                # the mean over all the others
        pairs = [pairing(found[rival].mean(keep), found["cea"].mean(keep)) for rival in rivals]
        columns += [np.sqrt(np.mean(np.square(column))) for column in zip(*pairs)]
    print(f"{suite:12s}" + "".join(f"{value:12.3f}" for value in columns))

# %% [markdown]
# The right half is why every test uses the same photographs for all: what makes one harder than another is common to all of them.
# The left half says what the same batches bought, if anything.
#
# ## 3. The bootstrap over seeds and photographs
#
# Let $d_{sf} = \bar T_a[s, f] - \bar T_{\mathrm{CEA}}[s, f]$ be the paired differences, five seeds by three photographs, and
# $\bar d$ their mean. How far might $\bar d$ be from the mean over *all* seeds and all such photographs? The *bootstrap*
# (Efron 1979) lets the sample stand for the world it came from: draw five seeds and three photographs anew, with replacement
# (some twice, others not at all), take the mean, repeat 10000 times. The middle 95 % of these means are the interval:
#
# $$d^*_b = \frac{1}{SF} \sum_{i=1}^{S} \sum_{j=1}^{F} d_{s_i f_j}, \qquad
# s_i \text{ and } f_j \text{ drawn anew for each } b, \qquad
# \big[\, q_{2.5\%}(d^*),\; q_{97.5\%}(d^*) \,\big] .$$
#
# That is all of [`interval`](../tinycea/lab/comparison.py). A drawing only decides how often each run counts: with $v_b$ the
# shares of the seeds and $w_b$ those of the photographs, all drawings of many tables are one product, $d^*_b = v_b^\top d\, w_b$,
# which the simulations below will want.

# %%
suite = list(seeds)[-1]
d = (T["photographs"][suite]["descriptor"] - T["photographs"][suite]["cea"]).mean(-1)       # (seeds, photographs)
S, F = d.shape

draw = np.random.default_rng(0)
drawn_seeds, drawn_photos = draw.integers(S, size=(10_000, S)), draw.integers(F, size=(10_000, F))
means = [d[np.ix_(drawn_seeds[b], drawn_photos[b])].mean() for b in range(10_000)]
ours = np.quantile(means, (0.025, 0.975))
assert close(ours, comparison.interval(d))
print(f"{suite}, descriptor minus CEA: {d.mean():+.3f} dB, 95 % interval [{ours[0]:+.3f}, {ours[1]:+.3f}]")


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
# **Why photographs are drawn, and not crops.** There are more than a hundred crops. Drawing among them gives pleasantly short
# intervals, and wrong ones: 48 crops of one cat are not 48 pictures of the world. A world where we know the truth: three
# photographs, each with a difference of its own (standard deviation 1 dB) around a true mean of 0, and 48 crops of each that
# scatter around it by 2 dB.

# %%
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
# More crops per photograph make it worse: the interval shrinks to the mean over these three photographs, and the world has
# others. But drawing photographs does not give 95 % either.
#
# ## 4. How often does the interval hold the truth?
#
# **An extreme case by hand.** Let all seeds agree, so that only the photographs are drawn. Of three numbers $d_1 < d_2 < d_3$ the
# drawing $(d_1, d_1, d_1)$ comes up with probability $(1/3)^3$, which is more than 2.5 %. So the "95 %" interval reaches from the
# smallest to the largest of them and no further. If each is as likely above as below the truth $\delta$, independently, the truth
# lies outside only if all three are on one side:
#
# $$\Big(\frac13\Big)^3 = 3.7\,\% > 2.5\,\% \;\Rightarrow\; \big[ d_1, d_3 \big], \qquad
# P\big(d_1 \le \delta \le d_3\big) = 1 - 2 \cdot \Big(\frac12\Big)^3 = 75\,\% .$$

# %%
only_photos = np.repeat(rng.normal(0, 1, (2000, 1, 3)), 5, 1)       # (experiments, seeds, photographs), all seeds alike
low, high = intervals(only_photos)
assert close(low, only_photos.min((1, 2))) and close(high, only_photos.max((1, 2)))
assert close(comparison.interval(only_photos[0]), (low[0], high[0]))
print(f"5 seeds that agree, 3 photographs: {coverage(only_photos):.1%}")
assert abs(coverage(only_photos) - 0.75) < 0.03

# %% [markdown]
# **A model of the scatter.** In general a difference has a part of the seed, a part of the photograph, and a rest, independent
# with standard deviations $\sigma_\alpha$, $\sigma_\beta$, $\sigma_\varepsilon$:
#
# $$d_{sf} = \delta + \alpha_s + \beta_f + \varepsilon_{sf} .$$
#
# How large are they in our lines? The variance of the means over the photographs is $\sigma_\alpha^2 + \sigma_\varepsilon^2 / F$,
# that of the means over the seeds $\sigma_\beta^2 + \sigma_\varepsilon^2 / S$, and what is left after taking both off estimates
# $\sigma_\varepsilon^2$. Solved for the three (estimates may be negative, which stands for zero):

# %%
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

differences = {view: {suite: {rival: found[rival] - found["cea"] for rival in rivals} for suite, found in T[view].items()}
               for view in T}
spread = {}
print("standard deviations in dB, from the mean variance over the rivals")
for view, suite in ((view, suite) for view in differences for suite in seeds):
    variances = np.mean([components(table.mean(-1)) for table in differences[view][suite].values()], 0)
    spread[suite, view] = np.sqrt(np.maximum(variances, 0))
    print(f"{suite + ', ' + view:26s} seeds {{:.3f}}   photographs {{:.3f}}   rest {{:.3f}}".format(*spread[suite, view]))

# %% [markdown]
# Now the same model with a known truth, 2000 times: how often does the interval hold it, for 5 seeds and 3 photographs? First for
# made-up spreads, then for those just estimated. The last column is the remedy: by what factor the two arms of the interval would
# have to be longer to hold the truth in 95 % of the cases.

# %%
def stretch(tables, truth=0.0):
    """The factor on both arms of the intervals that would make 95 % of them hold the truth."""
    mean, (low, high) = tables.mean((1, 2)), intervals(tables)
    arm = np.where(truth < mean, mean - low, high - mean)
    return np.quantile(np.abs(mean - truth) / arm, 0.95)


covered, factor = {}, {}
cases = {"only seeds differ": (1, 0, 0), "only photographs differ": (0, 1, 0), "both differ alike": (1, 1, 0),
         "only a rest": (0, 0, 1)}
print(f"{'':30s}{'coverage':>9s}{'stretch':>9s}")
for case, sds in (cases | spread).items():
    tables = simulate(*sds, S=len(seeds[case[0]]) if case in spread else 5)
    covered[case], factor[case] = coverage(tables), stretch(tables)
    print(f"{case if case in cases else 'as in ' + ', '.join(case):30s}{covered[case]:9.1%}{factor[case]:9.2f}")
assert all(covered[case] < 0.93 for case in list(cases)[:3])
assert covered["only photographs differ"] < covered["only seeds differ"] < 0.9
assert abs(coverage(2 + simulate(1, 1, 0), 2) - covered["both differ alike"]) < 1e-9        # whatever the truth is

figure, axis = plt.subplots()
numbers = (2, 3, 4, 6, 10, 20)
for case, marker in zip(cases, "osD^"):
    axis.plot(numbers, [coverage(simulate(*cases[case], F=n, count=1000)) for n in numbers], marker=marker, label=case)
axis.axhline(0.95, color="0.4", lw=0.8, ls="-")
axis.set(xlabel="photographs", ylabel="share that holds the truth", xscale="log", xticks=numbers, xticklabels=numbers,
         title="With 5 seeds, more photographs cure what photographs scatter, and no more")
axis.minorticks_off()
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# **Why.** The expected variance of the drawings can be computed. A share $v_s$ in a drawing of $S$ has
# $\mathbb E \sum_s v_s^2 = (2 - \frac1S)/S$, where equal shares would have $1/S$. Put into $d^* = v^\top d\, w$, next to the true
# variance of the mean:
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
# And even with the right variance the quantiles would be too close, since the variance of so few is itself a guess. More
# photographs cure what comes from photographs, more seeds what comes from seeds; neither replaces the other. Two limits remain
# that no formula mends: the spreads put in were estimated from the same few runs, and the three test photographs were not drawn
# at random from anything.
#
# ## 5. The table
#
# Mean PSNR of the whole test photographs, the standard deviation over seeds, and the paired difference to CEA with its interval.
# A **negative** difference means that CEA is ahead. Differences on the crops stand beside it: a network that has learned from
# patches what an image's averages mean may be misled by those of a whole photograph, and then the two views disagree.

# %% jupyter={"source_hidden": true}
for suite in seeds:
    print(f"{suite}, {len(seeds[suite])} seeds")
    print(f"{'':16s}{'mult./px':>8s}{'PSNR':>7s}{'sd':>6s}   {'minus CEA, photographs':24s}minus CEA, crops")
    for adapter in ("degraded", *comparison.CLASSICAL, *comparison.HEADLINE):
        row, crops = (by_view[view].get((suite, adapter)) for view in evaluation.VIEWS)
        if row is None:
            continue
        cost = f"{row['multiplications']:8d}" if row["multiplications"] else " " * 8
        sd = f"{row['sd']:6.2f}" if row["sd"] is not None else " " * 6
        both = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*r["minus_cea"]["all"]) if r["steps"] and "minus_cea" in r else ""
                for r in (row, crops)]
        print(f"{adapter:16s}{cost}{row['psnr']:7.2f}{sd}   {both[0]:24s}{both[1]:24s}".rstrip())
    print()

for view, (suite, rival) in ((view, pair) for view in T for pair in by_view[view] if pair[1] in rivals):
    table = differences[view][suite][rival].mean(-1)        # the library's row, once more by hand
    assert close(by_view[view][suite, rival]["minus_cea"]["all"], (table.mean(), *comparison.interval(table)))

# %% [markdown]
# Read a bar of the picture at the top so: if it crosses the line, these runs do not tell who is ahead. If it does not, they seem
# to; the coverage of section 4 says how far to believe it. The count below is made twice, with the intervals as they are and with
# both arms stretched by the factor that section 4 found for the suite and the view (never shortened):

# %% jupyter={"source_hidden": true}
def decided(view, suite, entry="all", longer=1.0):
    """How many rivals are behind CEA, ahead of it, or neither, by intervals with arms so many times longer."""
    signs = []
    for rival in rivals:
        mean, low, high = by_view[view][suite, rival]["minus_cea"][entry]
        low, high = mean - longer * (mean - low), mean + longer * (high - mean)
        signs.append(0 if low <= 0 <= high else np.sign(mean))
    return [signs.count(sign) for sign in (-1, 1, 0)]


print(f"of {len(rivals)} rivals: behind CEA / ahead of CEA / undecided")
print(f"{'':12s}{'photographs':>14s}{'stretched':>14s}{'crops':>14s}{'stretched':>14s}")
for suite in seeds:
    counts = [decided(view, suite, longer=longer) for view in T for longer in (1.0, max(1.0, factor[suite, view]))]
    assert all(sum(count) == len(rivals) for count in counts)
    print(f"{suite:12s}" + "".join(f"{' / '.join(map(str, count)):>14s}" for count in counts))

# %% [markdown]
# **The claim itself** is about an average and about where the lead is clearest: in compositions (the entries of `cdd11` with a +)
# and where the degradation varies over the image (`patchwork`). So take the entries apart by kind, and average over the rivals
# named in it. That is a difference of differences, again paired; for compositions and single degradations within one suite
#
# $$\Delta_{sf} = \frac{1}{|E_+|} \sum_{e \in E_+} d_{sfe} - \frac{1}{|E_1|} \sum_{e \in E_1} d_{sfe} ,$$
#
# negative if CEA's lead is larger in compositions. For `patchwork` against another suite the photographs still match, and so does
# the seed's number, not much more.

# %%
named = ("descriptor", "prompt", "experts-image", "experts-token")


def versus(view, suite, kind=lambda entry: True):
    """The named rivals minus CEA (seeds, photographs), averaged over the entries of a kind."""
    chosen = [kind(entry) for entry in entries[suite]]
    return np.mean([differences[view][suite][rival][..., chosen].mean(-1) for rival in named], 0)


def told(title, table):
    low, high = comparison.interval(table)
    print(f"{title:42s} {table.mean():+.2f} [{low:+.2f}, {high:+.2f}]")


composed, single = (lambda entry: "+" in entry), (lambda entry: "+" not in entry)
for view in T:
    print(f"{view}: the mean of {', '.join(named)}, minus CEA, in dB")
    for suite in seeds:
        if any(map(composed, entries[suite])):
            told(f"{suite}, single degradations", versus(view, suite, single))
            told(f"{suite}, compositions", versus(view, suite, composed))
            told("    compositions minus single", versus(view, suite, composed) - versus(view, suite, single))
        else:
            told(suite, versus(view, suite))
    if {"aio5", "patchwork"} <= set(seeds):
        n = min(len(seeds["aio5"]), len(seeds["patchwork"]))
        told("    patchwork minus aio5", versus(view, "patchwork")[:n] - versus(view, "aio5")[:n])
    print()

# %% [markdown]
# **What it costs.** Equal parameters are not equal work: an expert that is computed and then weighted by zero has been computed.
# The library counts the multiplications of a forward pass by an array that counts them ([notebook 3](03_linear_attention.ipynb)).
# Up and to the left is better; bars are one standard deviation over seeds.

# %% jupyter={"source_hidden": true}
figure, axes = plt.subplots(1, len(seeds), figsize=(2 + 1.9 * len(seeds), 3.2), squeeze=False)
for axis, suite in zip(axes[0], seeds):
    for i, adapter in enumerate(comparison.HEADLINE):
        row = by_view["photographs"][suite, adapter]
        look = {"color": "C1", "ms": 8} if adapter == "cea" else {"color": "0.45", "ms": 5}
        axis.errorbar(row["multiplications"] / 1000, row["psnr"], row["sd"], fmt="osD^v<P*"[i], capsize=2, label=adapter, **look)
        assert row["multiplications"] == comparison.multiplications(zoo.network(adapter))
    axis.set(title=suite, xlabel="thousand mult. per pixel")
axes[0, 0].set_ylabel("PSNR (dB)")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
figure.suptitle("Equal parameters are not equal work: the costliest adapter leads on one suite only", fontsize=10)
plt.show()

cost, decibels = ([[by_view["photographs"][suite, adapter][what] for adapter in comparison.HEADLINE] for suite in seeds]
                  for what in ("multiplications", "psnr"))
assert np.sum(np.argmax(cost, 1) == np.argmax(decibels, 1)) == 1

# %% [markdown]
# **One doubt about the backbone.** NAFNet's blocks have a channel attention (SCA), itself a descriptor of the whole image; it
# might do what an adapter could have done. Where the file has runs without it, they are compared with CEA without it:

# %%
bare = [line for line in lines if "sca=false" in line["recipe"]["adapter"]]
for row in comparison.rows(bare):
    if "minus_cea" in row:
        print(f"{row['suite']:10s} {row['adapter']:26s} {len(row['seeds'])} seeds: "
              "minus CEA without SCA {:+.2f} [{:+.2f}, {:+.2f}] dB".format(*row["minus_cea"]["all"]))
print(f"{len(bare)} lines without channel attention")
assert all(not zoo.network(line["recipe"]["adapter"]).sca for line in bare)

# %% [markdown]
# ## 6. A small part of it, live
#
# A table is worth what its rows are: each should come out again. Here two adapters train side by side on `patchwork`, as in the
# comparison but for 60 steps instead of 1000 and with 4 drawn scenes instead of 32. Then the first one trains again, alone. A
# batch is a function of seed and step only, so neither its company nor the repetition may change a digit:
#
# $$\text{PSNR} = f(\text{recipe}) .$$

# %%
recipes = [training.recipe_for(adapter, suite="patchwork", steps=60, scenes=4) for adapter in ("cea", "descriptor")]


def trained(recipes):
    """The lines that `comparison` makes of recipes trained side by side, in a folder that goes again."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").mkdir()
        while comparison.train_slice(recipes, Path(folder)) < recipes[0].steps:        # five seconds of it
            pass
        return [comparison.test_model(recipe, Path(folder), comparison.Split("test", None)) for recipe in recipes]


first = trained(recipes)
again, = trained(recipes[:1])
assert again["recipe"] == first[0]["recipe"] and again["psnr"] == first[0]["psnr"]
assert first[0]["psnr"] != first[1]["psnr"]

# %%
for title, line in zip(("cea", "descriptor", "cea, again"), (*first, again)):
    measured = line["psnr"]["photographs"]["patchwork"]
    print(f"{title:12s} {line['parameters']} parameters; after 60 steps",
          ", ".join(f"{photo} {dB:.4f} dB" for photo, dB in measured.items()))
assert comparison.matrix(first[0]).shape == (len(photos), 1)

# %% [markdown]
# Whoever is ahead after 60 steps means nothing, for the reasons above. To check a line of the file, take its recipe,
# `training.Recipe(**line["recipe"])`, and give it to `trained`: about a minute. (The same bits take the same machine and the same
# versions; elsewhere the last digits differ, and so does rounding grown over 1000 steps.)
#
# ## 7. What the maps show, and what would be missing without them
#
# CEA's own argument is that each token takes its mix of residuals by its own affinities $s_{nr}$, so that regions may be treated
# differently. Do the affinities follow the regions? For the shipped weights and the last CEA layer, over a photograph with three
# degradations in three regions ([`affinity_maps`](../tinycea/lab/instruments.py)), take for each $r$ the share of the map's
# variance that lies *between* the regions $k$ (with $N_k$ tokens of mean $\mu_{kr}$):
#
# $$\eta_r^2 = \frac{\sum_k N_k\, (\mu_{kr} - \mu_r)^2}{\sum_n (s_{nr} - \mu_r)^2} .$$
#
# It is 0 if all regions have the same mean and 1 if a map is constant in each. The control is the clean photograph with the same
# regions: whatever is seen there is the scene, not the degradation.

# %%
shipped, shipped_config = zoo.load_model(zoo.WEIGHTS)
degraded, mask, names, affinities, kind, stage = instruments.affinity_maps(shipped, shipped_config, cpu)
h, w, R = affinities.shape
pixels = round(len(degraded) / h)                           # a token is so many pixels wide
label = mask.argmax(-1)[::pixels, ::pixels][:h, :w]
clean = photographs("test")["coffee"]


def affinities_of(image):
    _, cache = nafnet.centered(image[None], shipped, shipped_config, cpu)
    return nafnet.anatomies(cache)[stage]["S"].reshape(h, w, R)


def between(maps, label):
    """Share of each map's variance that lies between the regions."""
    maps, label = maps.reshape(-1, maps.shape[-1]).astype(np.float64), label.ravel()
    mean = maps.mean(0)
    parts = [np.sum(label == k) * (maps[label == k].mean(0) - mean)**2 for k in range(label.max() + 1)]
    return sum(parts) / np.sum((maps - mean)**2, 0)


eta, control = between(affinities, label), between(affinities_of(clean), label)

# %% jupyter={"source_hidden": true}
# Check: the mask itself has all of its variance between the regions, and what lies within them is the rest.
one_hot = np.eye(len(names))[label]
assert np.array_equal(affinities_of(degraded), affinities) and close(between(one_hot, label), 1)
within = affinities - sum(one_hot[..., k:k + 1] * affinities[label == k].mean(0) for k in range(len(names)))
assert np.allclose(eta, 1 - within.reshape(-1, R).var(0) / affinities.reshape(-1, R).var(0), atol=1e-4)

# %% jupyter={"source_hidden": true}
figure, axes = plt.subplots(1, 5, figsize=(9, 1.9))
axes[0].imshow(degraded)
axes[0].set(title="degraded")
instruments.regions(axes[1], mask, names)
limit = np.quantile(np.abs(affinities), 0.99)
for axis, r in zip(axes[2:], np.argsort(-eta)[:3]):
    axis.imshow(affinities[..., r], vmin=-limit, vmax=limit, cmap="RdBu_r")
    axis.contour(label, np.arange(len(names) - 1) + 0.5, colors="C1", linewidths=1)
    axis.set(title=f"r = {r + 1}: {eta[r]:.0%} between")
for axis in axes:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
figure.suptitle("The three maps that follow the regions most (blue negative, red positive; orange: borders)", fontsize=10)
plt.show()

figure, axis = plt.subplots(figsize=(7, 2.4))
axis.bar(np.arange(1, R + 1) - 0.2, eta, 0.4, label="degraded in three regions")
axis.bar(np.arange(1, R + 1) + 0.2, control, 0.4, color="0.7", label="the clean photograph")
axis.set(xlabel="r", ylabel="variance between regions", xticks=range(1, R + 1),
         title="Only what a blue bar has above its gray one can be the degradation")
axis.legend()
plt.show()

# %% [markdown]
# Single maps are one basis among many ([notebook 5](05_training_by_hand.ipynb), section 7), so no bar is a finding by itself.
# That the blue bars exceed the gray ones would say that affinities see the degradation. It would not say that the network *uses*
# this.
#
# **Taking the affinities away.** Replace each token's affinities by their mean over the image,
# $\bar s_r = \frac1N \sum_n s_{nr}$, with all weights as they are (`level="image"`). The update is linear in $S$, so every token
# then gets the same one, the mean of all updates; the layer becomes a shift of the image's channels, as a descriptor makes it:
#
# $$y_n = x_n + \frac{1}{\sqrt R} \sum_r \bar s_r\, u_r = x_n + \frac1N \sum_m (y^{\text{token}}_m - x_m) .$$

# %% jupyter={"source_hidden": true}
# Check: with averaged affinities every token gets the mean of all updates.
image_config = replace(shipped_config, adapter=replace(shipped_config.adapter, level="image"))
layer = {name: value.astype(np.float64) for name, value in under(shipped, f"adapters.{stage}").items()}
x = np.random.default_rng(3).normal(size=(1, 9, 11, shipped_config.stages()[stage][0]))
y_token, y_image = (ablations.forward(x, layer, config.adapter, ops)[0] for config in (shipped_config, image_config))
update = (y_token - x).mean((1, 2), keepdims=True)
assert close(y_image, x + update) and np.abs(y_token - x - update).max() > 1e-3

# %% [markdown]
# For scale, the layer can also be silenced, $W_U = 0$, so that no token gets anything. Six patchworks of the three degradations,
# PSNR of the whole image:

# %%
silent = shipped.copy()
for name, value in silent.items():
    if name.endswith("W_U"):
        value[...] = 0
variants = {"as trained": (shipped, shipped_config), "affinities averaged": (shipped, image_config),
            "no update": (silent, shipped_config)}

table, by_region = [], []
for title, photo in photographs("test").items():
    for seed in (0, 1):
        image, regions, _ = degradations.patchwork(Scene(photo), np.random.default_rng(seed), names)
        regions = [regions.argmax(-1) == k for k in range(len(names))]
        outputs = [restore_rgb(image, *variant) for variant in variants.values()]
        table.append([evaluation.psnr(output, photo) for output in (image, *outputs)])
        by_region.append([[evaluation.psnr(output[region], photo[region]) for region in regions] for output in outputs])
        print(f"{title:9s} {seed}   degraded {table[-1][0]:.2f} dB   "
              + "   ".join(f"{variant} {value:.2f}" for variant, value in zip(variants, table[-1][1:])))

# %%
table, by_region = np.array(table), np.array(by_region)
averaged, silenced = ((table[:, i] - table[:, 1]).reshape(3, 2).mean(1) for i in (2, 3))      # per photograph
for title, change in (("averaging the affinities", averaged), ("silencing the layers", silenced)):
    print(f"{title:25s} {change.mean():+.2f} dB, in the three photographs {change.min():+.2f} to {change.max():+.2f}")
print("averaging, by region:     " +
      ", ".join(f"{name} {dB:+.2f} dB" for name, dB in zip(names, (by_region[:, 1] - by_region[:, 0]).mean(0))))
assert nafnet.shapes(image_config) == nafnet.shapes(shipped_config)         # the same parameters, read otherwise
assert not np.array_equal(outputs[0], outputs[1])

# %% [markdown]
# What the lines above cost is how much *these* weights rely on the layer: next to nothing, and no map of theirs would matter. It
# does not say that a network trained without would be worse: that one would have arranged itself. The fair contest is between
# trained networks, and the table of section 5 holds it: `descriptor` treats all tokens alike, `experts-token` each one by itself.
# (`cea-image`, CEA trained with averaged affinities, is an adapter of the library: `tinycea compare --adapters cea-image`.)
#
# **Does it hold?** Not on these toys: the first lines of this notebook. The printed tables hold for three photographs, at most
# five seeds, 1000 steps, small networks, rates of learning tuned on one seed. They cannot answer for the paper's networks, which
# are larger and trained for longer. What carries over is the way to ask: the same batches, the same photographs, differences in
# pairs, intervals whose coverage is known, and no choice made on the test.

# %% [markdown]
# ## Exercises
#
# **1.** Someone lost the pairing and bootstraps each adapter's table by itself, with seeds and photographs of its own. How much
# wider is the interval of the difference, for each suite? What did the pairing buy?

# %% jupyter={"source_hidden": true}
# Solution
# The unpaired interval keeps what all adapters have in common: above all how hard each photograph is.
draw = np.random.default_rng(4)
for suite, found in T["photographs"].items():
    ratios = []
    for rival in rivals:
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
# One rival fixed beforehand is the coverage of section 4 again. Seven looks find something several times as often, and the best
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
# It answers: what would other seeds give on these three photographs? For that its truth is the mean over these photographs,
# and it is right not to draw them. For the question of other photographs it is too narrow.
for suite, found in differences["photographs"].items():
    both = [np.ptp(comparison.interval(table.mean(-1))) for table in found.values()]
    alone = [np.ptp(comparison.interval(table.mean(-1).mean(1, keepdims=True))) for table in found.values()]
    print(f"{suite:10s} seeds alone: {np.median(np.divide(alone, both)):.2f} times the width (median of the rivals)")
tables = simulate(1, 1, 0)
alone, both = coverage(tables.mean(2, keepdims=True)), covered["both differ alike"]
print(f"coverage of the truth about all photographs, spreads alike: seeds alone {alone:.0%}, seeds and photographs {both:.0%}")
assert alone < both - 0.05

# %% [markdown]
# ## What to read next
#
# - [What the layer is for](../data/README.md): where the claim does hold, and the tables of all suites.
# - [Notebook 7](07_one_kernel.ipynb): the same layer on a GPU.
# - B. Efron (1979), "Bootstrap methods: another look at the jackknife".
# - A. Owen (2007), "The pigeonhole bootstrap", *Annals of Applied Statistics* 1: rows and columns drawn at once.
