"""Image files and arrays, in and out: PNG, JPEG, TIFF; any array through a function of (H,W,3) floats and back."""
import io
import logging
import sys
import warnings
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import PIL.Image
import tifffile

from .runtime import InputError, atomic, read_bytes

MEGAPIXELS = 128                              # of a file that is read without being told to
DENSEST = 10_000                              # pixels a byte of a file can hold: a blank page of one bit, deflated, has 8,256
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
for name in ("tifffile", "PIL"):              # a broken file is told of once, by our InputError
    logging.getLogger(name).addHandler(logging.NullHandler())


def read_pixels(path, megapixels=MEGAPIXELS):
    """The pixels (H,W,C) of an image file as it holds them, uint8 or uint16: C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA.

    PNG, JPEG, TIFF and whatever else Pillow reads. The EXIF orientation is obeyed; palettes and CMYK become RGB, one bit
    becomes gray; of several pages the first is read. 16 bits are kept from gray PNG and from TIFF; Pillow reads color PNG at 8.
    Raises InputError for a missing, damaged or foreign file, for more megapixels than so many or than the file can hold,
    before they take any memory, for pixels of 32 bits or floats, and for what would be misread: a volume, or 16 bits of
    anything but gray and RGB.
    """
    data, limit = read_bytes(path), PIL.Image.MAX_IMAGE_PIXELS
    try:
        PIL.Image.MAX_IMAGE_PIXELS = None           # the limit is ours
        with warnings.catch_warnings(action="ignore"):
            pixels = _decode(data, megapixels)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception:                               # decoders raise anything on foreign bytes
        raise InputError(f"{path}: not a readable image (damaged, or of a kind not read)") from None
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: pixels are {pixels.dtype}; expected 8- or 16-bit integers")
    return pixels.reshape(*pixels.shape[:2], -1)


def _decode(data, megapixels):
    """The first page, (H,W) or (H,W,C), of an encoded file: by Pillow, but 16-bit color, which that cuts to 8, by tifffile."""
    if data[:2] in (b"II", b"MM"):
        page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
        if page.dtype == np.uint16 and (page.samplesperpixel > 1 or page.photometric != 1):
            _check_size(page.imagelength, page.imagewidth, megapixels, len(data))
            if page.photometric not in (0, 1, 2) or page.imagedepth > 1:
                raise InputError("a TIFF of 16 bits that is neither gray nor RGB, or a volume")
            pixels = page.asarray() if page.planarconfig == 1 else np.moveaxis(page.asarray(), 0, -1)   # else plane after plane
            pixels = 65535 - pixels if page.photometric == 0 else pixels                                # 0 is white
            turn = page.tags.valueof(274, 1)                    # Orientation: 1 upright, the others mirrored, turned or both
            pixels = pixels.swapaxes(0, 1) if turn > 4 else pixels
            return pixels[::-1 if turn in (3, 4, 7, 8) else 1, ::-1 if turn in (2, 3, 6, 7) else 1]
    with iio.imopen(data, "r", plugin="pillow") as file:
        _check_size(*file.properties(index=0).shape[:2], megapixels, len(data))
        meta = file.metadata(index=0)
        palette = "RGBA" if "transparency" in meta else "RGB"
        mode = {"1": "L", "P": palette, "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB"}.get(meta["mode"])
        return file.read(index=0, rotate=True, mode=mode)


def _check_size(height, width, megapixels, size):
    if height * width > megapixels * 1e6:
        raise InputError(f"{width} x {height} pixels; at most {megapixels} megapixels are read")
    if height * width > DENSEST * size:
        raise InputError(f"{width} x {height} pixels in {size} bytes; a file that small cannot hold them")


