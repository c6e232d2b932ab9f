"""Clean images: dead leaves, the photographs in scikit-image's wheel, and files and folders of yours."""
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import skimage
import tifffile

from .errors import InputError, atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
logging.getLogger("tifffile").addHandler(logging.NullHandler())     # a broken file is told of once, by our InputError
# Left out of scikit-image's photographs: the blurred (clock_motion, text), the tiny or grainy (microaneurysms, cell),
# hubble_deep_field, whose stars look like snow, and motorcycle_right, the validation image seen from a step aside.
PHOTOGRAPHS = {
    "train": ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "ihc.png", "moon.png", "page.png", "retina.jpg"),
    "validation": ("rocket.jpg", "motorcycle_left.png"), "test": ("astronaut.png", "chelsea.png", "coffee.png")}


class Scene(NamedTuple):
    """An image (H,W,3) and its maps (H,W), float32, None where unknown as in photographs; image = reflectance * illumination."""
    image: np.ndarray                               # in [0,1]
    depth: np.ndarray | None = None                 # in [0,1], 0 near and 1 far
    illumination: np.ndarray | None = None          # in (0,1]


def smooth_field(shape, rng, waves=3):
    """A random field (H,W), float32, of at most `waves` half-periods a side, scaled to span [0,1]. Our choice:

    f(y,x) = sum_jk g_jk cos(pi j y) cos(pi k x), with y and x in [0,1] and g_jk ~ N(0,1) / (1 + j + k).
    """
    j = np.arange(waves + 1)
    gain = rng.standard_normal((waves + 1, waves + 1)) / (1 + j[:, None] + j)
    cos_y, cos_x = (np.cos(np.pi * j * (np.arange(n)[:, None] + 0.5) / n) for n in shape)
    field = cos_y @ gain @ cos_x.T
    return ((field - field.min()) / max(np.ptp(field), 1e-6)).astype(np.float32)


def leaf_radii(count, r_min, r_max, rng):
    """`count` radii of density proportional to r^-3 on [r_min, r_max], by inverting the distribution function at u ~ U(0,1):

    r = (r_min^-2 - u (r_min^-2 - r_max^-2))^-1/2. Every octave covers the same area: alike at every scale (Lee et al. 2001).
    """
    return (r_min**-2.0 - rng.random(count) * (r_min**-2.0 - r_max**-2.0)) ** -0.5


def dead_leaves(size, rng):
    """A Scene of opaque disks ("leaves") that hide each other, of `size` pixels (an int, or (H,W)).

    Radii follow leaf_radii, centers are uniform, and disks are laid front to back until 99.9 % is covered (Lee et al. 2001;
    Achddou et al. 2021); the rest is one background leaf. Some leaves are flat, others shaded or textured with 1/f^s noise.
    The palette, the shading and the maps are our choice: depth is the share of the image that lies nearer than the leaf,
    illumination exp(-a f) for a smooth_field f. Raises InputError if a side is not an integer of at least 1.
    """
    shape = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(shape) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in shape):
        raise InputError(f"size is {size!r}; expected a positive integer or two of them, (H, W)")
    reflectance, depth = _paint(shape, rng)
    illumination = np.exp(-rng.uniform(0.2, 1.6) * smooth_field(shape, rng))
    return Scene(reflectance * illumination[..., None], depth, illumination)


