"""Where arrays of an Orbax checkpoint lie in its files, and reading them from there.

Orbax stores arrays with tensorstore: a B-tree of keys (OCDBT) with values in data files, each value a Zarr shard. An array
that is one chunk and not compressed lies in such a file as it is in memory. Reading it from there takes half the processor
time of opening, reading and decoding it with tensorstore, time that serving does not get while experts are staged. What is
stored in any other way has no extent; tensorstore reads it.
"""

import ctypes
import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from dancemoe_jax.checkpoint.arena import LARGE, Arena

_CACHESTAT = 451  # on every architecture
_syscall = ctypes.CDLL(None).syscall
_INDEX = 20  # bytes at the end of a shard of one chunk: where the chunk is, its size, and a checksum of both


class Extent(NamedTuple):
    """Bytes of a file."""

    file: Path
    offset: int
    size: int


def find_extents(database: Path) -> dict[str, Extent]:
    """Of all arrays of an OCDBT database that lie in its files as they are in memory, by name.

    Raises:
        ValueError: the database cannot be read.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{database.absolute()}/"}).result()
    version = ts.ocdbt.dump(base).result()["versions"][-1]
    if version["root_height"]:  # entries of the root are other nodes; a bundle has too few keys for that
        return {}
    root = ts.ocdbt.dump(base, version["root"]["location"]).result()
    entries = {bytes(entry["key"]).decode(): entry for entry in root["entries"]}
    extents = {}
    for key, entry in entries.items():
        name, _, chunk = key.partition("/c/")
        about = entries.get(f"{name}/zarr.json", {}).get("inline_value")
        if chunk and about is not None and "indirect_value" in entry:
            extent = _extent(database, entry["indirect_value"], json.loads(bytes(about)))
            if extent is not None:
                extents[name] = extent
    return extents


def _extent(database: Path, value: str, array: dict[str, Any]) -> Extent | None:
    """Of a value ("value:FOLDER:FILE:OFFSET:SIZE") that is all of an array, and nothing else but a shard's index."""
    shape, codecs, index = array["shape"], array["codecs"], 0
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        shard = codecs[0]["configuration"]
        codecs, index = shard["codecs"] if shard["chunk_shape"] == shape else [], _INDEX
    if array["chunk_grid"]["configuration"]["chunk_shape"] != shape or [codec["name"] for codec in codecs] != ["bytes"]:
        return None
    if codecs[0].get("configuration", {}).get("endian") not in (sys.byteorder, None):  # none: of single bytes
        return None
    _, folder, file, offset, stored = value.split(":")
    size = int(stored) - index
    if size != np.dtype(array["data_type"]).itemsize * int(np.prod(shape)):
        return None
    return Extent(database / folder / file, int(offset), size)


def read_extent(extent: Extent, shape: tuple[int, ...], dtype: np.dtype, arena: Arena | None = None) -> np.ndarray:
    """The array that lies there.

    Args:
        arena: where large arrays go. They are read past the page cache unless they are in it: that takes half the
            processor time, which computing meanwhile may need. Such an array may not be aligned to its type.

    Raises:
        OSError: it cannot be read.
    """
    lead = extent.offset % mmap.PAGESIZE  # past the cache only whole pages are read
    if arena is None or extent.size < LARGE:
        array = np.empty(extent.size, np.uint8)
        _read(extent, array.data)
    else:
        pages = arena.take(mmap.PAGESIZE + extent.size)  # wherever in a page it begins, so that pieces are alike
        array = pages[lead : lead + extent.size]
        if _is_cached(extent) or not _read_past_cache(extent, pages):
            _read(extent, array.data)
    return array.view(dtype).reshape(shape)


def _read(extent: Extent, room: memoryview) -> None:
    with open(extent.file, "rb", buffering=0) as file:
        file.seek(extent.offset)
        while len(room) and (got := file.readinto(room)):
            room = room[got:]
    if len(room):
        raise OSError(f"{extent.file}: ends early")


def _read_past_cache(extent: Extent, pages: np.ndarray) -> bool:
    """Read the pages that it lies in; whether the system and the file's can do that."""
    lead = extent.offset % mmap.PAGESIZE
    try:
        file = os.open(extent.file, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(file, [pages.data], extent.offset - lead) >= lead + extent.size
        finally:
            os.close(file)
    except (OSError, AttributeError):  # AttributeError: only some systems have O_DIRECT
        return False


def _is_cached(extent: Extent) -> bool:
    """Whether most of it is in the page cache; so too where the system does not tell (Linux does from 6.5 on)."""
    found = (ctypes.c_uint64 * 5)()  # pages that are cached, dirty, in writeback, evicted, recently evicted
    with open(extent.file, "rb") as file:
        part = (ctypes.c_uint64 * 2)(extent.offset, extent.size)
        status = _syscall(_CACHESTAT, file.fileno(), part, found, 0) if sys.platform == "linux" else -1
    return status != 0 or found[0] * mmap.PAGESIZE > extent.size / 2
