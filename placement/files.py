"""How files are read, refused and written: one reader each for lines, JSON, TOML and CSV, with limits before work.

Files come from other people and other programs. Every reader here checks size, nesting and numbers before it builds anything
large, accepts a byte order mark, ends lines at newlines alone, and refuses in one line that names file, place and remedy.
Arrays are read in placement/data/arrays.py.
"""

import csv
import itertools
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

MAX_FILE_BYTES = 2**31
MAX_JSON_BYTES = 2**26  # of one document or one line; parsed, it may take twenty times as much
MAX_TOML_BYTES = 2**20
MAX_LINES = 10**7
MAX_DEPTH = 64
_MAX_KEY_PARTS = 32  # tomllib takes quadratic time in the parts of a dotted key
_LONGEST_INTEGER = 19  # digits; 2**64 has 20
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # one without an end takes all that is left
_JSON_HUGE = re.compile(rb"(?<![0-9.])[0-9]{%d,}+(?![0-9.eE])" % (_LONGEST_INTEGER + 1))
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_KEY_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_DOTTED = re.compile(rf"(?<![\w-])(?:{_KEY_PART}){{{_MAX_KEY_PARTS}}}")


class InputError(ValueError):
    """Unusable input; its message is one line that names file, field, value and remedy."""


def show(value: Any, limit: int = 60) -> str:
    """`value` as it may stand in a one-line message: at most `limit` characters, whatever it is and however deep."""
    pieces: list[str] = []
    _describe(value, pieces, limit, MAX_DEPTH)
    text = "".join(pieces)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _describe(value: Any, pieces: list[str], limit: int, depth: int) -> None:
    """Append the parts of repr(value) until they are longer than `limit`: repr itself would follow shared parts for ever."""
    if isinstance(value, str | bytes | bytearray):
        pieces.append(repr(value[: limit + 1]))
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        pieces.append(f"an integer of {value.bit_length()} bits")
    elif isinstance(value, list | tuple | dict) and depth:
        ends = {list: "[]", tuple: "()", dict: "{}"}[next(t for t in (list, tuple, dict) if isinstance(value, t))]
        pieces.append(ends[0])
        for i, item in enumerate(value):
            if sum(map(len, pieces)) > limit:
                break
            pieces.append(", " if i else "")
            _describe(item, pieces, limit, depth - 1)
            if isinstance(value, dict):
                pieces.append(": ")
                _describe(value[item], pieces, limit, depth - 1)
        pieces.append(",)" if isinstance(value, tuple) and len(value) == 1 else ends[1])
    elif isinstance(value, np.ndarray):
        pieces.append(f"an array of type {value.dtype} and shape {value.shape}")
    elif value is None or isinstance(value, bool | int | float | np.generic) or type(value).__module__ == "datetime":
        pieces.append(str(value))
    else:
        pieces.append(f"<{type(value).__name__}>")


def is_name(value: Any) -> TypeGuard[str]:
    """Whether `value` is a text that can stand in a table or a message: not empty, and printable throughout."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> bytes:
    """Content of a file.

    Args:
        path: the file.
        limit: bytes; a larger file is refused before it is read. What is no file, such as a pipe, may have `MAX_JSON_BYTES`.

    Raises:
        InputError: there is no such file, it cannot be read, or it is larger than `limit`.
    """
    try:
        with open(path, "rb") as file:
            if os.path.isfile(path):
                data = file.read() if os.fstat(file.fileno()).st_size <= limit else None
            else:
                limit = min(limit, MAX_JSON_BYTES)
                data = b"".join(itertools.islice(iter(lambda: file.read(2**16), b""), limit // 2**16 + 1))
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if data is None or len(data) > limit:
        raise InputError(f"{path}: larger than {limit} bytes, the most that is read of such a file; split it")
    return data


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 text file that are not blank, with their numbers from 1. A newline alone ends a line.

    U+2028, U+0085 and form feeds are characters like others; "\\r" before the newline and a byte order mark are removed. The
    file is read as the lines are asked for, so that it may be larger than memory.

    Args:
        path: the file.

    Raises:
        InputError: the file cannot be read, a line is longer than `MAX_JSON_BYTES`, or it is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            number = 0
            while data := file.readline(MAX_JSON_BYTES + 1):
                number += 1
                if len(data) > MAX_JSON_BYTES or number > MAX_LINES:
                    what = f"longer than {MAX_JSON_BYTES} bytes" if number <= MAX_LINES else "one too many"
                    raise InputError(f"{path}: line {number}: {what}; split the file")
                line = decode(data, str(path), number).removesuffix("\n").removesuffix("\r")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def decode(data: bytes, where: str, line: int | None = None) -> str:
    """UTF-8 text, without its byte order mark where `data` is the beginning of a file: all of it, or its line 1.

    Raises:
        InputError: not UTF-8; `where` begins the message.
    """
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {error.start}" if line is None else f"line {line}, byte {error.start}"
        raise InputError(f"{where}: not text: {place} is not UTF-8; save it as UTF-8") from None


def parse_json(data: str | bytes, where: str, *, any_number: bool = False) -> Any:
    """Value of one JSON document: nothing nested deeper than `MAX_DEPTH`, all numbers finite, integers of at most 64 bits.

    Args:
        data: the document, text or UTF-8.
        where: file, and line or field, for messages.
        any_number: the caller looks at the numbers, and can name the field of one that is too large or not finite.

    Raises:
        InputError: too large, no JSON, nested too deep, NaN, Infinity or a number too large to be one.
    """
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if len(raw) > MAX_JSON_BYTES:
        raise InputError(
            f"{where}: larger than {MAX_JSON_BYTES} bytes, the most that is read as one JSON value; split it"
        )
    text = data.removeprefix("\ufeff") if isinstance(data, str) else decode(data, where)
    bare = _JSON_STRING.sub(b"", raw)
    brackets = bare.translate(None, _NO_BRACKETS)
    # Short messages are read for every token that is served: the few brackets of one cannot nest too deep.
    if len(brackets) > MAX_DEPTH and (depth := _depth(brackets)) > MAX_DEPTH:
        raise InputError(f"{where}: JSON nested {depth} deep; at most {MAX_DEPTH} is read, so write it flatter")
    if not any_number and (huge := _JSON_HUGE.search(bare)):
        digits = len(huge[0])
        raise InputError(f"{where}: an integer of {digits} digits; at most {_LONGEST_INTEGER} are read, so correct it")
    try:
        return json.loads(text) if any_number else _FINITE.decode(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON, perhaps truncated: {one_line(error)}") from None


def _depth(brackets: bytes) -> int:
    signs = np.where(np.isin(np.frombuffer(brackets, np.uint8), (ord("["), ord("{"))), 1, -1).astype(np.int8)
    return int(np.cumsum(signs, dtype=np.int32).max(initial=0))


def _no_number(text: str) -> NoReturn:
    raise InputError(f"{text}: numbers must be finite; leave it out or write null")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text[:20])


_FINITE = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Value of a JSON file; see `parse_json`.

    Raises:
        InputError: the file cannot be read, or as `parse_json`.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Values of a file of JSON lines, with their line numbers; see `read_lines` and `parse_json`.

    Raises:
        InputError: naming the line.
    """
    for number, line in read_lines(path):
        yield number, parse_json(line, f"{path}: line {number}")


