"""The exchange of one MoE layer over slow links: a token crosses to a server once and comes back as one sum.

Two stages, both over static pairs of devices (`Links`): *across*, from each device to one gateway on every other server,
and *within*, from a gateway (or from where the token lives) to the other devices of its server. A row travels with its
routing weights and the slots it needs there, in one message; partial sums are added on the way back.

Rows travel by "pairs" where collectives are point to point (Gloo): each pair of devices runs only the messages that the
two of them agreed on, in one global order of rounds, so nothing waits in a circle. "ragged" has the same control flow on
every device, which NCCL needs. Which experts sit where is tables.py's business, how they are computed is the caller's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.config import ModelError
from dancemoe_jax.mesh import AXIS

Pairs = tuple[tuple[int, int], ...]

# A count of rows is sent digit by digit, a message for each digit that is not zero: exact sizes from few shapes. A larger
# base means fewer messages and a larger program.
RADIX = 8


@dataclasses.dataclass(frozen=True)
class Links:
    """Who may send to whom; static, the same on all devices.

    Attributes:
        server: server of each device.
        slots: upper bound of the slot numbers of any device.
        across: rounds of (source, gateway on another server). In a round a device is in at most one pair.
        within: rounds of (device, another device of its server).
    """

    server: tuple[int, ...]
    slots: int
    across: tuple[Pairs, ...]
    within: tuple[Pairs, ...]

    @property
    def place(self) -> tuple[int, ...]:
        """Index of each device within its server."""
        return tuple(self.server[:d].count(s) for d, s in enumerate(self.server))

    def fan_in(self, rounds: tuple[Pairs, ...]) -> int:
        """The most sources that any device receives from."""
        into = [target for pairs in rounds for _, target in pairs]
        return max(map(into.count, into), default=0)


@functools.cache
def make_links(device_server: tuple[int, ...], slots: int) -> Links:
    """Pairs and rounds for devices on these servers, gateways shared evenly among a server's devices.

    Raises:
        ModelError: more slots on a server than a row's header can name.
    """
    server = tuple(int(s) for s in device_server)
    members = {s: [d for d, other in enumerate(server) if other == s] for s in sorted(set(server))}
    most = max(map(len, members.values()))
    if slots * most >= 2**16:
        raise ModelError(
            f"exchange: {most} devices on a server with {slots} slots each; slots of a server must stay below {2**16}"
        )
    across, within = [], []
    for source, home in enumerate(server):
        turn = members[home].index(source) + home
        across += [(source, own[turn % len(own)]) for other, own in members.items() if other != home]
        within += [(source, sibling) for sibling in members[home] if sibling != source]
    return Links(server, slots, _rounds(across, len(server)), _rounds(within, len(server)))


def _rounds(pairs: list[tuple[int, int]], devices: int) -> tuple[Pairs, ...]:
    """Pairs in as few rounds as first fit finds; pairs at the same distance around the ring tend to share one."""
    rounds: list[list[tuple[int, int]]] = []
    for pair in sorted(pairs, key=lambda p: ((p[1] - p[0]) % devices, p)):
        free = (r for r in rounds if not any(set(pair) & set(other) for other in r))
        chosen = next(free, None)
        if chosen is None:
            rounds.append(chosen := [])
        chosen.append(pair)
    return tuple(tuple(sorted(r)) for r in rounds)


def link_needs(links: Links, device: np.ndarray) -> np.ndarray:
    """Which pair may carry rows of which device's tokens: bool [layers, source, target, device of entry].

    Args:
        device: int [devices, layers, experts], whose copy each source uses (tables.Tables.device).
    """
    server = np.array(links.server)
    devices, layers, _ = device.shape
    uses = (device[..., None] == np.arange(devices)).any(2).transpose(1, 0, 2)  # [layers, source, owner]
    needs = np.zeros((layers, devices, devices, devices), bool)
    for source, gateway in (pair for pairs in links.across for pair in pairs):
        there = server == server[gateway]
        needs[:, source, gateway, source] = uses[:, source][:, there].any(1)
        for sibling in np.flatnonzero(there & (np.arange(devices) != gateway)):
            needs[:, gateway, sibling, source] |= uses[:, source, sibling]
    for source, sibling in (pair for pairs in links.within for pair in pairs):
        needs[:, source, sibling, source] |= uses[:, source, sibling]
    return needs


def exchange(
    links: Links,
    compute: Callable,
    x: Float[Array, "tokens hidden"],
    topk_weights: Float[Array, "tokens k"],
    device: Int[Array, "tokens k"],
    slot: Int[Array, "tokens k"],
    live: Bool[Array, "devices devices"],
    eager: Bool[Array, "devices devices"],
    *,
    transport: Literal["pairs", "ragged"],
    wire_dtype: Any = None,
) -> tuple[Float[Array, "tokens hidden"], Int[Array, ""]]:
    """Sum of each token's routed experts, wherever they are (inside shard_map over all devices).

    Args:
        compute: (x [n, hidden], slots int32 [n, k] or -1 for none, weights [n, k]) -> weighted sums [n, hidden] over the
            experts in this device's slots.
        device: where each assignment is served; -1 for none.
        slot: its slot there.
        live: whether a pair may carry anything in this layer; the same on all devices. A pair of another server that is
            live costs a word, or a row if eager; one that is not costs nothing. See `live_links`.
        eager: pairs whose first row goes with the count, unasked; the same on all devices.
        wire_dtype: what rows and sums are sent in, 2 or 4 bytes wide; default the dtype of x.

    Returns:
        The sums, and how many rows this device sent across, those included that went before it was known that none is needed.
    """
    me = jax.lax.axis_index(AXIS)

    def alone(x, topk_weights):
        return compute(x, jnp.where(device == me, slot, -1), topk_weights), _varying(jnp.int32(0))

    def together(x, topk_weights):
        layer = _Layer(links, me, wire_dtype or x.dtype, x, topk_weights, device, slot)
        return _two_stages(layer, compute, transport, live, eager)

    # With NCCL all devices must decide alike; point to point, those that no live pair touches have no part in it.
    involved = live.any() if transport == "ragged" else live[me].any() | live[:, me].any()
    return jax.lax.cond(involved, together, alone, x, topk_weights)


def live_links(
    needs: Bool[Array, "devices devices devices"], busy: Bool[Array, " devices"]
) -> Bool[Array, "devices devices"]:
    """Pairs that may carry something in a layer: `link_needs` of the layer, and which devices have tokens in this step."""
    return (needs & busy).any(-1)


class _Layer(NamedTuple):
    """One layer's tokens on one device, and how a row of theirs looks on the wire (uint16: x, weights, codes).

    A code names a slot on the server that the row goes to: 1 + slot + slots * (index of the device there); 0 for none.
    """

    links: Links
    me: jax.Array
    wire: Any
    x: jax.Array
    topk_weights: jax.Array
    device: jax.Array
    slot: jax.Array

    def pack(self, _, index, target):
        """Rows `index` of the tokens as the server of device `target` reads them."""
        server, place = jnp.array(self.links.server), jnp.array(self.links.place)
        device = self.device[index]
        there = (device >= 0) & (server[device] == server[target][..., None])
        code = jnp.where(there, 1 + self.slot[index] + self.links.slots * place[device], 0)
        return jnp.concatenate(
            [
                _words(self.x[index].astype(self.wire)),
                _words(self.topk_weights[index].astype(jnp.float32)),
                code.astype(jnp.uint16),
            ],
            axis=1,
        )

    def unpack(self, packed):
        """x, weights, and codes of packed rows."""
        k = self.device.shape[1]
        x = _from_words(packed[:, : -3 * k], self.wire).astype(self.x.dtype)
        weights = _from_words(packed[:, -3 * k : -k], jnp.float32).astype(self.topk_weights.dtype)
        return x, weights, packed[:, -k:].astype(jnp.int32)


def _words(a):
    """uint16 [n, …] of the bits of a [n, …]."""
    if a.dtype.itemsize == 2:
        return jax.lax.bitcast_convert_type(a, jnp.uint16)
    return jax.lax.bitcast_convert_type(a, jnp.uint16).reshape(len(a), -1)


def _from_words(words, dtype):
    if jnp.dtype(dtype).itemsize == 2:
        return jax.lax.bitcast_convert_type(words, dtype)
    return jax.lax.bitcast_convert_type(words.reshape(len(words), -1, 2), dtype)


def _two_stages(layer, compute, transport, live, eager):
    """Send rows across, then within servers; compute all that is here; send the sums back the same ways.

    Where collectives run beside computing ("ragged"), what is at home is computed apart: it needs nothing that travels, so the
    compiler may do both at once. Elsewhere one pass over the weights serves all rows.
    """
    links, me = layer.links, layer.me
    hop, apart = {"pairs": (_pairs, False), "ragged": (_ragged, True)}[transport]
    tokens, k = layer.device.shape
    here = tokens * (1 + links.fan_in(links.across))
    total = here * (1 + links.fan_in(links.within))
    server, place = jnp.array(links.server), jnp.array(links.place)

    buffer = _prefix(layer.pack(None, jnp.arange(tokens), me), total)
    to_server = (server[layer.device][:, :, None] == server) & (layer.device >= 0)[:, :, None]
    wants = to_server.any(1) & jnp.array(_linked(links.across, len(server)))[me]
    buffer, fill, back_across, rows = hop(
        links.across, me, wants, live, eager, layer.pack, buffer, _varying(jnp.int32(tokens)), layer.wire
    )
    back_within = None
    if links.within:
        codes = buffer[:here, -k:].astype(jnp.int32)
        at = jnp.where(codes > 0, (codes - 1) // links.slots, -1)
        wants = (at[:, :, None] == place).any(1) & (server == server[me]) & (jnp.arange(len(server)) != me)
        wants = wants & (jnp.arange(here) < fill)[:, None]
        buffer, fill, back_within, _ = hop(
            links.within, me, wants, live, eager, lambda buffer, index, _: buffer[index], buffer, fill, layer.wire
        )

    def of_first(size):
        def branch(buffer, fill):
            x, weights, codes = layer.unpack(buffer[:size])
            row = jnp.arange(size)
            computed = (row < fill) & (row >= tokens) if apart else row < fill
            mine = (codes > 0) & ((codes - 1) // links.slots == place[me]) & computed[:, None]
            # What lives here has not been through the wire's dtype.
            x, weights = x.at[:tokens].set(layer.x), weights.at[:tokens].set(layer.topk_weights)
            return _prefix(compute(x, jnp.where(mine, (codes - 1) % links.slots, -1), weights), total)

        return branch

    sizes = [min(tokens * 2**i, total) for i in range((total // tokens - 1).bit_length() + 1)]
    chosen = jnp.searchsorted(jnp.array(sizes), fill)
    with jax.named_scope("experts"):
        out = jax.lax.switch(chosen, [of_first(size) for size in sizes], buffer, fill)
    for back in (back_within, back_across):
        out = out if back is None else back(out)
    if not apart:
        return out[:tokens], rows
    with jax.named_scope("experts_at_home"):
        home = compute(layer.x, jnp.where(layer.device == me, layer.slot, -1), layer.topk_weights)
    return out[:tokens] + home, rows


def _prefix(rows, total):
    """An array of `total` rows that starts with these; the others hold anything."""
    rest = _varying(jax.lax.empty((total, rows.shape[1]), rows.dtype))
    return jax.lax.dynamic_update_slice_in_dim(rest, rows, 0, axis=0)


def _varying(a):
    return jax.lax.pcast(a, AXIS, to="varying")


def _linked(rounds, devices):
    linked = np.zeros((devices, devices), bool)
    for source, target in (pair for pairs in rounds for pair in pairs):
        linked[source, target] = True
    return linked


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

        def quiet():
            return jnp.zeros_like(count), nothing

        def ask():
            return jnp.where(self.receiving, self.permute(count), 0), nothing

        def tell():
            message = jnp.concatenate([_words(count[None]), self.outgoing(take, buffer, 0, 1)], axis=1)
            message = self.permute(message)
            return jnp.where(self.receiving, _from_words(message[:, :2], jnp.int32)[0, 0], 0), message[:, 2:]

        nothing = jnp.zeros_like(buffer, shape=(1, buffer.shape[1]))
        told, row = jax.lax.switch(live.astype(int) + (live & eager), [quiet, ask, tell])
        buffer = _once(live & eager, lambda buffer: self.arriving(buffer, 0, row), buffer)
        return buffer, jnp.where(self.sending, count * live, told), (live & eager).astype(told.dtype)


def _pairs(rounds, me, wants, live, eager, take, buffer, fill, wire):
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
            return _words(jax.lax.dynamic_slice_in_dim(out, base + start, size).astype(wire))

        def add(out, start, block, turn=turn):
            rows = jax.lax.dynamic_slice_in_dim(turn.rows, start, len(block))
            at = jnp.where(turn.sending, rows, len(out))
            return out.at[at].add(_from_words(block, wire).astype(out.dtype), mode="drop")

        out = _stream(forth.permute, jnp.zeros_like(count), count, most, sums, add, out)
    return out


def _own_pair(pairs, me, devices):
    """The pair that this device is in; itself twice where it is in none."""
    ends = np.stack([np.arange(devices)] * 2)
    for source, target in pairs:
        ends[:, source] = ends[:, target] = source, target
    return jnp.array(ends[0])[me], jnp.array(ends[1])[me]


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


def _ragged(rounds, me, wants, live, eager, take, buffer, fill, wire):
    """The same as `_pairs`, with one collective of uneven sizes each way. What is not wanted is not sent anyway."""
    count, devices = wants.shape
    targets = int(np.max(_linked(rounds, devices).sum(1)))
    counts = wants.sum(0, dtype=jnp.int32)
    matrix, fills = jax.lax.all_gather((counts, fill), AXIS)
    order = jnp.argsort(~wants.T.reshape(-1), stable=True)[: targets * count]
    into = matrix[:, me]
    buffer = _ragged_all_to_all(
        take(buffer, order % count, order // count),
        buffer, _before(counts), counts, fills + _before(matrix)[me], into,
    )  # fmt: skip

    def back(out):
        sums = _words(out.astype(wire))
        reply = jnp.zeros_like(sums, shape=(len(order), sums.shape[1]))
        reply = _ragged_all_to_all(sums, reply, fill + _before(into), into, _before(matrix.T)[me], counts)
        at = jnp.where(jnp.arange(len(order)) < counts.sum(), order % count, len(out))
        return out.at[at].add(_from_words(reply, wire).astype(out.dtype), mode="drop")

    return buffer, fill + into.sum(), back, counts.sum()


def _before(sizes):
    return jnp.cumsum(sizes, axis=0, dtype=sizes.dtype) - sizes


def _ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
    """`jax.lax.ragged_all_to_all`, and the same by gathering everything where the backend has none (CPU)."""

    def native(*arguments):
        return jax.lax.ragged_all_to_all(*arguments, axis_name=AXIS)

    def gathered(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
        me = jax.lax.axis_index(AXIS)
        operands, starts, sizes, places = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), AXIS)
        for source, rows in enumerate(operands):
            index = jnp.arange(len(output)) - places[source, me]
            hit = (index >= 0) & (index < sizes[source, me])
            output = jnp.where(hit[:, None], rows.at[starts[source, me] + index].get(mode="clip"), output)
        return output

    arguments = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
    return jax.lax.platform_dependent(*arguments, cpu=gathered, default=native)