def rgb(pixels):
    """(H,W,C) as (H,W,3): gray repeated, alpha dropped."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)


def write_image(path, pixels, dtype=np.uint8):
    """Write (H,W) or (H,W,C), C as in read_pixels, in [0,1] or integers of all their range, as PNG, JPEG or TIFF by its suffix.

    uint16 is kept by TIFF and gray PNG, else 8 bits are written; JPEG has quality 95 and no alpha. The file appears whole or
    not at all. Raises InputError for another suffix or dtype, odd or non-finite pixels, a place that cannot be written to.
    """
    path, dtype, pixels = Path(path), np.dtype(dtype), np.asarray(pixels)
    pixels, suffix = pixels[..., None] if pixels.ndim == 2 else pixels, path.suffix.lower()
    if suffix not in SUFFIXES or dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path} as {dtype}: expected a suffix among {', '.join(SUFFIXES)}, and uint8 or uint16")
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or not pixels.size or not np.isfinite(pixels).all():
        raise InputError(f"{path}: pixels have shape {pixels.shape}; expected finite (H,W) or (H,W,C), C from 1 to 4")
    pixels = pixels[..., :-1] if suffix in (".jpg", ".jpeg") and pixels.shape[2] in (2, 4) else pixels
    channels, how = pixels.shape[2], {"plugin": "pillow", "is_batch": False, "quality": 95}
    if suffix in (".tif", ".tiff"):
        how = {"plugin": "tifffile", "photometric": "rgb" if channels >= 3 else "minisblack", "planarconfig": "contig",
               "extrasamples": [] if channels % 2 else ["unassalpha"]}
    elif suffix != ".png" or channels > 1:
        dtype = np.dtype(np.uint8)
    if pixels.dtype != dtype:
        scale = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
        pixels = np.rint(np.clip(pixels / scale, 0, 1) * np.iinfo(dtype).max).astype(dtype)
    with atomic(path) as temporary:
        iio.imwrite(temporary, pixels if channels > 1 else pixels[..., 0], extension=suffix, **how)


def list_images(paths):
    """Files among `paths` as given and, for each folder, the images right in it, sorted. Raises InputError if there are none."""
    found = [file for path in map(Path, paths) for file in (
        sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file()) if path.is_dir() else [path])]
    if not found:
        raise InputError(f"no image ({', '.join(SUFFIXES)}) in {', '.join(map(str, paths))}")
    return found


def folder(path):
    """Yield a folder's images, (name, (H,W,3) float32 in [0,1]); broken ones are named on stderr. InputError if there is none."""
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder")
    readable = False
    for file in list_images([path]):
        try:
            yield file.name, as_rgb(read_pixels(file))
            readable = True
        except InputError as error:
            print(f"skipping {error}", file=sys.stderr)
    if not readable:
        raise InputError(f"{path}: no readable image in this folder")


def checked(image):
    """An array that is an image: uint8, uint16 or float in [0,1], (H,W) or (H,W,C), C as in `read_pixels`; else InputError."""
    image = np.asarray(image)
    if image.ndim not in (2, 3) or 0 in image.shape or image.ndim == 3 and image.shape[2] > 4:
        raise InputError(f"image has shape {image.shape}: expected (H,W) or (H,W,C), C from 1 to 4, no side zero")
    if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
        raise InputError(f"image is {image.dtype}: expected uint8, uint16, or floats in [0, 1]")
    if image.dtype.kind == "f" and not (image.min() >= 0 and image.max() <= 1):
        raise InputError(f"image spans [{image.min():.3g}, {image.max():.3g}]: floats are expected in [0, 1]")
    return image


def as_rgb(image):
    """An image of any kind, as `checked` lets it through, as (H,W,3) float32 in [0,1]."""
    scale = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max
    return rgb(image.reshape(*image.shape[:2], -1) / np.float32(scale)).astype(np.float32)


def like(result, image):
    """(H,W,3) in [0,1] as an image of another one's kind: gray if that is gray (the mean of the channels), with its alpha."""
    scale, pixels = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max, image.reshape(*image.shape[:2], -1)
    if pixels.shape[2] < 3:
        result = result.mean(-1, keepdims=True)
    result = result if scale == 1 else np.rint(result * scale)
    return np.concatenate((result.astype(image.dtype), pixels[..., result.shape[2]:]), -1).reshape(image.shape)
