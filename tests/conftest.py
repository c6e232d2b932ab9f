"""One BLAS thread, as the command line sets it: sizes here gain nothing from a second."""
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
