"""Toy degradations, each a formula with its own randomness, and the suites a restorer is trained and tested on.

Every degradation is f(image, rng, strength=1.0) with the image (H,W,3) float32 in [0,1], and returns the same; it changes
nothing it is given. Strength 0 is the identity, 1 is nominal, more, up to 10, is stronger. With the same rng, strength changes
how strong the very same rain (snow, blur, ...) is. Each raises InputError if the image is not such an image, strength is not
such a number, or rng no numpy.random.Generator. The ranges drawn from are our choice unless a source is given, tuned to the
PSNRs of CDD-11's degraded images (lab/calibration.py).
"""
from functools import lru_cache, wraps

import imageio.v3 as iio
import numpy as np
from scipy import ndimage, signal

from .images import as_rgb, checked, like
from .runtime import InputError
from .scenes import Scene, smooth_field


def degradation(formula):
    """Wraps a bare formula: checks its arguments, makes strength 0 the identity, clips the result to [0,1]."""
    @wraps(formula)
    def checked(image, rng, strength=1.0, **options):
        _check("image", image, (*getattr(image, "shape", ())[:2], 3))
        if not isinstance(rng, np.random.Generator):
            raise InputError(f"rng is a {type(rng).__name__}; expected a numpy.random.Generator")
        _check_strength(strength)
        for name in ("depth", "illumination"):
            if options.get(name) is not None:
                _check(name, options[name], image.shape[:2])
        image = image.astype(np.float32)
        return image if strength == 0 else np.clip(formula(image, rng, strength, **options), 0, 1).astype(np.float32)
    return checked


def _check_strength(strength):
    if not isinstance(strength, (int, float, np.number)) or not 0 <= strength <= 10:
        raise InputError(f"strength is {strength!r}; expected a number from 0 to 10")


def _check(name, values, shape):
    """Raises InputError unless `values` are floats in [0,1] of that shape."""
    floats = getattr(values, "shape", None) == shape and 0 not in shape and values.dtype.kind == "f"
    if not floats or not (values.min() >= 0 and values.max() <= 1):
        got = f"{getattr(values, 'dtype', type(values).__name__)} of shape {getattr(values, 'shape', ())}"
        raise InputError(f"{name} is {got}; expected floats in [0, 1] of shape {shape}")


# Point spread functions (PSF): what a single bright point becomes. They sum to 1.

def disk(radius):
    """PSF (2m+1, 2m+1) of a lens out of focus: a disk of `radius` pixels whose edge is a ramp one pixel wide."""
    m = int(np.ceil(radius))
    y, x = np.ogrid[-m:m + 1, -m:m + 1]
    psf = np.clip(radius + 0.5 - np.hypot(y, x), 0, 1)
    return (psf / psf.sum()).astype(np.float32)


def trace(path):
    """PSF (2m+1, 2m+1) of a point that moves along `path` (T,2), pixels (y,x) from the center: a histogram of its places.

    psf = Y^T X / T, with Y (T, 2m+1) and X (T, 2m+1) the share of each row and column in each place: max(0, 1 - distance).
    """
    m = int(np.ceil(np.abs(path).max()))
    rows, columns = (np.maximum(0, 1 - np.abs(p[:, None] - np.arange(-m, m + 1))) for p in path.T)
    return (rows.T @ columns / len(path)).astype(np.float32)


def blur(image, psf):
    """The image convolved with a PSF, mirrored at its borders."""
    m = len(psf) // 2
    padded = np.pad(image, ((m, m), (m, m), (0, 0)), mode="symmetric")
    return signal.fftconvolve(padded, psf[..., None], mode="valid", axes=(0, 1))


def line(length, angle):
    """The path (T,2) of a straight stroke, `angle` from the vertical."""
    return np.linspace(-length / 2, length / 2, 2 * int(length) + 2)[:, None] * (np.cos(angle), np.sin(angle))


@lru_cache
def _matern_factor(count=128, correlation=0.3):
    """L with L L^T = K, the Matern-3/2 covariance K(d) = (1 + sqrt(3) d / l) exp(-sqrt(3) d / l) of `count` times in [0,1]."""
    times = np.linspace(0, 1, count)
    d = np.sqrt(3) * np.abs(times[:, None] - times) / correlation
    return np.linalg.cholesky((1 + d) * np.exp(-d) + 1e-9 * np.eye(count))


