"""One flat buffer with named views into it; safetensors in and out."""
import json
import math

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from .runtime import InputError, atomic

VERSION = 1                                   # of the checkpoint format


class Params(dict):
    """A dict of named arrays that are views of one contiguous 1-D array, `flat`.

    Whatever treats all parameters alike (the optimizer, a norm, a copy, an all-reduce) is one line on `flat`;
    whatever needs one layer reads a view: `p["intro.weight"]`. Assigning to a name writes into its view; names are fixed.
    """

    def __init__(self, shapes, dtype=np.float32, flat=None):
        """All zero; or views of `flat`, a buffer of that length, on the GPU perhaps."""
        self.flat = np.zeros(sum(math.prod(shape) for shape in shapes.values()), dtype) if flat is None else flat
        start = 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            super().__setitem__(name, self.flat[start:stop].reshape(shape))
            start = stop

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
        rebuild, arguments = self.__reduce__()
        return rebuild(*arguments)

    def __reduce__(self):                     # for copy, deepcopy and pickle: a plain dict's would cut the views off the buffer
        return _rebuilt, ({name: value.shape for name, value in self.items()}, self.flat)


def _rebuilt(shapes, flat):
    p = Params(shapes, flat.dtype)
    p.flat[:] = flat
    return p


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
    try:
        with safe_open(path, "numpy") as file:
            metadata = _metadata(path, file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, OSError, TypeError) as error:                      # TypeError: a type that NumPy does not have
        raise InputError(f"{path}: not a readable safetensors file ({str(error).strip()})") from None


def _metadata(path, header):
    try:
        metadata = json.loads(header["tinycea"])
        version = metadata.pop("version")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: a safetensors file, but not one that tinycea wrote") from None
    if version != VERSION:
        raise InputError(f"{path}: checkpoint format version {version}; this tinycea reads version {VERSION}")
    return metadata


def copy_into(p, tensors, source):
    """Copy named arrays into the views of p, all or none; a missing, unknown or mis-shaped name, or a NaN, is refused by name."""
    for name in p:
        if name not in tensors:
            raise InputError(f"{source}: parameter {name} is missing")
    for name in tensors:
        if name not in p:
            raise InputError(f"{source}: parameter {name} is unknown to this architecture")
    arrays = {}
    for name, value in tensors.items():
        value = np.asarray(value)
        if value.shape != p[name].shape or value.dtype.kind not in "fiu":
            raise InputError(f"{source}: parameter {name} has shape {value.shape} ({value.dtype}), expected {p[name].shape}")
        with np.errstate(over="ignore"):
            arrays[name] = value.astype(p[name].dtype)
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{source}: parameter {name} has values that are not finite in {p[name].dtype}")
    for name, value in arrays.items():
        p[name][...] = value
