"""Continuous batching of devices that step together: who gets a batch slot, and what the next step of all holds.

Pure rules over small values. The serving engine, the replay of traces and the lock-step simulator all call them, so
what is simulated is what serves. Holds no state; knows no clock, no costs and no model.

All devices take every step together. A prefill step takes chunks of a few prompts on each device, so many tokens in all, a
decode step one token of every sequence that has its prompt behind it. Which of the two comes next, and how many tokens of
prompts it takes, is agreed ahead: with every step each device also sends what it will want after it, as far as is known when
the step begins. A request that arrives during a step is hence announced with the step after it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["prefill", "decode"]

_WIDER = 4  # times the smallest chunk
PROMPTS = 4  # that a device takes chunks of in one step, at most
_OLDEST = 8  # the prompt that came first gets at least one token in so many


class Turn(NamedTuple):
    """A step that is to come.

    Attributes:
        tokens: prompt tokens that a prefill step takes on each device at most; few numbers occur, as a step is compiled for
            each.
    """

    kind: Kind
    tokens: int


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


class Wish(NamedTuple):
    """What a device wants next.

    Attributes:
        prefill: tokens that are left of its prompts; 0: no prefill step.
        decode: whether some sequence has its prompt behind it.
    """

    prefill: int
    decode: bool


@dataclass(frozen=True)
class Step:
    """What a step holds, and what the devices will want after it.

    Attributes:
        rows: by device, then by batch slot.
        wishes: of each device after this step, [D].
    """

    kind: Kind
    rows: tuple[SlotRows, ...]
    wishes: tuple[Wish, ...]


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


def chunks_of(chunk: int, context: int) -> tuple[int, ...]:
    """Prompt tokens that a step may take on a device, smallest first, where one may be wide.

    Args:
        chunk: where somebody decodes; context: longest sequence, in tokens.

    >>> chunks_of(64, 4096), chunks_of(64, 128)
    ((64, 256), (64,))
    """
    return (chunk, _WIDER * chunk) if _WIDER * chunk <= context else (chunk,)


def next_turn(last: Kind | None, wishes: Sequence[Wish], chunks: Sequence[int]) -> Turn | None:
    """The step after one of kind `last`.

    Where somebody decodes, a prefill step is short, so that nobody waits long for a token; where nobody does, it takes as
    much as there is.

    Args:
        last: as in `next_kind`.
        wishes: of the devices; of those whose wishes are the largest will do.
        chunks: prompt tokens that a step may take on a device, smallest first; the smallest where somebody decodes.

    >>> next_turn(None, [Wish(100, False), Wish(0, False)], (64, 256))
    Turn(kind='prefill', tokens=256)
    >>> next_turn("decode", [Wish(100, False), Wish(0, True)], (64, 256))
    Turn(kind='prefill', tokens=64)
    """
    decode = any(wish.decode for wish in wishes)
    tokens = max((wish.prefill for wish in wishes), default=0)
    kind = next_kind(last, tokens > 0, decode)
    if kind is None:
        return None
    wide = next((chunk for chunk in chunks if chunk >= tokens), chunks[-1])
    return Turn(kind, chunks[0] if decode else wide)


def plan_step(turn: Turn, slots: Slots, waiting: Sequence[Sequence[int]]) -> Step:
    """What a step holds.

    Args:
        slots: of the devices that the caller knows; others may be given as empty.
        waiting: tokens of the prompts that wait for a batch slot at the server of each device, first ones first, [D][…].
    """
    rows = tuple(_prefill_rows(slots, turn.tokens) if turn.kind == "prefill" else _decode_rows(slots))
    taken = {(own.device, own.slot): own.count for own in rows}
    after = []
    for device, own in enumerate(slots):
        left = [None if p is None else p.after(taken.get((device, slot), 0)) for slot, p in enumerate(own)]
        after.append([None if progress is None or progress.ended else progress for progress in left])
    return Step(turn.kind, rows, wishes(after, waiting))


def wishes(slots: Slots, waiting: Sequence[Sequence[int]]) -> tuple[Wish, ...]:
    """What each device wants, [D]; arguments as in `plan_step`."""
    found = []
    for own, coming in zip(slots, waiting, strict=True):
        room = sum(progress is None or progress.ended for progress in own)
        left = [p.prompt - p.cached for p in own if p is not None and not p.prefilled]
        found.append(
            Wish(sum(left) + sum(coming[:room]), any(p is not None and p.prefilled and not p.ended for p in own))
        )
    return tuple(found)


def _prefill_rows(slots: Slots, tokens: int) -> Iterable[SlotRows]:
    for device, own in enumerate(slots):
        due = {slot: p for slot, p in enumerate(own) if p is not None and not p.prefilled}
        for slot, count in sorted(_shares(due, tokens).items()):
            yield SlotRows(device, slot, due[slot].cached, count)


def _shares(due: dict[int, Progress], tokens: int) -> dict[int, int]:
    """How many tokens of each prompt a device takes: of what is nearest to its end first, so that short prompts do not wait
    for long ones; but always some of the one that came first, so that it does not wait for ever. A step that brings a
    prompt to its end takes nothing beyond that: it is to be over soon.

    >>> _shares({0: Progress(0.0, 2000, 64, 1), 1: Progress(1.0, 20, 0, 1)}, 64)
    {0: 8, 1: 20}
    >>> _shares({0: Progress(0.0, 2000, 64, 1), 1: Progress(1.0, 90, 0, 1)}, 64)
    {0: 8, 1: 56}
    """
    if not due:
        return {}
    left = {slot: p.prompt - p.cached for slot, p in due.items()}
    oldest = min(due, key=lambda slot: (due[slot].arrival, slot))
    shares = {oldest: min(left[oldest], max(1, tokens // _OLDEST))}
    room = tokens - shares[oldest]
    for slot in sorted(due, key=lambda slot: (left[slot], due[slot].arrival, slot)):
        share = min(left[slot], shares.get(slot, 0) + room)
        if share < left[slot] and any(shares[other] == left[other] for other in shares):
            break
        if slot in shares or len(shares) < PROMPTS:
            room -= share - shares.get(slot, 0)
            shares[slot] = share
    return {slot: share for slot, share in shares.items() if share}


def _decode_rows(slots: Slots) -> Iterable[SlotRows]:
    for device, own in enumerate(slots):
        for slot, progress in enumerate(own):
            if progress is not None and progress.prefilled and not progress.ended:
                yield SlotRows(device, slot, progress.cached, 1)
