"""What notebooks share: 00's check, which says in one sentence what is wrong; drawings; the results of the comparison."""
import io
from collections import Counter, defaultdict
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

from tinycea import check_gradients
from tinycea.adapters import family
from tinycea.lab import comparison
from tinycea.lab.mechanism import CEA, MODELS, TASKS, color, pictures, psnr, teach
from tinycea.plots import label_region, show

N, R, C, d, h = 11, 3, 5, 7, 4                # sizes to check with: all different, so that only the right product fits
SIZES = {"N": N, "R": R, "C": C, "d": d, "h": h, "D": h * d}
passed = {}                                   # name of a backward -> whether its last check passed
HINTS = {                                     # for a wrong try
    "combine_backward": "dS is dY times U transposed, dU is S transposed times dY; both keep the forward's 1/√R",
    "affinity_backward": "dx_n is the sum over r of ds_nr a_r, and da_r the sum over n of ds_nr x_n; both keep 1/√C",
    "linear_backward": "dT has shape (R,C): to get (R,D) and (D,C), transpose the other factor",
    "average_backward": "step 3 again, in each head: .mT, for .T would turn the heads as well",
    "softmax_backward": "P times (dP minus the row's sum of dP times P); sum(-1, keepdims=True) sums a row",
    "scores_backward": "step 2 with Q for X and K for A, in each head; d is K.shape[-1]",
    "normalize_backward": "dw, db sum over tokens, axis 0; dX is g, less its mean, less Xbar times the mean of g Xbar, over std",
    "layer_backward": "Z fed A and U; X̂ fed K and V; X fed the norm, the affinities and the skip connection"}


def split(T):
    """The heads of a matrix: (...,D) -> (h,...,d), d = D / h columns each."""
    return T.reshape(len(T), h, -1).swapaxes(0, 1)


def merge(T):
    """And back, side by side: (h,...,d) -> (...,D)."""
    return T.swapaxes(0, 1).reshape(T.shape[1], -1)


def check(forward, backward, after={}, **shapes):
    """Print each gradient of `backward` beside its finite difference and what is wrong with it; `passed` notes whether all pass.

    forward(*arrays) -> (y, cache); backward(dy, cache) -> a gradient for each argument. shapes: argument -> its shape.
    after: like `passed`; all others in it must be right before. The differences are those of `tinycea.check_gradients`.
    """
    name, rng = backward.__name__, np.random.default_rng(0)
    inputs = {argument: rng.normal(size=shape) / 2 for argument, shape in shapes.items()}
    passed[name] = False
    missing = [other.removesuffix("_backward") for other, fine in after.items() if not fine and other in HINTS and other != name]
    if missing:
        print(f"{name} waits for the steps above: {', '.join(missing)}.")
        return
    y, cache = forward(*inputs.values())
    dy = rng.normal(size=y.shape)
    try:
        found = listed(backward(dy, cache))
    except Exception as error:                # whatever a reader's lines can raise
        print(f"{name} {stopped(error)}")
    else:
        if len(found) == len(inputs):
            passed[name] = all([right(i, found[i], forward, backward, inputs) for i in range(len(found))])
        else:
            print(f"{name} returns {len(found)} gradients, expected {len(inputs)}: of {', '.join(inputs)}.")
        if any(gradient is ... for gradient in found):
            print(f"  Replace each `...`. The gradient that comes in has shape {dy.shape}.")
            return
    if not passed[name]:
        print(f"  Hint: {HINTS.get(name, 'derive it entry by entry')}.")


def listed(gradients):
    return list(gradients) if isinstance(gradients, tuple) else [gradients]


def stopped(error):
    """What an exception out of a reader's lines means."""
    if isinstance(error, ValueError):
        return f"stops where shapes do not fit, is a factor transposed? NumPy says: {error}"
    if isinstance(error, TypeError) and "ellipsis" in str(error).lower() or isinstance(error, (AttributeError, IndexError)):
        return f"has a blank left: replace each `...`. Python says: {error}"
    return f"stops with {type(error).__name__}: {error}"


