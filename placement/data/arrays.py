"""Arrays in files of numpy: headers are checked before memory is taken, and nothing is ever unpickled here.

A `.npy` header is read by a pattern of our own, since numpy evaluates it as Python source. The members of a zip file are
counted, and their declared sizes added up, before one of them is opened.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from placement.files import InputError, one_line, show

MAX_GRID = 2**24  # entries of an array [servers, layers, experts] or [devices, layers, experts]
MAX_ARRAY_BYTES = 2**30
MAX_MEMBERS = 20_000
_MAX_HEADER = 10_000
_MOST_ENTRIES = 2**40
# A profile packs 3 to 100 times; more than that and more than a little is a file made to fill memory.
_MOST_PACKED, _LITTLE = 100, 2**26
_ITEM = re.compile(
    rb"""\s*(?:['"](?:descr['"]\s*:\s*['"](?P<descr>[^'"]{1,16})|fortran_order['"]\s*:\s*(?P<order>True|False)"""
    rb"""|shape['"]\s*:\s*\((?P<shape>[0-9L,\s]{,400})\))['"]?)\s*(?:,|(?=\}))"""
)
_NUMBERS = re.compile(r"[<>|=]?(?:\?|b1|[iu][1248]|f[248])")
_TEXT = re.compile(r"[<>=]U[1-9][0-9]{,7}")
_OBJECT = re.compile(r"[|<>=]?O[48]?")
# What zipfile raises, by experience, on archives that are cut short or altered.
UNREADABLE = (
    *(ValueError, TypeError, OSError, EOFError, KeyError, IndexError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, OverflowError, UnicodeError),
)


@dataclass(frozen=True)
class Header:
    """What a `.npy` file says of itself.

    Attributes:
        dtype: of its numbers or texts; None for pickled objects.
        shape: its sides.
        fortran: whether the first side varies fastest.
        start: where its content begins, bytes.
    """

    dtype: np.dtype | None
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def size(self) -> int:
        """Bytes of header and content."""
        return self.start + (0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize)


def npy_header(data: bytes, where: str) -> Header:
    """Header of a `.npy` file, versions 1 to 3.

    Args:
        data: the file, or its first 10 kB.
        where: file and member, for messages.

    Raises:
        InputError: it is no such file, or holds something else than numbers, texts or pickled objects.
    """
    if not data.startswith(b"\x93NUMPY") or len(data) < 12:
        raise InputError(f"{where}: not a readable .npy file: no header; save it again with numpy.save")
    long = data[6] > 1
    length = int.from_bytes(data[8:12] if long else data[8:10], "little")
    start = (12 if long else 10) + length
    if data[6] not in (1, 2, 3) or length > _MAX_HEADER or start > len(data):
        raise InputError(f"{where}: not a readable .npy file: truncated header; save it again with numpy.save")
    found = _header_fields(data[start - length : start])
    if found is None:
        shown = show(data[start - length : start].strip()[:80], 70).removeprefix("b")
        raise InputError(f"{where}: not a readable .npy file: its header is {shown}; save it again with numpy.save")
    descr, order, shape = found
    sides = [part.strip().removesuffix("L") for part in shape.split(",") if part.strip()]
    if not all(part.isdecimal() and len(part) < 16 for part in sides) or not is_shape(list(map(int, sides))):
        raise InputError(f"{where}: not a readable .npy file: its shape is ({one_line(shape, 60)}); save it again")
    numeric = _NUMBERS.fullmatch(descr) or _TEXT.fullmatch(descr)
    if not numeric and not _OBJECT.fullmatch(descr):
        raise InputError(f"{where}: has type {descr}; must be numbers")
    return Header(np.dtype(descr) if numeric else None, tuple(map(int, sides)), order == "True", start)


def is_shape(sides: Any) -> TypeGuard[Sequence[int]]:
    """Whether `sides` is the shape of an array that numpy can hold: at most 32 integers from 0, of a product below 2**40."""
    if not isinstance(sides, list | tuple) or len(sides) > 32:
        return False
    if not all(type(side) is int and 0 <= side < _MOST_ENTRIES for side in sides):
        return False
    return math.prod(max(side, 1) for side in sides) < _MOST_ENTRIES  # numpy multiplies the others where one is 0


def _header_fields(text: bytes) -> tuple[str, str, str] | None:
    """descr, fortran_order and shape, as written; None where the header is anything but a dict of these three."""
    text = text.strip()
    if not (text.startswith(b"{") and text.endswith(b"}")):
        return None
    place, found = 1, {}
    while match := _ITEM.match(text, place):
        found |= {
            key: value.decode("ascii", "replace") for key, value in match.groupdict().items() if value is not None
        }
        place = match.end()
    return (
        (found["descr"], found["order"], found["shape"]) if len(found) == 3 and text[place:].strip() == b"}" else None
    )


def read_npy(data: bytes, where: str) -> np.ndarray:
    """The array of a `.npy` file, as a read-only view of `data`.

    Raises:
        InputError: damaged, longer or shorter than its header says, or pickled objects.
    """
    header = npy_header(data, where)
    if header.dtype is None:
        raise InputError(f"{where}: holds pickled objects; save it again as an array of numbers")
    if header.size != len(data):
        found = f"{len(data)} bytes, its header says {header.size}: shape {show(header.shape)} of {header.dtype}"
        raise InputError(f"{where}: not a readable .npy file: has {found}; save it again with numpy.save")
    array = (
        np.frombuffer(data, header.dtype, offset=header.start) if math.prod(header.shape) else np.zeros(0, header.dtype)
    )
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def open_zip(data: bytes, path: Any, remedy: str) -> zipfile.ZipFile:
    """A zip file in memory whose members have been counted.

    Raises:
        InputError: damaged, over `MAX_MEMBERS` members, encrypted, two of one name, or packed in an unknown way.
    """
    # zipfile makes an object of a kilobyte from 46 bytes, so count before it does.
    if data.count(b"PK\1\2") > MAX_MEMBERS:
        raise InputError(f"{path}: has over {MAX_MEMBERS} parts; {remedy}")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except UNREADABLE as error:
        raise InputError(f"{path}: truncated or damaged: {one_line(error, 100)}; {remedy}") from None
    names = Counter(entry.filename for entry in archive.infolist())
    if names and max(names.values()) > 1:
        twice = names.most_common(1)[0][0]
        raise InputError(f"{path}: truncated or damaged: two parts are named {show(twice)}; {remedy}")
    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if any(entry.compress_type not in known or entry.flag_bits & 1 for entry in archive.infolist()):
        raise InputError(f"{path}: has encrypted parts, or packed in an unknown way; {remedy}")
    return archive


def read_npz(data: bytes, path: Any, names: Iterable[str], remedy: str) -> dict[str, np.ndarray]:
    """Arrays of a `.npz` file: those of `names` that it has; others are not unpacked.

    Args:
        data: the file.
        path: for messages.
        names: arrays to read.
        remedy: what to do about a damaged file, for messages.

    Raises:
        InputError: no such file, damaged, pickled objects, or it would unpack to much more than it is large.
    """
    if not data.startswith(b"PK"):
        raise InputError(f"{path}: not a .npz file; {remedy}")
    found = {}
    with open_zip(data, path, remedy) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        wanted = {name: entries[name] for name in names if name in entries}
        total = sum(entry.file_size for entry in wanted.values())
        if total > min(max(_LITTLE, _MOST_PACKED * len(data)), MAX_ARRAY_BYTES):
            raise InputError(
                f"{path}: unpacks from {len(data)} to {total} bytes, more than is read of such a file; {remedy}"
            )
        for name, entry in wanted.items():
            where = f"{path}: {name}"
            try:
                with archive.open(entry) as member:
                    header = npy_header(member.read(_MAX_HEADER + 12), where)
                    if header.dtype is None:
                        raise InputError(f"{path}: holds pickled objects; {remedy}")
                    if header.size != entry.file_size:
                        counted = f"{entry.file_size} bytes for shape {show(header.shape)} of {header.dtype}"
                        raise InputError(f"{path}: truncated or damaged: {name} has {counted}; {remedy}")
                found[name] = read_npy(archive.read(entry), where)
            except InputError:
                raise
            except UNREADABLE as error:
                raise InputError(f"{path}: truncated or damaged: {one_line(error, 120)}; {remedy}") from None
    return found


def check_grid(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """`shape`, if an array of it may be made.

    Raises:
        InputError: it has over `MAX_GRID` entries.
    """
    if math.prod(shape) > MAX_GRID:
        words = " x ".join(map(str, shape))
        raise InputError(
            f"{where}: {words} entries are more than {MAX_GRID}; correct the numbers of layers and experts"
        )
    return shape
