"""tinycea: Continuous Expert Assembly (arXiv 2605.06127) for image restoration, forward and backward by hand in NumPy."""
from .errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "__version__"]