def right(i, gradient, forward, backward, inputs):
    """Print one argument's line -> whether its gradient is right."""
    name, x = list(inputs.items())[i]
    if gradient is ...:
        print(f"  d{name} is blank. It has {name}'s shape, {x.shape}.")
        return False
    if np.shape(gradient) != x.shape:
        turned = sorted(np.shape(gradient)) == sorted(x.shape)
        print(f"  d{name} has shape {np.shape(gradient)}, expected {name}'s, {x.shape}: "
              + ("transposed?" if turned else "a sum is missing, or one too many."))
        return False

    def alone(a):
        return forward(*(a if other == name else value for other, value in inputs.items()))

    try:
        rows = [check_gradients(alone, lambda dy, cache: listed(backward(dy, cache))[i], {name: x}, seed)[0] for seed in range(4)]
    except ValueError as error:               # a NaN
        print(f"  {error}")
        return False
    fine = all(row.passed for row in rows)
    print(f"  {'d' + name:4s} yours {rows[0].analytic:+13.7f}   finite difference {rows[0].numeric:+13.7f}   "
          + ("ok" if fine else wrong_by(np.array([row.analytic / row.numeric for row in rows]))))
    return fine


def wrong_by(ratios):
    """The sentence for gradients that are `ratios` times the finite differences of four random directions."""
    factor = ratios.mean()
    if np.ptp(ratios) > 1e-4 * abs(factor):
        return "WRONG: it points elsewhere, so a term is missing, or one too many."
    if factor == 0:
        return "WRONG: it is zero."
    sign, size = ("the sign is turned", " and ") if factor < 0 else ("", "")
    known = {f"1/√{letter} is {how}": n**power for letter, n in SIZES.items()
             for how, power in (("missing", 0.5), ("there twice", -0.5), ("missing, twice", 1))}
    scale = [text for text, value in known.items() if abs(abs(factor) / value - 1) < 1e-4]
    if scale or abs(abs(factor) - 1) > 1e-4:
        sign += f"{size}{scale[0] if scale else 'a constant factor is missing'}"
    return f"WRONG: {factor:.3f} times what it should be: {sign}."


# ---- the task ----------------------------------------------------------------------------------------------------------

lamps, RIVAL = TASKS["lamps"], MODELS["token MLP"]


@cache
def taught(config=CEA):
    """The numbers that a model learns in 2,000 steps, by the library's own backward."""
    return teach(lamps, config, steps=2000)


def test(p, config=CEA):
    """A photograph's tokens (128,128,16) under the lamps, and what the model makes of them."""
    photo = pictures(lamps, side=128, draws=2)[0][2]
    return photo, family(config).forward(photo[None], p, config)[0][0]


def mean_psnr(p, config=CEA):
    """In dB, over 12 pictures of 24 x 24 pixels, of photographs that no training sees; p None: under the lamps."""
    x, J, _ = pictures(lamps)
    return psnr(x if p is None else family(config).forward(x, p, config)[0], J).mean()


def compare(name, p):
    """The photograph under the lamps, what the rival and the layer with the numbers p make of it, and the truth."""
    truth = pictures(lamps, side=128, draws=2)[1][2]
    means = [mean_psnr(None), mean_psnr(taught(RIVAL), RIVAL), mean_psnr(p)]
    photo, mine = test(p)
    shown = [photo, test(taught(RIVAL), RIVAL)[1], mine]
    row(f"The token MLP gives gray, {name} gives the photograph",
        [np.clip(image + 0.5, 0, 1) for image in (*map(color, shown), truth)], ["under the lamps", "token MLP", name, "true"],
        [f"{psnr(y[None], truth[None])[0]:.1f} dB; mean {mean:.1f} dB" for y, mean in zip(shown, means)] + [""])
    print("mean PSNR: under the lamps {:.1f} dB, token MLP {:.1f} dB, {} {:.1f} dB".format(*means[:2], name, means[2]))


