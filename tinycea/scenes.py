"""Clean scenes: dead leaves, the photographs in scikit-image's wheel, crops of them; and pairs of files, degraded and clean."""
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage

from .images import as_rgb, folder, list_images, read_pixels, rgb
from .runtime import InputError

# Left out of scikit-image's photographs: the blurred (clock_motion, text), the tiny or grainy (microaneurysms, cell),
# hubble_deep_field, whose stars look like snow, and motorcycle_right, the validation image seen from a step aside.
PHOTOGRAPHS = {
    "train": ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "ihc.png", "moon.png", "page.png", "retina.jpg"),
    "validation": ("rocket.jpg", "motorcycle_left.png"), "test": ("astronaut.png", "chelsea.png", "coffee.png")}
WORDS = re.compile(r"(norain|rain|snow|hazy|haze|noisy|noise|blurry|blur|low|normal|input|target|degraded|clean|gt|lq|hq)"
                   r"(?![a-z])")                # as in norain-001.png of Rain100, low00001.png of LOL, 0001_NOISY_SRGB of SIDD


class Scene(NamedTuple):
    """An image (H,W,3) and its maps (H,W), float32, None where unknown as in photographs; image = reflectance * illumination."""
    image: np.ndarray                               # in [0,1]
    depth: np.ndarray | None = None                 # in [0,1], 0 near and 1 far
    illumination: np.ndarray | None = None          # in (0,1]
    degraded: np.ndarray | None = None              # (H,W,3), where it was found with the image, see `read_pair`


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
        centers, radii = rng.uniform(-r_max, shape + r_max, (64, 2)), leaf_radii(64, r_min, r_max, rng)
        for (cy, cx), radius in zip(centers.tolist(), radii.tolist()):
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
    """A random size x size copy, all maps flipped and turned alike in steps of 90 degrees; a small scene is mirrored first."""
    pad = [(0, max(size - n, 0)) for n in scene.image.shape[:2]]
    if np.any(pad):
        scene = Scene(*(m if m is None else np.pad(m, pad + [(0, 0)] * (m.ndim - 2), mode="symmetric") for m in scene))
    y, x = (rng.integers(n - size + 1) for n in scene.image.shape[:2])
    turns, step = rng.integers(4), rng.choice((-1, 1))
    return Scene(*(m if m is None else np.rot90(m[y:y + size, x:x + size][:, ::step], turns).copy() for m in scene))


def varied(scene, rng):
    """The scene in other light: J^gamma, ln gamma ~ N(0, 0.2^2), and N(0, 0.06^2) more for each channel; one in eight is gray."""
    image = scene.image ** np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.06, 3)).astype(np.float32)
    if rng.random() < 1 / 8:
        image = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    return scene._replace(image=image)


def photographs(split, images=None):
    """{name: (H,W,3) float32 in [0,1]}: photographs in scikit-image's wheel, never downloaded. InputError for another split.

    images: a folder of photographs instead: its first hundred by name for choosing ("validation"), its last hundred for "test".
    """
    if split not in PHOTOGRAPHS:
        raise InputError(f"split is {split!r}; expected one of {', '.join(PHOTOGRAPHS)}")
    if images:
        found = list(folder(images))
        return dict(found[-100:] if split == "test" else found[:100])
    data = Path(skimage.__file__).parent / "data"
    return {Path(name).stem: as_rgb(read_pixels(data / name)) for name in PHOTOGRAPHS[split]}


def keys(file):
    """Names by which an image may be a pair's: its own; without what says degraded or clean; up to the first _."""
    name = file.stem.lower()
    return [name, re.sub(r"[\W_]+", "_", WORDS.sub("", name)).strip("_"), name.partition("_")[0]]


def matched(degraded, clean):
    """[(degraded file, clean file), ...] of two folders, and the files of both that have no partner."""
    degraded, clean = (list_images([folder]) for folder in (degraded, clean))
    by_name = {keys(file)[rank]: file for rank in (1, 0) for file in reversed(clean)}       # own names, and earlier files, win
    found = [(file, next((by_name[key] for key in keys(file) if key in by_name), None)) for file in degraded]
    partners = {partner for _, partner in found}
    return ([pair for pair in found if pair[1]],
            [file for file, partner in found if not partner] + [file for file in clean if file not in partners])


def read_pair(degraded, clean):
    """The Scene of two image files, integers as they hold them, gray repeated.

    InputError as `read_pixels`, and for unequal sizes or too small ones.
    """
    scene = Scene(rgb(read_pixels(clean)), degraded=rgb(read_pixels(degraded)))
    sizes = [image.shape[:2] for image in (scene.degraded, scene.image)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{degraded} and {clean}: have sizes {sizes[0]} and {sizes[1]}")
    if min(sizes[0]) < 11:
        raise InputError(f"{degraded}: is smaller than SSIM's window of 11 pixels")
    return scene
