"""The placement in force, as a file that a restart comes back to."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from placement import InputError, Placement
from placement.files import parse_json, read_bytes, show, write_bytes


def open_state(folder: Path) -> Path:
    """A folder for the record, made if it is not there.

    Raises:
        InputError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--state {folder}: cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--state {folder}: cannot be written to; give another folder")
    return folder


FORMAT = "dancemoe.record/1"
NAME = "placement-in-force.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """A placement since it came into force.

    Attributes:
        epoch: how many placements have been in force before it.
        reason: why it is; time: seconds since 1970 at which it was recorded.
        limits: memory in bytes of devices ("edge-a/0") that have been given less than their cluster file says.
    """

    placement: Placement
    epoch: int
    reason: str
    time: float
    limits: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Of what is where."""
        return placement_hash(self.placement)


def placement_hash(placement: Placement) -> str:
    """SHA-256 of which device holds which experts."""
    facts = repr((placement.devices, placement.resident.shape)).encode()
    return hashlib.sha256(facts + np.packbits(placement.resident).tobytes()).hexdigest()


def write_record(folder: Path, placement: Placement, epoch: int, reason: str, limits: dict[str, int]) -> Record:
    """Record a placement, atomically.

    Raises:
        InputError: the file cannot be written; the one before it is as it was.
    """
    record = Record(placement, epoch, reason, time.time(), limits)
    about: dict[str, Any] = {
        "epoch": epoch,
        "hash": record.hash,
        "time": record.time,
        "reason": reason,
        "limits": limits,
    }
    text = json.dumps({"format": FORMAT, **about, "placement": placement.to_dict()})
    write_bytes(folder / NAME, text.encode() + b"\n")
    return record


def clear_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote the record has left behind. Nobody else may write it now."""
    for scratch in folder.glob(f".{NAME}.*.tmp"):
        with suppress(OSError):
            scratch.unlink()


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None where nothing has been recorded.

    Raises:
        InputError: there is a file that is none, or that has been changed.
    """
    path = folder / NAME
    if not path.exists():
        return None
    data = read_bytes(path)
    try:
        parsed = parse_json(data, str(path))
    except InputError as error:
        raise InputError(f"{error}; move it away to start anew") from None
    try:
        if parsed["format"] != FORMAT:
            raise ValueError(f"format is {parsed['format']!r}")
        placement = Placement.from_dict(parsed["placement"], str(path))
        if parsed["hash"] != placement_hash(placement):
            raise ValueError("its hash is not that of its placement")
        return Record(placement, *_facts(parsed, {f"{name}/{index}" for name, index in placement.devices}))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        words = " ".join(str(error).split())
        raise InputError(f"{path}: not a record of a placement ({words}); move it away to start anew") from None


def _facts(parsed: Mapping[str, Any], devices: set[str]) -> tuple[int, str, float, dict[str, int]]:
    """Epoch, reason, time and limits of a record. Raises ValueError, KeyError where one is of another type or kind."""
    epoch, reason, limits = parsed["epoch"], parsed["reason"], parsed["limits"]
    if type(epoch) is not int or epoch < 0:
        raise ValueError(f"epoch is {show(epoch)}")
    if not isinstance(reason, str):
        raise ValueError(f"reason is {show(reason)}")
    if not isinstance(limits, dict):
        raise ValueError(f"limits are {show(limits)}")
    for device, limit in limits.items():
        if device not in devices or type(limit) is not int or limit < 0:
            raise ValueError(f"limits[{show(device)}] is {show(limit)}")
    return epoch, reason, float(parsed["time"]), limits
