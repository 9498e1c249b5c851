"""A step that has begun and whose results nobody has read yet."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dancemoe_jax.inference.steps import StepResult
from dancemoe_jax.mesh import own_rows
from launch.engine.batch import Member
from launch.engine.request import Request
from launch.engine.step_inputs import token_places
from placement.scheduling import SlotRows, Turn


class Flight(NamedTuple):
    """What has been asked of a step, and the arrays that will hold what it gives.

    Attributes:
        members: rows of the step, and whose they are; numbers: row of each in the step's arrays.
        ready: which of them are given a token by it.
        control: what this process's devices send with it.
        tokens: int32 [D, sequences], the next token of each batch slot that is given one.
    """

    turn: Turn
    members: list[Member]
    numbers: list[int]
    ready: list[bool]
    control: np.ndarray
    result: StepResult
    tokens: jax.Array

    def routed(self, wanted: Sequence[bool]) -> list[tuple[SlotRows, Request, np.ndarray]]:
        """The experts of the tokens of those members that are wanted, [tokens, MoE layers, k] each. Waits for the step."""
        if not any(wanted):
            return []
        experts, places = own_rows(self.result.routed), token_places(self.turn.kind, self.members)
        return [
            (rows, request, experts[rows.device][first : first + rows.count])
            for (rows, request), first, one in zip(self.members, places, wanted, strict=True)
            if one
        ]
