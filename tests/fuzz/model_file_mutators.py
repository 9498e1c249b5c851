"""Damage that files come with: bits flipped, ends cut, and JSON values that are none of what a reader expects."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# What has ended readers before, or is likely to: wrong types, absurd sizes, numbers that are none, deep and long values.
NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "\x00", "\ud800", "../../etc/passwd", "/", "1e9", "model.layers.0", "é" * 50, "x" * 10**5),
    *([], {}, [[]], [None], [1, 2, 3], ["a"], [2**40, 2**40], {"a": 1}, {"": None}, [0] * 5000),
]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything inside a JSON value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def mutate_json(value: Any, rnd: random.Random) -> Any:
    """A copy in which one to three values are replaced, removed, moved, or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(rnd.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return rnd.choice(NASTY)
        *way, last = rnd.choice(found)
        holder = value
        for key in way:
            holder = holder[key]
        kind = rnd.randrange(6)
        if kind == 0:
            del holder[last]
        elif kind == 1:
            other = rnd.choice(found)
            moved = value
            for key in other:
                moved = moved[key] if isinstance(moved, dict | list) and _has(moved, key) else None
            holder[last] = copy.deepcopy(moved)
        elif kind == 2:
            holder[last] = [holder[last]] if rnd.random() < 0.5 else {"x": holder[last]}
        elif kind == 3 and isinstance(holder, dict):
            holder[rnd.choice(("", "x", "__class__", "é", f"{last}"))] = rnd.choice(NASTY)
        elif kind == 4 and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
            holder[last] = rnd.choice((lambda x: -x, lambda x: x + 1, lambda x: x * 2**40, lambda x: x / 3))(
                holder[last]
            )
        else:
            holder[last] = copy.deepcopy(rnd.choice(NASTY))
    return value


def _has(holder: dict | list, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and key < len(holder)


def to_bytes(value: Any) -> bytes:
    """As a file holds it; halves of surrogate pairs stay escapes."""
    return json.dumps(value).encode()


def mutate_bytes(data: bytes, rnd: random.Random) -> bytes:
    """A copy with bits flipped, a part cut, doubled or filled, or an end missing."""
    changed = bytearray(data)
    for _ in range(rnd.choice((1, 1, 2, 4))):
        if not changed:
            return b""
        at = rnd.randrange(len(changed) if rnd.random() < 0.5 else min(len(changed), 512))  # headers come first
        size = rnd.choice((1, 2, 8, 64, 1024))
        kind = rnd.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rnd.randrange(8)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = changed[at : at + size]
        elif kind == 3:
            changed[at : at + size] = bytes([rnd.choice((0, 0xFF, ord("["), ord("{"), ord('"')))]) * size
        elif kind == 4:
            changed[at : at + 8] = rnd.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
        else:
            del changed[at:]
    return bytes(changed)


def mutate_file(data: bytes, rnd: random.Random) -> bytes:
    """Damage of any kind to a JSON file."""
    if rnd.random() < 0.05:
        return b"[" * 10**5 if rnd.random() < 0.5 else b'{"a":' * 2000
    if rnd.random() < 0.3:
        return mutate_bytes(data, rnd)
    return to_bytes(mutate_json(json.loads(data), rnd))
