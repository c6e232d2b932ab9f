"""Proves that parameters are views of one buffer, files come back bit for bit, and no bad file or failed write does harm."""
import copy
import json
import os
import pickle
import struct
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tinycea import nafnet, params
from tinycea.ablations import CEAConfig
from tinycea.adapters import ExpertsConfig
from tinycea.nafnet import NAFNetConfig
from tinycea.params import Params, copy_into, load, save, under
from tinycea.runtime import InputError
from tinycea.zoo import ADAPTERS, from_dict, load_model, network, save_model, to_dict

SHAPES = {"a.weight": (3, 5), "a.bias": (5,), "b": (1, 7, 1, 1), "scalar": (), "none": (0, 4)}
SMALL = NAFNetConfig(width=8, encoders=(1,), middle=1, decoders=(1,))


def random(shapes=SHAPES, dtype=np.float32):
    p = Params(shapes, dtype)
    p.flat[...] = np.random.default_rng(0).normal(size=p.flat.shape)
    return p


@pytest.fixture
def model(tmp_path):
    """A model file, its parameters and configuration."""
    p = random(nafnet.shapes(SMALL))
    save_model(tmp_path / "model.safetensors", p, SMALL, note="as trained")
    return tmp_path / "model.safetensors", p, SMALL


def refused(path, action, *words):
    """`action` raises InputError in one line that names the file (and the words), and leaves nothing beside it."""
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} if path.parent.is_dir() else {}
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert path.name in message and "\n" not in message and all(word in message for word in words), message
    if path.parent.is_dir():
        assert {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, Params.copy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_is_one_buffer_of_its_own(clone):
    p = random()
    q = clone(p)
    assert type(q) is Params and q.keys() == p.keys() and np.array_equal(q.flat, p.flat)
    q["b"][...] = 7
    q["a.bias"] = np.arange(5)
    assert (q.flat == 7).sum() == 7 and np.array_equal(q["a.bias"], np.arange(5)) and not np.array_equal(q.flat, p.flat)
    assert all(np.shares_memory(value, q.flat) or not value.size for value in q.values())
    with pytest.raises(KeyError):
        q["new"] = 0


# ---- one buffer --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_views_tile_one_contiguous_buffer(dtype):
    p = Params(SHAPES, dtype)
    assert p.flat.dtype == dtype and p.flat.ndim == 1 and p.flat.flags.c_contiguous and not p.flat.any()
    assert {name: value.shape for name, value in p.items()} == SHAPES and list(p) == list(SHAPES)
    for i, value in enumerate(p.values()):
        assert value.size == 0 or np.shares_memory(value, p.flat)
        value[...] = i
    assert p.flat.tolist() == [0] * 15 + [1] * 5 + [2] * 7 + [3]
    p.flat += 1
    assert p["b"].ravel().tolist() == [3] * 7
    under(p, "a")["bias"][...] = 9
    assert (p["a.bias"] == 9).all() and under(p, "a").keys() == {"weight", "bias"} and not under(p, "a.w")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_like_is_alike_and_apart(dtype):
    p = random(dtype=dtype)
    before, zeros = p.flat.copy(), p.zeros_like()
    assert isinstance(zeros, Params) and list(zeros) == list(p) and not zeros.flat.any()
    assert zeros.flat.dtype == dtype and {n: v.shape for n, v in zeros.items()} == SHAPES
    zeros["b"][...] = 1
    assert zeros.flat.sum() == 7 and np.array_equal(p.flat, before) and not np.shares_memory(zeros.flat, p.flat)


# ---- files come back ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip_is_bit_for_bit(tmp_path, dtype):
    p, path = random(dtype=dtype), tmp_path / "p.safetensors"
    p.flat[:4] = -0.0, np.finfo(dtype).tiny / 8, np.finfo(dtype).max, np.nextafter(dtype(1), dtype(2))
    metadata = {"text": "naïve\n", "list": [1, None, {"x": 0.1}], "none": None}
    save(path, p, **metadata)
    tensors, found = load(path)
    assert found == metadata and tensors.keys() == p.keys()
    q = p.zeros_like()
    copy_into(q, tensors, path)
    assert q.flat.tobytes() == p.flat.tobytes() and all(tensors[name].dtype == dtype for name in p)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        save(tmp_path / name, random(), **{key: [1, 2] for key in "stuvwxyz"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_newer_save_replaces_the_older(model):
    path, p, config = model
    p.flat += 1
    save_model(path, p, config, note="later")
    assert load_model(path)[0].flat.tobytes() == p.flat.tobytes() and load(path)[1]["note"] == "later"


def test_any_memory_layout_is_saved(tmp_path):
    x = np.arange(60.).reshape(3, 4, 5)
    save(tmp_path / "p", {"t": x.T, "slice": x[:, ::2, 1:], "backwards": x[::-1]})
    tensors, _ = load(tmp_path / "p")
    assert np.array_equal(tensors["t"], x.T) and np.array_equal(tensors["slice"], x[:, ::2, 1:])
    assert np.array_equal(tensors["backwards"], x[::-1])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_model_round_trip(tmp_path, adapter):
    config = replace(network(adapter), width=8, slots=("middle_blks", "encoders.0"))
    p = random(nafnet.shapes(config))
    save_model(tmp_path / "model.safetensors", p, config)
    q, found = load_model(tmp_path / "model.safetensors")
    assert found == config and q.flat.tobytes() == p.flat.tobytes() and list(q) == list(p)


def test_a_name_with_options():
    config = network("experts-token:rank=7,topk=2,width=8,sca=false,slots=encoders.0+middle_blks")
    assert config == NAFNetConfig(8, adapter=ExpertsConfig(level="token", rank=7, topk=2), sca=False,
                                  slots=("encoders.0", "middle_blks"))
    assert network("cea:affinity=softmax") == network("cea-softmax") and network("none:width=27") == network("wider")
    for wrong in ("cea:depth=2", "none:rank=2", "cea:adapter=none", "cea:rank=two", "cea:slots=attic", "mlp:hidden=0",
                  "cea:sca=maybe", "ce"):
        with pytest.raises(InputError):
            network(wrong)


def test_file_permissions_follow_the_umask(model):
    umask = os.umask(0)
    os.umask(umask)
    assert model[0].stat().st_mode & 0o777 == 0o666 & ~umask
    assert [file.name for file in model[0].parent.iterdir()] == ["model.safetensors"]


# ---- bad files are refused ---------------------------------------------------------------------------------------------

def raw(metadata, dtype="F32", size=4, header=None):
    """The bytes of a safetensors file of one tensor of two entries, written by hand."""
    entries = {"__metadata__": metadata} if metadata is not None else {}
    header = header or json.dumps(entries | {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(2 * size)


def ours(text=json.dumps({"version": params.VERSION})):
    return {"tinycea": text}


BAD = {"an empty file": b"", "seven bytes": bytes(7), "eight zeros": bytes(8),
       "a text": b"# notes\nThis is no model, only a few words about one.\n",
       "a huge header": struct.pack("<Q", 2**62) + b"{}",
       "a header that is not text": raw(None, header=b"\xff\xfe{}"),
       "a header that is not JSON": raw(None, header=b"{'a': 1}"),
       "foreign": raw(None), "foreign metadata": raw({"format": "pt"}), "foreign bfloat16": raw({"format": "pt"}, "BF16", 2),
       "foreign float8": raw(None, "F8_E4M3", 1),
       "no version": raw(ours("{}")), "another version": raw(ours('{"version": "next"}')),
       "metadata that is no mapping": raw(ours("[1]")), "metadata that is not JSON": raw(ours("{version: 1")),
       "trailing bytes": raw(ours()) + b"!"}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
@pytest.mark.parametrize("read", [load, load_model])
def test_bad_file_is_refused(tmp_path, content, read):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(path, lambda: read(path))


def test_the_hand_written_file_is_a_good_one(tmp_path):
    (tmp_path / "good").write_bytes(raw(ours()))                # so that each bad one is bad for its own reason
    tensors, metadata = load(tmp_path / "good")
    assert tensors["a"].tolist() == [0, 0] and metadata == {}


@pytest.mark.parametrize("content, words", [("foreign", "tinycea wrote"), ("another version", "version next"),
                                            ("another version", f"reads version {params.VERSION}")])
def test_refusal_says_why(tmp_path, content, words):
    (tmp_path / "bad").write_bytes(BAD[content])
    refused(tmp_path / "bad", lambda: load(tmp_path / "bad"), words)


def test_truncated_file_is_refused_at_any_length(model):
    path, *_ = model
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, lambda: load_model(path))
    path.write_bytes(whole)
    load_model(path)


def test_model_files_without_a_norm_are_normalized_by_token():
    """As those are that are older than the switch."""
    old = {name: value for name, value in asdict(CEAConfig(norm="token", tokens="Xhat")).items() if name != "norm"}
    values = to_dict(NAFNetConfig()) | {"adapter": {"family": "cea"} | old}
    assert from_dict(values).adapter == CEAConfig(norm="token", tokens="Xhat")


@pytest.mark.parametrize("read", [load, load_model])
def test_missing_file_and_folder_are_refused(tmp_path, read):
    refused(tmp_path / "nothing.safetensors", lambda: read(tmp_path / "nothing.safetensors"))
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", lambda: read(tmp_path / "folder"))


def test_other_program_s_model_is_refused(tmp_path):
    for name, words in (("body.weight", "tinycea"), ("intro.weight", "intro.bias is missing")):
        save_file({name: np.zeros((8, 12, 3, 3), np.float32)}, tmp_path / "other.safetensors")
        refused(tmp_path / "other.safetensors", lambda: load_model(tmp_path / "other.safetensors"), words)


OURS = {"family": "cea"}
CONFIGS = {"no configuration": None, "a number": 3, "nothing in it": {}, "an unknown field": {"adapter": OURS, "depth": 3},
           "an unknown adapter": {"adapter": {"family": "magic"}}, "an adapter in words": {"adapter": "cea"},
           "an adapter without a family": {"adapter": {"rank": 8}}, "a rank of zero": {"adapter": OURS | {"rank": 0}},
           "an unknown switch": {"adapter": OURS | {"sparse": 1}}, "a width in words": {"adapter": OURS, "width": "24"},
           "a negative width": {"adapter": OURS, "width": -8}, "a fractional width": {"adapter": OURS, "width": 24.5},
           "a fractional width, no adapter": {"width": 24.5, "adapter": None},
           "attention in words": {"adapter": None, "sca": "yes"},
           "heads that do not divide": {"adapter": OURS | {"heads": 7}}, "stages as a number": {"adapter": OURS, "encoders": 1},
           "blocks in words": {"adapter": OURS, "middle": "two"}, "an unknown slot": {"adapter": OURS, "slots": ["attic"]}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_unknown_configuration_is_refused(tmp_path, config):
    path = tmp_path / "model.safetensors"
    save(path, {"a": np.zeros(3)}, **({} if config is None else {"config": config}))
    refused(path, lambda: load_model(path))


def drop(tensors, name):
    del tensors[name]


@pytest.mark.parametrize("spoil, words", [
    (lambda t: drop(t, "ending.bias"), ("ending.bias", "missing")),
    (lambda t: t.update({"extra": np.zeros(3)}), ("extra", "unknown")),
    (lambda t: t.update({"intro.weight": t["intro.weight"].T}), ("intro.weight", "(3, 3, 12, 8)", "(8, 12, 3, 3)")),
    (lambda t: t.update({"intro.bias": np.float32([np.nan] * 8)}), ("intro.bias", "finite")),
    (lambda t: t.update({"ending.bias": np.float32([0] * 11 + [np.inf])}), ("ending.bias", "finite")),
    (lambda t: t.update({"intro.bias": np.full(8, 1e300)}), ("intro.bias", "finite")),         # infinite once it is float32
    (lambda t: t.update({"intro.bias": np.full(8, 1j, np.complex64)}), ("intro.bias",))])
@pytest.mark.filterwarnings("error")
def test_wrong_tensors_are_refused_by_name(model, spoil, words):
    path, p, config = model
    tensors, metadata = load(path)
    tensors = dict(tensors)
    spoil(tensors)
    save(path, tensors, **metadata)
    refused(path, lambda: load_model(path), *words)
    before = p.flat.copy()
    refused(path, lambda: copy_into(p, tensors, path), *words)
    assert np.array_equal(p.flat, before)                       # all or none


def test_another_architecture_is_refused(model):
    path, *_ = model
    tensors, _ = load(path)
    for config in (replace(SMALL, width=16), replace(SMALL, middle=2), replace(SMALL, adapter=None), replace(SMALL, slots=())):
        q = random(nafnet.shapes(config))
        before = q.flat.copy()
        refused(path, lambda: copy_into(q, tensors, path), "parameter")
        assert np.array_equal(q.flat, before)


def test_the_first_of_many_missing_names_is_told():
    """In the model's order, not in that of a set: the same message on every run."""
    p = Params({f"layer{i}": (1,) for i in range(50)})
    with pytest.raises(InputError, match="layer0 is missing"):
        copy_into(p, {}, "file")
    with pytest.raises(InputError, match="extra0 is unknown"):
        copy_into(p, dict(p) | {f"extra{i}": 0 for i in range(50)}, "file")


# ---- writes are whole or not at all ------------------------------------------------------------------------------------

def fail(*_, **__):
    raise OSError(28, "No space left on device")


def half(path, data):
    with open(path, "wb") as file:
        file.write(data[:9])
    fail()


@pytest.mark.parametrize("place, name, how", [(Path, "write_bytes", fail), (Path, "write_bytes", half), (os, "replace", fail)])
def test_failed_save_leaves_the_old_file_and_no_other(model, monkeypatch, place, name, how):
    path, p, config = model
    monkeypatch.setattr(place, name, how)
    p.flat += 1
    for target in (path, path.with_name("new.safetensors")):
        refused(target, lambda: save_model(target, p, config), "cannot be written", "No space left")


@pytest.mark.parametrize("tensors, metadata", [({"a": np.array([None])}, {}), ({"a": np.zeros(2, complex)}, {}),
                                               ({"a": np.zeros(2)}, {"x": object()})])
def test_what_cannot_be_saved_leaves_the_old_file(model, tensors, metadata):
    path, *_ = model
    before = path.read_bytes()
    with pytest.raises(Exception):
        save(path, tensors, **metadata)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_interrupted_save_leaves_the_old_file(model, monkeypatch):
    path, p, config = model
    before = path.read_bytes()

    def interrupted(path, data):
        with open(path, "wb") as file:
            file.write(data[:9])
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(path, p, config)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_missing_folder_is_refused(tmp_path):
    path = tmp_path / "nowhere" / "p.safetensors"
    refused(path, lambda: save(path, random()), "nowhere", "cannot be written")
    assert not path.parent.exists()


def test_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "p").mkdir()
    refused(tmp_path / "p", lambda: save(tmp_path / "p", random()))


def test_denied_folder_is_refused(model, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "write_bytes", denied)
    refused(model[0], lambda: save_model(*model), "cannot be written", "Permission denied")
