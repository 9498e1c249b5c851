"""The cluster's secret: without it nobody gets an answer from our sockets. Kept in a file that all servers have."""

import logging
import os
import secrets
import tempfile
from pathlib import Path

from placement import InputError

log = logging.getLogger(__name__)

_SHORTEST, _LONGEST = 16, 4096  # bytes


def user_cache() -> Path:
    """The folder of this user for what can be made again: $XDG_CACHE_HOME/dancemoe or ~/.cache/dancemoe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dancemoe"


def load_secret(path: Path | None = None) -> bytes:
    """The secret in a file, by default that in the user's cache folder; a file that is not there is made, for this user
    alone. Servers on other machines need a copy of it.

    Raises:
        InputError: the file cannot be read or made, or holds too little.
    """
    file = path or user_cache() / "secret"
    if not file.exists():
        _make(file)
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LONGEST + 1).strip()
            mode = os.fstat(stream.fileno()).st_mode
    except OSError as error:
        raise InputError(f"--secret-file {file}: cannot be read ({error.strerror}); give another file") from None
    if not _SHORTEST <= len(data) <= _LONGEST:
        raise InputError(
            f"--secret-file {file}: holds {len(data)} bytes, must be {_SHORTEST} to {_LONGEST}; remove it to have one made"
        )
    warn_of_readers("--secret-file", file, mode)
    return data


def warn_of_readers(flag: str, file: Path, mode: int) -> None:
    """Say so where others may read a secret. A group may: secrets are mounted so into containers (mode 0440)."""
    if mode & 0o026:
        log.warning("%s %s: others can read or change it; chmod 600 it (440 for a group of its own)", flag, file)


def _make(file: Path) -> None:
    """Write a new secret, whole or not at all; the first one wins."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
        try:
            os.write(descriptor, secrets.token_hex(32).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(scratch, file)
        except FileExistsError:
            pass
        finally:
            os.unlink(scratch)
    except OSError as error:
        raise InputError(
            f"the cluster's secret cannot be made at {file} ({error.strerror}); give --secret-file a file that can be written"
        ) from None