# The degradations

@degradation
def noise(image, rng, strength=1.0, sigma=25):
    """I = floor(255 clip(J + N(0, (strength sigma / 255)^2))) / 255, sigma 15, 25 or 50: AIO-3's protocol, cut to 8 bits.

    Strength 0 cuts nothing.
    """
    noisy = image + strength * sigma / 255 * rng.standard_normal(image.shape, np.float32)
    return np.floor(255 * np.clip(noisy, 0, 1)) / 255


def _scatter(shape, rng, density, psf):
    """A layer (H,W) in [0,1]: points of random brightness, `density` of them a pixel, each grown to the PSF's shape."""
    m = len(psf) // 2
    points = rng.random((shape[0] + 2 * m, shape[1] + 2 * m), np.float32)
    points = np.where(points < density, 0.5 + points / (2 * density), 0).astype(np.float32)
    return np.clip(signal.fftconvolve(points, psf / psf.max(), mode="valid"), 0, 1)


@degradation
def rain(image, rng, strength=1.0):
    """I = J + strength M: three layers of streaks, from dense and faint to sparse and bright (CDD-11's additive mask).

    All fall at about one angle, up to 35 degrees from the vertical; lengths, densities and gains vary.
    """
    angle, amount, mask = rng.uniform(-0.6, 0.6), rng.uniform(0.6, 1.4), 0
    for density, length, gain in ((0.02, 9, 0.14), (0.005, 17, 0.22), (0.001, 27, 0.35)):
        psf = trace(line(length * rng.uniform(0.7, 1.3), angle + rng.normal(0, 0.03)))
        mask = mask + gain * rng.uniform(0.7, 1.3) * _scatter(image.shape[:2], rng, amount * density, psf)
    return image + strength * mask[..., None]


@degradation
def snow(image, rng, strength=1.0):
    """I = J (1 - m) + m, m = min(1, strength M) (CDD-11): three layers of flakes, small to large, blurred along the wind."""
    angle, amount, clear = rng.uniform(-1.2, 1.2), rng.uniform(0.6, 1.4), 1
    for density, radius, drift in ((0.008, 0.7, 2), (0.002, 1.3, 3), (0.0004, 2.4, 5)):
        flake = signal.convolve2d(disk(radius * rng.uniform(0.8, 1.2)), trace(line(drift, angle)))
        clear = clear * (1 - 0.8 * _scatter(image.shape[:2], rng, amount * density, flake))
    m = np.minimum(1, strength * (1 - clear))[..., None]
    return image * (1 - m) + m


@degradation
def haze(image, rng, strength=1.0, depth=None):
    """I = J t + A (1 - t), t = exp(-strength beta min(depth, 0.7)), beta ~ U(1,2), A ~ U(.6,.9): Koschmieder's law as in CDD-11.

    depth (H,W) in [0,1], 0 near and 1 far; if None, a smooth random one that recedes toward the top.
    """
    beta, light = rng.uniform(1, 2), rng.uniform(0.6, 0.9)
    if depth is None:
        height = np.linspace(1, 0, len(image), dtype=np.float32)[:, None]
        depth = height * (0.4 + 0.6 * smooth_field(image.shape[:2], rng))
    t = np.exp(-strength * beta * np.minimum(depth, 0.7))[..., None]
    return image * t + light * (1 - t)


@degradation
def motion(image, rng, strength=1.0):
    """The image convolved with the path of a shaken camera: a centered Gaussian process of Matern covariance (as in deepinv).

    The path strays strength U(3, 7) pixels (standard deviation of the process) along each axis.
    """
    path = _matern_factor() @ rng.standard_normal((128, 2))
    return blur(image, trace(strength * rng.uniform(3, 7) * (path - path.mean(0))))


@degradation
def defocus(image, rng, strength=1.0):
    """The image convolved with a disk of radius strength U(2, 5.5) pixels."""
    return blur(image, disk(strength * rng.uniform(2, 5.5)))


@degradation
def gray_noise(image, rng, strength=1.0):
    """I = J + strength N(0, (sigma/255)^2), sigma ~ U(10, 50), equal in all channels: as film has, and gray cameras."""
    return image + strength * rng.uniform(10, 50) / 255 * rng.standard_normal((*image.shape[:2], 1), np.float32)


