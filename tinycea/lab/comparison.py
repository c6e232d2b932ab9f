"""What an adapter buys: adapters x suites x seeds, trained on the same batches and tested on photographs that no choice has seen.

Every finished run is one line of runs.jsonl and a model beside it, so a grid can be stopped, resumed and enlarged; tables are
made of the lines alone. The work is cut into short tasks without memory: a slice of a training, or one test. How to read the
intervals: notebooks/07_how_far_to_believe_a_table; what they say: notebooks/08_does_it_hold.
"""
import json
import math
import os
import re
import time
from collections import defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from tqdm import tqdm

from .. import runtime
from ..degradations import ALONE, DEGRADATIONS, apply, suite
from ..evaluation import VIEWS, psnr, test_set
from ..feed import batch
from ..nafnet import nafnet, shapes
from ..ops import backend, reference
from ..ops.cpu import keep_memory
from ..params import Params, load
from ..plots import save
from ..restoration import restore_rgb
from ..runtime import InputError, interruptible, locked, machine, pool, read_bytes
from ..training import load_progress, recipe_for, save_progress, train_together
from ..zoo import load_model, network, save_model

HEADLINE = ("wider", "static", "mlp", "descriptor", "prompt", "experts-image", "experts-token", "cea")
SUITES = ("aio3", "aio5", "cdd11", "patchwork")
CELL_STEPS = 10_000                           # steps of all runs of a cell together, at most: what is trained side by side
SLICE_SECONDS = 5                             # of training in one task; then its state is saved


def non_local_means(image, h, sigma=0):
    """Buades et al. 2005: patches of 5 pixels a side, up to 6 away. h: how unlike they may be; sigma: the noise, if known."""
    return denoise_nl_means(image, 5, 6, h, sigma=sigma, channel_axis=-1)


CLASSICAL = {"total variation": (lambda image, s: denoise_tv_chambolle(image, s, channel_axis=-1), (0.02, 0.05, 0.1, 0.2)),
             "non-local means": (non_local_means, (0.03, 0.06, 0.1, 0.2))}


# ---- the grid --------------------------------------------------------------------------------------------------------

def grid(suites=SUITES, adapters=HEADLINE, seeds=5, steps=(1000,), rates=(None,), images=None):
    """The Recipes of all combinations; a rate of None is the one that train.ADAPTER_LR holds for the adapter."""
    return [recipe_for(a, suite=s, seed=seed, steps=n, images=images, batch=8, patch=48, nominal=True, floor=1e-8, chunks=1,
                       **{} if rate is None else {"adapter_lr": rate})
            for s, n, seed, a, rate in product(suites, steps, range(seeds), adapters, rates)]


