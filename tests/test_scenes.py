"""Clean images: the law of dead leaves, maps that fit the image, crops, and files of every kind, whole, odd and hostile."""
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import stats

from tinycea import scenes
from tinycea.errors import InputError
from tinycea.scenes import (
    Scene,
    crop,
    dead_leaves,
    folder,
    leaf_radii,
    list_images,
    photographs,
    pyramid,
    read_image,
    rgb,
    smooth_field,
    write_image,
)

COLOR = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (20, 30, 3), np.uint16)


def rng(seed=0):
    return np.random.default_rng(seed)


# Dead leaves

def test_radii_follow_the_cubic_law():
    radii = leaf_radii(20000, 2.0, 50.0, rng())
    law = lambda r: (2.0**-2 - r**-2) / (2.0**-2 - 50.0**-2)              # the integral of r^-3, scaled to end at 1
    assert radii.min() >= 2 and radii.max() <= 50
    assert stats.kstest(radii, law).pvalue > 0.01


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
    assert 0 <= reflectance.min() and reflectance.max() <= 1 and all(m.dtype == np.float32 for m in scene)


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
        for half, whole in zip(level, finer):
            h, w = half.shape[:2]
            quarters = whole[:2 * h, :2 * w].reshape(h, 2, w, 2, -1)
            np.testing.assert_allclose(half, quarters.mean((1, 3)).reshape(half.shape), rtol=1e-6)
    assert pyramid(Scene(scene.image), 38)[0].depth is None and len(pyramid(scene, 19)) == 1


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_orientation_and_planes_of_16_bit_color_tiff(tmp_path, turn, planar):
    deep = np.random.default_rng(0).integers(0, 65535, (20, 4, 3)).astype(np.uint16)
    stored = deep if planar == "contig" else np.moveaxis(deep, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, extratags=[(274, "H", 1, turn, True)])
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "b.tif", exif=exif(turn))           # Pillow turns this one
    pixels, dtype = read_image(tmp_path / "a.tif")
    assert dtype == np.uint16 and np.allclose(pixels, read_image(tmp_path / "b.tif")[0], atol=1 / 200)


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


# Reading

def exif(turn):
    tags = Image.Exif()
    tags[274] = turn                                                      # the orientation tag
    return tags


def test_every_kind_of_png(tmp_path):
    image, path = Image.fromarray(COLOR), tmp_path / "a.png"
    for mode, channels in {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 3, "1": 1}.items():
        image.convert(mode).save(path)
        pixels, dtype = read_image(path)
        plain = {"P": "RGB", "1": "L"}.get(mode, mode)
        assert dtype == np.uint8 and pixels.dtype == np.float32 and pixels.shape == (20, 30, channels)
        assert np.allclose(pixels.squeeze() * 255, np.asarray(image.convert(mode).convert(plain)), atol=1e-4)
    image.convert("P").save(path, transparency=3)
    assert read_image(path)[0].shape == (20, 30, 4)
    Image.fromarray(DEEP[..., 0]).save(path)
    pixels, dtype = read_image(path)
    assert dtype == np.uint16 and np.array_equal(pixels[..., 0], DEEP[..., 0] / np.float32(65535))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation_is_obeyed(tmp_path, suffix):
    Image.fromarray(COLOR).save(tmp_path / f"a.{suffix}", exif=exif(6))
    assert np.allclose(read_image(tmp_path / f"a.{suffix}")[0], np.rot90(COLOR, -1) / 255)


def test_jpeg_turned_and_cmyk(tmp_path):
    smooth = np.repeat(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], 24, 1).repeat(3, 2)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", exif=exif(3))
    assert np.abs(read_image(tmp_path / "a.jpg")[0] - smooth[::-1] / 255).max() < 0.03
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "b.jpg")
    pixels, _ = read_image(tmp_path / "b.jpg")
    assert pixels.shape == (32, 24, 3) and np.abs(pixels - smooth / 255).max() < 0.05


def test_tiffs_of_16_bits_planes_pages_and_compressed(tmp_path):
    path, deep = tmp_path / "a.tif", DEEP / np.float32(65535)
    for pixels, how in [(DEEP, {}), (DEEP, {"compression": "zlib"}), (np.stack([DEEP, DEEP[::-1]]), {}),
                        (np.moveaxis(DEEP, -1, 0), {"planarconfig": "separate"})]:
        tifffile.imwrite(path, pixels, photometric="rgb", **how)
        got, dtype = read_image(path)
        assert dtype == np.uint16 and np.array_equal(got, deep)
    for how in ({}, {"compression": "tiff_lzw"}, {"save_all": True, "append_images": [Image.fromarray(COLOR[::-1].copy())]}):
        Image.fromarray(COLOR).save(path, **how)
        assert np.array_equal(read_image(path)[0], COLOR / np.float32(255))


def test_the_first_frame_of_an_animation(tmp_path):
    first = Image.fromarray(COLOR)
    first.save(tmp_path / "a.png", save_all=True, append_images=[first.rotate(180)])
    assert np.array_equal(read_image(tmp_path / "a.png")[0], COLOR / np.float32(255))


def odd_animation(path):
    """A sound PNG that announces an animation of no frames, at which Pillow warns."""
    Image.fromarray(COLOR).save(path)
    data, chunk = path.read_bytes(), b"acTL" + bytes(8)
    path.write_bytes(data[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:])


