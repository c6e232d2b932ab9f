"""The data of a run: degraded and clean patches, made ahead of the training step in processes of their own."""
import multiprocessing
import signal
from contextlib import contextmanager
from itertools import cycle

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:                           # Windows
    fcntl = None

from .degrade import degrade, suite
from .errors import InputError
from .scenes import Scene, crop, dead_leaves, folder, photographs, pyramid

INIT, SCENES, BATCHES = 1, 2, 3               # the random streams of a run: default_rng([seed, stream, ...])
PIPE = 2**20                                  # bytes between a worker and the trainer: the most that Linux grants to anyone
LARGEST = 1500                                # pixels a side of a photograph in memory; larger ones are used at half, a quarter, ...


def photographs_of(recipe):
    """Scenes of the photographs to train on, at all sizes up to LARGEST: the user's folder, or scikit-image's training split."""
    scenes = []
    for _, image in folder(recipe.images) if recipe.images else photographs("train").items():
        levels = pyramid(Scene(image), recipe.patch)
        scenes += [level for level in levels if max(level.image.shape) <= LARGEST] or levels[-1:]
    return scenes


def leaves_of(recipe):
    """The dead-leaves Scenes to train on, at all sizes: a patch must show part of a scene, or nearly all of it as in use."""
    return [level for i in tqdm(range(recipe.scenes), desc="dead leaves", leave=False, disable=None)
            for level in pyramid(dead_leaves(256, np.random.default_rng([recipe.seed, SCENES, i])), recipe.patch)]


def pair(scene, entry, size, rng):
    """(degraded, clean) patches (size,size,3) of a random crop."""
    scene = crop(scene, size, rng)
    return degrade(scene, entry, rng), scene.image


def batch(recipe, scenes, entries, step):
    """Degraded and clean patches (B,P,P,3) of one step, half from dead leaves and half from photographs."""
    rng = np.random.default_rng([recipe.seed, BATCHES, step])
    pairs = []
    for i in range(recipe.batch):
        kind = scenes[i % 2]                  # dead leaves, photographs
        pairs.append(pair(kind[rng.integers(len(kind))], entries[rng.integers(len(entries))], recipe.patch, rng))
    return [np.stack(images) for images in zip(*pairs)]


def held_out_patches(entries, size=96):
    """Degraded and clean patches (B,96,96,3) of the validation photographs, two per entry of the suite, always the same."""
    pairs = [pair(Scene(image), entry, size, np.random.default_rng([i, j]))
             for i, image in enumerate(photographs("validation").values()) for j, entry in enumerate(entries)]
    return [np.stack(images) for images in zip(*pairs)]


@contextmanager
def feed(recipe, first=0, workers=1):
    """Within: a function that returns `batch` of the next step, from `first` on. Worker i of n makes every n-th batch from its i-th.

    InputError for photographs that cannot be read. Like all of multiprocessing, a script needs `if __name__ == "__main__"` around it.
    """
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for i in range(workers):
            connection, other = context.Pipe(duplex=False)
            if hasattr(fcntl, "F_SETPIPE_SZ"):          # Linux: a batch fits into the pipe, and the next one is made meanwhile
                fcntl.fcntl(other.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
            processes.append(context.Process(target=_work, args=(other, recipe, first + i, workers), daemon=True))
            connections.append(connection)
            processes[-1].start()
            other.close()                     # the worker's alone: when either end dies, the other one hears of it
        turns = cycle(connections)
        yield lambda: _received(next(turns))
    finally:
        for process, connection in zip(processes, connections):
            process.terminate()
            process.join()
            connection.close()


def _received(connection):
    try:
        answer = connection.recv()
    except EOFError:
        raise InputError("the process that makes the training patches has died, perhaps for want of memory") from None
    if isinstance(answer, InputError):
        raise answer
    return answer


def _work(connection, recipe, first, stride):
    """One worker: draws the scenes, then sends a batch whenever the last one was taken. Ctrl-C is the trainer's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        scenes, entries = (leaves_of(recipe), photographs_of(recipe)), suite(recipe.suite)
        for step in range(first, recipe.steps, stride):
            connection.send(batch(recipe, scenes, entries, step))
    except InputError as error:
        connection.send(error)
    except ConnectionError:                   # the trainer has gone
        pass
