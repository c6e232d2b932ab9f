"""PyTorch's .pth read without PyTorch: what torch saved comes out, TLC is its definition, and hostile files run nothing."""
import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tinycea import load_model, nafnet
from tinycea.nafnet import NAFNetConfig, init
from tinycea.runtime import InputError
from tinycea.zoo import save_model

CONFIG = NAFNetConfig(width=4, encoders=(1, 2), middle=1, decoders=(2, 0), unshuffle=1, adapter=None, centered=False)
WRAPPED = {"bare": lambda s: s, "params": lambda s: {"params": s}, "params_ema": lambda s: {"params": {}, "params_ema": s},
           "state_dict, module.": lambda s: {"state_dict": {f"module.{n}": v for n, v in s.items()}, "epoch": 3}}


@pytest.fixture(scope="module")
def p():
    p = init(CONFIG, np.random.default_rng(0))
    p.flat += np.random.default_rng(1).normal(0, 0.1, p.flat.size).astype(np.float32)
    return p


@pytest.fixture
def image():
    return np.random.default_rng(2).random((1, 21, 35, 3), np.float32)


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_torch_saved_gives_the_network_s_outputs(p, image, tmp_path, wrapped, dtype):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(value).to(getattr(torch, dtype)) for name, value in p.items()}
    torch.save(wrapped(state), tmp_path / "model.pth")
    q, config = load_model(tmp_path / "model.pth")
    assert config == CONFIG
    for name, value in state.items():
        assert np.array_equal(q[name], value.float().numpy())
    assert np.allclose(nafnet.centered(image, q, config)[0], nafnet.nafnet(image, q, CONFIG)[0], atol=1e-6)


def test_it_is_read_where_torch_cannot_be_imported(p, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(value) for name, value in p.items()}, tmp_path / "model.pth")
    code = ("import sys; sys.modules['torch'] = None\nimport tinycea\n"
            f"assert tinycea.load_model({str(tmp_path / 'model.pth')!r}).config.width == 4")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("height, width", [(21, 35), (9, 40), (7, 7)])
def test_local_averages_are_means_over_windows_kept_inside(height, width):
    """The definition: the window of k places around each one, (k - 1) // 2 of them before it, moved inside at the borders."""
    x, k = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32), 8
    expected = np.empty_like(x)
    for i, j in np.ndindex(height, width):
        y0, x0 = (min(max(n - (k - 1) // 2, 0), max(size - k, 0)) for n, size in ((i, height), (j, width)))
        expected[:, i, j] = x[:, y0:y0 + k, x0:x0 + k].mean((1, 2))
    assert np.allclose(nafnet.local_average(x, k), expected, atol=1e-6)


def test_a_model_that_averages_locally_says_so_and_does(p, image, tmp_path):
    save_model(tmp_path / "whole.safetensors", p, CONFIG)
    local, whole = load_model(tmp_path / "whole.safetensors", 16), load_model(tmp_path / "whole.safetensors")
    assert [local.config.window(stage) for stage in local.config.stages()] == [24, 12, 6, 12, 24]
    a, b = (nafnet.centered(image, *model)[0] for model in (local, whole))
    assert abs(a - b).max() > 1e-4
    small = image[:, :16, :16]                # no larger than what it was trained on: the same network
    assert np.array_equal(nafnet.centered(small, *local)[0], nafnet.centered(small, *whole)[0])


# ---- hostile files ---------------------------------------------------------------------------------------------------

def pth(pickled, files=(("data/0", bytes(64)),), compress=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as archive:
        for name, data in (("data.pkl", pickled), *files):
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def tensor(shape, strides, offset=0, storage="FloatStorage", key="0", count=16):
    """The pickle of {"intro.weight": a tensor}, by hand."""
    def text(s):
        return b"X" + len(s).to_bytes(4, "little") + s.encode()

    def number(n):
        return b"\x8a\x08" + n.to_bytes(8, "little", signed=True)

    def numbers(ns):
        return b"(" + b"".join(map(number, ns)) + b"t"
    place = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    return (b"\x80\x02}" + text("intro.weight") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + number(offset)
            + numbers(shape) + numbers(strides) + b"\x89}tRs.")


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile(p, path):
    """Names and bytes of files that hold no model."""
    good = tensor((2, 2, 2, 2), (8, 4, 2, 1))
    yield "a command", pth(pickle.dumps({"params": Command(path)}))
    yield "eval", pth(b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.")
    yield "a method of what is known", pth(b"ccollections\nOrderedDict.update\n.")
    yield "another class", pth(pickle.dumps({"a": np.zeros(3)}))
    yield "no arrays", pth(pickle.dumps({"a": 1}))
    yield "no dictionary", pth(pickle.dumps([1]))
    yield "itself", pth(b"\x80\x02}q\x00X\x06\x00\x00\x00paramsh\x00s.")
    yield "compressed", pth(good, compress=zipfile.ZIP_DEFLATED)
    yield "a bomb", pth(good, [("data/0", bytes(2**24))], zipfile.ZIP_DEFLATED)
    yield "no pickle", pth(good)[:0] + pth(b"")
    yield "a memo far away", pth(b"\x80\x02}r\xff\xff\xff\x7f.")
    yield "a string of a terabyte", pth(b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00abc.")
    yield "an array of a terabyte", pth(b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00abc.")
    yield "ten thousand deep", pth(b"\x80\x02" + b"]" * 10000 + b"a" * 9999 + b".")
    for shape, strides, offset in (((2**40,), (0,), 0), ((2**30, 2**30), (1, 1), 0), ((-1,), (1,), 0), ((4, 4, 4), (4, 4, 4), 0),
                                   ((16,), (1,), 1), ((2,), (-1,), 5), ((2,), (1, 1), 0), ((1,), (1,), 2**39),
                                   ((2**20,), (0,), 0)):
        yield f"shape {shape} {strides} {offset}", pth(tensor(shape, strides, offset))
    yield "a storage that is missing", pth(tensor((2,), (1,), key="7"))
    yield "an unknown type", pth(tensor((2,), (1,), storage="QInt8Storage"))
    whole, rng = pth(good), np.random.default_rng(0)
    for i in range(90):
        yield f"cut {i}", whole[:rng.integers(len(whole))]
    for i in range(90):
        spoiled = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            spoiled[place] ^= 1 << rng.integers(8)
        yield f"flipped {i}", bytes(spoiled)


def test_two_hundred_hostile_files_are_refused_and_run_nothing(p, tmp_path):
    touched, path, count = tmp_path / "touched", tmp_path / "model.pth", 0
    for name, data in hostile(p, touched):
        path.write_bytes(data)
        with pytest.raises(InputError) as refused:
            load_model(path)
        assert "\n" not in str(refused.value) and str(path) in str(refused.value), name
        count += 1
    assert not touched.exists() and count > 200
