"""What an adapter buys: adapters x suites x seeds, trained on the very same batches and tested on photographs that no choice has seen.

Every finished run is one line of runs.jsonl and a model beside it, so a grid can be stopped, resumed and enlarged; tables are made of the
lines alone. How to read the intervals: notebooks/06_does_it_hold.
"""
import json
import math
import multiprocessing
import re
import signal
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import islice, product
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from tqdm import tqdm

from .degrade import degrade, suite
from .errors import InputError
from .feed import batch, leaves_of, pair, photographs_of
from .nafnet import by_adapter, load_model, nafnet, save_model, shapes
from .ops import backend, reference
from .ops.cpu import keep_memory
from .params import Params, load, save
from .restore import TEST_SEED, make_folder, restore
from .scenes import Scene, photographs
from .train import Recipe, advance, arrays, interruptible, machine, recipe_for, start

HEADLINE = ("wider", "static", "mlp", "descriptor", "prompt", "experts-image", "experts-token", "cea")
SUITES = ("aio3", "aio5", "cdd11", "patchwork")
VIEWS = ("photographs", "crops")
TOGETHER = 10_000                             # steps of all runs of a cell together, at most: the unit that one process works on
SAVE_SECONDS = 60                             # between two states of a cell written for resuming
CLASSICAL = {"total variation": (lambda image, s: denoise_tv_chambolle(image, s, channel_axis=-1), (0.02, 0.05, 0.1, 0.2)),
             "non-local means": (lambda image, s: denoise_nl_means(image, 5, 6, s, channel_axis=-1), (0.03, 0.06, 0.1, 0.2))}


# ---- the grid --------------------------------------------------------------------------------------------------------

def grid(suites=SUITES, adapters=HEADLINE, seeds=5, steps=(1000,), rates=(None,)):
    """The Recipes of all combinations; a rate of None is the one that train.ADAPTER_LR holds for the adapter."""
    return [recipe_for(a, suite=s, seed=seed, steps=n, **{} if rate is None else {"adapter_lr": rate})
            for s, n, seed, a, rate in product(suites, steps, range(seeds), adapters, rates)]


def cells(recipes):
    """Recipes that share their batches, in lists of at most TOGETHER steps in all: what one process trains side by side."""
    alike = defaultdict(list)
    for recipe in recipes:
        alike[replace(recipe, adapter="", adapter_lr=0)].append(recipe)
    for shared, members in alike.items():
        size = max(1, TOGETHER // shared.steps)
        yield from (members[i:i + size] for i in range(0, len(members), size))


def name(recipes):
    """A file name for the runs of a cell: the first one's in words, and a digest of all."""
    first, digest = recipes[0], sha256(json.dumps(list(map(asdict, recipes))).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.+-]", "_", f"{first.suite}-{first.adapter}-{first.steps}-seed{first.seed}-{digest}")


def finished(folder):
    """The lines of a folder's runs.jsonl, a list of dicts; InputError for a damaged one."""
    path = Path(folder) / "runs.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (OSError, ValueError):
        raise InputError(f"{path}: not lines of JSON") from None


def compare(recipes, folder, split="test", jobs=2):
    """Train and test what `folder` does not hold yet -> the lines of all recipes, and of the degraded and classical rows, as `finished`.

    split: the photographs tested on, "test" or "validation". Ctrl-C saves the cells under way and raises KeyboardInterrupt.
    """
    folder, wanted = Path(folder), [asdict(recipe) for recipe in recipes]
    for recipe in recipes:
        by_adapter(recipe.adapter), suite(recipe.suite)       # what is misspelt is refused before anything is trained
    make_folder(folder / "models")
    have = [line["recipe"] for line in finished(folder) if line["split"] == split]
    suites = dict.fromkeys(recipe.suite for recipe in recipes)
    tasks = [(s, split) for s in suites if split == "test" and {"suite": s, "adapter": "degraded"} not in have]
    tasks += cells([recipe for recipe, line in zip(recipes, wanted) if line not in have])
    steps = sum(len(task) * task[0].steps for task in tasks if isinstance(task, list))
    with interruptible() as interrupted, open(folder / "runs.jsonl", "a") as file, \
            tqdm(total=steps, desc="comparing", unit="step", disable=None) as bar:
        for message in work(tasks, folder, split, jobs, interrupted):
            if isinstance(message, dict):
                file.write(json.dumps(message) + "\n")
                file.flush()
                bar.set_postfix_str(f"{message['recipe']['suite']}, {message['recipe']['adapter']}: {matrix(message).mean():.2f} dB")
            else:
                bar.update(message)
        if interrupted():
            raise KeyboardInterrupt
    wanted += [{"suite": s, "adapter": row} for s in suites for row in ("degraded", *CLASSICAL)]
    return [line for line in finished(folder) if line["recipe"] in wanted and line["split"] == split]


def work(tasks, folder, split, jobs, interrupted):
    """Hand the tasks to so many processes; yields what they tell: numbers of steps done, and finished lines.

    When `interrupted` says so, each process saves its cell, tells what is finished, and ends.
    """
    context, tasks, workers, told = multiprocessing.get_context("spawn"), iter(tasks), {}, False
    try:
        for task in islice(tasks, jobs):
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_work, args=(theirs, folder, split), daemon=True)
            workers[ours].start()
            theirs.close()
            ours.send(task)
        while workers:
            if interrupted() and not told:
                tasks, told = iter(()), True
                for ours in workers:
                    ours.send(None)
            for ours in wait(workers, timeout=0.5):
                try:
                    message = ours.recv()
                except EOFError:
                    raise InputError("a process of the comparison has died, perhaps for want of memory") from None
                if isinstance(message, InputError):
                    raise message
                if message == "next":
                    task = next(tasks, None)
                    if not told:
                        ours.send(task)
                    if task is None:
                        workers.pop(ours).join()
                else:
                    yield message
    finally:
        for process in workers.values():
            process.terminate()
            process.join()


