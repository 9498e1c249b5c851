"""Ways to damage a file or a value, chosen by a random generator that is given: the same generator makes the same damage."""

import contextlib
import copy
import io
import json
import random
import re
import warnings
import zipfile
from collections.abc import Callable

HUGE = [
    "9" * 5000,
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-1",
    "0",
    "1e-400",
    str(2**63),
    str(2**64),
    str(10**18),
    "0x" + "f" * 4000,
]
HUGE += [
    "1_000",
    "1e5",
    "00",
    "2147483648",
    "100000",
    "0.1",
    "-0",
    "1e308",
    "٣",
    "½",
    "true",
    "null",
    '"3"',
    "[]",
    "{}",
]
ODD = [
    "\u2028",
    "\u0085",
    "\ufeff",
    "\x00",
    "\x0c",
    "\r",
    "\n",
    "\t",
    "\u202e",
    "é",
    "𝔘",
    "\ud800",
    "'",
    '"',
    "\\",
    "\\u0000",
    "\\ud800",
]
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    2**63,
    10**30,
    1e300,
    "",
    "x",
    "\u2028\n",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    "9" * 300,
    [[[[1]]]],
]
VALUES += [False, 2, 7, 255, 2**31 - 1, 2**31, 2**32, -(2**63), 10**400, 0.0, 0.5, 1e-320, float("inf"), float("nan")]
VALUES += ["\x00", "../../etc/passwd", "/", "1e9", "model.layers.0", "é" * 50, "x" * 10**5]
VALUES += [[1, 2, 3], ["a"], [2**40, 2**40], {"": None}, [0] * 5000]
TEXTS = [
    "",
    " ",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "1e99s",
    "1e-400",
    "é\u2028",
    "\udcff",
    "a" * 50_000,
    "a,a",
    ",",
    "--",
    "-",
]
TEXTS += [
    "0x10",
    "1_000",
    "٣",
    "½",
    " 5 ",
    "5GB",
    "1e99GB",
    "1e99Gbps",
    ".",
    "/",
    "/dev/null",
    "nope.json",
    "\n",
    "%s",
    "{}",
    "None",
]
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    reach = len(changed) if rng.random() < 0.5 else min(len(changed), 512)  # headers come first
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _slice(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 1000)))


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 2, 100, 3000)) + data[end:]


def _delete(data: bytes, rng: random.Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:start] + data[end:]


def _random_bytes(data: bytes, rng: random.Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def _fill(data: bytes, rng: random.Random) -> bytes:
    """A part of zeros, ones or brackets, or a number of eight bytes where sizes and offsets stand."""
    start, end = _slice(data[: rng.choice((512, len(data)))], rng)
    if rng.random() < 0.5:
        return data[:start] + bytes([rng.choice((0, 0xFF, ord("["), ord("{"), ord('"')))]) * (end - start) + data[end:]
    number = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return data[:start] + number + data[start + 8 :]


def _nest(data: bytes, rng: random.Random) -> bytes:
    depth, start = rng.choice((10, 70, 1000, 100_000)), rng.randrange(len(data) + 1)
    mark = rng.choice((b"[", b"{", b'{"a":', b"(", b"a.", b"a=[", b"- "))
    close = {b"[": b"]", b"(": b")", b"{": b"}", b'{"a":': b"}"}.get(mark, b"") if rng.random() < 0.5 else b""
    return data[:start] + mark * depth + (b"1" + close * depth) * bool(close) + data[start:]


def _number(data: bytes, rng: random.Random) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return _flip(data, rng)
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(HUGE).encode() + data[match.end() :]


def _unicode(data: bytes, rng: random.Random) -> bytes:
    start = rng.choice((0, rng.randrange(len(data) + 1)))
    return data[:start] + rng.choice(ODD).encode(errors="surrogatepass") * rng.choice((1, 1, 5)) + data[start:]


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at : at + 1] = rng.choice(
        ([], [lines[at]] * 2, [b""] * 10_000, [lines[at], rng.choice(lines)], [lines[at] + b"\r"])
    )
    return b"\n".join(lines)


