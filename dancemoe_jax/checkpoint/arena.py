"""Memory that is used again: what experts are staged into, round after round."""

import math
import mmap
import threading

import numpy as np

LARGE = 2**19  # bytes from which on a piece of its own is worth while


class Arena:
    """Pieces of memory, all free again at once. Safe from several threads.

    A page that a process touches for the first time costs the system about as much as reading it from a disk does.
    Pieces begin at a page and are filed by their size in pages, which for experts of one model is mostly the same.

    Args:
        most: bytes from which on pieces that are free make room for those of another size.
    """

    def __init__(self, most: int | float = math.inf) -> None:
        self._most, self._held = most, 0
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = {}
        self._taken: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """At least so many bytes, uint8 [whole pages], with anything in them."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            free = self._free.setdefault(size, [])
            self._taken.append(free.pop() if free else self._new(size))
            return self._taken[-1]

    def reset(self) -> None:
        """All that was taken is free; nothing that was read into it may still be in use."""
        with self._lock:
            for piece in self._taken:
                self._free[len(piece)].append(piece)
            self._taken = []

    def _new(self, size: int) -> np.ndarray:
        for pieces in self._free.values():
            while pieces and self._held + size > self._most:
                self._held -= len(pieces.pop())
        self._held += size
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def room(size: int, arena: Arena | None) -> np.ndarray:
    """Memory for so many bytes, uint8 [size]: of the arena if they are many, and else new."""
    return np.empty(size, np.uint8) if arena is None or size < LARGE else arena.take(size)[:size]


def staging_threads(expert_bytes: int) -> int:
    """How many threads stage experts of a size fastest.

    Large ones wait for the disk, and where all cores compute then again for a core, so more are under way. Small ones
    wait for the interpreter, which more threads would only keep from serving.
    """
    return 8 if expert_bytes >= 2 * LARGE else 4
