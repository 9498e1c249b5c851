"""Continuous batching of devices that step together: who gets a batch slot, and what the next step of all holds.

Pure rules over small values. The serving engine, the replay of traces and the lock-step simulator all call them, so
what is simulated is what serves. Holds no state; knows no clock, no costs and no model.

All devices take every step together. A prefill step takes a chunk of one prompt on each device, a decode step one token
of every sequence that has its prompt behind it. Which of the two comes next is agreed ahead: with every step each device
also sends what it will want after it, as far as is known when the step begins. A request that arrives during a step is
hence announced with the step after it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["prefill", "decode"]


class Progress(NamedTuple):
    """How far the sequence in a batch slot has come.

    Attributes:
        arrival: orders the prompts of a device; any unit.
        prompt: tokens to prefill.
        cached: tokens that have been through a step, [0, prompt + answer).
        left: tokens of the answer that are still to come.
    """

    arrival: float
    prompt: int
    cached: int
    left: int

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has been through a step, so that decode steps follow."""
        return self.cached >= self.prompt

    @property
    def ended(self) -> bool:
        """Whether its answer is complete, as far as lengths say."""
        return self.prefilled and self.left <= 0

    def after(self, count: int) -> "Progress":
        """After a step that takes `count` of its tokens; the last of the prompt and each after it give one of the answer."""
        cached = self.cached + count
        return Progress(self.arrival, self.prompt, cached, self.left - (count > 0 and cached >= self.prompt))


class SlotRows(NamedTuple):
    """Rows of a step: tokens `start` to `start + count` of the sequence in a batch slot of a device."""

    device: int
    slot: int
    start: int
    count: int


@dataclass(frozen=True)
class Step:
    """What a step holds, and what the devices will want after it.

    Attributes:
        rows: by device, then by batch slot.
        prefill, decode: whether each device wants such a step after this one, [D].
    """

    kind: Kind
    rows: tuple[SlotRows, ...]
    prefill: tuple[bool, ...]
    decode: tuple[bool, ...]


Slots = Sequence[Sequence[Progress | None]]  # [devices][batch slots]; None is free


def admit(free: Sequence[Sequence[int]], waiting: int) -> list[tuple[int, int]]:
    """Batch slots for the requests that wait at a server, the first ones first.

    Each goes to the device with most slots free, the first of several such, and takes its first free slot.

    Args:
        free: numbers of the free batch slots of each device of the server.
        waiting: how many requests wait.

    Returns:
        (index into `free`, slot) for as many of them as find room.

    >>> admit([[1], [0, 1]], 4)
    [(1, 0), (0, 1), (1, 1)]
    """
    left, given = [list(slots) for slots in free], []
    while len(given) < waiting and any(left):
        device = max(range(len(left)), key=lambda own: len(left[own]))
        given.append((device, left[device].pop(0)))
    return given


def next_kind(last: Kind | None, prefill: bool, decode: bool) -> Kind | None:
    """The kind of the step after one of kind `last`: prefill and decode take turns where both are wanted.

    Args:
        last: None before the first step, or after a pause.
        prefill, decode: whether any device wants such a step.

    Returns:
        None: nothing is wanted; all wait until a request comes.

    >>> next_kind("prefill", True, True), next_kind("decode", True, True), next_kind("decode", False, True)
    ('decode', 'prefill', 'decode')
    """
    if prefill and not (decode and last == "prefill"):
        return "prefill"
    return "decode" if decode else None


def plan_step(kind: Kind, slots: Slots, waiting: Sequence[bool], chunk: int) -> Step:
    """What a step of a kind holds.

    Args:
        slots: of the devices that the caller knows; others may be given as empty.
        waiting: whether requests wait at the server of each device for a batch slot, [D].
        chunk: prompt tokens that a step takes from one sequence at most.
    """
    rows = tuple(_prefill_rows(slots, chunk) if kind == "prefill" else _decode_rows(slots))
    taken = {(own.device, own.slot): own.count for own in rows}
    prefill, decode = [], []
    for device, own in enumerate(slots):
        after = [None if p is None else p.after(taken.get((device, slot), 0)) for slot, p in enumerate(own)]
        stay = [progress for progress in after if progress is not None and not progress.ended]
        room = waiting[device] and len(stay) < len(own)
        prefill.append(room or any(not progress.prefilled for progress in stay))
        decode.append(any(progress.prefilled for progress in stay))
    return Step(kind, rows, tuple(prefill), tuple(decode))


def _prefill_rows(slots: Slots, chunk: int) -> Iterable[SlotRows]:
    """On each device the next chunk of the prompt that came first, of several such the one in the first slot."""
    for device, own in enumerate(slots):
        due = [(p.arrival, slot) for slot, p in enumerate(own) if p is not None and not p.prefilled]
        if due:
            _, slot = min(due)
            progress = own[slot]
            assert progress is not None
            yield SlotRows(device, slot, progress.cached, min(chunk, progress.prompt - progress.cached))


def _decode_rows(slots: Slots) -> Iterable[SlotRows]:
    for device, own in enumerate(slots):
        for slot, progress in enumerate(own):
            if progress is not None and progress.prefilled:
                yield SlotRows(device, slot, progress.cached, 1)
