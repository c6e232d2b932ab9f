"""Restore images with a trained model: arrays, files and folders, in windows that overlap, on all cores."""
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from .images import MEGAPIXELS, SUFFIXES, as_rgb, checked, like, list_images, read_pixels, write_image
from .nafnet import centered
from .ops import cpu
from .ops.cpu import keep_memory
from .runtime import InputError, make_folder
from .zoo import WEIGHTS, Model, load_model

WINDOW = 512                                  # pixels a side of a window, at most
OVERLAP, ALIGNED = 64, 16                     # pixels of two windows; where they may start
BORDER = 12                                   # of a window, counts nothing where another one covers it: it saw no neighbors
shipped = cache(partial(load_model, WEIGHTS))            # the model in the package
SUMMARIES = "global_average_pool", "summarize"          # the ops that speak of the whole image: in NAFNet's SCA, in CEA's probe
MARGIN = 8                                    # mirrored pixels around what tinycea's own models see: beside zeros skies darken


def restore(image: np.ndarray, model: Model | None = None, window: int = WINDOW, threads: int | None = None) -> np.ndarray:
    """The restored image, of the input's shape and type.

    image: uint8, uint16 or float in [0,1], (H,W) or (H,W,C), gray or color, with or without alpha, any size from 1 x 1 up.
    model: what `load_model` read; None: the weights in the package. window: an image larger than four of them is cut into
    overlapping windows of at most so many pixels a side, blended linearly, that all know the same `summaries`; 0: it stays whole.
    What tinycea's own models see is mirrored at its border, MARGIN wide; a NAFNet sees zeros there, as its authors feed it.
    What a model with `spare` would hardly change comes back as it came, bit for bit: the weights in the package do so.
    threads: how many restore a window each, or a half of what stays whole (see `banded`); None: one for each core. Their number
    changes no byte. InputError for anything else, and for NaN.
    """
    image, model = checked(image), model or shipped()
    if not (isinstance(window, int) and (window == 0 or window >= 4 * OVERLAP)):
        raise InputError(f"window is {window!r}: expected 0 or an integer of at least {4 * OVERLAP}")
    (height, width), result = image.shape[:2], np.empty_like(image)
    rows, columns = (windows(length, window if height * width > 4 * window**2 else 0) for length in (height, width))
    known = summaries(image, model, window) if len(rows) + len(columns) > 2 and not model[1].local else None
    forward = partial(banded, threads=threads or os.cpu_count()) if len(rows) + len(columns) == 2 else centered
    below, change = np.zeros((0, width, 3), np.float32), 0                      # what the windows above say of the rows to come

    def restored(y, x, down, right):
        ops = answering(lambda *_, left=iter(known): next(left)) if known else cpu
        return mirrored(image[y:y + len(down), x:x + len(right)], model, ops, forward) * (down[:, None, None] * right[:, None])

    with ThreadPoolExecutor(threads or os.cpu_count()) as executor, \
            tqdm(total=len(rows) * len(columns), desc="restoring", unit="window", delay=2, leave=False, disable=None) as bar:
        for (y, down), (end, _) in zip(rows, [*rows[1:], (height, None)]):
            strip = np.zeros((len(down), width, 3), np.float32)
            strip[:len(below)] = below
            for (x, right), part in zip(columns, executor.map(lambda column: restored(y, column[0], down, column[1]), columns)):
                strip[:, x:x + len(right)] += part
                bar.update()
            result[y:end] = like(np.clip(strip[:end - y], 0, 1), image[y:end])
            change += np.square(as_rgb(result[y:end]) - as_rgb(image[y:end])).sum(dtype=float)
            below = strip[end - y:]
    spare = model[1].spare
    return image.copy() if spare and change <= 10 ** (-spare / 10) * 3 * height * width else result


def mirrored(image, model, ops, forward=centered):
    """`restore_rgb` of an image of any kind, with its mirror image around it where the model is tinycea's own."""
    m, (height, width) = MARGIN * model[1].centered, image.shape[:2]
    padded = np.pad(as_rgb(image), ((m, m), (m, m), (0, 0)), "symmetric")
    return restore_rgb(padded, *model, ops, forward)[m:m + height, m:m + width]


def banded(images, p, config, ops=cpu, keep=False, threads=2):
    """`centered` of images on the CPU, forward only: the upper and the lower half, a thread each, on so many `threads` at a time.

    A half is what it is in the whole: where an op looks at neighbors, or sums over the image, the two tell each other their
    border row, or their sums, and wait. `threads` changes no byte. Whole stays what is small, and what goes through a rival, a
    switch of CEA's, or local means.
    """
    half = images.shape[1] // 2 // config.multiple() * config.multiple()
    if half < 64 or config.local or not getattr(config.adapter, "is_the_method", lambda: config.adapter is None)():
        return centered(images, p, config, ops, keep=False)
    turn, mail = Semaphore(threads), (SimpleQueue(), SimpleQueue())

    def gather(i, value):
        mail[1 - i].put(value)
        turn.release()
        theirs = mail[i].get()
        turn.acquire()
        if isinstance(theirs, BaseException):
            raise theirs
        return value, theirs

    def bordered(i, op, x, *weights):
        y, (_, near) = op(x, *weights)[0], gather(i, x[:, i - 1, None])
        y[:, i - 1] = op(np.concatenate((near, x[:, :2]) if i else (x[:, -2:], near), 1), *weights)[0][:, 1]
        return y, None

    def restored(i):
        own = {name: partial(getattr(cpu, name), gather=partial(gather, i)) for name in ("groupnorm", *SUMMARIES)}
        own |= {name: partial(bordered, i, getattr(cpu, name)) for name in ("conv3x3", "gated_depthwise3x3")}
        try:
            with turn, np.errstate(all="ignore"):
                return centered(np.split(images, [half], 1)[i], p, config, SimpleNamespace(**vars(cpu) | own), keep=False)[0]
        except BaseException as error:        # the other half waits for mail
            mail[1 - i].put(error)
            raise
    with ThreadPoolExecutor(2) as executor:
        return np.concatenate(list(executor.map(restored, range(2))), 1), None


