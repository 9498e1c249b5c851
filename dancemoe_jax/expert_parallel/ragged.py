"""One hop of the exchange by `ragged_all_to_all`, with the same control flow on every device, as NCCL needs it."""

import jax
import jax.numpy as jnp
import numpy as np

from dancemoe_jax.expert_parallel.links import linked_pairs
from dancemoe_jax.expert_parallel.wire import from_words, to_words
from dancemoe_jax.mesh import AXIS


def ragged_hop(rounds, me, wants, live, eager, take, buffer, fill, wire):
    """The same as `point_to_point_hop`, with one collective of uneven sizes each way: nothing travels that is not wanted."""
    count, devices = wants.shape
    targets = int(np.max(linked_pairs(rounds, devices).sum(1)))
    counts = wants.sum(0, dtype=jnp.int32)
    matrix, fills = jax.lax.all_gather((counts, fill), AXIS)
    order = jnp.argsort(~wants.T.reshape(-1), stable=True)[: targets * count]
    into = matrix[:, me]
    buffer = _ragged_all_to_all(
        take(buffer, order % count, order // count),
        buffer,
        _before(counts),
        counts,
        fills + _before(matrix)[me],
        into,
    )

    def back(out):
        sums = to_words(out.astype(wire))
        reply = jnp.zeros_like(sums, shape=(len(order), sums.shape[1]))
        reply = _ragged_all_to_all(sums, reply, fill + _before(into), into, _before(matrix.T)[me], counts)
        return add_replies(out, from_words(reply, wire), wants, _before(counts))

    return buffer, fill + into.sum(), back, counts.sum()


def add_replies(out, reply, wants, first):
    """Add to each row the replies of all devices that it wanted, by device: a scatter would add in any order on a GPU.

    Args:
        reply: rows by device, those of one in the order of the rows that wanted it.
        wants: bool [rows, devices]; first: int [devices], where each device's replies begin.
    """
    at = first[None] + jnp.cumsum(wants, axis=0) - 1
    parts = jnp.where(wants[:, :, None], reply.at[at].get(mode="clip"), 0).astype(out.dtype)
    return out.at[: len(wants)].add(parts.sum(1)) if len(out) > len(wants) else out + parts.sum(1)


def _before(sizes):
    return jnp.cumsum(sizes, axis=0, dtype=sizes.dtype) - sizes


def _ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
    """`jax.lax.ragged_all_to_all`, and the same by gathering everything where the backend has none (CPU)."""

    def native(*arguments):
        return jax.lax.ragged_all_to_all(*arguments, axis_name=AXIS)

    def gathered(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
        me = jax.lax.axis_index(AXIS)
        operands, starts, sizes, offsets = jax.lax.all_gather(
            (operand, input_offsets, send_sizes, output_offsets), AXIS
        )
        for source, rows in enumerate(operands):
            index = jnp.arange(len(output)) - offsets[source, me]
            hit = (index >= 0) & (index < sizes[source, me])
            output = jnp.where(hit[:, None], rows.at[starts[source, me] + index].get(mode="clip"), output)
        return output

    arguments = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
    return jax.lax.platform_dependent(*arguments, cpu=gathered, default=native)
