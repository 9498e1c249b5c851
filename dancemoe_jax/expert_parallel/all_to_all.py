"""Rows by a plain all_to_all, in buffers of one size for every pair of devices: for devices of one process.

It is also the reference for the two-stage exchange over slow links (two_stage.py).
"""

import jax
import jax.numpy as jnp

from dancemoe_jax.expert_parallel.ragged import add_replies
from dancemoe_jax.mesh import AXIS


def size_classes(tokens: int, most: int = 4) -> list[int]:
    """Rows per pair of devices that an exchange may be sized for: all tokens of the step, half of them, a quarter …

    >>> size_classes(20)
    [3, 5, 10, 20]
    """
    return sorted({-(-tokens // 2**i) for i in range(most)})


def all_to_all_experts(compute, server, need, x, topk_weights, device, slot, fixed, wire):
    """Sum of each token's routed experts, with buffers of one size for every pair of devices (inside shard_map).

    The size is the smallest of a few that holds the busiest pair, agreed by all; with `fixed` that of all tokens, always.

    Args:
        compute: (x, slots, topk_weights) -> weighted sums over the experts in this device's slots.
        server: int [devices], of each device.
        need: whether any device may need another in this layer, the same on all devices.
        device, slot: int [tokens, k], where each assignment is served; device -1 for none.
        wire: dtype of rows and sums on the wire; None for that of x, and float32 for sums.

    Returns:
        The sums float32 [tokens, hidden], and how many rows this device sent to other servers.
    """
    me, devices = jax.lax.axis_index(AXIS), server.size
    out = compute(x, jnp.where(device == me, slot, -1), topk_weights)
    if devices == 1:
        return out, jnp.zeros_like(me)
    every = jnp.arange(devices)
    needs = (device[:, :, None] == every[None, None]).any(1) & (every != me)[None]
    away = (server != server[me]).sum()

    def elsewhere(size: int):
        def branch(x, topk_weights):
            with jax.named_scope(f"exchange_{size}"):
                return _send_and_return(compute, x, topk_weights, device, slot, needs, size, wire), size * away

        return branch

    def nowhere(x, topk_weights):
        return jnp.zeros_like(x, dtype=jnp.float32), 0 * away

    sizes = [x.shape[0]] if fixed else size_classes(x.shape[0])

    def smallest_size():
        busiest = jax.lax.pmax(needs.sum(0).max(), AXIS)
        return jnp.where(busiest > 0, 1 + jnp.searchsorted(jnp.array(sizes), busiest), 0)

    # Known to be local everywhere: the devices need not even agree on a size.
    choice = 1 if fixed else jax.lax.cond(need, smallest_size, lambda: jnp.zeros((), jnp.int32))
    there, rows = jax.lax.switch(choice, [nowhere, *map(elsewhere, sizes)], x, topk_weights)
    return out + there, rows


def _send_and_return(compute, x, topk_weights, device, slot, needs, size, wire):
    """Send each device the tokens that need it, compute what arrives, send the partial sums back."""
    devices, k = needs.shape[1], slot.shape[1]
    # The tokens that need a device, in order, first; `size` is enough for all of them.
    token = jnp.argsort(~needs, axis=0, stable=True)[:size].T
    sent = jnp.take_along_axis(needs.T, token, axis=1)
    theirs = (device[token] == jnp.arange(devices)[:, None, None]) & sent[:, :, None]
    parcel = {
        "x": x[token].astype(wire or x.dtype),
        "weights": topk_weights[token],
        "slots": jnp.where(theirs, slot[token], -1),
    }
    parcel = jax.tree.map(lambda a: jax.lax.all_to_all(a, AXIS, 0, 0).reshape(devices * size, -1), parcel)
    partial = compute(parcel["x"].astype(x.dtype), parcel["slots"].reshape(-1, k), parcel["weights"])
    partial = partial.astype(wire or jnp.float32).reshape(devices, size, -1)
    partial = jax.lax.all_to_all(partial, AXIS, 0, 0).reshape(devices * size, -1)
    return add_replies(jnp.zeros_like(x, dtype=jnp.float32), partial, needs, size * jnp.arange(devices))
