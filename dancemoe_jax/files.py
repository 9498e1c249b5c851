"""Files and directories of this package: JSON objects read and written, directories replaced as a whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dancemoe_jax.errors import ModelError


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_directory(out: Path, write: Callable[[Path], None]) -> None:
    """Fill a new directory beside `out`, then put it in `out`'s place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
    fresh.mkdir()
    try:
        write(fresh)
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def replace_directory(fresh: Path, place: Path) -> None:
    """Move a complete directory to where another may be, which is put back if that fails and removed if it does not."""
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


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file; a model store needs it, convert the model again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds {type(value).__name__}, must be an object")
    return value


def write_json_line(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")


def read_optional_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); download it again or remove it") from None
    if not isinstance(fields, dict):
        raise ModelError(
            f"{file}: holds a {type(fields).__name__}, must be a JSON object; download it again or remove it"
        )
    return fields