def _paint(shape, rng):
    """Reflectance (H,W,3) and depth (H,W) of dead leaves, painted at twice the size and averaged 2x2: edges are anti-aliased."""
    leaf, disks = _lay(2 * np.array(shape), rng)
    n = len(disks)

    # Natural colors differ most in lightness, less from red to blue, least from green to magenta (Ohta et al. 1980).
    hues = rng.standard_normal((rng.integers(2, 6), 2)) * (0.18, 0.07)                      # a scene has a few hues
    chroma = hues[rng.integers(len(hues), size=n)] + rng.standard_normal((n, 2)) * (0.05, 0.025)
    light = rng.uniform(0.02, 0.98, (n, 1))                                                 # black and white have no hue
    color = light + 4 * light * (1 - light) * chroma @ (np.array([[1, 0, -1], [-1, 2, -1]]) / np.sqrt([[2], [6]]))
    # Every pixel looks up its leaf: a slope across the disk (shading) and a window into a tile of noise (texture).
    y, x = np.indices(leaf.shape)
    cy, cx, radius = disks.T[:, leaf]
    angle, slope = rng.uniform(0, 2 * np.pi, n)[leaf], (rng.uniform(0, 0.5, n) * (rng.random(n) < 0.6))[leaf]
    shading = 1 + slope * (np.sin(angle) * (y - cy) + np.cos(angle) * (x - cx)) / radius
    tiles = np.stack([_noise_tile(256, rng) for _ in range(4)])
    tile, down, right = rng.integers((4, 256, 256), size=(n, 3)).T[:, leaf]
    amount = (rng.uniform(0.03, 0.25, n) * (rng.random(n) < 0.7))[leaf]
    pixels = np.clip(color[leaf] * (shading + amount * tiles[tile, (y + down) % 256, (x + right) % 256])[..., None], 0, 1)
    area = np.bincount(leaf.ravel(), minlength=n)
    depth = ((np.cumsum(area) - area) / leaf.size)[leaf]
    return halve(np.float32(pixels)), halve(np.float32(depth))


def _lay(shape, rng):
    """Front-to-back disks: at each pixel (H,W) the index of the one seen there, and their (cy, cx, radius) (n,3)."""
    r_min, r_max = rng.uniform(3, 14), max(0.3 * min(shape), 16)
    leaf, disks, bare = np.full(shape, -1), [], np.prod(shape)
    while bare > 1e-3 * leaf.size:
        (cy, cx), radius = rng.uniform(-r_max, shape + r_max), leaf_radii(1, r_min, r_max, rng)[0]
        y0, x0 = int(max(cy - radius, 0)), int(max(cx - radius, 0))
        box = leaf[y0:int(max(cy + radius + 1, 0)), x0:int(max(cx + radius + 1, 0))]
        if box.size == 0 or box.min() >= 0:
            continue
        y, x = np.ogrid[y0:y0 + box.shape[0], x0:x0 + box.shape[1]]
        seen = ((y - cy) ** 2 + (x - cx) ** 2 <= radius**2) & (box < 0)
        box[seen] = len(disks)
        bare -= np.count_nonzero(seen)
        disks.append((cy, cx, radius))
    leaf[leaf < 0] = len(disks)
    return leaf, np.array([*disks, (*shape / 2, max(shape))])


def _noise_tile(n, rng):
    """A periodic (n,n) field of amplitude spectrum 1/f^s and unit variance, with an s and a grain of its own."""
    fy, fx = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 3)
    f = np.hypot((fx * np.cos(angle) + fy * np.sin(angle)) * stretch, (fy * np.cos(angle) - fx * np.sin(angle)) / stretch)
    f[0, 0] = np.inf                                                                        # no constant part
    tile = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) * f ** -rng.uniform(0.5, 1.5), s=(n, n))
    return tile / tile.std()