def _work(connection, folder, split):
    """One process: trains and tests cells, or tests the rows without a network, until there are none. It ends when the other end does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory()
    try:
        while (task := connection.recv()) is not None:
            for message in (train_cell(task, folder, split, connection.poll) if isinstance(task, list) else without_network(*task)):
                connection.send(message)
            connection.send("next")
    except InputError as error:
        connection.send(error)
    except (EOFError, ConnectionError):       # whoever asked has gone
        pass


# ---- one cell --------------------------------------------------------------------------------------------------------

def train_cell(recipes, folder, split, stopped=lambda: False):
    """Train recipes that differ in nothing but adapter and its rate on the same batches, then test them.

    Yields the number of steps done, again and again, then one line per recipe. When `stopped` says so, saves and ends early.
    """
    shared, ops, configs = recipes[0], backend(recipes[0].backend), [by_adapter(recipe.adapter) for recipe in recipes]
    path = folder / "models" / f"{name(recipes)}.state.safetensors"
    flats, done, times = [None] * len(recipes), 0, [[] for _ in recipes]
    if path.exists():
        tensors, metadata = load(path)
        done, times = metadata["step"], metadata["seconds"]
        flats = [{key: tensors[f"{i}.{key}"] for key in "wmv"} for i in range(len(recipes))]
        yield done * len(recipes)
    states = [start(recipe, config, ops, flat) for recipe, config, flat in zip(recipes, configs, flats)]
    scenes, entries, saved = _scenes(shared.seed, shared.scenes, shared.patch), suite(shared.suite), time.perf_counter()
    while done < shared.steps:
        if stopped() or time.perf_counter() - saved > SAVE_SECONDS:
            save(path, {f"{i}.{key}": value for i, state in enumerate(states) for key, value in arrays(state, ops).items()}, step=done, seconds=times)
            saved = time.perf_counter()
            if stopped():
                return
        pairs = batch(shared, scenes, entries, done)
        done += 1
        for state, recipe, config, seconds in zip(states, recipes, configs, times):
            began = time.perf_counter()
            advance(state, *pairs, done, recipe, config, ops)
            seconds.append(time.perf_counter() - began)
        yield len(recipes)
    for state, recipe, config, seconds in zip(states, recipes, configs, times):
        p = state.p.over(ops.to_host(state.p.flat))
        save_model(folder / "models" / f"{name([recipe])}.safetensors", p, config)
        yield {"recipe": asdict(recipe), "split": split, "parameters": p.flat.size, "multiplications_per_pixel": multiplications(config),
               "milliseconds_per_step": round(1e3 * float(np.median(seconds)), 2),
               "psnr": tested(lambda image, entry: restore(image, p, config), shared.suite, split),
               "machine": machine(), "versions": {"tinycea": version("tinycea"), "numpy": np.__version__}}
    path.unlink(missing_ok=True)


@cache
def _scenes(seed, scenes, patch):
    recipe = Recipe(seed=seed, scenes=scenes, patch=patch)
    return leaves_of(recipe), photographs_of(recipe)


class Counted(np.ndarray):
    """An array that counts the multiplications it takes part in: matrix products and elementwise ones, as `ops.reference` defines them."""
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
    nafnet(np.zeros((1, side, side, 3), np.float32).view(Counted), p, config, reference)
    return round(Counted.count / side**2)


# ---- the test --------------------------------------------------------------------------------------------------------

@cache
def degraded(suite_name, split, view):
    """(entry, photograph, degraded, clean) of a split, always the same, about twelve times each photograph. InputError for another view.

    view: "photographs", whole as in use, or "crops" of 96 x 96 pixels, degraded one by one as in training: a network that has learned
    on patches what an image's averages mean may be misled by those of a whole photograph.
    """
    entries, draws = suite(suite_name), {"photographs": 12, "crops": 48}[view]
    found = []
    for j, (photo, clean) in enumerate(photographs(split).items()):
        for entry, draw in product(entries, range(max(1, draws // len(entries)))):
            rng, scene = np.random.default_rng([TEST_SEED, j, draw, *entry.encode()]), Scene(clean)
            found.append((entry, photo, *(pair(scene, entry, 96, rng) if view == "crops" else (degrade(scene, entry, rng), clean))))
    return found


def tested(restorer, suite_name, split, views=VIEWS):
    """PSNR in dB of restorer(image, entry), averaged over draws: view -> entry -> photograph -> dB."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for view in views:
        for entry, photo, image, clean in degraded(suite_name, split, view):
            found[view][entry][photo].append(psnr(np.clip(restorer(image, entry), 0, 1), clean))
    return {view: {entry: {photo: round(float(np.mean(values)), 4) for photo, values in photos.items()} for entry, photos in entries.items()}
            for view, entries in found.items()}


