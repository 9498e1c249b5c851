"""The YAML of TensorRT-LLM's load balancer: keys with numbers and lists of numbers, block or flow style. No other is read."""

import re

from placement.engines.recording import MAX_ID
from placement.files import InputError, decode, read_bytes, show

_MAX_BYTES = 2**26
_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]{,63})[ \t]*:(?=[ \t]|$)")
_COMMENT = re.compile(r"(?:^|(?<=[ \t]))#.*")
_TOKEN = re.compile(r"[ \t\n]*(?:(['\"]?)([0-9]{1,6})\1(?![0-9])|([\[\]{},:]|-(?=[ \t])))")


def read_balancer_yaml(path: str) -> tuple[int, dict[int, list[int]]]:
    """`num_slots`, and `initial_global_assignments`: the expert of every slot, by layer.

    Args:
        path: the file; comments, "\\r\\n", quoted layer numbers, and lists over several lines are read.

    Raises:
        InputError: a key is missing or twice, something is no number, or a layer has another number of slots.
    """
    blocks = _blocks(path)
    for key in ("num_slots", "initial_global_assignments"):
        if key not in blocks:
            raise InputError(f"{path}: {key}: missing; must be the load balancer's YAML with a list of slots per layer")
    text = blocks["num_slots"][1].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 7 and 0 < int(text) <= MAX_ID):
        raise InputError(f"{path}: num_slots = {show(text)}: must be an integer from 1 to {MAX_ID}")
    slots, (line, block) = int(text), blocks["initial_global_assignments"]
    rows = _layers(_tokens(block, line, path), path)
    if not rows:
        raise InputError(f"{path}: initial_global_assignments has no lists per layer; num_slots is {slots}")
    odd = next((layer for layer, row in rows.items() if len(row) != slots), None)
    if odd is not None:
        sizes = show(sorted({len(row) for row in rows.values()}))
        found = f"{sizes} slots per layer; num_slots is {slots}, layer {odd} differs"
        raise InputError(f"{path}: initial_global_assignments has {found}")
    return slots, rows


def _blocks(path: str) -> dict[str, tuple[int, str]]:
    """Text after every key at the left margin, up to the next one, without comments; and the number of its first line."""
    text = decode(read_bytes(path, _MAX_BYTES), path)
    found: dict[str, tuple[int, list[str]]] = {}
    current: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = _COMMENT.sub("", line.removesuffix("\r"))
        key = _KEY.match(line)
        if key is None:
            if number > 1 or line.strip() != "---":
                current.append(line)
            continue
        if key[1] in found:
            raise InputError(f"{path}: line {number}: {key[1]}: given twice; keep one")
        current = [line[key.end() :]]
        found[key[1]] = number, current
    return {key: (number, "\n".join(lines)) for key, (number, lines) in found.items()}


def _tokens(block: str, line: int, path: str) -> list[int | str]:
    """Numbers as int, and the marks [ ] { } , : - as text."""
    tokens: list[int | str] = []
    place, end = 0, len(block.rstrip())
    while place < end:
        match = _TOKEN.match(block, place)
        if match is None:
            rest = block[place:].lstrip()
            at, found = line + block.count("\n", 0, len(block) - len(rest)), show(rest[:40].split("\n")[0], 40)
            raise InputError(f"{path}: line {at}: {found}: must be lists of experts from 0 to {MAX_ID} by layer")
        tokens.append(int(match[2]) if match[2] else match[3])
        place = match.end()
    return tokens


def _layers(tokens: list[int | str], path: str) -> dict[int, list[int]]:
    """Lists by layer, of block or flow style."""
    where = f"{path}: initial_global_assignments"
    if tokens[:1] == ["{"]:
        if tokens[-1:] != ["}"]:
            raise InputError(f"{where}: no closing }}; perhaps truncated")
        tokens = tokens[1:-1]
    rows: dict[int, list[int]] = {}
    place = 0
    while place < len(tokens):
        layer = tokens[place]
        if not isinstance(layer, int) or tokens[place + 1 : place + 2] != [":"]:
            raise InputError(
                f"{where}: {show(layer)} after layer {max(rows, default='-')}: must be a layer and its list"
            )
        if layer in rows:
            raise InputError(f"{where}: layer {layer} is given twice; keep one")
        rows[layer], place = _list(tokens, place + 2, f"{where}: layer {layer}")
        place += tokens[place : place + 1] == [","]
    return rows


def _list(tokens: list[int | str], place: int, where: str) -> tuple[list[int], int]:
    """One list of experts, as [1, 2] or as "- 1" lines, and where it ends."""
    row: list[int] = []
    flow = tokens[place : place + 1] == ["["]
    place += flow
    while place < len(tokens):
        token = tokens[place]
        if flow and token == "]":
            return row, place + 1
        if token in ("-", ","):
            if (token == "-") == flow:
                break
            place += 1
        elif not isinstance(token, int):
            break
        elif not flow and tokens[place - 1] != "-":
            return row, place  # the next layer
        else:
            row.append(token)
            place += 1
    if flow or not row:
        raise InputError(f"{where}: must be a list of experts; perhaps truncated")
    return row, place