def hostile(path):
    """Files that are no images, by name."""
    Image.fromarray(COLOR).save(path / "whole.png")
    Image.fromarray(COLOR).save(path / "whole.jpg")
    tifffile.imwrite(path / "whole.tif", DEEP, photometric="rgb")
    (path / "text.png").write_text("I am a poem\n")
    (path / "empty.png").touch()
    (path / "folder.png").mkdir()
    for name, length in (("png", 900), ("jpg", 500), ("tif", 900)):
        (path / f"cut.{name}").write_bytes((path / f"whole.{name}").read_bytes()[:length])
    (path / "tags.tif").write_bytes((path / "whole.tif").read_bytes()[:250])
    (path / "head.tif").write_bytes(b"II*\0hello there")
    tifffile.imwrite(path / "float.tif", DEEP[..., 0].astype(np.float32))
    for suffix in ("png", "jpg", "tif"):
        (path / f"whole.{suffix}").unlink()
    return ["text.png", "empty.png", "folder.png", "cut.png", "cut.jpg", "cut.tif", "tags.tif", "head.tif", "float.tif",
            "missing.png"]


def test_hostile_files_get_one_sentence(tmp_path):
    for name in hostile(tmp_path):
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value), name


def test_no_library_talks_over_us(tmp_path):
    names = hostile(tmp_path)
    odd_animation(tmp_path / "odd.png")
    code = "import sys; from tinycea.scenes import folder; print(*dict(folder(sys.argv[1])))"
    ran = subprocess.run([sys.executable, "-W", "always", "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout == "odd.png\n"
    said = ran.stderr.splitlines()
    assert len(said) == len(names) - 2 and all(line.startswith("skipping ") for line in said), ran.stderr


def test_a_folder_skips_and_names_what_is_no_image(tmp_path, capsys):
    names = hostile(tmp_path)
    with pytest.raises(InputError, match="no readable image"):
        list(folder(tmp_path))
    capsys.readouterr()
    Image.fromarray(COLOR).convert("L").save(tmp_path / "gray.PNG")
    assert {name: image.shape for name, image in folder(tmp_path)} == {"gray.PNG": (20, 30, 3)}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(names) - 2 and all(line.startswith("skipping ") for line in said)


def test_list_images_expands_folders_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "c.txt", "d.tiff"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "e.png").touch()
    found = list_images([tmp_path / "c.txt", str(tmp_path)])
    assert [file.name for file in found] == ["c.txt", "a.JPG", "b.png", "d.tiff"]
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="no image"):
        list_images([tmp_path / "bare"])


def test_rgb_repeats_gray_and_drops_alpha():
    pixels = rng().random((4, 5, 4))
    for channels in (1, 2):
        assert np.array_equal(rgb(pixels[..., :channels]), np.repeat(pixels[..., :1], 3, 2))
    for channels in (3, 4):
        assert np.array_equal(rgb(pixels[..., :channels]), pixels[..., :3])


# Writing

@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".TIF", ".jpg"])
def test_what_is_written_is_read_again(tmp_path, suffix, channels, dtype):
    y, x = np.mgrid[0:1:21j, 0:1:33j]
    pixels = np.stack([y, x, 1 - y, (x + y) / 2], -1)[..., :channels].astype(np.float32)
    write_image(tmp_path / f"a{suffix}", pixels, dtype)
    got, kept = read_image(tmp_path / f"a{suffix}")
    deep = dtype == np.uint16 and (suffix == ".TIF" or suffix == ".png" and channels == 1)
    assert kept == (np.uint16 if deep else np.uint8)
    pixels = pixels[..., :-1] if suffix == ".jpg" and channels in (2, 4) else pixels
    assert got.shape == pixels.shape
    assert np.abs(got - pixels).max() <= (0.04 if suffix == ".jpg" else 0.501 / np.iinfo(kept).max)


def test_values_are_rounded_and_clipped_and_gray_may_be_flat(tmp_path):
    write_image(tmp_path / "a.png", np.array([[-3, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 7]]))
    assert np.array_equal(read_image(tmp_path / "a.png")[0][..., 0] * 255, [[0, 0, 1, 255, 255]])


@pytest.mark.parametrize("name, pixels", [
    ("a.gif", np.zeros((2, 2, 3))), ("a", np.zeros((2, 2, 3))), ("no/a.png", np.zeros((2, 2, 3))), ("a.png", np.zeros((2, 2, 5))),
    ("a.png", np.full((2, 2, 3), np.nan)), ("a.png", np.zeros(4)), ("a.png", np.zeros((0, 2, 3))),
    ("taken.png", np.zeros((2, 2, 3)))])
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, name, pixels):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(InputError, match=name):
        write_image(tmp_path / name, pixels)
    assert [file.name for file in tmp_path.iterdir()] == ["taken.png"]


def test_a_float_dtype_is_refused(tmp_path):
    with pytest.raises(InputError, match="uint8 or uint16"):
        write_image(tmp_path / "a.png", np.zeros((2, 2, 3)), np.float32)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_image(path, np.zeros((4, 4, 3)))
    before = path.read_bytes()

    def full(file, *_, **__):
        with open(file, "wb") as handle:
            handle.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes.iio, "imwrite", full)
    with pytest.raises(InputError, match="No space left"):
        write_image(path, np.ones((4, 4, 3)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