@degradation
def jpeg(image, rng, strength=1.0, quality=None):
    """The image through a JPEG file of so much quality, 1 to 100; if None, 100 - strength U(10, 60), at least 20."""
    quality = max(20, round(100 - strength * rng.uniform(10, 60))) if quality is None else quality
    pixels = np.rint(255 * image).astype(np.uint8)
    return iio.imread(iio.imwrite("<bytes>", pixels, extension=".jpg", quality=quality), extension=".jpg") / np.float32(255)


@degradation
def low(image, rng, strength=1.0, illumination=None):
    """I = J L^(strength (gamma - 1)) + N(0, (strength sigma)^2), gamma ~ U(2,3), sigma ~ U(.03,.08) (CDD-11).

    L (H,W) in [0,1] is the illumination; if None, max over RGB, smoothed by a Gaussian of 8 pixels.
    """
    gamma, sigma = rng.uniform(2, 3), rng.uniform(0.03, 0.08)
    if illumination is None:
        illumination = ndimage.gaussian_filter(image.max(-1), 8, mode="reflect")
    dark = image * illumination[..., None] ** (strength * (gamma - 1))
    return dark + strength * sigma * rng.standard_normal(image.shape, np.float32)


# Names, compositions and suites

def on_image(formula, **options):
    """A degradation of a scene that looks at nothing but its image."""
    return lambda scene, rng, strength: formula(scene.image, rng, strength, **options)


# Each takes (scene, rng, strength). The order is the one they are applied in: light, weather (CDD-11's order), lens, sensor.
DEGRADATIONS = {
    "low": lambda scene, rng, strength: low(scene.image, rng, strength, illumination=scene.illumination),
    "rain": on_image(rain), "snow": on_image(snow),
    "haze": lambda scene, rng, strength: haze(scene.image, rng, strength, depth=scene.depth),
    "blur": lambda scene, rng, strength: (motion, defocus)[rng.integers(2)](scene.image, rng, strength),
    "motion": on_image(motion), "defocus": on_image(defocus), "gray-noise": on_image(gray_noise),
    "noise15": on_image(noise, sigma=15), "noise25": on_image(noise, sigma=25), "noise50": on_image(noise, sigma=50),
    "jpeg": on_image(jpeg)}
SUITES = {
    "aio3": ["noise15", "noise25", "noise50", "rain", "haze"],
    "aio5": ["noise25", "rain", "haze", "blur", "low"],
    "cdd11": ["low", "haze", "rain", "snow", "low+haze", "low+rain", "low+snow", "haze+rain", "haze+snow",
              "low+haze+rain", "low+haze+snow"],
    "patchwork": ["patchwork"], "stains": ["stains", "stains-overlapping"],
    "everyday": ["noise15", "noise25", "noise50", "gray-noise", "jpeg", "rain", "snow", "blur", "haze", "low"],
    "lens": ["blur", "motion", "defocus"]}


def compose(scene, names, rng, strength=1.0):
    """The image of a scene after several degradations, applied in the order of DEGRADATIONS however they are typed.

    Raises InputError for an unknown or repeated name.
    """
    for name in names:
        if name not in DEGRADATIONS:
            raise InputError(f"unknown degradation {name!r}; expected some of {', '.join(DEGRADATIONS)}, joined by +")
    if len(set(names)) < len(names):
        raise InputError(f"degradations {'+'.join(names)} repeat one; each may occur once")
    for name in sorted(names, key=list(DEGRADATIONS).index):
        scene = scene._replace(image=DEGRADATIONS[name](scene, rng, strength))
    return scene.image


