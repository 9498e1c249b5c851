"""Files and directories of this package: JSON objects read and written, directories replaced as a whole."""

import ctypes
import glob
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dancemoe_jax.errors import ModelError

# The largest configuration or index of a published model has 10 MB and 8 levels.
LONGEST_JSON, DEEPEST_JSON = 2**28, 64


def write_json(file: Path, value: dict[str, Any], *, lines: bool = True) -> None:
    """Write a JSON object: indented for people, or with `lines=False` as short as can be, on one line."""
    text = json.dumps(value, indent=2) if lines else json.dumps(value)
    file.write_text(text + "\n", encoding="utf-8")


def read_json(file: Path, remedy: str = "download it again", *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON object, a file of at most `LONGEST_JSON` bytes that nests at most `DEEPEST_JSON` deep.

    Args:
        remedy: what helps where it cannot be read, for the message.
        optional: give an empty object where there is no file.

    Raises:
        ModelError: it is missing, too large, no JSON, or JSON that is no object.
    """
    if optional and not file.exists():
        return {}
    try:
        with file.open("rb") as opened:
            data = opened.read(LONGEST_JSON + 1)
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file; {remedy}") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error}); {remedy}") from None
    return parse_json(data, str(file), remedy)


def parse_json(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The same from the file's bytes; `where` is named in errors."""
    if len(data) > LONGEST_JSON:
        raise ModelError(f"{where}: longer than {LONGEST_JSON} bytes; {remedy}")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        value, depth = {}, DEEPEST_JSON + 1
    except ValueError as error:
        raise ModelError(f"{where}: not readable as JSON ({error}); {remedy}") from None
    else:
        depth = _depth(value)
    if depth > DEEPEST_JSON:
        raise ModelError(f"{where}: lists and objects nest deeper than {DEEPEST_JSON} levels; {remedy}")
    if not isinstance(value, dict):
        raise ModelError(f"{where}: holds a {type(value).__name__}, must be a JSON object; {remedy}")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def write_directory(out: Path, write: Callable[[Path], None]) -> None:
    """Fill a new directory beside `out`, then put it in `out`'s place; nothing is left of it if that fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    fresh = out.with_name(f".{out.name}.{os.getpid()}.new")
    fresh.mkdir()
    try:
        write(fresh)
        replace_directory(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def replace_directory(fresh: Path, place: Path) -> None:
    """Move a complete directory to where another may be, which is removed.

    Where the system can exchange two names at once (Linux), there is a complete directory in the place at every moment.
    """
    if place.exists() and _exchange(fresh, place):
        shutil.rmtree(fresh, ignore_errors=True)
        return
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    if place.exists():
        place.rename(old)
    try:
        fresh.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(place: Path) -> None:
    """Remove what processes that were killed while they wrote to this place left beside it."""
    for leftover in place.parent.glob(f".{glob.escape(place.name)}.*"):
        number, _, suffix = leftover.name.removeprefix(f".{place.name}.").partition(".")
        if suffix in ("new", "old") and number.isdecimal() and not _is_running(int(number)):
            shutil.rmtree(leftover, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; whether the system and the file system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