# ---- drawings ----------------------------------------------------------------------------------------------------------

FILL = {"learned": "#ffd49a", "written": "#b5d8f7", "tokens": "#f4f4f4", "yours": "#ffffff"}


def row(title, images, titles, below=None, width=9, **settings):
    """Images side by side."""
    figure, axes = plt.subplots(1, len(images), figsize=(width, width / len(images) + 0.75))
    for axis, *shown in zip(axes, images, titles, below or [""] * len(images)):
        show(axis, *shown, **settings)
    figure.suptitle(title)
    jpeg(figure)


def regions(axes, mask, names):
    """The mask (H,W,K) as gray levels, each region labeled with its degradation at its center."""
    label = mask.argmax(-1)
    show(axes, label, "regions", cmap="gray", vmin=-0.5, vmax=len(names) - 0.5)
    for k, name in enumerate(names):
        label_region(axes, label == k, name)


def jpeg(figure):
    """Show a figure of photographs as JPEG, for noise fills a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", pil_kwargs={"quality": 90})
    plt.close(figure)
    display(Image(file.getvalue()))


def shapes(title, *lines):
    """Matrices as boxes, each (name, its two letters, its kind in FILL), with signs between them."""
    length = {"N": 3.4, "C": 1.9, "R": 1.0, "D": 2.5, "O": 1.9, "d": 1.3}
    figure, axes = plt.subplots(figsize=(7.4, 1.05 + 0.24 * sum(max(length[b[1][0]] for b in line if b[1:]) for line in lines)))
    y, right = 0.0, 0.0
    for line in lines:
        x, tall = 0.0, max(length[box[1][0]] for box in line if box[1:])
        for name, *box in line:
            if not box:
                axes.text(x + 0.5, y - tall / 2, name, ha="center", va="center", size=11)
                x += 1.1 if len(name) < 3 else 0.3 * len(name) + 0.6
                continue
            (rows, columns), kind = box
            high, wide = length[rows], length[columns]
            top = y - (tall - high) / 2
            dashed = "--" if kind == "yours" else "-"
            axes.add_patch(plt.Rectangle((x, top - high), wide, high, fc=FILL[kind], ec="#444444", ls=dashed))
            axes.text(x + wide / 2, top - high / 2, name, ha="center", va="center", size=11)
            axes.text(x + wide / 2, top - high - 0.08, f"({rows},{columns})", ha="center", va="top", size=7, color="#444444")
            x += wide + 0.35
        y, right = y - tall - 1, max(right, x)
    axes.set(xlim=(-0.1, max(right, 17)), ylim=(y + 0.4, 0.2), title=title)
    axes.set_aspect("equal")
    axes.axis("off")
    plt.show()


def matrix():
    """T = Z W, and the pieces of its backward."""
    shapes("Of the products of these pieces, one has Z's shape and one has W's",
           [("Z", "RD", "written"), ("W", "DC", "learned"), ("=",), ("T", "RC", "written")],
           [("dT", "RC", "written"), ("Z", "RD", "written"), ("W", "DC", "learned"), ("give",), ("dZ", "RD", "yours"), ("and",),
            ("dW", "DC", "yours")])


def one_head():
    """L = Q K^T, and the pieces of its backward."""
    shapes("In one head: you have written this before, with other letters",
           [("Q", "Rd", "learned"), ("Kᵀ", "dN", "tokens"), ("=",), ("L", "RN", "written")],
           [("dL", "RN", "written"), ("Q", "Rd", "learned"), ("K", "Nd", "tokens"), ("give",), ("dQ", "Rd", "yours"), ("and",),
            ("dK", "Nd", "yours")])


def along():
    """One token in two channels, and what its affinity to a routing basis a is."""
    rng, a = np.random.default_rng(1), np.array([1.0, 0.6])
    X = rng.normal(size=(250, 2))
    figure, axes = plt.subplots(figsize=(7, 3))
    dots = axes.scatter(*X.T, c=X @ a, cmap="RdBu_r", vmin=-3, vmax=3, s=18)
    axes.annotate("", a * 1.6, (0, 0), arrowprops={"width": 2, "headwidth": 9, "color": "black"})
    axes.text(*a * 1.7, "a", size=13, weight="bold")
    axes.set(title="The affinity grows along a, and along nothing else: its derivative by the token is a",
             xlabel="channel 1 of a token", ylabel="channel 2", aspect="equal", xlim=(-4.2, 4.2), ylim=(-2.4, 2.4))
    figure.colorbar(dots, label="s = <x, a>")
    plt.show()


def shares():
    """A softmax before and after one logit is raised."""
    logits = np.array([0.3, 1.2, -0.4, 0.8, 0.0, -1.0])
    figure, axes = plt.subplots()
    for shift, name, offset in ((0, "before", -0.2), (1, "logit 4 raised by 1", 0.2)):
        e = np.exp(logits + shift * (np.arange(6) == 3))
        axes.bar(np.arange(1, 7) + offset, e / e.sum(), 0.38, label=name, hatch="//" if shift else None, ec="white")
    axes.set(title="Shares sum to 1: raise one logit, its share grows, every other shrinks",
             xlabel="token n", ylabel="share p")
    axes.legend()
    plt.show()


def projected():
    """What the normalization lets through of a gradient, with one direction drawn for each that it forgets."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    angle, turn = np.linspace(-0.3, 1.9, 100), np.deg2rad(40)
    axes.plot(np.cos(angle), np.sin(angle), label="all normalized images have this length")
    x, g = np.array([np.cos(turn), np.sin(turn)]), np.array([0.15, 0.85])
    left = g - x * (x @ g)
    axes.plot(*np.transpose([0 * x, 1.9 * x]), color="#888888", ls=":", lw=1)
    for start, end, shade, name, shift in (
            (0 * x, x, "black", "X̄", (0.04, -0.08)), (x, x + g, "#D55E00", "g", (0.04, 0)),
            (x, x + left, "#009E73", "what is left of g", (-1.0, 0.05))):
        axes.annotate("", end, start, arrowprops={"width": 1.8, "headwidth": 8, "color": shade})
        axes.text(*end + shift, name, color=shade, size=11)
    axes.set(title="X and 2X have the same X̄: of g, the part along X̄ comes to nothing", aspect="equal",
             xlim=(-1.2, 2.8), ylim=(-0.15, 1.7))
    axes.legend(loc="lower right")
    axes.grid(False)
    plt.show()


