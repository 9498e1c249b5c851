"""The next tokens of a step: the likeliest ones, or by the rules of the requests. Keeps what these have seen."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.inference.sampling import SamplingRows, choose, stack_params
from dancemoe_jax.inference.steps import StepResult
from dancemoe_jax.mesh import shard_rows, sharded
from dancemoe_jax.text.grammar import WORD
from launch.engine.batch import Member
from launch.engine.request import Request
from launch.engine.step_inputs import SampledInputs, sampled_inputs

ALL = 2**WORD - 1  # a word of a mask in which every token may come


class TokenChoice:
    """Chooses for the batch slots of this process's devices.

    Args:
        sequences: batch slots of a device; vocabulary: tokens that there are.
    """

    def __init__(self, mesh: Mesh, sequences: int, vocabulary: int) -> None:
        self._mesh = mesh
        self._seen = jnp.zeros((mesh.size, sequences, vocabulary), bool, device=sharded(mesh))
        self._any = np.full((mesh.size, sequences, -(-vocabulary // WORD)), ALL, np.uint32)
        self._any_on_devices = shard_rows(mesh, self._any)

    def next_tokens(
        self,
        members: Sequence[Member],
        numbers: Sequence[int],
        running: Sequence[Sequence[Request | None]],
        result: StepResult,
        last: jax.Array,
        width: int,
    ) -> jax.Array:
        """The next token of each batch slot whose sequence takes part in a step, int32 [D, sequences], on the devices. Waits
        for nothing.

        Args:
            numbers: row of each member (step_inputs.row_numbers).
            running: requests by device and batch slot.
            last: what this gave after the step before; those slots that take no part are given it again.
            width: tokens that the step takes of a sequence at most.
        """
        if all(request.greedy for _, request in members):
            assert result.last is not None
            return result.last
        inputs = sampled_inputs(members, numbers, len(running), len(running[0]), width)
        return self._choose(inputs, running, result.logits, self._allowed(members), last)

    def _allowed(self, members: Sequence[Member]) -> jax.Array:
        """Which tokens each batch slot may be given, uint32 [D, sequences, words]."""
        held = [(rows, request.grammar) for rows, request in members if request.grammar is not None]
        if not held:
            return self._any_on_devices
        allowed = self._any.copy()
        for rows, grammar in held:
            allowed[rows.device, rows.slot] = grammar.allowed()
        return shard_rows(self._mesh, allowed)

    def _choose(
        self,
        inputs: SampledInputs,
        running: Sequence[Sequence[Request | None]],
        logits: jax.Array,
        allowed: jax.Array,
        last: jax.Array,
    ) -> jax.Array:
        rows = [stack_params([request and request.params for request in row]) for row in running]
        rules = SamplingRows(*(shard_rows(self._mesh, np.stack(column)) for column in zip(*rows, strict=True)))
        index = np.array([[len(r.output) + r.coming if r else 0 for r in row] for row in running], np.int32)
        *given, row = (shard_rows(self._mesh, part) for part in inputs)
        index = shard_rows(self._mesh, index)
        self._seen, chosen = choose(self._seen, *given, logits, rules, index, row, allowed, last, mesh=self._mesh)
        return chosen
