"""One flat buffer with named views into it; safetensors in and out."""
import json
import math

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialize

from .runtime import InputError, atomic, read_bytes

VERSION = 1                                   # of the checkpoint format
KINDS = {"BOOL": "?", "F16": "<f2", "BF16": "<bf16", "F32": "<f4", "F64": "<f8",        # safetensors' names -> NumPy's
         "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


class Params(dict):
    """A dict of named arrays that are views of one contiguous 1-D array, `flat`.

    Whatever treats all parameters alike (the optimizer, a norm, a copy, an all-reduce) is one line on `flat`;
    whatever needs one layer reads a view: `p["intro.weight"]`. Assigning to a name writes into its view; names are fixed.
    """

    def __init__(self, shapes, dtype=np.float32, flat=None):
        """All zero; or views of `flat`, a buffer of that length, on the GPU perhaps."""
        sizes = list(map(math.prod, shapes.values()))
        self.flat = np.zeros(sum(sizes), dtype) if flat is None else flat
        parts = np.split(self.flat, np.cumsum(sizes[:-1], dtype=int).tolist())
        super().__init__((name, part.reshape(shape)) for (name, shape), part in zip(shapes.items(), parts))

    def __setitem__(self, name, value):
        self[name][...] = value

    def zeros_like(self):
        """Params of the same names and shapes, all zero: gradients, or an optimizer's moments."""
        return self.over(np.zeros_like(self.flat))

    def over(self, flat):
        """Params of the same names and shapes whose values are those of another flat buffer."""
        return Params({name: value.shape for name, value in self.items()}, flat=flat)

    def copy(self):
        """A Params of its own with the same names and values."""
        return self.over(self.flat.copy())

    def __reduce__(self):                     # for copy, deepcopy and pickle: a plain dict's would cut the views off the buffer
        return Params, ({name: value.shape for name, value in self.items()}, None, self.flat.copy())


def under(p, prefix):
    """The part of a mapping below `prefix`, names shortened: under(p, "middle_blks.0")["conv1.weight"]. Views, not copies."""
    prefix += "."
    return {name[len(prefix):]: value for name, value in p.items() if name.startswith(prefix)}


def accumulate(g, gradients, *names):
    """An op's gradients, its input's first: add the others into g under their names, hand the first one on."""
    dx, *rest = gradients
    for name, gradient in zip(names, rest):
        g[name] += gradient.reshape(g[name].shape)
    return dx


def save(path, tensors, **metadata):
    """Write named arrays as safetensors, whole or not at all, with JSON-able metadata and the format's version.

    The metadata is one JSON string: safetensors writes several in no fixed order, and equal content shall be equal bytes.
    """
    header = {"tinycea": json.dumps({"version": VERSION} | metadata)}
    with atomic(path) as temporary:
        temporary.write_bytes(serialize({name: np.asarray(value, order="C") for name, value in tensors.items()}, header))


def load(path):
    """Read what `save` wrote -> (tensors, metadata). A missing, truncated or foreign file, or another version: InputError."""
    return tensors_in(path, data := read_bytes(path)), metadata_in(path, data)


def tensors_in(path, data):
    """The named arrays in the bytes of a safetensors file; InputError for anything else."""
    try:
        found = dict(deserialize(data))
    except (SafetensorError, ValueError) as error:
        old = "; or PyTorch's format of before version 1.6: load and save it there" if data[:2] == b"\x80\x02" else ""
        raise InputError(f"{path}: not a readable safetensors file ({str(error).strip()}{old})") from None
    for name, tensor in found.items():
        if tensor["dtype"] not in KINDS:
            raise InputError(f"{path}: parameter {name} is of type {tensor['dtype']}, which is not read")
    return {name: array(tensor["data"], KINDS[tensor["dtype"]], tensor["shape"]) for name, tensor in found.items()}


def array(data, kind, shape):
    """Bytes as an array: kind is NumPy's name of a type, or ends in bf16, the upper half of a float32."""
    if kind.endswith("bf16"):
        return (np.frombuffer(data, kind[:-4] + "u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, kind).reshape(shape)


def metadata_in(path, data):
    """What `save` was told beside the arrays; InputError for a safetensors file of others, or of another version."""
    try:
        metadata = json.loads(json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]["tinycea"])
        version = metadata.pop("version")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: a safetensors file, but not one that tinycea wrote") from None
    if version != VERSION:
        raise InputError(f"{path}: checkpoint format version {version}; this tinycea reads version {VERSION}")
    return metadata


def copy_into(p, tensors, source):
    """Copy named arrays into the views of p, all or none; a missing, unknown or mis-shaped name, or a NaN, is refused by name."""
    for name in [*p, *tensors]:
        if name not in tensors or name not in p:
            raise InputError(f"{source}: parameter {name} is {'missing' if name in p else 'unknown to this architecture'}")
    arrays = {}
    for name, value in zip(tensors, map(np.asarray, tensors.values())):
        if value.shape != p[name].shape or value.dtype.kind not in "fiu":
            raise InputError(f"{source}: parameter {name} has shape {value.shape} ({value.dtype}), expected {p[name].shape}")
        with np.errstate(over="ignore"):
            arrays[name] = value.astype(p[name].dtype)
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{source}: parameter {name} has values that are not finite in {p[name].dtype}")
    for name, value in arrays.items():
        p[name][...] = value
