"""Restore images with a trained model: arrays, files and folders."""
from functools import cache
from pathlib import Path

import numpy as np

from .degradations import patchwork
from .evaluation import TEST_SEED
from .images import SUFFIXES, list_images, on_rgb, read_image, write_image
from .nafnet import centered
from .ops import cpu
from .ops.cpu import keep_memory
from .runtime import InputError, make_folder
from .scenes import Scene, photographs
from .zoo import WEIGHTS, Model, load_model


def restore(image: np.ndarray, model: Model | None = None) -> np.ndarray:
    """The restored image, of the input's shape and type.

    image: uint8, uint16 or float in [0,1], (H,W) or (H,W,C), gray or color, with or without alpha, any size from 1 x 1 up.
    model: what `load_model` read; None: the weights in the package. InputError for anything else, and for NaN.
    """
    model = model or shipped()
    return on_rgb(image, lambda pixels: restore_rgb(pixels, *model))


@cache
def shipped():
    """The model in the package."""
    return load_model(WEIGHTS)


def restore_rgb(image, p, config, ops=cpu):
    """image (H,W,3) float in [0,1] -> the restored one, the same, computed by the backend `ops`."""
    y, _ = centered(ops.to_device(image[None]), p, config, ops, keep=False)
    return ops.to_host(np.clip(y[0], 0, 1))


def restore_files(paths, out, weights=WEIGHTS):
    """Restore files or folders of images; yields each path written.

    One file goes to `out` if that has a suffix; otherwise `out` is a folder, made if need be, and each image keeps its name.
    The result has the input's size, alpha and, where the format can, its bit depth; a gray image stays gray; color profiles and
    other metadata are not carried over. What can be read but not written (such as .webp) becomes a .png. A file that is no
    image does not stop the others: an InputError names all such files at the end. Two images of one name, or a result that would
    replace its own photo, are refused before anything is written.
    """
    files, out = list_images(paths), Path(out)
    if len(files) == 1 and out.suffix and not out.is_dir():
        targets = [out]
    else:
        targets = [out / (file.name if file.suffix.lower() in SUFFIXES else f"{file.stem}.png") for file in files]
        if out.suffix.lower() in SUFFIXES and not out.is_dir():
            raise InputError(f"{out}: {len(files)} images need a folder, not one file")
    for file, target in zip(files, targets):
        if (suffix := target.suffix).lower() not in SUFFIXES:
            raise InputError(f"{target}: cannot write {suffix}; name one of {', '.join(SUFFIXES)}, or a folder that exists")
        if targets.count(target) > 1:
            raise InputError(f"two of the images are called {target.name}: restore them into different folders")
        refuse_overwriting(file, target)
    keep_memory()
    model = load_model(weights)
    make_folder(targets[0].parent)
    failed = []
    for file, target in zip(files, targets):
        try:
            pixels, dtype = read_image(file)
            write_image(target, restore(pixels, model), dtype)
            yield target
        except InputError as error:
            failed.append(str(error))
        except MemoryError:
            failed.append(f"{file}: too large for the memory at hand, about 0.2 GB a megapixel")
    if failed:
        raise InputError(f"not restored: {'; '.join(failed)}")


def refuse_overwriting(source, target):
    """InputError if a result would replace the photo it is made from."""
    if Path(source).resolve() == Path(target).resolve():
        raise InputError(f"{target} is the photo itself: name another output")


def demo(names=("noise25", "rain", "snow")):
    """A held-out photograph, one degradation per region, restored by `shipped` -> degraded, restored, clean, mask, names."""
    clean = photographs("test")["astronaut"]
    degraded, mask, names = patchwork(Scene(clean), np.random.default_rng(TEST_SEED), names)
    return degraded, restore(degraded), clean, mask, names
