"""Arrays of CPU devices moved to large pages after they were filled; kernels/zeros.py says what for."""

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import jax

_HUGE = 2**21  # bytes of a large page, x86-64's and ARM's with small pages of 4 kB
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1: now, not when the system finds time
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def on_huge_pages(tree: Any) -> Any:
    """The same arrays, those on CPUs moved to large pages where the system has some to give.

    Small arrays stay where they are, and so does everything on systems other than Linux, or where large pages are off.
    """
    if sys.platform != "linux" or not _allowed():
        return tree
    for array in jax.tree.leaves(tree):
        if array.nbytes >= 2 * _HUGE and isinstance(array, jax.Array):
            for shard in array.addressable_shards:
                if shard.device.platform == "cpu":
                    _ask(shard.data.unsafe_buffer_pointer(), shard.data.nbytes)
    return tree


def _allowed() -> bool:
    with contextlib.suppress(OSError):
        return "[never]" not in _SETTING.read_text()
    return False


def _ask(address: int, size: int) -> None:
    """For the whole large pages among so many bytes. A refusal does no harm, so nobody looks at what comes back."""
    begin, end = -(-address // _HUGE) * _HUGE, (address + size) // _HUGE * _HUGE
    if begin < end:
        madvise = ctypes.CDLL(None).madvise
        for advice in (mmap.MADV_HUGEPAGE, _COLLAPSE):
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