def patchwork(scene, rng, names=None, strength=1.0):
    """(image, mask, names): another degradation in each of K regions, image = sum_k mask_k f_k(J), blended where they meet.

    names: K degradations or compositions, in the order of the mask's channels; if None or empty, two or three of noise25,
    rain, snow and blur. mask (H,W,K) float32 sums to 1 over K, is 1 inside region k, and its argmax gives each region 1/K of
    the area: regions are bands between the quantiles of a smooth_field. Our choice. InputError for an unknown name.
    """
    if not names:
        names = [str(name) for name in rng.permutation(["noise25", "rain", "snow", "blur"])[:rng.integers(2, 4)]]
    shape, k = scene.image.shape[:2], len(names)
    field = smooth_field(shape, rng, waves=2)
    rank = np.empty(field.size, np.float32)
    rank[field.argsort(axis=None)] = (np.arange(field.size) + 0.5) / field.size             # uniform on [0,1], smooth in space
    ramps = [np.clip(10 * (k * rank.reshape(shape) - i) + 0.5, 0, 1) for i in range(1, k)]  # from 0 to 1 at the i-th quantile
    ramps = [np.ones(shape, np.float32), *ramps, np.zeros(shape, np.float32)]
    mask = np.stack([here - beyond for here, beyond in zip(ramps, ramps[1:])], axis=-1)
    parts = [compose(scene, name.split("+"), rng, strength) for name in names]
    return np.clip(sum(mask[..., i:i + 1] * part for i, part in enumerate(parts)), 0, 1), mask, names


def stains(scene, rng, overlapping=False, strength=1.0):
    """(image, amounts) under K = 3 stains of unknown color: I = 1/8 + 3/4 (J + sum_k a_k (t_k + g_k)), cut to [0,1].

    t_k ~ N(0, 0.25^2) per color channel is a stain's tint, another one in every image; from all three the same color is taken
    away, so that the image keeps its mean color: else nobody could tell it from its stains. g_k is a stain's grain, by which it
    can be told: a sine of amplitude 0.12 and period 4 pixels along the columns, the rows or the diagonal, the same in all colors.
    amounts a (H,W,K) float32: 1 where the k-th of three smooth random fields is the largest, 0 elsewhere; or, overlapping, half
    the size of each field of unit variance. They grow with the image. The photograph is faded, so that little is cut off.
    strength 0 is J; others lie on the line from J through I. Our choice.
    """
    _check_strength(strength)
    shape = scene.image.shape[:2]
    fields = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), min(shape) / 12, mode="wrap") for _ in range(3)], -1)
    amounts = abs(fields) / (2 * fields.std()) if overlapping else fields.argmax(-1)[..., None] == np.arange(3)
    amounts, tints = amounts.astype(np.float32), rng.normal(0, 0.25, (3, 3)).astype(np.float32)
    tints -= np.average(tints, 0, amounts.mean((0, 1)))
    y, x = np.indices(shape)
    grain = 0.12 * np.sin(np.pi / 2 * np.stack((y, x, x + y), -1)).astype(np.float32)
    stained = 0.125 + 0.75 * (scene.image + amounts @ tints + (amounts * grain).sum(-1, keepdims=True))
    return np.clip(scene.image + strength * (stained - scene.image), 0, 1).astype(np.float32), amounts


# Entries of a suite that are no composition: each takes (scene, rng, strength) and gives (image, masks, ...).
ALONE = {"clean": lambda scene, rng, strength: (scene.image.copy(), None),
         "patchwork": lambda scene, rng, strength: patchwork(scene, rng, strength=strength),
         "stains": lambda scene, rng, strength: stains(scene, rng, False, strength),
         "stains-overlapping": lambda scene, rng, strength: stains(scene, rng, True, strength)}


def apply(scene, entry, rng, strength=1.0):
    """The degraded image of a scene for one entry of a suite: one of ALONE, or a degradation or several joined by "+"."""
    if entry in ALONE:
        return ALONE[entry](scene, rng, strength)[0]
    return compose(scene, entry.split("+"), rng, strength)


def degrade(image: np.ndarray, names: str, seed: int = 0, strength: float = 1.0) -> np.ndarray:
    """An image degraded by `names`: an entry of a suite, such as "haze+rain" or "stains". The same seed gives the same result.

    image: uint8, uint16 or float in [0,1], gray or color, with or without alpha, as `images.checked`; the result is of the
    same kind. InputError for anything else, and for an unknown or repeated name.
    """
    rng = np.random.default_rng(seed)
    image = checked(image)
    return like(apply(Scene(as_rgb(image)), names, rng, strength), image)


def suite(name):
    """The entries of a suite, or of several joined by "+", each once. Raises InputError for an unknown suite."""
    unknown = [part for part in name.split("+") if part not in SUITES]
    if unknown:
        raise InputError(f"unknown suite {unknown[0]!r}; expected some of {', '.join(SUITES)}, joined by +")
    return tuple(dict.fromkeys(entry for part in name.split("+") for entry in SUITES[part]))