def _json(data: bytes, rng: random.Random) -> bytes:
    """One field, deep or not, deleted, doubled, renamed, wrapped, moved, or of another value or type."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _number(data, rng)
    nodes, waiting = [], [value]
    while waiting and len(nodes) < 2000:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        nodes += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    if not nodes:
        return json.dumps(rng.choice(VALUES)).encode()
    for _ in range(rng.choice((1, 1, 2))):
        node, key = rng.choice(nodes)
        if (isinstance(node, list) and key >= len(node)) or (isinstance(node, dict) and key not in node):
            continue
        action = rng.randrange(7)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, list):
            node.extend([node[key]] * rng.choice((1, 3, 500)))
        elif action == 2 and isinstance(node, dict):
            node[rng.choice(("x", "layers", key + " ", "\u2028"))] = node.pop(key)
        elif action == 3:
            node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
        elif action == 4:
            other, place = rng.choice(nodes)
            with contextlib.suppress(LookupError):
                node[key] = copy.deepcopy(other[place])
        elif action == 5 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = rng.choice((-node[key], node[key] + 1, node[key] * 2**40, 0.3 * min(node[key], 2**900)))
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def _npy_header(data: bytes, rng: random.Random) -> bytes:
    """Another header before the same numbers."""
    if not data.startswith(b"\x93NUMPY") or len(data) < 12:
        return _flip(data, rng)
    end = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:end]
    shapes = (
        "(10000000, 1000000)",
        "()",
        "(0, 99999999999999)",
        "(-1,)",
        "(2, 3",
        "(1,) * 9",
        "((1,),)",
        "(9" + "9" * 300 + ",)",
    )
    kinds = ("|O", "<i8", "<f16", "<U99999999", "<c16", "|V8", "<m8", "|b1", ">f4", "<i3", "[('a', '<i4')]", "<U0")
    changed = rng.choice((
        re.sub(rb"\([^)]*\)", rng.choice(shapes).encode(), header),
        re.sub(rb"'[<>|=][^']*'", repr(rng.choice(kinds)).encode(), header),
        header.replace(b"False", b"True"),
        b"(" * rng.choice((1, 60, 9000)),
        _flip(header, rng),
        header + b" " * 70_000,
    ))  # fmt: skip
    length = len(changed) % 2**16 if rng.random() < 0.9 else rng.randrange(2**16)
    return data[: rng.choice((6, 8))].ljust(8, b"\x01") + length.to_bytes(2, "little") + changed + data[end:]


def _zip(data: bytes, rng: random.Random) -> bytes:
    """A zip file with one member damaged, dropped, doubled, renamed, larger than it says, or packed in another way."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # not a whole zip file any more
        return _flip(data, rng)
    if not members:
        return data
    at, action = rng.randrange(len(members)), rng.randrange(8)
    name, content = members[at]
    if action <= 2:
        members[at] = name, mutate(content, rng, 1)
    elif action == 3:
        del members[at]
    elif action == 4:
        members += [members[at]] * rng.choice((1, 300))
    elif action == 5:
        members[at] = rng.choice(("x", "../x", name + "/", "a" * 60_000, "\u2028", "data.pkl", name.upper())), content
    elif action == 6:
        members.append((rng.choice(("extra.npy", "counts.npy", "ids.npy")), bytes(2 ** rng.choice((10, 10, 20, 24)))))
    else:
        members[at] = name, _npy_header(content, rng)
    buffer, packing = (
        io.BytesIO(),
        rng.choice((zipfile.ZIP_STORED,) * 6 + (zipfile.ZIP_DEFLATED,) * 3 + (zipfile.ZIP_BZIP2,)),
    )
    with zipfile.ZipFile(buffer, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two members of one name are meant
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, packing)
    changed = bytearray(buffer.getvalue())
    if rng.random() < 0.2:  # a size in the central directory that is not true
        place = changed.rfind(b"PK\1\2")
        changed[place + 20 : place + 28] = rng.randbytes(8)
    return bytes(changed)


BYTES = (_flip, _flip, _truncate, _repeat, _delete, _random_bytes, _fill)
TEXT = (_nest, _number, _number, _unicode, _lines, _json, _json, _json)
BINARY = (_zip, _zip, _zip, _npy_header)


def mutate(data: bytes, rng: random.Random, times: int | None = None) -> bytes:
    """`data` damaged once or a few times, in ways that suit what it is."""
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        kinds: tuple[Callable[[bytes, random.Random], bytes], ...] = BYTES
        if data.startswith((b"PK", b"\x93NUMPY")):
            kinds += BINARY + (_zip,) * 4 * data.startswith(b"PK")
        elif data[:200].isascii() or b"\x00" not in data[:200]:
            kinds += TEXT
        data = rng.choice(kinds)(data, rng)[: 2**26]
    return data


def mutate_text(text: str, rng: random.Random) -> str:
    """A flag's value, another one or damaged."""
    if rng.random() < 0.6:
        return rng.choice(TEXTS)
    return (
        mutate(text.encode(errors="surrogatepass"), rng, 1)
        .decode(errors="surrogateescape")
        .replace("\x00", "0")[:100_000]
    )