def halve(pixels):
    """Means over 2x2 blocks of (H,W) or (H,W,C); an odd last row or column is dropped."""
    pixels = pixels[:len(pixels) // 2 * 2, :pixels.shape[1] // 2 * 2]
    return (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4


def pyramid(scene, size):
    """[the scene, at half its size, at a quarter, ...], as long as both sides have at least `size` pixels."""
    levels = [scene]
    while min(levels[-1].image.shape[:2]) >= 2 * size:
        levels.append(Scene(*(None if pixels is None else halve(pixels) for pixels in levels[-1])))
    return levels


def crop(scene, size, rng):
    """A random size x size copy, all maps flipped and turned alike by multiples of 90 degrees; a small scene is mirrored first."""
    pad = [(0, max(size - n, 0)) for n in scene.image.shape[:2]]
    if np.any(pad):
        scene = Scene(*(m if m is None else np.pad(m, pad + [(0, 0)] * (m.ndim - 2), mode="symmetric") for m in scene))
    y, x = (rng.integers(n - size + 1) for n in scene.image.shape[:2])
    turns, step = rng.integers(4), rng.choice((-1, 1))
    return Scene(*(m if m is None else np.rot90(m[y:y + size, x:x + size][:, ::step], turns).copy() for m in scene))


def photographs(split):
    """{name: (H,W,3) float32 in [0,1]}: photographs in scikit-image's wheel, never downloaded. InputError for another split."""
    if split not in PHOTOGRAPHS:
        raise InputError(f"split is {split!r}; expected one of {', '.join(PHOTOGRAPHS)}")
    data = Path(skimage.__file__).parent / "data"
    return {Path(name).stem: rgb(read_image(data / name)[0]) for name in PHOTOGRAPHS[split]}


def read_image(path):
    """(pixels, dtype): float32 (H,W,C) in [0,1], C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA; and the file's uint8 or uint16.

    PNG, JPEG, TIFF and whatever else Pillow reads. The EXIF orientation is obeyed; palettes and CMYK become RGB, one bit
    becomes gray; of several pages the first is read. 16 bits are kept from gray PNG and from TIFF; Pillow reads color PNG at 8.
    Raises InputError for a missing, damaged or foreign file, and for pixels of 32 bits or floats.
    """
    try:
        data = Path(path).read_bytes()
        with warnings.catch_warnings(action="ignore"):
            pixels = _decode(data)
    except Exception as error:                      # decoders raise anything on foreign bytes
        reason = getattr(error, "strerror", None) or "damaged, or of a kind not read"
        raise InputError(f"{path}: not a readable image ({reason})") from None
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: pixels are {pixels.dtype}; expected 8- or 16-bit integers")
    return pixels.reshape(*pixels.shape[:2], -1) / np.float32(np.iinfo(pixels.dtype).max), pixels.dtype


def _decode(data):
    """The first page, (H,W) or (H,W,C), of an encoded file: by Pillow, but 16-bit color, which that cuts to 8, by tifffile."""
    if data[:2] in (b"II", b"MM"):
        page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
        if page.dtype == np.uint16 and page.samplesperpixel > 1:
            pixels = page.asarray() if page.planarconfig == 1 else np.moveaxis(page.asarray(), 0, -1)   # else plane after plane
            turn = page.tags.valueof(274, 1)                    # Orientation: 1 upright, the others mirrored, turned or both
            pixels = pixels.swapaxes(0, 1) if turn > 4 else pixels
            return pixels[::-1 if turn in (3, 4, 7, 8) else 1, ::-1 if turn in (2, 3, 6, 7) else 1]
    meta = iio.immeta(data, plugin="pillow", index=0)
    palette = "RGBA" if "transparency" in meta else "RGB"
    mode = {"1": "L", "P": palette, "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB"}.get(meta["mode"])
    return iio.imread(data, plugin="pillow", index=0, rotate=True, mode=mode)


def rgb(pixels):
    """(H,W,C) as (H,W,3): gray repeated, alpha dropped."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)


def write_image(path, pixels, dtype=np.uint8):
    """Write (H,W) or (H,W,C) in [0,1], C as in read_image, clipped and rounded to dtype, as PNG, JPEG or TIFF by its suffix.

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
    whole = np.rint(np.clip(pixels, 0, 1) * np.iinfo(dtype).max).astype(dtype)
    with atomic(path) as temporary:
        iio.imwrite(temporary, whole if channels > 1 else whole[..., 0], extension=suffix, **how)


def list_images(paths):
    """Files among `paths` as given and, for each folder, the images right in it, sorted. Raises InputError if there are none."""
    found = [file for path in map(Path, paths) for file in (
        sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file()) if path.is_dir() else [path])]
    if not found:
        raise InputError(f"no image ({', '.join(SUFFIXES)}) in {', '.join(map(str, paths))}")
    return found


def folder(path):
    """Yield the images of a folder, (name, (H,W,3) float32 in [0,1]); broken ones are named on stderr. InputError if there is none."""
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder")
    readable = False
    for file in list_images([path]):
        try:
            yield file.name, rgb(read_image(file)[0])
            readable = True
        except InputError as error:
            print(f"skipping {error}", file=sys.stderr)
    if not readable:
        raise InputError(f"{path}: no readable image in this folder")
