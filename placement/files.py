"""How files are refused and written: one clear line, and whole or not at all. Holds no file format."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Unusable input; its message is one line that names file, field, value and remedy."""


def show(value: Any, limit: int = 60) -> str:
    """`value` as it may stand in a one-line message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Content of a file.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: readers find the old content or the new, never a part.

    Raises:
        InputError: the folder does not exist or does not admit the file.
    """
    target = Path(os.path.realpath(path))  # a symbolic link keeps pointing where it did
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: cannot be written: not a regular file; name a file")
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        scratch.unlink(missing_ok=True)  # of a process that was killed here and had our number, as in containers
        with open(scratch, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
