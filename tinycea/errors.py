"""The one exception for bad input, and files that are written whole or not at all."""
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input: one sentence that names the argument or file, what came and what was expected."""


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed and `path` stays as it was."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)              # mkstemp makes it private; an ordinary file follows the user's umask
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