def parse_line(line: str, where: str) -> Any:
    """What a line of a file of texts or JSON objects holds: a line that begins with { is JSON, any other is the text itself.

    Raises:
        InputError: it begins with { and is no JSON; `where` names file and line.
    """
    return parse_json(line, where) if line.lstrip().startswith("{") else line


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tables of a TOML file: at most `MAX_TOML_BYTES`, finite numbers, integers of 64 bits as TOML has them.

    Raises:
        InputError: the file cannot be read, is no TOML, nested too deep, or a number is too large or not finite.
    """
    text = decode(read_bytes(path, MAX_TOML_BYTES), f"{path}: not valid TOML").replace("\r\n", "\n")
    if _DOTTED.search(text):
        raise InputError(f"{path}: not valid TOML: a key of over {_MAX_KEY_PARTS} parts; write tables instead")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{path}: not valid TOML: nested too deep; write it flatter") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise InputError(f"{path}: not valid TOML: {one_line(error)}") from None
    waiting: list[tuple[str, Any, int]] = [("", tables, 0)]
    while waiting:
        where, value, depth = waiting.pop()
        field = f"{path}: {where.removeprefix('.')}"
        if depth > MAX_DEPTH:
            raise InputError(f"{path}: not valid TOML: nested too deep; write it flatter")
        if isinstance(value, dict):
            waiting += [(f"{where}.{show(key).strip(chr(39))}", inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{where}[{i}]", inner, depth + 1) for i, inner in enumerate(value)]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{field} = {show(value)}: must fit into 64 bits; write a smaller number")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{field} = {value}: must be a finite number")
    return tables


def read_csv(path: str | os.PathLike[str]) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Header and rows of a CSV file, cells without the spaces around them; blank lines are left out.

    Comma, semicolon and tab are known as delimiters: the one that the header has most of.

    Returns:
        the names in the header, and the rows with their line numbers, read as they are asked for.

    Raises:
        InputError: no such file, no header, not text, a cell that CSV cannot hold, or a row with more cells than the header.
    """
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path}: empty; write a header and a row each")
    delimiter = max(",;\t", key=first[1].count)
    return _cells(path, first, delimiter), (
        (line[0], _cells(path, line, delimiter, len(_cells(path, first, delimiter)))) for line in lines
    )


def _cells(path: Any, line: tuple[int, str], delimiter: str, count: int | None = None) -> list[str]:
    number, text = line
    try:
        rows = list(csv.reader([text.strip(" ")], delimiter=delimiter, strict=True, skipinitialspace=True))
    except csv.Error as error:
        raise InputError(f"{path}: line {number}: not valid CSV: {one_line(error)}") from None
    cells = [cell.strip() for cell in rows[0]]
    if count is not None and len(cells) > count:
        raise InputError(f"{path}: line {number}: has {len(cells)} cells, the header has {count}; correct the row")
    return cells


def one_line(error: BaseException | str, limit: int = 160) -> str:
    """An error's own words as part of a one-line message."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)[: 4 * limit]).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def columns_of(names: Sequence[str]) -> str:
    """Names of columns for a message."""
    return show(", ".join(names), 120).strip("'\"")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: readers find the old content or the new, never a part.

    Raises:
        InputError: the folder does not exist or does not admit the file.
    """
    target = Path(os.path.realpath(path))  # a symbolic link keeps pointing where it did
    if os.path.exists(target) and not os.path.isfile(target):
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
