"""The arrays of a step, out of what the scheduler has planned for it. Takes no step and touches no device."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from launch.engine.batch import Member
from placement.scheduling import PROMPTS, Kind


class SampledInputs(NamedTuple):
    """What choosing tokens by their requests' rules takes of a step, by batch slot.

    Attributes:
        tokens: that go through the step, int32 [D, sequences, tokens], -1 one that is still to come from a step under way;
            valid: which of them count, bool.
        fresh: slots in which a request begins, bool [D, sequences].
        row: of each slot among the step's rows, int32 [D, sequences]; 0 for those that have none.
    """

    tokens: np.ndarray
    valid: np.ndarray
    fresh: np.ndarray
    row: np.ndarray


def row_numbers(kind: Kind, members: Sequence[Member]) -> list[int]:
    """Which row of its device each member has: in a prefill step one after another, in a decode step its slot's."""
    if kind == "decode":
        return [rows.slot for rows, _ in members]
    seen: collections.Counter[int] = collections.Counter()
    numbers = []
    for rows, _ in members:
        numbers.append(seen[rows.device])
        seen[rows.device] += 1
    return numbers


def prefill_inputs(members: Sequence[Member], devices: int, chunk: int) -> tuple[np.ndarray, ...]:
    """`prefill`'s tokens int32 [D, PROMPTS, chunk], and sequences, starts and lengths, int32 [D, PROMPTS] each."""
    tokens = np.zeros((devices, PROMPTS, chunk), np.int32)
    sequence, start, length = np.zeros((3, devices, PROMPTS), np.int32)
    for (rows, request), number in zip(members, row_numbers("prefill", members), strict=True):
        own = rows.device, number
        tokens[(*own, slice(rows.count))] = request.tokens(rows.start, rows.count)
        sequence[own], start[own], length[own] = rows.slot, rows.start, rows.count
    return tokens, sequence, start, length


def decode_inputs(members: Sequence[Member], devices: int, sequences: int) -> tuple[np.ndarray, ...]:
    """`decode_step`'s tokens and positions, int32 [D, sequences] each, and active rows, bool; the token of a row that is still
    to come from a step under way is -1."""
    tokens, positions = np.zeros((2, devices, sequences), np.int32)
    active = np.zeros((devices, sequences), bool)
    for rows, request in members:
        (tokens[rows.device, rows.slot],) = request.tokens(rows.start, 1) or [-1]
        positions[rows.device, rows.slot], active[rows.device, rows.slot] = rows.start, True
    return tokens, positions, active


def token_places(kind: Kind, members: Sequence[Member]) -> list[int]:
    """Where each member's tokens begin among those that its device computes: in a prefill step one's after another's."""
    if kind == "decode":
        return row_numbers(kind, members)
    taken: collections.Counter[int] = collections.Counter()
    places = []
    for rows, _ in members:
        places.append(taken[rows.device])
        taken[rows.device] += rows.count
    return places


def given_routing(kind: Kind, members: Sequence[Member], shape: tuple[int, int, int, int]) -> tuple[np.ndarray, ...]:
    """Experts int32 and weights float32 [D, tokens, MoE layers, k] of requests that bring them."""
    ids, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for (rows, request), first in zip(members, token_places(kind, members), strict=True):
        assert request.routed is not None
        tokens = slice(rows.start, rows.start + rows.count)
        own = (rows.device, slice(first, first + rows.count))
        ids[own], weights[own] = request.routed[0][tokens], request.routed[1][tokens]
    return ids, weights


def sampled_inputs(
    members: Sequence[Member], numbers: Sequence[int], devices: int, sequences: int, width: int
) -> SampledInputs:
    """Of a step that takes `width` tokens of a sequence at most; numbers: row of each member."""
    tokens, valid = np.zeros((devices, sequences, width), np.int32), np.zeros((devices, sequences, width), bool)
    fresh, row = np.zeros((devices, sequences), bool), np.zeros((devices, sequences), np.int32)
    for (rows, request), number in zip(members, numbers, strict=True):
        own = (rows.device, rows.slot, slice(0, rows.count))
        tokens[own], valid[own] = request.tokens(rows.start, rows.count) or [-1], True
        fresh[own[:2]], row[own[:2]] = rows.start == request.found, number
    return SampledInputs(tokens, valid, fresh, row)
