"""tinycea: Continuous Expert Assembly (arXiv 2605.06127) for image restoration, forward and backward by hand in NumPy."""
from importlib import import_module

__version__ = "0.1.0"
FACE = {"restore": "restoration", "load_model": "zoo", "train": "training", "degrade": "degradations",
        "check_gradients": "gradcheck", "assert_gradients": "gradcheck", "InputError": "runtime"}
__all__ = [*FACE, "__version__"]


def __getattr__(name):
    """The public face, loaded when it is asked for: `import tinycea` alone is as fast as nothing."""
    if name not in FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{FACE[name]}", __name__), name)
