"""Three rooms with the same doors: `backend("reference")`, "cpu" and "cuda"; modules take one as their `ops` argument."""
from importlib import import_module

from ..runtime import InputError

BACKENDS = ("cpu", "reference", "cuda")


def backend(name):
    """The module of operations called `name` (one of BACKENDS), imported on first use.

    InputError for any other name, and for "cuda" without CuPy or a GPU.
    """
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "cuda":
        try:
            cupy = import_module("cupy")
            found = cupy.cuda.runtime.getDeviceCount()
        except ImportError:
            raise InputError('the cuda backend needs CuPy: pip install "tinycea[cuda]" (for CUDA 12: cupy-cuda12x)') from None
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise InputError(f"the cuda backend needs an NVIDIA GPU and its driver ({error})") from None
        if not found:
            raise InputError("the cuda backend needs an NVIDIA GPU: CuPy finds none")
    return import_module(f"{__name__}.{name}")