def answering(answer):
    """The CPU's ops, but those of SUMMARIES are answer(op, *inputs)."""
    return SimpleNamespace(**vars(cpu) | {name: partial(answer, getattr(cpu, name)) for name in SUMMARIES})


def summaries(image, model, window):
    """What the ops of SUMMARIES say of an image, in their order; else each window would judge by itself whether it is night.

    Of a mosaic of at most 2 x 2 windows, made of pieces of the image spread evenly: in a smaller image noise, rain and JPEG's
    blocks would not survive.
    """
    found = []

    def noted(op, *inputs):
        found.append((op(*inputs)[0], None))
        return found[-1]

    def spread(length):
        starts = np.linspace(0, length - window // 2, 4).astype(int)
        return np.arange(length) if length <= 2 * window else (starts[:, None] + np.arange(window // 2)).ravel()
    mirrored(image[np.ix_(*map(spread, image.shape[:2]))], model, answering(noted))
    return found


def windows(length, most):
    """[(start, weights), ...]: windows of at most `most` places that cover 0 to length; the weights sum to 1 at every place.

    Starts are multiples of ALIGNED, so that the network's down steps meet the same pixels as in the whole.
    """
    if not most or length <= most:
        return [(0, np.ones(length, np.float32))]
    n = -(-(length - OVERLAP) // (most - ALIGNED - OVERLAP))
    starts = [i * (length - OVERLAP) // n // ALIGNED * ALIGNED for i in range(n)]
    ramp, found = np.clip((np.arange(OVERLAP) + 0.5 - BORDER) / (OVERLAP - 2 * BORDER), 0, 1), []
    for start, end in zip(starts, [*(start + OVERLAP for start in starts[1:]), length]):
        weights = np.ones(end - start, np.float32)
        weights[:OVERLAP] *= ramp if start else 1
        weights[-OVERLAP:] *= 1 - ramp if end < length else 1
        found.append((start, weights))
    return found


def restore_rgb(image, p, config, ops=cpu, forward=centered):
    """image (H,W,3) float in [0,1] -> the restored one, the same, by the backend `ops`. InputError if it is not finite."""
    with np.errstate(all="ignore"):
        y, _ = forward(ops.to_device(image[None]), p, config, ops, keep=False)
    y = ops.to_host(y[0])
    if not np.isfinite(y).all():
        raise InputError("the network gives what is not finite: its weights are not sound")
    return np.clip(y, 0, 1)


def restore_files(paths, out, weights=WEIGHTS, window=WINDOW, threads=None, megapixels=MEGAPIXELS):
    """Restore files or folders of images, see `restore` and `read_pixels`; yields each path written.

    One file goes to `out` if that has a suffix; otherwise `out` is a folder, made if need be, and each image keeps its name.
    The result has the input's size, alpha and, where the format can, its bit depth; a gray image stays gray; color profiles and
    other metadata are not carried over. What can be read but not written (such as .webp) becomes a .png. A file that is no
    image does not stop the others: an InputError names all such files at the end. Two images of one name, or a result that would
    replace its own photo, are refused before anything is written.
    """
    files, out = list_images(paths), Path(out)
    single = len(files) == 1 and out.suffix and not out.is_dir()
    targets = [out if single else out / (file.name if file.suffix.lower() in SUFFIXES else f"{file.stem}.png") for file in files]
    if not single and out.suffix.lower() in SUFFIXES and not out.is_dir():
        raise InputError(f"{out}: {len(files)} images need a folder, not one file")
    for file, target in zip(files, targets):
        if (suffix := target.suffix).lower() not in SUFFIXES:
            raise InputError(f"{target}: cannot write {suffix}; name one of {', '.join(SUFFIXES)}, or a folder that exists")
        if targets.count(target) > 1:
            raise InputError(f"two of the images are called {target.name}: restore them into different folders")
        refuse_overwriting(files, target)
    keep_memory()
    model = load_model(weights)
    make_folder(targets[0].parent)
    failed = []
    for file, target in zip(files, targets):
        try:
            pixels = read_pixels(file, megapixels)
            write_image(target, restore(pixels, model, window, threads), pixels.dtype)
            yield target
        except (InputError, MemoryError) as error:
            failed.append(str(error) if isinstance(error, InputError) else f"{file}: too large for the memory at hand")
    if failed:
        raise InputError(f"not restored: {'; '.join(failed)}")


def refuse_overwriting(sources, target):
    """InputError if a result would replace what one is made from."""
    if os.path.realpath(target) in map(os.path.realpath, sources):
        raise InputError(f"{target} is the input itself: name another output")
