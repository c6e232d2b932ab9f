"""The data of a run: degraded and clean patches, made ahead of the training step in processes of their own."""
import sys
from collections import deque
from contextlib import contextmanager
from functools import cache, lru_cache

import numpy as np

from .degradations import apply, suite
from .images import as_rgb, folder
from .runtime import InputError, pool
from .scenes import Scene, crop, dead_leaves, matched, photographs, pyramid, read_pair, varied

INIT, SCENES, BATCHES = 1, 2, 3               # the random streams of a run: default_rng([seed, stream, ...])
LARGEST = 1500                                # pixels a side of a photograph in memory; larger ones at half, a quarter, ...
decoded = lru_cache(32)(read_pair)            # the last pairs stay in memory: 6 bytes a pixel each, 12 if they have 16 bits


@cache
def leaves(seed, i, patch):
    """Scene i of dead leaves to train on, at all sizes: a patch must show part of a scene, or nearly all of it as in use."""
    return pyramid(dead_leaves(256, np.random.default_rng([seed, SCENES, i])), patch)


@cache
def photos(images, patch):
    """Scenes of the photographs to train on, at all sizes up to LARGEST: the user's folder, or scikit-image's training split."""
    scenes = []
    for _, image in folder(images) if images else photographs("train").items():
        levels = pyramid(Scene(image), patch)
        scenes += [level for level in levels if max(level.image.shape) <= LARGEST] or levels[-1:]
    return scenes


def entries_of(recipe):
    """The entries of the recipe's suite; none if it has pairs alone."""
    return suite(recipe.suite or "") if recipe.suite or not recipe.pairs else ()


@cache
def divided(degraded, clean):
    """Pairs of files in two folders: to train on, held out (of every tenth clean image by name), and files without a partner."""
    found, alone = matched(degraded, clean)
    held = set(sorted({partner for _, partner in found})[::10])
    train = [pair for pair in found if pair[1] not in held]
    if not train:
        raise InputError(f"{degraded} and {clean}: expected two clean images with a partner at least, {len(held)} found")
    return train, [pair for pair in found if pair[1] in held], alone


def paired(recipe, rng):
    """Degraded and clean patch (P,P,3) of a random pair, cropped, flipped and turned alike."""
    files = divided(*recipe.pairs)[0]
    scene = crop(decoded(*files[rng.integers(len(files))]), recipe.patch, rng)
    return as_rgb(scene.degraded), as_rgb(scene.image)


def batch(recipe, step, degrade=apply):
    """Degraded and clean patches (B,P,P,3) of one step, half from dead leaves and half from photographs.

    Of a recipe with pairs, the first half comes from these, as they are, and without a suite the whole.
    Unless the recipe is nominal, the network shall learn to do no harm: scenes are `varied`, one patch in ten is not degraded
    at all, the others with a strength of U(0.5, 1.3), and every other gray one as by a gray camera, all channels alike.
    """
    rng, entries, pairs = np.random.default_rng([recipe.seed, BATCHES, step]), entries_of(recipe), []
    for i in range(recipe.batch):
        if recipe.pairs and (2 * i < recipe.batch or not entries):
            pairs.append(paired(recipe, rng))
            continue
        which = int(rng.integers(recipe.scenes))
        levels = photos(recipe.images, recipe.patch) if i % 2 else leaves(recipe.seed, which, recipe.patch)
        scene, entry = levels[rng.integers(len(levels))], entries[rng.integers(len(entries))]
        scene, strength = crop(scene, recipe.patch, rng), 1
        if not recipe.nominal:
            scene, strength = varied(scene, rng), rng.uniform(0.5, 1.3)
            entry = "clean" if rng.random() < 0.1 else entry
        degraded = degrade(scene, entry, rng, strength)
        if not recipe.nominal and np.ptp(scene.image, -1).max() == 0 and rng.random() < 0.5:
            degraded = np.repeat(degraded[..., :1], 3, -1)
        pairs.append((degraded, scene.image))
    return [np.stack(images) for images in zip(*pairs)]


@contextmanager
def feed(recipe, first=0, workers=1):
    """Within: an iterator over the `batch`es of the steps from `first` on, the same whatever the number of workers.

    InputError for photographs that cannot be read; files without a partner are named on stderr. A script that uses it needs
    `if __name__ == "__main__"` around it.
    """
    for file in divided(*recipe.pairs)[2] if recipe.pairs else ():
        print(f"skipping {file}: has no partner", file=sys.stderr)
    with pool(workers) as executor:
        yield _ahead(executor, recipe, range(first, recipe.steps), workers + 1)


def _ahead(executor, recipe, steps, count):
    """The batches in their order, so many asked for ahead."""
    asked = deque(executor.submit(batch, recipe, step) for step in steps[:count])
    for step in steps:
        yield asked.popleft().result()
        if step + count < steps.stop:
            asked.append(executor.submit(batch, recipe, step + count))
