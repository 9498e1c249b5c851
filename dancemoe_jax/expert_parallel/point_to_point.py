"""One hop of the exchange by messages between pairs of devices, as Gloo carries them: nothing is sent that is not needed.

Each pair runs only the messages that its two ends agreed on, in one global order of rounds, so that nothing waits in a
circle. Counts go digit by digit, so that any number of rows travels in a few messages of fixed shapes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dancemoe_jax.expert_parallel.links import Pairs
from dancemoe_jax.expert_parallel.wire import from_words, to_words
from dancemoe_jax.mesh import AXIS

# A count of rows is sent digit by digit, a message for each digit that is not zero: exact sizes from few shapes. A larger
# base means fewer messages and a larger program.
RADIX = 8


class _Turn(NamedTuple):
    """One round of a hop, as one device sees it: the pair it is in, and where the rows of that pair are."""

    pairs: Pairs
    source: jax.Array
    target: jax.Array
    me: jax.Array
    rows: jax.Array  # of this device that go to the target, in order, first
    base: jax.Array  # row of the buffer where the first one arrives

    @property
    def sending(self):
        return (self.source == self.me) & (self.target != self.me)

    @property
    def receiving(self):
        return (self.target == self.me) & (self.source != self.me)

    def permute(self, message):
        return jax.lax.ppermute(message, AXIS, self.pairs)

    def outgoing(self, take, buffer, start, size):
        rows = jax.lax.dynamic_slice_in_dim(self.rows, start, size)
        return take(buffer, rows, jnp.broadcast_to(self.target, size))

    def arriving(self, buffer, start, block):
        old = jax.lax.dynamic_slice_in_dim(buffer, self.base + start, len(block))
        block = jnp.where(self.receiving, block, old)
        return jax.lax.dynamic_update_slice_in_dim(buffer, block, self.base + start, 0)

    def announce(self, take, buffer, count, live, eager):
        """How many rows come, from the source to the target, with the first of them where that is eager.

        Returns: the buffer, the rows that this pair sends, and how many have been sent.
        """

        no_row = jnp.zeros_like(buffer, shape=(1, buffer.shape[1]))

        def nothing():
            return jnp.zeros_like(count), no_row

        def count_alone():
            return jnp.where(self.receiving, self.permute(count), 0), no_row

        def count_and_row():
            message = jnp.concatenate([to_words(count[None]), self.outgoing(take, buffer, 0, 1)], axis=1)
            message = self.permute(message)
            return jnp.where(self.receiving, from_words(message[:, :2], jnp.int32)[0, 0], 0), message[:, 2:]

        first = live & eager
        received, row = jax.lax.switch(live.astype(int) + first, [nothing, count_alone, count_and_row])
        buffer = _once(first, lambda buffer: self.arriving(buffer, 0, row), buffer)
        return buffer, jnp.where(self.sending, count * live, received), first.astype(received.dtype)


def point_to_point_hop(rounds, me, wants, live, eager, take, buffer, fill, wire):
    """Rows to where they are wanted, pair by pair.

    Args:
        wants: bool [rows, devices], which of this device's rows each device is to get.
        take: (buffer, rows, device each is for) -> packed rows.
        buffer: arriving rows are added from row `fill` on.

    Returns:
        The buffer, its new fill, a function that sends back what `out` holds for the rows that arrived and adds what
        comes back to the rows that were sent, and how many rows this device sent.
    """
    most, devices = wants.shape
    counts = wants.sum(0, dtype=jnp.int32)
    order = jnp.argsort(~wants, axis=0, stable=True).T
    turns, sent = [], jnp.zeros_like(fill)
    for pairs in rounds:
        source, target = _own_pair(pairs, me, devices)
        turn = _Turn(pairs, source, target, me, order[target], fill)
        buffer, count, first = turn.announce(take, buffer, counts[target], live[source, target], eager[source, target])
        turns.append((turn, count, first))
        sent = sent + jnp.where(turn.sending, jnp.maximum(count, first), 0)
        fill = fill + jnp.where(turn.receiving, count, 0)

    # All counts have gone before the other rows: pairs further on need not wait for what these take.
    for turn, count, first in turns:
        outgoing = functools.partial(turn.outgoing, take)
        buffer = _stream(turn.permute, first, count, most, outgoing, turn.arriving, buffer)
    back = functools.partial(_pairs_back, [(turn, count) for turn, count, _ in turns], most, wire)
    return buffer, fill, back, sent


def _pairs_back(turns, most, wire, out):
    """Send the sums of the rows that arrived back to where they came from, and add those that come back."""
    for turn, count in turns:
        forth = turn._replace(pairs=tuple((target, source) for source, target in turn.pairs))

        def sums(out, start, size, base=turn.base):
            return to_words(jax.lax.dynamic_slice_in_dim(out, base + start, size).astype(wire))

        def add(out, start, block, turn=turn):
            rows = jax.lax.dynamic_slice_in_dim(turn.rows, start, len(block))
            at = jnp.where(turn.sending, rows, len(out))
            return out.at[at].add(from_words(block, wire).astype(out.dtype), mode="drop")

        out = _stream(forth.permute, jnp.zeros_like(count), count, most, sums, add, out)
    return out


def _own_pair(pairs, me, devices):
    """The pair that this device is in; itself twice where it is in none."""
    pair_of = np.stack([np.arange(devices)] * 2)
    for source, target in pairs:
        pair_of[:, source] = pair_of[:, target] = source, target
    return jnp.array(pair_of[0])[me], jnp.array(pair_of[1])[me]


def _stream(permute, start, stop, most, take, put, carry):
    """Send rows start..stop (at most `most`, known to both ends) of `take`; `put` them into `carry` where they arrive."""

    def rows(carry):
        at = start
        for unit in _units(most):
            digit = (stop - start) // unit % RADIX
            for size in range(unit, min(most, unit * (RADIX - 1)) + 1, unit):

                def message(carry, size=size, at=at):
                    return put(carry, at, permute(take(carry, at, size)))

                carry = _once(digit * unit == size, message, carry)
            at = at + digit * unit
        return carry

    return _once(start < stop, rows, carry)


def _once(wanted, body, carry):
    """body(carry) if wanted, else carry: a loop of at most one turn, because unlike a conditional it never copies `carry`."""
    return jax.lax.while_loop(lambda c: c[0], lambda c: (c[0] & False, body(c[1])), (wanted, carry))[1]


def _units(most):
    """Powers of RADIX up to `most`, largest first."""
    units = [1]
    while units[-1] * RADIX <= most:
        units.append(units[-1] * RADIX)
    return units[::-1]
