"""One MoE layer across devices, inside shard_map: serve at home what is at home, exchange only what is not.

A token crosses to a device at most once per layer, with the slots it needs there, and comes back as one partial sum.
Nothing is dropped and nothing is cut: the buffer of an exchange is the smallest of a few sizes that holds the busiest
pair, agreed by all devices, up to every token of the step; with no need anywhere there is no exchange.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.mesh import AXIS
from dancemoe_jax.tables import Tables


class Traffic(NamedTuple):
    """What one device did in one layer, int32 scalars (stacked over layers and devices in a step's results).

    Attributes:
        local: assignments served on this device's own server.
        remote: assignments served on another server.
        crossings: distinct (token, device on another server) pairs: rows that had to cross the network, one way.
        rows: rows of the exchange buffers that this device sent to other servers, one way, padding included.
    """

    local: jax.Array
    remote: jax.Array
    crossings: jax.Array
    rows: jax.Array


def size_classes(tokens: int, most: int = 4) -> list[int]:
    """Rows per pair of devices that an exchange may be sized for: all tokens of the step, half of them, a quarter …"""
    return sorted({-(-tokens // 2**i) for i in range(most)})


def dispatch(
    compute: Callable,
    tables: Tables,
    x: Float[Array, "tokens hidden"],
    topk_weights: Float[Array, "tokens k"],
    topk_ids: Int[Array, "tokens k"],
    valid: Bool[Array, " tokens"],
) -> tuple[Float[Array, "tokens hidden"], Traffic]:
    """Sum of each token's routed experts, wherever they are (inside shard_map).

    Args:
        compute: (x, slots, topk_weights) -> weighted sum of the slots' experts on this device (pool.slot_experts).
        tables: this source's and one layer's: `device` and `slot` [experts], `exchange` a scalar, `server` [devices].
        valid: rows that hold a token; the others are not sent anywhere and give zeros.
    """
    me = jax.lax.axis_index(AXIS)
    devices = tables.server.size
    to = jnp.where(valid[:, None], tables.device[topk_ids], -1)
    slots = tables.slot[topk_ids]
    with jax.named_scope("local_experts"):
        out = compute(x, jnp.where(to == me, slots, -1), topk_weights)

    needs = (to[:, :, None] == jnp.arange(devices)).any(1) & (jnp.arange(devices) != me)
    away = tables.server != tables.server[me]

    def exchange(size: int):
        def branch(x, topk_weights):
            with jax.named_scope(f"exchange_{size}"):
                return _exchange(compute, x, topk_weights, to, slots, needs, size), size * away.sum()

        return branch

    def stay(x, topk_weights):
        return jnp.zeros_like(x), 0 * away.sum()

    sizes = size_classes(x.shape[0])

    def agree():
        busiest = jax.lax.pmax(needs.sum(0).max(), AXIS)
        return jnp.where(busiest > 0, 1 + jnp.searchsorted(jnp.array(sizes), busiest), 0)

    # Known to be local everywhere: not even the question is asked.
    choice = jax.lax.cond(tables.exchange, agree, lambda: jnp.zeros((), jnp.int32))
    there, rows = jax.lax.switch(choice, [stay, *map(exchange, sizes)], x, topk_weights)
    remote = jnp.sum((to >= 0) & away[to])
    traffic = Traffic(jnp.sum(to >= 0) - remote, remote, jnp.sum(needs & away), rows)
    return out + there, jax.tree.map(lambda a: a.astype(jnp.int32), traffic)


def _exchange(compute, x, topk_weights, to, slots, needs, size):
    """Send each device the tokens that need it, compute what arrives, send the partial sums back."""
    devices, k = needs.shape[1], slots.shape[1]
    # The tokens that need a device, in order, first; `size` is enough for all of them.
    token = jnp.argsort(~needs, axis=0, stable=True)[:size].T
    sent = jnp.take_along_axis(needs.T, token, axis=1)
    theirs = (to[token] == jnp.arange(devices)[:, None, None]) & sent[:, :, None]
    parcel = {
        "x": x[token],
        "weights": topk_weights[token],
        "slots": jnp.where(theirs, slots[token], -1),
    }
    parcel = jax.tree.map(lambda a: jax.lax.all_to_all(a, AXIS, 0, 0).reshape(devices * size, -1), parcel)
    partial = compute(parcel["x"], parcel["slots"].reshape(-1, k), parcel["weights"])
    partial = jax.lax.all_to_all(partial.reshape(devices, size, -1), AXIS, 0, 0)
    rows = jnp.where(sent, token, x.shape[0]).reshape(-1)
    return jnp.zeros_like(x).at[rows].add(partial.reshape(devices * size, -1), mode="drop")
