"""One file of weights, which must stay what it was when its header was read."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dancemoe_jax.errors import ModelError


class Shard:
    """A file, and what it was when its header was read: device, inode, size, time of the last change.

    Args:
        same_content: whether all files hold what they held then; asked where only the time or the inode differs. None: no.
    """

    def __init__(self, path: Path, status: os.stat_result, same_content: Callable[[], bool] | None) -> None:
        self.path, self._identity, self._same_content = path, _identity(status), same_content
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self.path)

    def _check(self, status: os.stat_result) -> None:
        """Raise ModelError unless a file of this status, just opened, is the one whose header was read."""
        found = _identity(status)
        with self._lock:
            if found != self._identity:
                same = found[2] == self._identity[2] and self._same_content is not None and self._same_content()
                # Whoever replaces it while it is being compared is not taken in either.
                if not same or _identity(self.path.stat()) != found:
                    raise ModelError(
                        f"{self}: changed since it was opened; put the old file back, or start again with the new one"
                    )
                self._identity = found

    def read_into(self, offset: int, array: np.ndarray) -> None:
        """Fill an array with the bytes from an offset on. Raises ModelError where the file changed or ends before."""
        view = array.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as opened:
                # Experts of another model beside those that are being served would go unnoticed.
                self._check(os.fstat(opened.fileno()))
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(opened.fileno(), offset, len(view), os.POSIX_FADV_SEQUENTIAL)
                done = 0
                while done < len(view):  # one call moves 2 GB at most
                    count = os.preadv(opened.fileno(), [view[done:]], offset + done)
                    if not count:
                        raise ModelError(
                            f"{self}: ends before byte {offset + len(view)}; it changed since it was opened"
                        )
                    done += count
        except OSError as error:
            raise ModelError(f"{self}: not readable ({error.strerror}); export or download it again") from None


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
