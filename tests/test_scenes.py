"""Clean scenes: the law of dead leaves, maps that fit the image, crops, the photographs."""
import numpy as np
import pytest
from scipy import stats

from tinycea import scenes
from tinycea.runtime import InputError
from tinycea.scenes import Scene, crop, dead_leaves, leaf_radii, photographs, pyramid, smooth_field


def rng(seed=0):
    return np.random.default_rng(seed)



# Dead leaves

def test_radii_follow_the_cubic_law():
    radii = leaf_radii(20000, 2.0, 50.0, rng())
    assert radii.min() >= 2 and radii.max() <= 50
    law = stats.kstest(radii, lambda r: (2.0**-2 - r**-2) / (2.0**-2 - 50.0**-2))      # the integral of r^-3, scaled
    assert law.pvalue > 0.01


def test_leaves_are_disks_that_hide_what_lies_behind():
    leaf, disks = scenes._lay(np.array([60, 84]), rng())
    y, x = np.indices(leaf.shape)
    inside = np.stack([np.hypot(y - cy, x - cx) <= radius for cy, cx, radius in disks])
    first = inside.argmax(0)                                              # of the disks over a pixel, the one laid first
    assert np.array_equal(leaf, first)
    assert np.mean(leaf == len(disks) - 1) <= 1e-3                        # nearly nothing is left to the background


def test_a_scene_is_reflectance_times_illumination():
    reflectance, depth = scenes._paint((40, 56), rng(3))
    scene = dead_leaves((40, 56), rng(3))
    assert scene.image.shape == (40, 56, 3) and scene.depth.shape == scene.illumination.shape == (40, 56)
    assert np.array_equal(scene.image, reflectance * scene.illumination[..., None])
    assert np.array_equal(scene.depth, depth)
    assert 0 < scene.illumination.min() and scene.illumination.max() == 1
    assert 0 <= reflectance.min() and reflectance.max() <= 1 and all(m.dtype == np.float32 for m in scene[:3])


def test_depth_is_the_share_of_the_image_that_lies_nearer():
    _, depth = scenes._paint((64, 64), rng(4))
    leaf, _ = scenes._lay(np.array([128, 128]), rng(4))
    for index in np.unique(leaf)[::40]:
        whole = (leaf == index).reshape(64, 2, 64, 2).all((1, 3))         # pixels all of whose quarters show this leaf
        assert np.allclose(depth[whole], np.mean(leaf < index), atol=1e-6)


def test_scenes_differ_use_the_range_and_repeat_with_their_seed():
    pool = [dead_leaves(128, rng(seed)) for seed in range(6)]
    assert all(np.array_equal(a, b) for a, b in zip(pool[2], dead_leaves(128, rng(2))))
    assert np.mean([np.ptp(scene.image) for scene in pool]) > 0.8
    assert min(np.abs(a.image - b.image).mean() for i, a in enumerate(pool) for b in pool[:i]) > 0.05


def test_edges_are_anti_aliased():
    _, depth = scenes._paint((64, 64), rng(5))
    leaf, _ = scenes._lay(np.array([128, 128]), rng(5))
    nearer = np.array([np.mean(leaf < index) for index in range(leaf.max() + 1)])
    assert np.allclose(depth, nearer[leaf].reshape(64, 2, 64, 2).mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize("size", [0, -3, 2.5, (3, 4, 5), (3, 0), "big"])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(InputError, match="size is"):
        dead_leaves(size, rng())


def test_a_smooth_field_spans_the_unit_interval_slowly():
    field = smooth_field((48, 60), rng())
    assert field.dtype == np.float32 and field.min() == 0 and field.max() == 1
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in (0, 1)) < 0.15


# Crops

def coordinates(height, width):
    """A scene whose image, depth and illumination all hold the same number, another one at each pixel."""
    ramp = ((np.arange(height * width) + 1) / (height * width + 1)).reshape(height, width).astype(np.float32)
    return Scene(np.repeat(ramp[..., None], 3, 2), ramp, ramp)


def test_a_crop_turns_all_maps_alike_and_shares_no_memory():
    scene, draw, seen = coordinates(9, 13), rng(), set()
    for _ in range(400):
        part = crop(scene, 5, draw)
        assert part.image.shape == (5, 5, 3)
        assert np.array_equal(part.image[..., 0], part.depth) and np.array_equal(part.depth, part.illumination)
        steps = np.rint(np.array([part.depth[1, 0] - part.depth[0, 0], part.depth[0, 1] - part.depth[0, 0]]) * (9 * 13 + 1))
        seen.add(tuple(steps.astype(int)))
        part.image[:], part.depth[:] = 0, 0
    assert seen == {(a, b) for a in (13, -13) for b in (1, -1)} | {(b, a) for a in (13, -13) for b in (1, -1)}   # 8 poses
    assert np.array_equal(scene.depth, coordinates(9, 13).depth)


def test_crops_reach_every_place():
    scene, draw = coordinates(9, 13), rng()
    assert {v for _ in range(400) for v in crop(scene, 5, draw).depth.flat} == set(scene.depth.flat)


@pytest.mark.parametrize("shape", [(3, 4), (3, 20), (1, 1)])
def test_a_small_scene_is_mirrored_first(shape):
    scene = coordinates(*shape)
    part = crop(scene._replace(illumination=None), 8, rng())
    assert part.image.shape == (8, 8, 3) and part.depth.shape == (8, 8) and part.illumination is None
    assert set(part.depth.flat) <= set(scene.depth.flat)


def test_pyramid_halves_every_map_down_to_the_size():
    scene = coordinates(50, 37)
    levels = pyramid(scene, 9)
    assert [level.image.shape for level in levels] == [(50, 37, 3), (25, 18, 3), (12, 9, 3)]
    for level, finer in zip(levels[1:], levels):
        for half, whole in zip(level[:3], finer):
            h, w = half.shape[:2]
            quarters = whole[:2 * h, :2 * w].reshape(h, 2, w, 2, -1)
            np.testing.assert_allclose(half, quarters.mean((1, 3)).reshape(half.shape), rtol=1e-6)
    assert pyramid(Scene(scene.image), 38)[0].depth is None and len(pyramid(scene, 19)) == 1


# Photographs

def test_the_splits_are_disjoint_images():
    splits = {split: photographs(split) for split in ("train", "validation", "test")}
    assert set(splits["test"]) == {"astronaut", "chelsea", "coffee"}
    assert set(splits["validation"]) == {"rocket", "motorcycle_left"}
    names = [name for split in splits.values() for name in split]
    assert len(set(names)) == len(names) and "motorcycle_right" not in names
    for image in (image for split in splits.values() for image in split.values()):
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.float32
        assert 0 <= image.min() and image.max() <= 1 and image.std() > 0.05


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="train, validation, test"):
        photographs("tset")


