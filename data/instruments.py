"""What the instruments read of CEA: where the answer is known (the tasks of `tinycea mechanism`, stains), and on aio5.

    python data/instruments.py TEST MODEL [MODEL ...]

TEST is the 200 test images of BSDS500 (the last hundred by name are used), MODEL a network that the comparison taught `stains`
or `aio5`: its file's name begins so. What affinity maps say where it is not known: notebooks/06_what_the_maps_say.
"""
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tinycea import ablations
from tinycea.degradations import apply, stains, suite
from tinycea.evaluation import TEST_SEED, psnr
from tinycea.lab import mechanism
from tinycea.lab.explain import rank
from tinycea.nafnet import anatomies, centered
from tinycea.ops import cpu
from tinycea.runtime import machine
from tinycea.scenes import Scene, crop, photographs
from tinycea.zoo import load_model

# The CPU's ops, but every CEA layer is given the routing bases and residual directions of another image.
OTHERS = SimpleNamespace(**vars(cpu) | {
    "assembly": lambda x, tokens, A, U: cpu.assembly(x, tokens, np.roll(A, 1, 0), np.roll(U, 1, 0))})


def recognized(S, a):
    """How often least squares on the affinities S (B,N,R) finds the largest amount of a (B,N,K): fitted to every other token.

    "each": fitted anew in each image, where the largest is not the same everywhere; "all": once for all images, which asks that
    A means the same in every one.
    """
    features, largest = np.concatenate((S, np.ones((*S.shape[:2], 1))), -1), mechanism.largest(a)

    def right(f, y):
        w = np.linalg.lstsq(f[::2], y[::2], rcond=None)[0]
        return np.mean((f[1::2] @ w).argmax(-1) == y[1::2].argmax(-1))
    each = f"{np.mean([right(f, y) for f, y in zip(features, largest)]):6.2f}" if np.ptp(largest, 1).any() else " " * 6
    return f"{each} {right(*(m.reshape(-1, m.shape[-1]) for m in (features, largest))):6.2f}"


def line(name, layers, a, restore):
    """One row: restore(ops, level) -> mean PSNR in dB."""
    base, mean_rank = restore(cpu, "token"), np.mean([rank(layer["S"] @ layer["U"]) for layer in layers])
    print(f"{name:34s} {mean_rank:6.2f} {recognized(layers[-1]['S'], a)} {base:9.2f} "
          f"{restore(cpu, 'image') - base:+9.2f} {restore(OTHERS, 'token') - base:+9.2f}")


def network(name, path, images, cleans, amounts):
    """The row of a network."""
    p, config = load_model(path)
    layers = list(anatomies(centered(images, p, config)[1]).values())
    step = round((images[0, ..., 0].size / layers[-1]["S"].shape[1])**0.5)
    a = amounts.reshape(len(images), images.shape[1] // step, step, images.shape[2] // step, step, -1).mean((2, 4))

    def restore(ops, level):
        changed = replace(config, adapter=replace(config.adapter, level=level))
        return np.mean([psnr(np.clip(y, 0, 1), J) for y, J in zip(centered(images, p, changed, ops, keep=False)[0], cleans)])
    line(name, layers, a.reshape(len(a), -1, a.shape[-1]), restore)


def one_of(entries):
    """(scene, i) -> the i-th scene under the i-th degradation, in turn, and its name as amounts that are the same everywhere."""
    def degraded(scene, i):
        label = np.zeros((*scene.image.shape[:2], len(entries)))
        label[..., i % len(entries)] = 1
        return apply(scene, entries[i % len(entries)], np.random.default_rng([TEST_SEED, i, 1])), label
    return degraded


# Suite -> what is asked of its networks: (scene, i) -> image, amounts (H,W,K).
ASKED = {"stains": {"apart": lambda scene, i: stains(scene, np.random.default_rng([TEST_SEED, i, 1])),
                    "overlapping": lambda scene, i: stains(scene, np.random.default_rng([TEST_SEED, i, 1]), True)},
         "aio5": {"aio5": one_of(suite("aio5"))}}


if __name__ == "__main__":
    folder, *paths = sys.argv[1:]
    print("rank: effective rank of what a layer adds, mean over layers and images\n"
          "each, all: share of tokens whose largest amount, or degradation, a linear classifier finds in the last layer's\n"
          "affinities, fitted to each image by itself, or to all\n"
          "PSNR in dB; its change with affinities averaged over the image; with A and U of another image\n\n"
          f"{'':34s} {'rank':>6s} {'each':>6s} {'all':>6s} {'PSNR':>9s} {'averaged':>9s} {'other':>9s}")
    for name in ("regions", "lamps"):
        task, config = mechanism.TASKS[name], mechanism.CEA
        p, (x, J, a) = mechanism.teach(task, config, 2000), mechanism.pictures(task, folder)
        layer = ablations.anatomy(ablations.forward(x, p, config)[1])
        line(f"mechanism, {name}", [layer], a.reshape(len(a), -1, task.K), lambda ops, level: mechanism.psnr(
            ablations.forward(x, p, replace(config, level=level), ops)[0], J).mean())
        print(f"{'  what there is to add':34s} {rank((mechanism.color(x) - J).reshape(len(a), -1, 3)):6.2f}")
    scenes = [crop(Scene(photo), 96, np.random.default_rng([TEST_SEED, i]))
              for i, photo in enumerate(photographs("test", folder).values())]
    for path in paths:
        taught, adapter = Path(path).name.partition("-4000-")[0].split("-", 1)
        for entry, degraded in ASKED[taught].items():
            made = [degraded(scene, i) for i, scene in enumerate(scenes)]
            network(f"{adapter}, {entry}", path, *map(np.stack, (
                [image for image, _ in made], [scene.image for scene in scenes], [a for _, a in made])))
    print(machine())
