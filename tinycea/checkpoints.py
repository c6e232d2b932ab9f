"""Model files of others: PyTorch's .pth, read without PyTorch and running nothing, and NAFNet's names -> arrays by name."""
import io
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .params import array
from .runtime import InputError

STORAGES = {"FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": "bf16", "LongStorage": "i8",
            "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?"}
WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net", "generator")
PICKLE = 2**26                                # bytes of a pickle, at most; the arrays lie outside of it


class Tensor(NamedTuple):
    """What a pickle says of a tensor: the type and the file of its numbers, and which of these are its."""
    storage: tuple
    offset: int
    shape: tuple
    strides: tuple


class Reader(pickle._Unpickler):            # the one in Python: that in C allocates what a damaged file asks for
    """Knows tensors, storages and ordered dictionaries, and refuses anything else by its name."""

    def find_class(self, module, name):
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, strides, *_: Tensor(storage, offset, tuple(shape), tuple(strides))
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        raise InputError(f"it names {module}.{name}, which a list of arrays does not need")

    def persistent_load(self, name):
        _, kind, key, *_ = name
        return kind, str(key)


def read_pth(data):
    """The object in a PyTorch file's bytes: dictionaries whose leaves are Tensors, and a function that makes their arrays."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    files = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in files:
        raise InputError("there is no data.pkl in it")
    if any(info.compress_type != zipfile.ZIP_STORED for info in files.values()) or files["data.pkl"].file_size > PICKLE:
        raise InputError("its parts are compressed, or its list of arrays is too long")
    order = ">" if "byteorder" in files and archive.read(files["byteorder"]) == b"big" else "<"
    left = len(data)                          # numbers still to come: all tensors together are no longer than the file
    read = cache(lambda key: archive.read(files[f"data/{key}"]))

    def numbers(tensor):
        nonlocal left
        (kind, key), offset, shape, strides = tensor
        if not all(isinstance(n, int) and 0 <= n < 2**40 for n in (offset, *shape, *strides)) or len(shape) != len(strides):
            raise InputError("an array's shape is none")
        size = int(np.prod(shape, dtype=object))
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        left, values = left - size, array(read(key), order + kind, -1)
        if left < 0 or size and last >= len(values):
            raise InputError(f"an array of {shape} is longer than what the file holds")
        return as_strided(values[offset:], shape, [s * values.itemsize for s in strides]).copy()
    with archive.open(files["data.pkl"]) as file:
        return Reader(file).load(), numbers


def load_pth(path, data):
    """Arrays by name in the bytes of a .pth: what is wrapped, and prefixed as in "module.", without the wrapping."""
    try:
        found, numbers = read_pth(data)
        for _ in range(3):                    # a wrapper may hold another one, or itself
            found = next((found[w] for w in WRAPPERS if isinstance(found, dict) and isinstance(found.get(w), dict)), found)
        if not isinstance(found, dict):
            raise InputError("it holds no dictionary of arrays")
        return {str(name): numbers(tensor) for name, tensor in found.items() if isinstance(tensor, Tensor)}
    except Exception as error:                # whatever a damaged pickle or archive can make Python's readers say
        raise InputError(f"{path}: not a PyTorch file that can be read ({type(error).__name__}: {str(error)[:200]})") from None


def nafnet_options(path, tensors):
    """Arrays by NAFNet's names, prefixes taken off -> options of a NAFNetConfig that has them. InputError if there are none."""
    first = next((name for name in tensors if name.endswith("intro.weight")), None)
    if first is None or tensors[first].ndim != 4:
        raise InputError(f"{path}: holds no array intro.weight (O,I,3,3); expected a NAFNet's or tinycea's model")
    prefix = first.removesuffix("intro.weight")
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    blocks = {m.groups() for m in map(re.compile(r"(encoders\.\d+|decoders\.\d+|middle_blks)\.(\d+)\.").match, tensors) if m}
    count = Counter(stage for stage, _ in blocks)
    stages = range(sum(bool(re.fullmatch(r"downs\.\d+\.weight", name)) for name in tensors))
    encoders, decoders = (tuple(count[f"{part}.{i}"] for i in stages) for part in ("encoders", "decoders"))
    return tensors, {"width": len(tensors["intro.weight"]), "encoders": encoders, "middle": count["middle_blks"],
                     "decoders": decoders, "unshuffle": 2 if tensors["intro.weight"].shape[1] == 12 else 1, "adapter": None,
                     "centered": False, "sca": any(name.endswith("sca.1.weight") for name in tensors)}
