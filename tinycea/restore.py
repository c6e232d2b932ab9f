"""Restore images with a trained model: arrays, files and folders; and how well it did, in PSNR and SSIM."""
from pathlib import Path

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .degrade import degrade, patchwork
from .errors import InputError
from .nafnet import centered, load_model
from .ops import cpu
from .ops.cpu import keep_memory
from .scenes import SUFFIXES, Scene, list_images, photographs, read_image, rgb, write_image

WEIGHTS = Path(__file__).parent / "weights" / "default.safetensors"
SSIM = "RGB float in [0,1], Gaussian window of standard deviation 1.5, population covariance (Wang et al. 2004)"
TEST_SEED = 0                                 # of the degradations of held-out photographs: the same in every run


def restore(image, p, config, ops=cpu):
    """The restored image. image (H,W,3) float in [0,1], any size from 1 x 1 up -> (H,W,3) in [0,1]."""
    y, _ = centered(ops.to_device(image[None]), p, config, ops, keep=False)
    return ops.to_host(np.clip(y[0], 0, 1))


def quality(image, clean):
    """(PSNR in dB, SSIM as SSIM says) of an image (H,W,3) in [0,1] against the clean one; both sides at least 11 pixels."""
    return (float(peak_signal_noise_ratio(clean, image, data_range=1)),
            float(structural_similarity(clean, image, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                        use_sample_covariance=False)))


def held_out(entries, p, config, ops=cpu):
    """Restore every test photograph under every entry of a suite; yields dicts with entry, photograph, images and metrics."""
    for j, (name, clean) in enumerate(photographs("test").items()):
        for entry in entries:
            rng = np.random.default_rng([TEST_SEED, j, *entry.encode()])
            degraded = degrade(Scene(clean), entry, rng)
            restored = restore(degraded, p, config, ops)
            before, after = quality(degraded, clean), quality(restored, clean)
            yield {"entry": entry, "photograph": name, "images": (degraded, restored, clean), "before": before, "after": after}


def table(results):
    """Rows (dicts) per degradation, averaged over photographs, then their average: PSNR and SSIM before and after."""
    columns = ("psnr_before", "ssim_before", "psnr_after", "ssim_after")
    entries = list(dict.fromkeys(r["entry"] for r in results))
    means = [np.mean([r["before"] + r["after"] for r in results if r["entry"] == entry], 0) for entry in entries]
    return [{"degradation": entry} | dict(zip(columns, map(float, mean)))
            for entry, mean in zip(entries + ["average"], means + [np.mean(means, 0)])]


def format_table(rows):
    """The rows of `table` as aligned text."""
    lines = [f"{'degradation':16s} {'PSNR before':>11s} {'after':>7s} {'gain':>7s}   {'SSIM before':>11s} {'after':>7s}"]
    for r in rows:
        gain = r["psnr_after"] - r["psnr_before"]
        lines.append(f"{r['degradation']:16s} {r['psnr_before']:11.2f} {r['psnr_after']:7.2f} {gain:+7.2f}   "
                     f"{r['ssim_before']:11.3f} {r['ssim_after']:7.3f}")
    return "\n".join(lines)


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
        if target.suffix.lower() not in SUFFIXES:
            raise InputError(f"{target}: cannot write {target.suffix}; name one of {', '.join(SUFFIXES)}, or a folder that exists")
        if targets.count(target) > 1:
            raise InputError(f"two of the images are called {target.name}: restore them into different folders")
        refuse_overwriting(file, target)
    keep_memory()
    p, config = load_model(weights)
    make_folder(targets[0].parent)
    failed = []
    for file, target in zip(files, targets):
        try:
            pixels, dtype = read_image(file)
            restored = restore(rgb(pixels), p, config)
            if pixels.shape[2] < 3:
                restored = restored.mean(-1, keepdims=True)
            write_image(target, np.concatenate((restored, pixels[..., restored.shape[2]:]), -1), dtype)
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


def make_folder(path):
    """Make a folder and its parents if need be, or raise InputError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror})") from None


def demo(names=("noise25", "rain", "snow")):
    """A held-out photograph, one degradation per region, restored by the shipped weights -> degraded, restored, clean, mask, names."""
    clean = photographs("test")["astronaut"]
    degraded, mask, names = patchwork(Scene(clean), np.random.default_rng(TEST_SEED), names)
    return degraded, restore(degraded, *load_model(WEIGHTS)), clean, mask, names
