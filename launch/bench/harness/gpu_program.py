"""What a compiled GPU program does in one step, read from its text: launches, waits of the host, copies, collectives.

XLA's program says it all: a loop without a trip count known beforehand and a conditional make the host wait for the card,
a copy is an instruction, a collective has its operands' shapes.
"""

import collections
import dataclasses
import re
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
# Instructions that launch nothing.
_FREE = frozenset(
    {
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "domain"),
        *("partition-id", "replica-id", "while", "conditional", "call", "async-start", "async-update", "async-done"),
        *("copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "ragged-all-to-all-done"),
        *("send-done", "recv-done", "add-dependency"),
    }
)
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")


class Instruction(NamedTuple):
    """One line of a program: its name, the shape of its result, what it is, the names of its operands, the line."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str


@dataclasses.dataclass
class Work:
    """What one run of a program, or a part of it, does.

    Attributes:
        launches: kernels and copies that are started.
        waits: times that the host has to wait for the card to know how to go on.
        written: bytes that launches write, in-place writes of a part counted by the part.
        copied: bytes written by large copies, transposes and slices, which compute nothing.
        collectives: bytes that each kind of collective brings to a device, padding included.
        copies: the large ones, by name of the operation that they are for: bytes.
    """

    launches: float = 0
    waits: float = 0
    written: float = 0
    copied: float = 0
    collectives: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    copies: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))

    def add(self, other: "Work", times: float = 1) -> None:
        """Do another part so many times after this one."""
        for name in ("launches", "waits", "written", "copied"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for mine, theirs in ((self.collectives, other.collectives), (self.copies, other.copies)):
            for key, value in theirs.items():
                mine[key] += times * value


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape as programs write it.

    >>> shape_bytes("(bf16[2,3]{1,0}, s32[])")
    16
    """
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        size = _BYTES.get(dtype, 0)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry's name, and the instructions of every computation of a program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.split("\n"):
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (own := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
            shape, rest = _cut_shape(own[2])
            opcode, _, arguments = rest.partition("(")
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments.partition(")")[0]))
            current.append(Instruction(own[1], shape, opcode.strip(), operands, line))
    return entry, computations


def _cut_shape(text: str) -> tuple[str, str]:
    """The shape in front of an instruction, and what follows."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for end, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return text[: end + 1], text[end + 1 :].lstrip()
    return text, ""


class Program:
    """A compiled step.

    Args:
        text: the optimized module.
        tiles: how often a loop runs whose length depends on the data: tiles of the expert product.
        large: bytes from which a copy counts as one.
    """

    def __init__(self, text: str, tiles: int = 1, large: int = 1 << 16):
        self.text, self.tiles, self.large = text, tiles, large
        self.entry, self.computations = parse(text)

    def work(self, name: str | None = None) -> Work:
        """What a computation does; default: the whole step. Of a conditional the branch that does most counts."""
        total = Work()
        own = self.computations.get(name or self.entry, [])
        shapes = {one.name: one.shape for one in own}
        for one in own:
            if one.opcode == "while":
                trips = re.search(r'known_trip_count"?:?\{?"?n"?:?"?(\d+)', one.line)
                body, condition = (self.work(_called(one.line, part)) for part in ("body", "condition"))
                count = int(trips[1]) if trips else self.tiles
                total.add(body, count)
                if not trips:
                    total.add(condition, count + 1)
                    total.waits += count + 1
            elif one.opcode == "conditional":
                total.waits += 1
                total.add(max((self.work(branch) for branch in _branches(one.line)), key=lambda w: w.launches))
            elif one.opcode in ("call", "async-start"):
                total.add(self.work(_called(one.line, "to_apply") or _called(one.line, "calls")))
            elif one.opcode not in _FREE:
                self._launch(one, shapes, total)
        return total

    def _launch(self, one: Instruction, shapes: dict[str, str], total: Work) -> None:
        total.launches += 1
        kind = next((k for k in _COLLECTIVES if one.opcode in (k, f"{k}-start")), None)
        size = shape_bytes(one.shape)
        if kind is not None:
            into = shape_bytes(one.shape.rpartition("), ")[2]) if one.opcode.endswith("start") else size
            total.collectives[kind] += into
            total.waits += kind == "ragged-all-to-all"  # its sizes are read by the host
        roots, moves = [one], one.opcode in ("copy", "transpose", "dynamic-slice", "copy-start")
        if one.opcode == "fusion":
            inside = self.computations.get(_called(one.line, "calls") or "", [])
            shapes = {i.name: i.shape for i in inside}
            roots = _roots(inside)
            moves = all(i.opcode in _MOVES for i in inside)
        size = sum(_written(root, shapes) for root in roots)
        total.written += size
        if moves and size >= self.large:
            total.copied += size
            name = re.search(r'op_name="([^"]*)"', one.line)
            total.copies[f"{one.shape} {(name[1] if name else one.name)[-80:]}"] += size


# What a fusion that computes nothing consists of; sums and comparisons are of where a slice begins.
_MOVES = frozenset(
    {
        *("parameter", "constant", "bitcast", "copy", "transpose", "dynamic-slice", "slice", "reshape", "tuple"),
        *("bitcast-convert", "convert", "compare", "add", "select", "broadcast", "get-tuple-element", "clamp"),
    }
)


def _called(line: str, what: str) -> str | None:
    found = re.search(rf"{what}=%?([\w.\-]+)", line)
    return found[1] if found else None


def _branches(line: str) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", line)
    if found:
        return re.findall(r"%?([\w.\-]+)", found[1])
    return [str(_called(line, "true_computation")), str(_called(line, "false_computation"))]


def _roots(inside: list[Instruction]) -> list[Instruction]:
    """What a fusion results in, through tuples and bitcasts."""
    by_name = {one.name: one for one in inside}
    open_roots = [one for one in inside if one.line.lstrip().startswith("ROOT")]
    found = []
    while open_roots:
        one = open_roots.pop()
        if one.opcode in ("tuple", "bitcast") and one.operands:
            open_roots += [by_name[name] for name in one.operands if name in by_name]
        else:
            found.append(one)
    return found


def _written(one: Instruction, shapes: dict[str, str]) -> int:
    """Bytes that an instruction writes: of an update in place the update's."""
    at = {"dynamic-update-slice": 1, "scatter": -1}.get(one.opcode)
    if at is not None and len(one.operands) > 1:
        return shape_bytes(shapes.get(one.operands[at], one.shape))
    return shape_bytes(one.shape)


def summary(compiled: Any, tiles: int) -> dict[str, Any]:
    """A compiled step's figures, for a table or as JSON."""
    program = Program(compiled.as_text(), tiles)
    work, memory = program.work(), compiled.memory_analysis()
    return {
        "launches": round(work.launches),
        "waits": round(work.waits),
        "written": round(work.written),
        "copied": round(work.copied),
        "collectives": {kind: round(size) for kind, size in work.collectives.items()},
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "copies": dict(sorted(work.copies.items(), key=lambda copy: -copy[1])[:6]),
    }