def cells(recipes):
    """Recipes that share their batches, in lists of at most CELL_STEPS steps in all: what one process trains side by side."""
    alike = defaultdict(list)
    for recipe in recipes:
        alike[replace(recipe, adapter="", adapter_lr=0), degrader(recipe.adapter)].append(recipe)
    for (shared, _), members in alike.items():
        size = max(1, CELL_STEPS // shared.steps)
        yield from (members[i:i + size] for i in range(0, len(members), size))


def name(recipes):
    """A file name for the runs of a cell: the first one's in words, and a digest of all."""
    first, digest = recipes[0], sha256(json.dumps(list(map(asdict, recipes))).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.+-]", "_", f"{first.suite}-{first.adapter}-{first.steps}-seed{first.seed}-{digest}")


def finished(folder, name="runs.jsonl", check=lambda line: (line["recipe"]["suite"], line["split"], line["psnr"])):
    """The lines of a folder's runs.jsonl, a list of dicts; InputError for a damaged one, at which `check` stumbles."""
    path, found = Path(folder) / name, []
    for i, line in enumerate(read_bytes(path).splitlines(True) if path.exists() else (), 1):
        try:
            if line.endswith(b"\n"):          # else half a line, of a full disk or a killed process: its run is made again
                found.append(json.loads(line))
                check(found[-1])
        except (ValueError, RecursionError, KeyError, TypeError):
            raise InputError(f"{path}: line {i} is not that of a run") from None
    return found


def compare(recipes, folder, split="test", jobs=2, photos=None, test=None):
    """Train and test what `folder` does not hold yet -> lines as `finished`: of all recipes, of degraded and classical rows.

    split: the photographs tested on, "test" or "validation". photos: a folder of them, instead of scikit-image's: a crop of each
    one and entry. test: another test than `test_model`, then of the recipes alone. Ctrl-C saves the cells under way and
    raises KeyboardInterrupt.
    """
    folder, wanted = Path(folder), [asdict(recipe) for recipe in recipes]
    for recipe in recipes:
        network(recipe.adapter), suite(recipe.suite)          # what is misspelt is refused before anything is trained
    split = Split(split, photos and os.path.realpath(photos))
    have = [line["recipe"] for line in finished(folder) if line["split"] == str(split)]
    suites = dict.fromkeys(recipe.suite for recipe in recipes)
    rows = [] if test else [{"suite": s, "adapter": row} for s in suites for row in ("degraded", *CLASSICAL)]
    test = test or test_model
    todo = [recipe for recipe, line in zip(recipes, wanted) if line not in have]
    tasks = deque((test_without_network, row, split) for row in rows if split.name == "test" and row not in have)
    tasks += ((test, recipe, folder, split) for recipe in todo if model_path(recipe, folder).exists())
    tasks += ((train_slice, cell, folder) for cell in cells([r for r in todo if not model_path(r, folder).exists()]))
    steps = {name(task[1]): 0 for task in tasks if task[0] is train_slice}
    jobs = runtime.RANKS.num_workers if runtime.RANKS else jobs
    with locked(folder / "models"), open(folder / "runs.jsonl", "a+b") as file, interruptible() as interrupted, \
            nullcontext(runtime.RANKS) if runtime.RANKS else pool(jobs, keep_memory) as executor, \
            tqdm(total=sum(len(task[1]) * task[1][0].steps for task in tasks if task[0] is train_slice),
                 desc="comparing", unit="step", disable=None) as bar:
        file.truncate(read_bytes(file.name).rfind(b"\n") + 1)          # half a line goes
        for (function, subject, *_), result in work(executor, tasks, jobs, interrupted):
            if function is train_slice:
                bar.update(len(subject) * (result - steps[name(subject)]))
                steps[name(subject)] = result
                tests = [(test, recipe, folder, split) for recipe in subject]
                tasks.extendleft([(train_slice, subject, folder)] if result < subject[0].steps else tests)
            else:
                file.write(json.dumps(result).encode() + b"\n")
                file.flush()
                bar.set_postfix_str(f"{result['recipe']['suite']}, {result['recipe']['adapter']}: {mean(result['psnr']):.2f} dB")
        if interrupted():
            raise KeyboardInterrupt(f"stopped; the same command goes on with what is in {folder}")
    wanted += rows
    return [line for line in finished(folder) if line["recipe"] in wanted and line["split"] == str(split)]


def work(executor, tasks, jobs, interrupted):
    """Yield (task, result) as they come; a task is a function and its arguments, and `tasks` may grow on the way.

    When `interrupted` says so, nothing new is begun, and only the slices of trainings are waited for: the rest can be done again.
    """
    running = {}
    while tasks and not interrupted() or any(task[0] is train_slice or not interrupted() for task in running.values()):
        while tasks and len(running) < jobs and not interrupted():
            task = tasks.popleft()
            running[executor.submit(*task)] = task
        for future in wait(running, 0.5, FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


class Split(NamedTuple):
    """The photographs tested on: the split's name, and a folder or None."""
    name: str
    photos: str | None

    def __str__(self):
        return f"{self.name} of {Path(self.photos).name}" if self.photos else self.name


# ---- the ceiling -----------------------------------------------------------------------------------------------------

LABELS = (*DEGRADATIONS, "stain 1", "stain 2", "stain 3")


def told(scene, entry, rng, strength=1.0):
    """What `apply` gives, and behind its colors how much of each of LABELS a pixel has: (H,W,3+15), for a network that is told.

    As colors are, amounts are numbers around a gray: 1/2 is none, 1 is all.
    """
    image, amounts, *names = ALONE[entry](scene, rng, strength) if entry in ALONE else (
        apply(scene, entry, rng, strength), np.ones((*scene.image.shape[:2], 1)), [entry])
    label = np.zeros((*image.shape[:2], len(LABELS)), np.float32)
    if names:                                 # of the degradations, or compositions, whose regions `amounts` are
        for i, name in enumerate(names[0]):
            label[..., [LABELS.index(part) for part in name.split("+")]] += amounts[..., i:i + 1]
    elif amounts is not None:
        label[..., -3:] = amounts
    return np.concatenate((image, (1 + strength * label) / 2), -1)


def degrader(adapter):
    """What makes the images that a network takes: `apply`, or `told` for one that is told."""
    return told if network(adapter).told else apply


# ---- one task --------------------------------------------------------------------------------------------------------

def scores(restorer, tests):
    """Mean PSNR in dB over the draws of `test_set`: entry -> photograph -> dB. restorer(image, entry) -> image."""
    found = defaultdict(lambda: defaultdict(list))
    for entry, photo, degraded, clean in tests:
        found[entry][photo].append(psnr(np.clip(restorer(degraded, entry), 0, 1), clean))
    return {entry: {photo: round(float(np.mean(draws)), 4) for photo, draws in photos.items()} for entry, photos in found.items()}


def model_path(recipe, folder):
    """Where the trained network of a recipe is kept."""
    return folder / "models" / f"{name([recipe])}.safetensors"


def train_slice(recipes, folder):
    """Go on with a cell for SLICE_SECONDS, or to its end -> steps done so far. Recipes differ in adapter and its rate only.

    Its state is a file; at the end it goes, and a model for each recipe comes.
    """
    path, began = folder / "models" / f"{name(recipes)}.state.safetensors", time.perf_counter()
    progress = load_progress(path, recipes)
    done = len(progress.logs[0])
    batches = (batch(recipes[0], step, degrader(recipes[0].adapter)) for step in range(done, recipes[0].steps))
    for done in train_together(recipes, batches, progress):
        if time.perf_counter() - began > SLICE_SECONDS:
            break
    if done < recipes[0].steps:
        save_progress(path, progress, recipes)
        return done
    for recipe, state, log in zip(recipes, *progress):
        save_model(model_path(recipe, folder), state.p.over(backend(recipe.backend).to_host(state.p.flat)),
                   network(recipe.adapter), milliseconds_per_step=round(1e3 * float(np.median([row[-1] for row in log])), 2))
    path.unlink(missing_ok=True)
    return done


def test_model(recipe, folder, split):
    """The line of a trained network."""
    path = model_path(recipe, folder)
    (p, config), (_, metadata) = load_model(path), load(path)
    return {"recipe": asdict(recipe), "split": str(split), "parameters": p.flat.size,
            "multiplications_per_pixel": multiplications(config), "milliseconds_per_step": metadata.get("milliseconds_per_step"),
            "psnr": tested(lambda image, entry: restore_rgb(image, p, config), recipe.suite, split, degrader(recipe.adapter)),
            "machine": machine(), "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
            "versions": {"tinycea": version("tinycea"), "numpy": np.__version__}}


def test_without_network(row, split):
    """The line of the degraded input, or of a classical restorer, which is told the degradation: with each one's best strength.

    The best of four on the validation photographs. A favor: no network is told. row: a dict of suite and adapter.
    """
    entries = suite(row["suite"])
    if row["adapter"] == "degraded":
        return {"recipe": row, "split": str(split), "psnr": tested(lambda image, entry: image, row["suite"], split)}
    restorer, strengths = CLASSICAL[row["adapter"]]
    found = [scores(lambda image, entry: restorer(image, s), test_set(entries, "validation", "crops")) for s in strengths]
    best = {entry: strengths[np.argmax([np.mean(list(score[entry].values())) for score in found])] for entry in entries}
    values = tested(lambda image, entry: restorer(image, best[entry]), row["suite"], split)
    return {"recipe": row, "split": str(split), "psnr": values, "strengths": best}


def tested(restorer, suite_name, split, degrade=apply):
    """PSNR in dB of restorer(image, entry), averaged over draws: view -> entry -> photograph -> dB."""
    views = {"crops": 1} if split.photos else dict.fromkeys(VIEWS)
    return {view: scores(restorer, test_set(suite(suite_name), split.name, view, draws, degrade, split.photos))
            for view, draws in views.items()}


class Counted(np.ndarray):
    """An array that counts the multiplications it takes part in, of matrices and elementwise, as `ops.reference` defines them."""
    count = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        inputs = [np.asarray(x) for x in inputs]
        y = getattr(ufunc, method)(*inputs, out=out and tuple(map(np.asarray, out)), **options)
        Counted.count += y.size * (inputs[0].shape[-1] if ufunc is np.matmul else ufunc is np.multiply)
        return y.view(Counted) if isinstance(y, np.ndarray) else y

    def __array_function__(self, function, types, inputs, options):
        y = super().__array_function__(function, types, inputs, options)
        if function is np.tensordot:          # of I x K and K x O numbers
            Counted.count += y.size * math.isqrt(inputs[0].size * inputs[1].size // y.size)
        return y.view(Counted) if isinstance(y, np.ndarray) else y


@cache
def multiplications(config, side=64):
    """Multiplications of a forward pass, for each pixel of an image of side x side."""
    Counted.count = 0
    p = Params(shapes(config))
    p = p.over(p.flat.view(Counted))
    nafnet(np.zeros((1, side, side, 3 + config.told), np.float32).view(Counted), p, config, reference)
    return round(Counted.count / side**2)


# ---- the table -------------------------------------------------------------------------------------------------------

def mean(values):
    """The mean of dicts, of dicts, of numbers."""
    return np.mean(list(map(mean, values.values())) if isinstance(values, dict) else values)


def matrix(line, view=None):
    """PSNR in dB of a line, in a view or its first one: (photographs, entries)."""
    return np.array([list(photos.values()) for photos in line["psnr"][view or next(iter(line["psnr"]))].values()]).T


def interval(differences, draws=10_000):
    """95 % bootstrap interval of the mean of paired differences (seeds, photographs): both are drawn anew, with replacement.

    Crops, degradations and draws of one photograph are not independent, so photographs are drawn, not images.
    """
    rng = np.random.default_rng(0)
    seeds, photos = (rng.integers(n, size=(draws, n)) for n in differences.shape)
    return np.quantile(differences[seeds[:, :, None], photos[:, None, :]].mean((1, 2)), [0.025, 0.975])


def rows(lines, view=None):
    """One dict per suite, number of steps, adapter and rate: mean and standard deviation over seeds, and its lead over CEA.

    The difference is paired, seed by seed and photograph by photograph, with CEA in the same backbone (with or without SCA).
    So is the gain over "none"; beside it what share it is of the gain of the backbone that is "told" what to restore.
    """
    found = defaultdict(dict)                 # (suite, steps, adapter, rate) -> seed -> line
    for line in lines:
        r = line["recipe"]
        found[r["suite"], r.get("steps"), r["adapter"], r.get("adapter_lr")][r.get("seed", 0)] = line
    results = []
    for (suite_name, steps, adapter, rate), runs in found.items():
        line, table = next(iter(runs.values())), np.array([matrix(run, view) for run in runs.values()])  # (seed, photo, entry)
        means, entries = table.mean((1, 2)), list(next(iter(line["psnr"].values())))
        label = adapter if rate in (None, recipe_for(adapter).adapter_lr) else f"{adapter}, rate {rate:g}"
        row = {"suite": suite_name, "steps": steps, "adapter": adapter, "label": label, "seeds": sorted(runs),
               "view": view or next(iter(line["psnr"])), "psnr": float(means.mean()),
               "sd": float(means.std(ddof=1)) if len(means) > 1 else None,
               "entries": dict(zip(entries, map(float, table.mean((0, 1))))),
               "parameters": line.get("parameters"), "multiplications": line.get("multiplications_per_pixel"),
               "milliseconds": float(np.median([run["milliseconds_per_step"] for run in runs.values()])) if steps else None}
        for base in ("cea", "none"):
            same = base + ":sca=false" * ("sca=false" in adapter)
            usual = found.get((suite_name, steps, same, recipe_for(same).adapter_lr))       # of several rates
            other = usual or next((other for key, other in found.items() if key[:3] == (suite_name, steps, same)), {})
            both = sorted(set(other) & set(runs))
            if both and adapter != same:
                ahead = np.array([matrix(runs[seed], view) - matrix(other[seed], view) for seed in both])
                row[f"minus_{base}"] = {entry: (float(d.mean()), *map(float, interval(d)))
                                        for entry, d in [("all", ahead.mean(-1)), *zip(entries, np.moveaxis(ahead, -1, 0))]}
        results.append(row)
    for row in results:
        ceiling = [row["suite"], row["steps"], "told" + ":sca=false" * ("sca=false" in row["adapter"])]
        above = [other["minus_none"]["all"] for other in results if "minus_none" in other
                 and [other["suite"], other["steps"], other["adapter"]] == ceiling]
        row["ceiling"] = above[0][0] if above and above[0][1] > 0 else None     # a gain that may be zero is no ceiling
    return results


def format_rows(results):
    """The rows as text: a table for each suite and number of steps, then the differences to CEA of each degradation."""
    tables = defaultdict(list)
    for row in results:
        if row["steps"]:
            tables[row["suite"], row["steps"]].append(row)
    text = []
    for (suite_name, steps), table in tables.items():
        whole = [row for row in results if row["suite"] == suite_name and not row["steps"]] + table
        entries, width, seeds = list(table[0]["entries"]), max(len(row["label"]) for row in whole), table[0]["seeds"]
        text += [f"{suite_name}, {steps} steps, seeds {seeds[0]}-{seeds[-1]}, {table[0]['view']}: PSNR in dB, its standard "
                 "deviation over seeds, minus CEA's and none's with 95 % intervals, share of told's gain over none",
                 f"{'':{width}s} {'param.':>7s} {'mult./px':>8s} {'ms/step':>7s} {'PSNR':>6s} {'sd':>4s}  {'minus CEA':21s} "
                 f"{'minus none':21s} {'share':>5s}" + "".join(f" {e:>6s}" for e in entries)]
        for row in whole:
            cost = f"{row['parameters']:7d} {row['multiplications']:8d} {row['milliseconds']:7.1f}" if row["steps"] else " " * 24
            sd = f"{row['sd']:4.2f}" if row["sd"] is not None else "    "
            share = f"{row['minus_none']['all'][0] / row['ceiling']:5.0%}" if row["ceiling"] and "minus_none" in row else ""
            text.append(f"{row['label']:{width}s} {cost} {row['psnr']:6.2f} {sd}  {_difference(row, 'all'):21s} "
                        f"{_difference(row, 'all', 'minus_none'):21s} {share:5s}"
                        + "".join(f" {row['entries'][e]:{max(6, len(e))}.2f}" for e in entries))
        compared = [row for row in table if "minus_cea" in row]
        if compared and len(entries) > 1:
            text += ["", "minus CEA, per degradation"]
            text += [f"{'':{width}s}" + "".join(f" {e:>21s}" for e in entries)]
            text += [f"{row['label']:{width}s}" + "".join(f" {_difference(row, e):>21s}" for e in entries) for row in compared]
        text.append("")
    return "\n".join(text)


def _difference(row, entry, base="minus_cea"):
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[base][entry]) if base in row else ""


# ---- what is printed and drawn ---------------------------------------------------------------------------------------

def publish(lines, folder):
    """Print the tables of `compare`'s lines, draw the pictures into the folder."""
    for view in lines[0]["psnr"]:
        print(format_rows(rows(lines, view)))
    quality(rows(lines), folder / "cost.png")
    print(f"{machine()}; runs, models and pictures in {folder}")


def quality(results, path):
    """PSNR of `rows` against multiplications, one panel per suite, a bar of one standard deviation over seeds."""
    suites = list(dict.fromkeys(row["suite"] for row in results if row["steps"]))
    figure = Figure((4.4 * len(suites), 3.8), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites):
        for i, label in enumerate(dict.fromkeys(row["label"] for row in results if row["suite"] == title and row["steps"])):
            x, y, sd = zip(*[(row["multiplications"], row["psnr"], row["sd"] or 0) for row in results
                             if (row["suite"], row["label"]) == (title, label)])
            axes.errorbar(x, y, sd, fmt="osD^v<>P*X"[i // 10 % 10] + "-", color=f"C{i % 10}", lw=1, capsize=2, label=label)
        axes.set(title=title, ylabel="PSNR (dB)", xlabel="multiplications per pixel")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
