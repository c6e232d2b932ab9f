"""Image files of every kind, whole, odd and hostile; arrays of every kind through one function."""
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

import tinycea
from tinycea import images
from tinycea.images import as_rgb, folder, like, list_images, read_pixels, rgb, write_image
from tinycea.runtime import InputError

COLOR = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (20, 30, 3), np.uint16)


def read_image(path):
    """(pixels in [0,1], the file's dtype)."""
    pixels = read_pixels(path)
    return pixels / np.float32(np.iinfo(pixels.dtype).max), pixels.dtype


def rng(seed=0):
    return np.random.default_rng(seed)


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


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_orientation_and_planes_of_16_bit_color_tiff(tmp_path, turn, planar):
    deep = np.random.default_rng(0).integers(0, 65535, (20, 4, 3)).astype(np.uint16)
    stored = deep if planar == "contig" else np.moveaxis(deep, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, extratags=[(274, "H", 1, turn, True)])
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "b.tif", exif=exif(turn))           # Pillow turns this one
    pixels, dtype = read_image(tmp_path / "a.tif")
    assert dtype == np.uint16 and np.allclose(pixels, read_image(tmp_path / "b.tif")[0], atol=1 / 200)


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


def test_16_bit_tiffs_are_right_or_refused(tmp_path):
    tifffile.imwrite(tmp_path / "white.tif", 65535 - DEEP[..., 0], photometric="miniswhite")
    assert np.array_equal(read_pixels(tmp_path / "white.tif")[..., 0], DEEP[..., 0])
    four = np.repeat(DEEP[..., :1], 4, -1)
    tifffile.imwrite(tmp_path / "cmyk.tif", four, photometric="separated")
    tifffile.imwrite(tmp_path / "lab.tif", DEEP[..., :3], photometric="cielab")
    tifffile.imwrite(tmp_path / "volume.tif", np.zeros((4, 16, 16, 3), np.uint16), photometric="rgb", volumetric=True)
    for name in ("cmyk", "lab", "volume"):
        with pytest.raises(InputError, match=f"{name}.tif: a TIFF of 16 bits that is neither"):
            read_image(tmp_path / f"{name}.tif")


def huge(path, n=20_000):
    """A PNG and a TIFF of a few hundred bytes that declare n x n pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    chunks = (b"IHDR", struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")
    (path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks))
    tifffile.imwrite(path / "huge.tif", DEEP[:8, :8, 0])
    data = (path / "huge.tif").read_bytes()
    for tag in (256, 257):                                                  # ImageWidth and ImageLength, shorts or longs
        at = data.index(struct.pack("<H", tag), 8)
        data = data[:at + 2] + struct.pack("<HII", 4, 1, n) + data[at + 12:]
    (path / "huge.tif").write_bytes(data)


def test_what_is_too_large_is_refused_before_it_takes_memory(tmp_path):
    huge(tmp_path)
    for name in ("huge.png", "huge.tif"):
        tracemalloc.start()
        with pytest.raises(InputError, match=f"{name}: 20000 x 20000 pixels; at most 128 megapixels are read"):
            read_image(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()
    Image.fromarray(COLOR).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="at most 0.0001 megapixels"):
        read_pixels(tmp_path / "small.png", 1e-4)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    blank = tmp_path / "blank.png"
    Image.new("1", (4000, 4000)).save(blank)                   # a page of a fax: as dense as an honest file can be
    assert read_pixels(blank).shape == (4000, 4000, 1)
    tifffile.imwrite(tmp_path / "liar.tif", COLOR[..., 0])
    with tifffile.TiffFile(tmp_path / "liar.tif", mode="r+b") as file:
        file.pages[0].tags["ImageLength"].overwrite(4_000_000)
    with pytest.raises(InputError, match=r"30 x 4000000 pixels in \d+ bytes; a file that small cannot hold them"):
        read_pixels(tmp_path / "liar.tif")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have a name")
def test_what_has_no_end_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(InputError, match=f"{name}: cannot be read .expected a regular file"):
            read_image(tmp_path / name)


def test_no_library_talks_over_us(tmp_path):
    names = hostile(tmp_path)
    odd_animation(tmp_path / "odd.png")
    code = "import sys; from tinycea.images import folder; print(*dict(folder(sys.argv[1])))"
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

    monkeypatch.setattr(images.iio, "imwrite", full)
    with pytest.raises(InputError, match="No space left"):
        write_image(path, np.ones((4, 4, 3)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Arrays

@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1), (7, 5, 2), (7, 5, 3), (1, 1, 4)])
def test_any_array_comes_back_as_it_went(shape, dtype):
    image = rng().integers(0, 256, shape).astype(dtype)
    image = image / np.dtype(dtype).type(255) if dtype.startswith("float") else image
    seen = as_rgb(image)
    same = like(seen, image)
    assert same.shape == shape and same.dtype == dtype and np.allclose(same, image, atol=1e-3 if dtype == "float16" else 1e-6)
    assert seen.shape == (*shape[:2], 3) and seen.dtype == np.float32 and 0 <= seen.min() <= seen.max() <= 1
    turned = like(1 - seen, image)
    assert turned.dtype == dtype and not np.array_equal(turned, image)
    if shape[-1] in (2, 4):
        np.testing.assert_array_equal(turned[..., -1], image[..., -1])              # alpha is kept


@pytest.mark.parametrize("image, message", [
    (np.zeros((2, 3), int), "int64"), (np.zeros(5), "shape"), (np.zeros((0, 3, 3)), "shape"), (np.zeros((2, 3, 5)), "shape"),
    (np.full((2, 3), 1.5), "floats are expected"), (np.full((2, 3), np.nan), "floats are expected"),
    ("photo.png", "shape"), (None, "shape")])
def test_other_arrays_are_refused(image, message):
    for function in (tinycea.restore, lambda image: tinycea.degrade(image, "rain")):
        with pytest.raises(InputError, match=message):
            function(image)


def test_the_public_face_restores_and_degrades_any_kind():
    assert tinycea.restore(np.zeros((7, 5, 3), "uint8")).shape == (7, 5, 3)
    image = rng().integers(0, 65536, (24, 30)).astype("uint16")
    rainy, again, other = (tinycea.degrade(image, "haze+rain", seed=seed) for seed in (1, 1, 2))
    assert rainy.dtype == "uint16" and np.array_equal(rainy, again) and not np.array_equal(rainy, other)
    with pytest.raises(InputError, match="unknown degradation"):
        tinycea.degrade(image, "fog")
