"""Three rooms with the same doors: `backend("reference")`, `backend("cpu")`; modules take one as their `ops` argument."""
from importlib import import_module

from ..errors import InputError

BACKENDS = ("cpu", "reference")


def backend(name):
    """The module of operations called `name` (one of BACKENDS), imported on first use; raises InputError for any other name."""
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return import_module(f"{__name__}.{name}")
