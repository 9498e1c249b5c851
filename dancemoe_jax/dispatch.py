"""One MoE layer across devices, inside shard_map: serve at home what is at home, exchange only what is not.

Nothing is dropped and nothing is cut. How rows travel is chosen here and nowhere else, by backend (`default_transport`):
point to point between servers of their own processes, with ragged collectives on accelerators, and by a plain all_to_all
within one CPU process, where there is no network. The all_to_all is also the reference for the others.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.exchange import Links, exchange, live_links
from dancemoe_jax.mesh import AXIS
from dancemoe_jax.tables import Tables

# "fixed" is the all_to_all of the textbook: one size for all tokens of a step, always, whatever is needed.
Transport = Literal["pairs", "ragged", "all_to_all", "fixed"]


class Traffic(NamedTuple):
    """What one device did in one layer, int32 scalars (stacked over layers and devices in a step's results).

    Attributes:
        local: assignments served on this device's own server.
        remote: assignments served on another server.
        crossings: distinct (token, other server) pairs: rows that had to cross the network, one way.
        rows: rows that this device sent to other servers, one way, padding and rows sent unasked included.
    """

    local: jax.Array
    remote: jax.Array
    crossings: jax.Array
    rows: jax.Array


def default_transport(mesh: Mesh) -> Transport:
    """How rows travel on this mesh."""
    if mesh.devices.flat[0].platform != "cpu":
        return "ragged"
    return "pairs" if jax.process_count() > 1 else "all_to_all"


def size_classes(tokens: int, most: int = 4) -> list[int]:
    """Rows per pair of devices that an exchange may be sized for: all tokens of the step, half of them, a quarter …"""
    return sorted({-(-tokens // 2**i) for i in range(most)})


def dispatch(
    compute: Callable,
    links: Links,
    tables: Tables,
    x: Float[Array, "tokens hidden"],
    topk_weights: Float[Array, "tokens k"],
    topk_ids: Int[Array, "tokens k"],
    valid: Bool[Array, " tokens"],
    busy: Bool[Array, " devices"],
    *,
    transport: Transport,
    wire_dtype: Any = None,
) -> tuple[Float[Array, "tokens hidden"], Traffic]:
    """Sum of each token's routed experts, wherever they are (inside shard_map).

    Args:
        compute: (x, slots, topk_weights) -> weighted sum of the slots' experts on this device (pool.slot_experts).
        tables: this source's and one layer's: `device` and `slot` [experts], `needs` and `eager` without a layer axis.
        valid: rows that hold a token; the others are not sent anywhere and give zeros.
        busy: devices that hold a token in this step, the same on all devices.
    """
    server = jnp.array(links.server)
    device = jnp.where(valid[:, None], tables.device[topk_ids], -1)
    slot = tables.slot[topk_ids]
    if transport in ("pairs", "ragged"):
        live = live_links(tables.needs, busy)
        out, rows = exchange(
            links, compute, x, topk_weights, device, slot, live, tables.eager & live, transport=transport,
            wire_dtype=wire_dtype,
        )  # fmt: skip
    else:
        need = (tables.needs & busy).any()
        fixed = transport == "fixed"
        out, rows = _all_to_all(compute, server, need, x, topk_weights, device, slot, fixed, wire_dtype or x.dtype)
    there = server[device]
    here = server[jax.lax.axis_index(AXIS)]
    servers = jnp.array(sorted(set(links.server)))
    crossings = ((device >= 0)[:, :, None] & (there[:, :, None] == servers) & (servers != here)).any(1)
    remote = jnp.sum((device >= 0) & (there != here))
    traffic = Traffic(jnp.sum(device >= 0) - remote, remote, crossings.sum(), rows)
    return out, jax.tree.map(lambda a: a.astype(jnp.int32), traffic)


def _all_to_all(compute, server, need, x, topk_weights, device, slot, fixed, wire):
    """Buffers of one size for every pair of devices: the smallest of a few that holds the busiest pair, agreed by all."""
    me, devices = jax.lax.axis_index(AXIS), server.size
    out = compute(x, jnp.where(device == me, slot, -1), topk_weights)
    needs = (device[:, :, None] == jnp.arange(devices)).any(1) & (jnp.arange(devices) != me)
    away = (server != server[me]).sum()

    def exchange(size: int):
        def branch(x, topk_weights):
            with jax.named_scope(f"exchange_{size}"):
                return _exchange(compute, x, topk_weights, device, slot, needs, size, wire), size * away

        return branch

    def stay(x, topk_weights):
        return jnp.zeros_like(x), 0 * away

    sizes = [x.shape[0]] if fixed else size_classes(x.shape[0])

    def agree():
        busiest = jax.lax.pmax(needs.sum(0).max(), AXIS)
        return jnp.where(busiest > 0, 1 + jnp.searchsorted(jnp.array(sizes), busiest), 0)

    # Known to be local everywhere: not even the question is asked.
    choice = 1 if fixed else jax.lax.cond(need, agree, lambda: jnp.zeros((), jnp.int32))
    there, rows = jax.lax.switch(choice, [stay, *map(exchange, sizes)], x, topk_weights)
    return out + there, rows


def _exchange(compute, x, topk_weights, device, slot, needs, size, wire):
    """Send each device the tokens that need it, compute what arrives, send the partial sums back."""
    devices, k = needs.shape[1], slot.shape[1]
    # The tokens that need a device, in order, first; `size` is enough for all of them.
    token = jnp.argsort(~needs, axis=0, stable=True)[:size].T
    sent = jnp.take_along_axis(needs.T, token, axis=1)
    theirs = (device[token] == jnp.arange(devices)[:, None, None]) & sent[:, :, None]
    parcel = {
        "x": x[token].astype(wire),
        "weights": topk_weights[token],
        "slots": jnp.where(theirs, slot[token], -1),
    }
    parcel = jax.tree.map(lambda a: jax.lax.all_to_all(a, AXIS, 0, 0).reshape(devices * size, -1), parcel)
    partial = compute(parcel["x"].astype(x.dtype), parcel["slots"].reshape(-1, k), parcel["weights"]).astype(wire)
    partial = jax.lax.all_to_all(partial.reshape(devices, size, -1), AXIS, 0, 0).astype(x.dtype)
    rows = jnp.where(sent, token, x.shape[0]).reshape(-1)
    return jnp.zeros_like(x).at[rows].add(partial.reshape(devices * size, -1), mode="drop")
