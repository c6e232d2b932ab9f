"""The one exception for bad input, and files that are written whole or not at all."""
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path


class InputError(ValueError):
    """Bad input: one sentence that names the argument or file, what came and what was expected."""


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed and `path` stays as it was.

    An OSError on the way (no such folder, no permission, a full disk) becomes an InputError that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
