"""Degradations against their formulas, compositions, patchworks and suites, and the strengths against CDD-11's."""
import csv
from pathlib import Path

import numpy as np
import pytest

from tinycea import degradations as room
from tinycea.degradations import (
    DEGRADATIONS,
    SUITES,
    apply,
    blur,
    compose,
    defocus,
    disk,
    haze,
    line,
    low,
    motion,
    noise,
    patchwork,
    rain,
    snow,
    suite,
    trace,
)
from tinycea.runtime import InputError
from tinycea.scenes import Scene, dead_leaves, photographs

SCENE = dead_leaves((40, 56), np.random.default_rng(0))
PHOTO = Scene(SCENE.image)
ENTRIES = [*DEGRADATIONS, "low+haze+snow", "patchwork", "stains", "stains-overlapping"]


def rng(seed=0):
    return np.random.default_rng(seed)


def mse(a, b):
    return np.mean((a - b) ** 2)


def gray(value, shape=(64, 80)):
    return np.full((*shape, 3), value, np.float32)


# What holds for all

@pytest.mark.parametrize("scene", [SCENE, PHOTO], ids=["maps", "photograph"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_seed_gives_the_same_bytes_and_leaves_the_scene_alone(entry, scene):
    before = [None if m is None else m.copy() for m in scene]
    first, again, other = (apply(scene, entry, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert all(a is b is None or np.array_equal(a, b) for a, b in zip(before, scene))
    assert first.dtype == np.float32 and first.shape == scene.image.shape and not np.shares_memory(first, scene.image)
    assert first.min() >= 0 and first.max() <= 1 and mse(first, scene.image) > 1e-5


@pytest.mark.parametrize("entry", ENTRIES)
def test_strength_0_is_the_identity_and_more_is_worse(entry):
    assert np.allclose(apply(SCENE, entry, rng(), 0), SCENE.image, atol=0 if entry in DEGRADATIONS else 1e-6)
    same = apply(Scene(SCENE.image.astype(float)), entry, rng(), 0)
    assert same.dtype == np.float32 and not np.shares_memory(apply(SCENE, entry, rng(), 0), SCENE.image)
    errors = [np.mean([mse(apply(PHOTO, entry, rng(seed), s), PHOTO.image) for seed in range(4)]) for s in (0.25, 0.5, 1, 1.5)]
    assert np.all(np.diff(errors) > 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3)])
@pytest.mark.parametrize("entry", ENTRIES)
def test_tiny_images_keep_their_shape(entry, shape):
    assert apply(Scene(gray(0.4, shape)), entry, rng()).shape == (*shape, 3)


BAD_IMAGES = [None, np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.float32), np.zeros((4, 4, 3), np.uint8),
              np.zeros((0, 4, 3), np.float32), gray(1.1), gray(-0.1), gray(np.nan)]


@pytest.mark.parametrize("function", [noise, rain, snow, haze, motion, defocus, low])
def test_bad_arguments_are_refused(function):
    for image in BAD_IMAGES:
        with pytest.raises(InputError, match="image"):
            function(image, rng())
    for strength in (-1, 11, 1e300, np.nan, np.inf, "1", None):
        with pytest.raises(InputError, match="strength"):
            function(gray(0.5), rng(), strength)
    with pytest.raises(InputError, match="rng"):
        function(gray(0.5), 7)


@pytest.mark.parametrize("entry", ENTRIES)
def test_any_float_and_every_strength_in_range(entry):
    half = Scene(gray(0.5).astype(np.float16))
    assert apply(half, entry, rng(), 10).dtype == np.float32 and np.isfinite(apply(half, entry, rng(), 10)).all()
    with pytest.raises(InputError, match="strength"):
        apply(half, entry, rng(), 1e300)


def test_maps_that_do_not_fit_are_refused():
    for bad in (np.zeros((3, 3), np.float32), np.full((64, 80), 2.0), np.full((64, 80), np.nan)):
        with pytest.raises(InputError, match="depth"):
            haze(gray(0.5), rng(), depth=bad)
        with pytest.raises(InputError, match="illumination"):
            low(gray(0.5), rng(), illumination=bad)


# Each against its formula

@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_noise_has_its_sigma_and_eight_bits(sigma):
    noisy = noise(gray(0.5, (200, 200)), rng(), sigma=sigma) * 255
    assert np.allclose(noisy, np.rint(noisy), atol=1e-3)
    assert abs(np.subtract(*np.percentile(noisy, (84.13, 15.87))) / (2 * sigma) - 1) < 0.04      # a sigma either side
    assert abs(noisy.mean() - (127.5 - 0.5)) < 0.5                                # truncation costs half a level
    assert np.array_equal(DEGRADATIONS[f"noise{sigma}"](PHOTO, rng(3), 1), noise(PHOTO.image, rng(3), sigma=sigma))


def test_haze_at_one_depth_is_the_closed_form():
    depth, draw = np.full((40, 56), 0.5, np.float32), rng(8)
    beta, light = draw.uniform(1, 2), draw.uniform(0.6, 0.9)
    for strength, near in ((1, 0.5), (0.3, 0.5), (1, 1)):
        t = np.exp(-strength * beta * min(near, 0.7))
        hazy = haze(SCENE.image, rng(8), strength, depth=0 * depth + near)
        assert np.allclose(hazy, SCENE.image * t + light * (1 - t), atol=1e-6)
    assert np.array_equal(haze(SCENE.image, rng(), depth=0 * depth), SCENE.image)


def test_haze_of_a_photograph_thickens_toward_the_top_and_of_a_scene_with_its_depth():
    veil = np.mean([haze(gray(0), rng(seed)) for seed in range(20)], axis=0)[..., 0].mean(1)
    assert veil[0] > 3 * veil[-2] and np.all(np.diff(veil[10:]) < 0)
    veil = DEGRADATIONS["haze"](SCENE._replace(image=0 * SCENE.image), rng(), 1)[..., 0]
    assert np.corrcoef(veil.ravel(), np.minimum(SCENE.depth, 0.7).ravel())[0, 1] > 0.95


def test_low_light_is_a_power_of_the_illumination_and_noise():
    draw, light = rng(9), np.full((200, 200), 0.6, np.float32)
    gamma, sigma = draw.uniform(2, 3), draw.uniform(0.03, 0.08)
    for strength in (1, 0.5):
        dark = low(gray(0.9, (200, 200)), rng(9), strength, illumination=light)
        assert abs(dark.mean() - 0.9 * 0.6 ** (strength * (gamma - 1))) < 1e-3
        assert abs(dark.std() / (strength * sigma) - 1) < 0.02


def test_low_light_uses_the_scene_s_illumination_or_guesses_it():
    assert np.array_equal(DEGRADATIONS["low"](SCENE, rng(), 1), low(SCENE.image, rng(), illumination=SCENE.illumination))
    assert np.array_equal(low(gray(0.6), rng()), low(gray(0.6), rng(), illumination=gray(0.6)[..., 0]))


def test_rain_and_snow_only_brighten_and_rain_only_adds():
    for weather in (rain, snow):
        change = weather(SCENE.image, rng()) - SCENE.image
        assert change.min() > -1e-6 and 0.01 < change.mean() < 0.2
    mask = rain(gray(0), rng(4))
    assert np.allclose(rain(gray(0.2), rng(4)), np.clip(0.2 + mask, 0, 1), atol=1e-6)
    assert np.allclose(rain(gray(0), rng(4), 0.5), mask / 2, atol=1e-6)
    assert np.array_equal(mask[..., 0], mask[..., 2])


def test_snow_blends_toward_white():
    m = snow(0 * SCENE.image, rng(4))
    assert np.allclose(snow(SCENE.image, rng(4)), SCENE.image * (1 - m) + m, atol=1e-6)
    assert np.all(snow(gray(1), rng()) == 1)


def test_rain_runs_along_its_angle():
    for seed in range(5):
        angle = rng(seed).uniform(-0.6, 0.6)
        mask = rain(gray(0, (128, 128)), rng(seed))[..., 0]
        along, across = (np.roll(mask, np.rint(step).astype(int), (0, 1)) for step in
                         (6 * np.array([np.cos(angle), np.sin(angle)]), 6 * np.array([-np.sin(angle), np.cos(angle)])))
        assert np.corrcoef(mask.ravel(), along.ravel())[0, 1] > 0.25 + np.corrcoef(mask.ravel(), across.ravel())[0, 1]


PSFS = {"disk": disk(3.3), "pinpoint": disk(0.2), "stroke": trace(line(9, 0.4)), "stray": trace(np.array([[0.5, -2.2], [1, 3]]))}


@pytest.mark.parametrize("name", PSFS)
def test_a_psf_sums_to_1_and_keeps_a_constant(name):
    psf = PSFS[name]
    assert psf.min() >= 0 and np.isclose(psf.sum(), 1) and psf.shape[0] == psf.shape[1] and psf.shape[0] % 2 == 1
    assert np.allclose(blur(gray(0.7, (12, 15)), psf), 0.7, atol=1e-6)


def test_the_disk_has_its_area_and_the_trace_its_places():
    assert abs(1 / disk(6.5).max() / (np.pi * 6.5**2) - 1) < 0.02
    y, x = np.mgrid[-3:4, -3:4]
    psf = trace(np.array([[0.25, -1.0], [1.5, 2.5]]))
    assert np.allclose([(psf * y).sum(), (psf * x).sum()], [0.875, 0.75])        # the mean place survives the histogram


def test_blur_is_a_convolution_mirrored_at_the_borders():
    psf, image = PSFS["stray"], SCENE.image[:9, :11]
    m = len(psf) // 2
    mirrored = np.pad(image, ((m, m), (m, m), (0, 0)), mode="symmetric")
    direct = sum(psf[m + i, m + j] * mirrored[m - i:m - i + 9, m - j:m - j + 11]
                 for i in range(-m, m + 1) for j in range(-m, m + 1))
    assert np.allclose(blur(image, psf), direct, atol=1e-6)


def test_a_point_blurs_in_place():
    point = 0 * gray(0, (41, 41))
    point[20, 20] = 1
    y, x = np.mgrid[-20:21, -20:21]
    for lens in (motion, defocus):
        for seed in range(5):
            spot = lens(point, rng(seed))[..., 0]
            assert abs(spot.sum() - 1) < 1e-2 and abs((spot * y).sum()) < 0.1 and abs((spot * x).sum()) < 0.1
            assert 1 < np.sqrt((spot * (y**2 + x**2)).sum()) < 12 if lens is motion else spot.max() < 0.1


# Compositions

@pytest.mark.parametrize("typed", ["haze+rain+low", "rain+low+haze", "low+rain+haze"])
def test_the_order_typed_does_not_matter(typed):
    draw = rng(6)
    image = haze(rain(low(SCENE.image, draw, illumination=SCENE.illumination), draw), draw, depth=SCENE.depth)
    assert np.array_equal(apply(SCENE, typed, rng(6)), image)
    assert np.array_equal(compose(SCENE, typed.split("+"), rng(6)), image)


def test_light_comes_before_weather_before_the_lens_before_the_sensor(monkeypatch):
    came, names = [], ["low", "rain", "snow", "haze", "blur", "noise15"]
    for name in names:
        monkeypatch.setitem(DEGRADATIONS, name, lambda scene, draw, strength, name=name: came.append(name) or scene.image)
    apply(SCENE, "noise15+blur+haze+snow+rain+low", rng())
    assert came == names


@pytest.mark.parametrize("entry", ["fog", "", "low+", "low+patchwork", "Haze"])
def test_unknown_names_are_refused_with_the_known_ones(entry):
    with pytest.raises(InputError, match="unknown degradation.*low, rain, snow, haze"):
        apply(SCENE, entry, rng())


def test_repeated_names_are_refused():
    with pytest.raises(InputError, match="once"):
        compose(SCENE, ["haze", "haze"], rng())


# Patchworks

@pytest.mark.parametrize("shape", [(48, 48), (200, 150)])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_patchwork_s_regions_share_the_area(shape, k):
    names = ["noise25", "haze+rain", "snow", "defocus"][:k]
    image, mask, same = patchwork(Scene(gray(0.5, shape)), rng(k), names)
    assert same == names and mask.shape == (*shape, k) and mask.dtype == image.dtype == np.float32
    assert mask.min() >= 0 and np.allclose(mask.sum(-1), 1, atol=1e-6)
    assert np.allclose(np.bincount(mask.argmax(-1).ravel(), minlength=k) * k / mask[..., 0].size, 1, atol=0.02)
    assert np.mean(mask.max(-1) == 1) > 0.6                                       # most pixels have one degradation only


def test_each_region_holds_its_own_degradation(monkeypatch):
    for value, name in ((0.1, "rain"), (0.5, "snow"), (0.9, "blur")):
        monkeypatch.setitem(room.DEGRADATIONS, name, lambda scene, draw, strength, value=value: gray(value, scene.depth.shape))
    for names, values in ((["rain", "snow", "blur"], [0.1, 0.5, 0.9]), (["blur", "rain"], [0.9, 0.1])):
        image, mask, _ = patchwork(SCENE, rng(), names)
        assert np.allclose(image[..., 0], mask @ np.float32(values), atol=1e-6)


def test_a_patchwork_draws_two_or_three_and_says_which():
    drawn = [patchwork(SCENE, rng(seed))[2] for seed in range(40)]
    assert {len(names) for names in drawn} == {2, 3} and all(len(set(names)) == len(names) for names in drawn)
    assert {name for names in drawn for name in names} == {"noise25", "rain", "snow", "blur"}
    image, mask, names = patchwork(SCENE, rng(5))
    assert mask.shape[2] == len(names) and np.array_equal(image, apply(SCENE, "patchwork", rng(5)))


# Suites

def test_the_suites_are_the_papers_and_join():
    assert suite("aio3") == ("noise15", "noise25", "noise50", "rain", "haze")
    assert suite("aio5") == ("noise25", "rain", "haze", "blur", "low")
    assert [frozenset(entry.split("+")) for entry in suite("cdd11")] == [frozenset(entry.split("_")) for entry in (
        "low haze rain snow low_haze low_rain low_snow haze_rain haze_snow low_haze_rain low_haze_snow".split())]
    assert suite("aio5+patchwork") == (*suite("aio5"), "patchwork")
    assert suite("aio3+aio5") == (*suite("aio3"), "blur", "low")


@pytest.mark.parametrize("name", ["aio7", "", "aio3+", "noise25"])
def test_an_unknown_suite_is_refused(name):
    with pytest.raises(InputError, match="aio3, aio5, cdd11, patchwork, stains"):
        suite(name)


TABLE = list(csv.DictReader((Path(__file__).parents[1] / "data" / "calibration.csv").read_text().splitlines()[1:]))
TEST = list(photographs("test").values())


def test_the_calibration_table_holds_cdd11():
    assert [row["entry"] for row in TABLE if row["cdd11_dB"]] == SUITES["cdd11"]


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["entry"])
def test_strengths_are_those_of_cdd11_and_of_the_table(row):
    psnr = np.mean([-10 * np.log10(mse(apply(Scene(image), row["entry"], rng(seed)), image))
                    for image in TEST for seed in range(6)])
    assert abs(psnr - float(row["test_dB"])) < 0.1                                # the table is this code's, seed for seed
    assert not row["cdd11_dB"] or abs(psnr - float(row["cdd11_dB"])) < 3
    assert row["entry"] != "blur" or 23 < psnr < 27
