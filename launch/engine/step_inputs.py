"""The arrays of a step, out of what the scheduler has planned for it. Takes no step and touches no device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from launch.engine.batch import Member
from placement.scheduling import Kind, SlotRows


class SampledInputs(NamedTuple):
    """What choosing tokens by their requests' rules takes of a step, by batch slot.

    Attributes:
        tokens: that went through the step, int32 [D, sequences, tokens]; valid: which of them count, bool.
        fresh: slots in which a request begins, bool [D, sequences].
    """

    tokens: np.ndarray
    valid: np.ndarray
    fresh: np.ndarray


def first_row(kind: Kind, rows: SlotRows) -> int:
    """Where rows lie among those of their device: a chunk begins at 0, a decoded token has its slot's row."""
    return 0 if kind == "prefill" else rows.slot


def prefill_inputs(members: Sequence[Member], devices: int, chunk: int) -> tuple[np.ndarray, ...]:
    """`prefill`'s tokens int32 [D, 1, chunk], and sequences, starts and lengths, int32 [D, 1] each."""
    tokens = np.zeros((devices, 1, chunk), np.int32)
    sequence, start, length = np.zeros((3, devices, 1), np.int32)
    for rows, request in members:
        tokens[rows.device, 0, : rows.count] = request.tokens(rows.start, rows.count)
        sequence[rows.device], start[rows.device], length[rows.device] = rows.slot, rows.start, rows.count
    return tokens, sequence, start, length


def decode_inputs(members: Sequence[Member], devices: int, sequences: int) -> tuple[np.ndarray, ...]:
    """`decode_step`'s tokens and positions, int32 [D, sequences] each, and active rows, bool."""
    tokens, positions = np.zeros((2, devices, sequences), np.int32)
    active = np.zeros((devices, sequences), bool)
    for rows, request in members:
        (tokens[rows.device, rows.slot],) = request.tokens(rows.start, 1)
        positions[rows.device, rows.slot], active[rows.device, rows.slot] = rows.start, True
    return tokens, positions, active


def given_routing(kind: Kind, members: Sequence[Member], shape: tuple[int, int, int, int]) -> tuple[np.ndarray, ...]:
    """Experts int32 and weights float32 [D, rows, MoE layers, k] of requests that bring them."""
    ids, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for rows, request in members:
        assert request.routed is not None
        first, tokens = first_row(kind, rows), slice(rows.start, rows.start + rows.count)
        own = (rows.device, slice(first, first + rows.count))
        ids[own], weights[own] = request.routed[0][tokens], request.routed[1][tokens]
    return ids, weights


def sampled_inputs(members: Sequence[Member], devices: int, sequences: int, width: int) -> SampledInputs:
    """Of a step that takes `width` tokens of a sequence at most."""
    tokens, valid = np.zeros((devices, sequences, width), np.int32), np.zeros((devices, sequences, width), bool)
    fresh = np.zeros((devices, sequences), bool)
    for rows, request in members:
        own = (rows.device, rows.slot, slice(0, rows.count))
        tokens[own], valid[own] = request.tokens(rows.start, rows.count), True
        fresh[rows.device, rows.slot] = rows.start == 0
    return SampledInputs(tokens, valid, fresh)
