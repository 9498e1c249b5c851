"""Memory that is used again, and what is read into it past the page cache."""

import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import dancemoe_jax.checkpoint.arena
import dancemoe_jax.checkpoint.extents
from dancemoe_jax.checkpoint.arena import Arena, room
from dancemoe_jax.checkpoint.extents import Extent, read_extent


@pytest.fixture
def large(monkeypatch):
    """Arrays of some pages are large already."""
    for module in (dancemoe_jax.checkpoint.arena, dancemoe_jax.checkpoint.extents):
        monkeypatch.setattr(module, "LARGE", 10_000)


@pytest.fixture
def arrays(tmp_path, rng):
    """Arrays of 50 kB in a file, each some odd number of bytes after the one before: the array, and where it lies."""
    stored, parts, offset = [], [], 0
    for gap in (0, 3, 4096, 77, 1):
        array = rng.standard_normal((100, 125)).astype("f4")
        parts += [rng.bytes(gap), array.tobytes()]
        stored.append((array, Extent(tmp_path / "data", offset + gap, array.nbytes)))
        offset += gap + array.nbytes
    (tmp_path / "data").write_bytes(b"".join(parts))
    return stored


def forget(path):
    """Have the next reading of a file come from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def address(array):
    return array.__array_interface__["data"][0]


def test_pieces_are_used_again_but_never_twice_at_once():
    arena, seen = Arena(), set()
    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            pieces = list(threads.map(arena.take, [9000] * 40))
        assert {len(piece) for piece in pieces} == {3 * mmap.PAGESIZE}
        own = {address(piece) for piece in pieces}
        assert len(own) == 40
        assert not seen or own == seen
        assert all(place % mmap.PAGESIZE == 0 for place in own)
        seen = own
        arena.reset()
    assert address(arena.take(20_000)) not in seen


def test_an_arena_holds_no_more_than_it_may_but_gives_what_is_asked():
    arena = Arena(most=10 * mmap.PAGESIZE)

    def held():
        return sum(len(piece) for pieces in [*arena._free.values(), arena._taken] for piece in pieces)

    for size, number in ((2, 5), (3, 3), (5, 2), (1, 10), (4, 4), (1, 1)):
        pieces = [arena.take(size * mmap.PAGESIZE) for _ in range(number)]
        assert len({address(piece) for piece in pieces}) == number
        assert held() <= max(10, size * number) * mmap.PAGESIZE
        arena.reset()


def test_pieces_are_alike_wherever_in_a_page_arrays_begin(large, arrays):
    arena = Arena()
    for array, extent in arrays:
        read_extent(extent, array.shape, array.dtype, arena)
        arena.reset()
    assert [len(pieces) for pieces in arena._free.values()] == [1]


def test_only_much_memory_comes_from_an_arena(large):
    arena = Arena()
    taken = room(20_000, arena)
    assert (taken.shape, taken.dtype, address(taken) % mmap.PAGESIZE) == ((20_000,), np.uint8, 0)
    arena.reset()
    assert address(room(20_000, arena)) == address(taken)
    assert address(room(20_000, None)) != address(taken)
    for size in (9_999, 0):
        assert room(size, arena).shape == (size,)
    assert sum(map(len, arena._free.values())) == 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("past_cache", ["possible", "refused", "unknown"])
def test_arrays_come_back_wherever_they_lie(large, arrays, monkeypatch, cached, past_cache):
    if past_cache == "refused":
        monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # opening fails
    if past_cache == "unknown":
        monkeypatch.delattr(os, "O_DIRECT")
    arena = Arena()
    for _ in range(2):
        if not cached:
            forget(arrays[0][1].file)
        for array, extent in arrays:
            np.testing.assert_array_equal(read_extent(extent, array.shape, array.dtype, arena), array)
        arena.reset()
    assert sum(map(len, arena._free.values())) == len(arrays)


def test_what_is_not_cached_stays_so(large, arrays):
    """Reading past the cache costs half as much, and pushes nobody's pages out."""
    array, extent = arrays[3]
    forget(extent.file)
    if dancemoe_jax.checkpoint.extents._is_cached(extent):
        pytest.skip("the system does not tell what is cached, or cannot forget it")
    read_extent(extent, array.shape, array.dtype, Arena())
    assert not dancemoe_jax.checkpoint.extents._is_cached(extent)
    read_extent(extent, array.shape, array.dtype)
    assert dancemoe_jax.checkpoint.extents._is_cached(extent)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system is asked")
@pytest.mark.parametrize(("told", "pages", "cached"), [(0, 0, False), (0, 6, False), (0, 7, True), (-1, 0, True)])
def test_most_of_an_array_has_to_be_cached(arrays, monkeypatch, told, pages, cached):
    def cachestat(number, file, part, found, flags):
        assert (number, list(part)) == (451, [extent.offset, 50_000])
        found[0] = pages
        return told

    extent = arrays[1][1]
    monkeypatch.setattr(dancemoe_jax.checkpoint.extents, "_syscall", cachestat)
    assert dancemoe_jax.checkpoint.extents._is_cached(extent) == cached


def test_a_file_that_ends_early_is_no_array(large, arrays):
    array, extent = arrays[-1]
    os.truncate(extent.file, extent.offset + 30_000)
    for cold in (False, True):
        if cold:
            forget(extent.file)
        with pytest.raises(OSError, match="ends early"):
            read_extent(extent, array.shape, array.dtype, Arena())