def psnr(image, clean):
    """In dB, of images in [0,1]."""
    return -10 * np.log10(np.mean((image - clean)**2, dtype=float))


def without_network(suite_name, split):
    """The lines of the degraded input and of two classical restorers; these are told the degradation, each with its best strength.

    The best of four on the validation photographs. A favor: no network is told.
    """
    def line(row, restorer, **more):
        return {"recipe": {"suite": suite_name, "adapter": row}, "split": split, "psnr": tested(restorer, suite_name, split)} | more

    lines = [line("degraded", lambda image, entry: image)]
    for row, (restorer, strengths) in CLASSICAL.items():
        scores = [tested(lambda image, entry: restorer(image, s), suite_name, "validation", ("crops",))["crops"] for s in strengths]
        best = {entry: strengths[np.argmax([np.mean(list(score[entry].values())) for score in scores])] for entry in scores[0]}
        lines.append(line(row, lambda image, entry: restorer(image, best[entry]), strengths=best))
    return lines


# ---- the table -------------------------------------------------------------------------------------------------------

def matrix(line, view="photographs"):
    """PSNR in dB of a line: (photographs, entries)."""
    return np.array([list(photos.values()) for photos in line["psnr"][view].values()]).T


def interval(differences, draws=10_000):
    """95 % bootstrap interval of the mean of paired differences (seeds, photographs): both are drawn anew, with replacement.

    Crops, degradations and draws of one photograph are not independent, so photographs are drawn, not images.
    """
    rng = np.random.default_rng(0)
    seeds, photos = (rng.integers(n, size=(draws, n)) for n in differences.shape)
    return np.quantile(differences[seeds[:, :, None], photos[:, None, :]].mean((1, 2)), [0.025, 0.975])


