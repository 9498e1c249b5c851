"""Quantities with units as people write them: "12GB", "500Mbps", "0.2ms"."""

import math
import re
from fractions import Fraction
from typing import Any

from placement.files import InputError, show

# Digits are bounded: 5,000 of them are no quantity, and Python itself refuses to read more than 4,300.
_NUMBER = re.compile(r"\s{,9}([0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,2})?)\s{,9}([A-Za-z/]{,9})\s{,9}")
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_BYTES = {f"{prefix}B": Fraction(scale) for prefix, scale in (_DECIMAL | _BINARY).items()}
_BITS = {"" if prefix == "" else prefix: Fraction(scale, 8) for prefix, scale in _DECIMAL.items()}
_BITS["k"] = _BITS["K"]
_RATES = {f"{unit}/s": scale for unit, scale in _BYTES.items()}
_RATES |= {prefix + bits: scale for prefix, scale in _BITS.items() for bits in ("bps", "bit/s")}
_LEAST_RATE, _MOST_RATE = 1e-3, 1e18  # bytes/s; what lies outside is a mistake, and its inverse may be no number
_LONGEST = 1e9  # seconds, 31 years; clocks of the operating system take at most nine times as many
_TIMES = {"us": Fraction(1, 10**6), "ms": Fraction(1, 10**3), "s": Fraction(1)}


def _parse(value: Any, units: dict[str, Fraction], where: str, example: str) -> Fraction:
    if not isinstance(value, str):
        raise InputError(f'{where} = {show(value)}: needs a unit; write for example "{example}"')
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise InputError(f'{where} = {show(value)}: not a quantity >= 0; write for example "{example}"')
    number, unit = match.groups()
    if not unit:
        raise InputError(f'{where} = {show(value)}: needs a unit; write for example "{example}"')
    if unit not in units:
        known = ", ".join(units)
        raise InputError(f"{where} = {show(value)}: unknown unit {unit!r}; use one of {known}")
    return Fraction(number) * units[unit]


def parse_bytes(value: Any, where: str) -> int:
    """Bytes of "12GB" (powers of 1000), "12GiB" (powers of 1024) or a bare integer; greater than 0.

    Raises:
        InputError: naming `where`, the value and the remedy.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        size = math.floor(_parse(value, _BYTES, where, "12GB"))
    if not 0 < size < 2**53:
        raise InputError(f'{where} = {show(value)}: must be at least 1 byte and below 2**53; write for example "12GB"')
    return size


def parse_rate(value: Any, where: str, example: str = "500Mbps") -> float:
    """Bytes per second of "500Mbps" (bits) or "2GB/s" (bytes); from 0.001 to 1e18.

    A bare number is refused: nothing tells bits from bytes.

    Raises:
        InputError: naming `where`, the value and the remedy.
    """
    rate = float(_parse(value, _RATES, where, example))
    if rate <= 0:
        raise InputError(f'{where} = {show(value)}: must be greater than 0; write for example "{example}"')
    if not _LEAST_RATE <= rate <= _MOST_RATE:
        raise InputError(f'{where} = {show(value)}: no link or disk has this rate; write for example "{example}"')
    return rate


def parse_seconds(value: Any, where: str) -> float:
    """Seconds of "0.2ms", "150us" or "1s"; from 0 to 1e9.

    Raises:
        InputError: naming `where`, the value and the remedy.
    """
    seconds = float(_parse(value, _TIMES, where, "0.2ms"))
    if seconds > _LONGEST:
        raise InputError(f'{where} = {show(value)}: must be at most {_LONGEST:g} seconds; write for example "0.2ms"')
    return seconds


def format_bytes(size: float) -> str:
    """Bytes for people: 12.3 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
