"""Stands in for CuPy: NumPy arrays, and raw kernels that the emulator runs. Host code that imports cupy runs unchanged.

What is not here is NumPy's own. `seed` picks the schedule of the launches, `check` their checking mode; `schedule` sets both for
a while. Two differences stay: kernels take NumPy arrays here and CuPy's there, and a sum over everything is a scalar here, a 0-d
array there.
"""
import sys
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy

from . import cudacpu

seed = 0
check = False


@contextmanager
def schedule(seed=0, check=False):
    """Launch with this seed, and with the checking mode on or off, inside the block."""
    before = {name: globals()[name] for name in ("seed", "check")}
    globals().update(seed=seed, check=check)
    try:
        yield
    finally:
        globals().update(before)


@contextmanager
def installed():
    """This module as `cupy` inside the block. tinycea.ops.cuda is imported anew inside it, and forgotten with it."""
    before = {name: sys.modules.pop(name, None) for name in ("cupy", "tinycea.ops.cuda")}
    sys.modules["cupy"] = sys.modules[__name__]
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module:
                sys.modules[name] = module
        package = sys.modules.get("tinycea.ops")
        if hasattr(package, "cuda"):
            del package.cuda


def __getattr__(name):
    return getattr(numpy, name)


def asarray(a, dtype=None, order=None):
    """A copy, as on the way from the host to a GPU."""
    return numpy.array(a, dtype, order=order)


def asnumpy(a, order="C"):
    """A copy, as on the way from a GPU to the host."""
    return numpy.array(a, order=order)


def empty(shape, dtype=float, order="C"):
    """An array of poison: NaN, or the largest integer. What a kernel forgets to write stays visible."""
    a = numpy.empty(shape, dtype, order)
    if a.dtype.kind in "fc":
        a.fill(numpy.nan)
    elif a.dtype.kind in "iu":
        a.fill(numpy.iinfo(a.dtype).max)
    return a


def empty_like(prototype, dtype=None, order="C", shape=None):
    """`empty` of another array's shape and type."""
    return empty(prototype.shape if shape is None else shape, dtype or prototype.dtype, order)


class RawModule:
    """cupy.RawModule, compiled when the first kernel is asked for, and again where the checking mode changes."""

    def __init__(self, *, code, options=(), backend="nvrtc", name_expressions=None):
        self._build = cache(lambda check: cudacpu.RawModule(code=code, options=options, name_expressions=name_expressions,
                                                            check=check))

    def get_function(self, name):
        """The kernel called `name`: a template of `name_expressions` or an extern "C" kernel."""
        return RawKernel(lambda: self._build(check).get_function(name))


class RawKernel:
    """cupy.RawKernel as RawModule returns it."""

    def __init__(self, build):
        self._build = build
        self.max_dynamic_shared_size_bytes = build().max_dynamic_shared_size_bytes

    def __call__(self, grid, block, args, *, shared_mem=0):
        kernel = self._build()
        kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        kernel(grid, block, args, shared_mem=shared_mem, seed=seed)


class Device:
    """cupy.cuda.Device: the shared memory of an H100, and few multiprocessors, so that grids of their number must stride."""

    id = 0
    compute_capability = "90"
    attributes = {"MaxSharedMemoryPerBlock": cudacpu.DEFAULT_SHARED, "MaxSharedMemoryPerBlockOptin": cudacpu.MOST_SHARED,
                  "MaxThreadsPerBlock": 1024, "MultiProcessorCount": 3, "WarpSize": 32}

    def __init__(self, device=0):
        if device:
            raise cuda.runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def synchronize(self):
        """Nothing to wait for: a launch returns when it has ended."""


cuda = SimpleNamespace(
    Device=Device,
    get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
    runtime=SimpleNamespace(getDeviceCount=lambda: 1, getDeviceProperties=lambda device: {"name": b"emulated"},
                            CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {})))
