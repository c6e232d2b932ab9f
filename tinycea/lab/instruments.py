"""What the instruments read of CEA where the answer is known: the tasks of `tinycea mechanism`, networks taught on stains.

    python -m tinycea.lab.instruments TEST MODEL [MODEL ...]

TEST is the 200 test images of BSDS500 (the last hundred by name are used), MODEL a network taught on `stains`. What
affinity maps say where it is not known: notebooks/06_what_the_maps_say.
"""
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from .. import ablations
from ..degradations import stains
from ..evaluation import TEST_SEED, psnr
from ..nafnet import anatomies, centered
from ..ops import cpu
from ..plots import label_region, show
from ..runtime import machine
from ..scenes import Scene, crop, photographs
from ..zoo import load_model
from . import mechanism

# The CPU's ops, but every CEA layer is given the routing bases and residual directions of another image.
OTHERS = SimpleNamespace(**vars(cpu) | {
    "assembly": lambda x, tokens, A, U: cpu.assembly(x, tokens, np.roll(A, 1, 0), np.roll(U, 1, 0))})


def rank(added):
    """Effective rank of what is added to the tokens (B,N,C) of an image: the exponential of the entropy of its energies."""
    added = np.float64(added)
    energy = np.maximum(np.linalg.eigvalsh(added.swapaxes(1, 2) @ added), 0) + 1e-30
    share = energy / energy.sum(1, keepdims=True)
    return np.exp(-(share * np.log(share)).sum(1)).mean()


def regions(axes, mask, names):
    """The mask (H,W,K) as gray levels, each region labeled with its degradation at its center."""
    label = mask.argmax(-1)
    show(axes, label, "regions", cmap="gray", vmin=-0.5, vmax=len(names) - 0.5)
    for k, name in enumerate(names):
        label_region(axes, label == k, name)


def recognized(S, a):
    """How often least squares on the affinities S (B,N,R) finds the largest amount of a (B,N,K): fitted to every other token.

    "each": fitted anew in each image; "all": once for all of them, which asks that A means the same in every image.
    """
    features, largest = np.concatenate((S, np.ones((*S.shape[:2], 1))), -1), mechanism.largest(a)

    def right(f, y):
        w = np.linalg.lstsq(f[::2], y[::2], rcond=None)[0]
        return np.mean((f[1::2] @ w).argmax(-1) == y[1::2].argmax(-1))
    joined = (m.reshape(-1, m.shape[-1]) for m in (features, largest))
    return f"{np.mean([right(f, y) for f, y in zip(features, largest)]):6.2f} {right(*joined):6.2f}"


def line(name, layers, a, restore):
    """One row: restore(ops, level) -> mean PSNR in dB."""
    base, mean_rank = restore(cpu, "token"), np.mean([rank(layer["S"] @ layer["U"]) for layer in layers])
    print(f"{name:44s} {mean_rank:6.2f} {recognized(layers[-1]['S'], a)} {base:9.2f} "
          f"{restore(cpu, 'image') - base:+9.2f} {restore(OTHERS, 'token') - base:+9.2f}")


def network(path, entry, images, cleans, amounts):
    """The row of a network."""
    p, config = load_model(path)
    layers = list(anatomies(centered(images, p, config)[1]).values())
    step = round((images[0, ..., 0].size / layers[-1]["S"].shape[1])**0.5)
    a = amounts.reshape(len(images), images.shape[1] // step, step, images.shape[2] // step, step, -1).mean((2, 4))

    def restore(ops, level):
        changed = replace(config, adapter=replace(config.adapter, level=level))
        return np.mean([psnr(np.clip(y, 0, 1), J) for y, J in zip(centered(images, p, changed, ops, keep=False)[0], cleans)])
    line(f"{entry}, {path.rsplit('/', 1)[-1]}"[:44], layers, a.reshape(len(a), -1, a.shape[-1]), restore)


if __name__ == "__main__":
    folder, *paths = sys.argv[1:]
    print("rank: effective rank of what a layer adds, mean over layers and images\n"
          "each, all: share of tokens whose largest amount a linear classifier finds in the last layer's affinities, fitted to\n"
          "each image by itself, or to all\n"
          "PSNR in dB; its change with affinities averaged over the image; with A and U of another image\n\n"
          f"{'':44s} {'rank':>6s} {'each':>6s} {'all':>6s} {'PSNR':>9s} {'averaged':>9s} {'other':>9s}")
    for name in ("regions", "lamps"):
        task, config = mechanism.TASKS[name], mechanism.CEA
        p, (x, J, a) = mechanism.teach(task, config, 2000), mechanism.pictures(task, folder)
        layer = ablations.anatomy(ablations.forward(x, p, config)[1])
        line(f"mechanism, {name}", [layer], a.reshape(len(a), -1, task.K), lambda ops, level: mechanism.psnr(
            ablations.forward(x, p, replace(config, level=level), ops)[0], J).mean())
        print(f"{'  what there is to add':44s} {rank((mechanism.color(x) - J).reshape(len(a), -1, 3)):6.2f}")
    scenes = [crop(Scene(photo), 96, np.random.default_rng([TEST_SEED, i]))
              for i, photo in enumerate(photographs("test", folder).values())]
    for path in paths:
        for entry, overlapping in (("apart", False), ("overlapping", True)):
            made = [stains(scene, np.random.default_rng([TEST_SEED, i, 1]), overlapping) for i, scene in enumerate(scenes)]
            network(path, entry, *map(np.stack, ([image for image, _ in made], [s.image for s in scenes], [a for _, a in made])))
    print(machine())