def rows(lines, view="photographs"):
    """One dict per suite, number of steps, adapter and rate: mean and standard deviation over seeds, and how far it is ahead of CEA.

    The difference is paired, seed by seed and photograph by photograph, with CEA in the same backbone (with or without SCA).
    """
    found = defaultdict(dict)                 # (suite, steps, adapter, rate) -> seed -> line
    for line in lines:
        r = line["recipe"]
        found[r["suite"], r.get("steps"), r["adapter"], r.get("adapter_lr")][r.get("seed", 0)] = line
    results = []
    for (suite_name, steps, adapter, rate), runs in found.items():
        line, table = next(iter(runs.values())), np.array([matrix(run, view) for run in runs.values()])      # (seeds, photographs, entries)
        means, entries = table.mean((1, 2)), list(line["psnr"][view])
        label = adapter if rate in (None, recipe_for(adapter).adapter_lr) else f"{adapter}, rate {rate:g}"
        row = {"suite": suite_name, "steps": steps, "adapter": adapter, "label": label, "seeds": sorted(runs), "view": view,
               "psnr": float(means.mean()), "sd": float(means.std(ddof=1)) if len(means) > 1 else None,
               "entries": dict(zip(entries, map(float, table.mean((0, 1))))),
               "parameters": line.get("parameters"), "multiplications": line.get("multiplications_per_pixel"),
               "milliseconds": float(np.median([run["milliseconds_per_step"] for run in runs.values()])) if steps else None}
        same = "cea:sca=false" if "sca=false" in adapter else "cea"
        cea = next((other for key, other in found.items() if key[:3] == (suite_name, steps, same)), {})
        both = sorted(set(cea) & set(runs))
        if both and adapter != same:
            ahead = np.array([matrix(runs[seed], view) - matrix(cea[seed], view) for seed in both])
            row["minus_cea"] = {entry: (float(d.mean()), *map(float, interval(d)))
                                for entry, d in [("all", ahead.mean(-1)), *zip(entries, np.moveaxis(ahead, -1, 0))]}
        results.append(row)
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
        entries, width = list(table[0]["entries"]), max(len(row["label"]) for row in whole)
        text += [f"{suite_name}, {steps} steps, seeds {table[0]['seeds'][0]}-{table[0]['seeds'][-1]}, {table[0]['view']}: PSNR in dB, its standard "
                 "deviation over seeds, minus CEA's with a 95 % interval", f"{'':{width}s} {'param.':>7s} {'mult./px':>8s} {'ms/step':>7s} "
                 f"{'PSNR':>6s} {'sd':>4s}  {'minus CEA':21s}" + "".join(f" {e:>{max(6, len(e))}s}" for e in entries)]
        for row in whole:
            cost = f"{row['parameters']:7d} {row['multiplications']:8d} {row['milliseconds']:7.1f}" if row["steps"] else f"{'':24s}"
            sd = f"{row['sd']:4.2f}" if row["sd"] is not None else "    "
            text.append(f"{row['label']:{width}s} {cost} {row['psnr']:6.2f} {sd}  {_difference(row.get('minus_cea', {}).get('all')):21s}"
                        + "".join(f" {row['entries'][e]:{max(6, len(e))}.2f}" for e in entries))
        compared = [row for row in table if "minus_cea" in row]
        if compared and len(entries) > 1:
            text += ["", "minus CEA, per degradation"]
            text += [f"{'':{width}s}" + "".join(f" {e:>21s}" for e in entries)]
            text += [f"{row['label']:{width}s}" + "".join(f" {_difference(row['minus_cea'][e]):>21s}" for e in entries) for row in compared]
        text.append("")
    return "\n".join(text)


def _difference(found):
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found) if found else ""


def examples(recipes, folder, split, size=128):
    """A crop of the last photograph in each suite: degraded, restored by each of the recipes with seed 0, clean -> a dict a suite."""
    results = []
    for suite_name in dict.fromkeys(recipe.suite for recipe in recipes):
        entry, photo, image, clean = degraded(suite_name, split, "photographs")[-1]
        corner = tuple(slice((n - size) // 2, (n + size) // 2) for n in clean.shape[:2])
        images = {f"{photo}, {entry}": image}
        images |= {recipe.adapter: restore(image, *load_model(Path(folder) / "models" / f"{name([recipe])}.safetensors"))
                   for recipe in recipes if (recipe.suite, recipe.seed, recipe.steps) == (suite_name, 0, recipes[0].steps)}
        results.append({title: (image[corner], psnr(image[corner], clean[corner])) for title, image in images.items()}
                       | {"clean": (clean[corner], None)})
    return results
