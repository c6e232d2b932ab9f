"""One BLAS thread, as the command line sets it: sizes here gain nothing from a second. And a stand-in for CuPy."""
import os

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """The slow tests come first: what a process starts last, while the others have nothing left to do, is then short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def emulated_cupy():
    """The stand-in for CuPy, which `import cupy` finds during one test; skips where the emulator cannot run."""
    from cudacpu import cudacpu, cupy
    if missing := cudacpu.missing():
        pytest.skip(f"the emulator needs {missing}")
    with cupy.installed():
        yield cupy