# ---- the comparison ----------------------------------------------------------------------------------------------------

RIVALS = [adapter for adapter in comparison.HEADLINE if adapter != "cea"]


def contest(folder="../data/results/headline"):
    """The lines that count, the seeds of each suite, and T: view -> suite -> adapter -> PSNR in dB (seeds, photographs, entries).

    What counts: runs of the commonest number of steps, and the seeds that CEA and all RIVALS have finished, at least two of them.
    """
    lines = comparison.finished(folder)
    steps = Counter(line["recipe"].get("steps") for line in lines).most_common(1)[0][0]
    runs = defaultdict(lambda: defaultdict(dict))               # suite -> adapter -> seed -> line
    for line in lines:
        recipe = line["recipe"]
        if recipe.get("steps") in (steps, None):
            runs[recipe["suite"]][recipe["adapter"]][recipe.get("seed")] = line
    whole = {suite: sorted(set.intersection(*(set(found[a]) for a in (*RIVALS, "cea")))) for suite, found in sorted(runs.items())}
    seeds = {suite: common for suite, common in whole.items() if len(common) > 1}
    T = {view: {suite: {a: np.array([comparison.matrix(runs[suite][a][seed], view) for seed in seeds[suite]])
                        for a in (*RIVALS, "cea")} for suite in seeds} for view in lines[0]["psnr"]}
    kept = [line for suite in seeds for found in runs[suite].values() for seed, line in found.items()
            if seed in (None, *seeds[suite])]
    return kept, seeds, T
