"""The exchange of one MoE layer over slow links: a token crosses to a server once and comes back as one sum.

Two stages, both over static pairs of devices (`Links`): *across*, from each device to one gateway on every other server,
and *within*, from a gateway (or from where the token lives) to the other devices of its server. A row travels with its
routing weights and the slots it needs there, in one message; partial sums are added on the way back.

Rows travel by "pairs" where collectives are point to point (Gloo): each pair of devices runs only the messages that the
two of them agreed on, in one global order of rounds, so nothing waits in a circle. "ragged" has the same control flow on
every device, which NCCL needs. Which experts sit where is tables.py's business, how they are computed is the caller's.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.expert_parallel.links import Links, linked_pairs
from dancemoe_jax.expert_parallel.point_to_point import point_to_point_hop
from dancemoe_jax.expert_parallel.ragged import ragged_hop
from dancemoe_jax.expert_parallel.wire import LayerRows
from dancemoe_jax.mesh import AXIS


def two_stage_experts(
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
        wire_dtype: what rows and sums are sent in, 2 or 4 bytes wide; default the dtype of x for rows, float32 for sums, which
            then do not depend on which device computed what (kernels.experts.sum_grid).

    Returns:
        The sums, and how many rows this device sent across, those included that went before it was known that none is needed.
    """
    me = jax.lax.axis_index(AXIS)

    def alone(x, topk_weights):
        return compute(x, jnp.where(device == me, slot, -1), topk_weights), _varying(jnp.int32(0))

    def together(x, topk_weights):
        layer = LayerRows(links, me, wire_dtype or x.dtype, x, topk_weights, device, slot)
        return _two_stages(layer, compute, transport, live, eager, wire_dtype or jnp.float32)

    if not links.across and not links.within:
        return alone(x, topk_weights)
    # With NCCL all devices must decide alike; point to point, those that no live pair touches have no part in it.
    involved = live.any() if transport == "ragged" else live[me].any() | live[:, me].any()
    return jax.lax.cond(involved, together, alone, x, topk_weights)


def _two_stages(layer, compute, transport, live, eager, sums):
    """Send rows across, then within servers; compute all that is here; send the sums back the same ways.

    Where collectives run beside computing ("ragged"), what is at home is computed apart: it needs nothing that travels, so the
    compiler may do both at once. Elsewhere one pass over the weights serves all rows.
    """
    links, me = layer.links, layer.me
    hop, apart = {"pairs": (point_to_point_hop, False), "ragged": (ragged_hop, True)}[transport]
    tokens, k = layer.device.shape
    here = tokens * (1 + links.fan_in(links.across))
    total = here * (1 + links.fan_in(links.within))
    server, index_on_server = jnp.array(links.server), jnp.array(links.index_on_server)

    buffer = _prefix(layer.pack(None, jnp.arange(tokens), me), total)
    to_server = (server[layer.device][:, :, None] == server[None, None]) & (layer.device >= 0)[:, :, None]
    wants = to_server.any(1) & jnp.array(linked_pairs(links.across, len(server)))[me][None]
    fill, rows, back_across, back_within = _varying(jnp.int32(tokens)), _varying(jnp.int32(0)), None, None
    if links.across:
        buffer, fill, back_across, rows = hop(links.across, me, wants, live, eager, layer.pack, buffer, fill, sums)
    if links.within:
        codes = buffer[:here, -k:].astype(jnp.int32)
        at = jnp.where(codes > 0, (codes - 1) // links.slots, -1)
        siblings = (server == server[me]) & (jnp.arange(len(server)) != me)
        wants = (at[:, :, None] == index_on_server[None, None]).any(1) & siblings[None]
        wants = wants & (jnp.arange(here) < fill)[:, None]
        buffer, fill, back_within, _ = hop(
            links.within, me, wants, live, eager, lambda buffer, index, _: buffer[index], buffer, fill, sums
        )

    def of_first(size):
        def branch(buffer, fill):
            x, weights, codes = layer.unpack(buffer[:size])
            row = jnp.arange(size)
            computed = (row < fill) & (row >= tokens) if apart else row < fill
            mine = (codes > 0) & ((codes - 1) // links.slots == index_on_server[me]) & computed[:, None]
            # What lives here has not been through the wire's dtype.
            x, weights = _starting(x, layer.x), _starting(weights, layer.topk_weights)
            return _prefix(compute(x, jnp.where(mine, (codes - 1) % links.slots, -1), weights), total)

        return branch

    sizes = [min(tokens * 2**i, total) for i in range((total // tokens - 1).bit_length() + 1)]
    sizes = (
        sizes[-1:] if apart else sizes
    )  # a GPU would have to tell the host which; there empty rows cost next to nothing
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
    return _starting(_varying(jax.lax.empty((total, rows.shape[1]), rows.dtype)), rows)


def _starting(array, rows):
    """The array with these rows first. (`array.at[:n].set` makes an index without elements, which jax 0.11.2 crashes on.)"""
    return jax.lax.dynamic_update_slice_in_dim(array, rows, 0, axis=0)


def _varying(a):
    return jax.lax.pcast(a, AXIS, to="varying")
