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

from dancemoe_jax.expert_parallel.all_to_all import all_to_all_experts
from dancemoe_jax.expert_parallel.links import Links, live_links
from dancemoe_jax.expert_parallel.tables import Tables
from dancemoe_jax.expert_parallel.two_stage import two_stage_experts
from dancemoe_jax.mesh import AXIS

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
    """Float32 sum of each token's routed experts, wherever they are (inside shard_map).

    Args:
        compute: (x, slots, topk_weights) -> weighted sum of the slots' experts on this device (slot_experts.slot_experts).
        tables: this source's and one layer's: `device` and `slot` [experts], `needs` and `eager` without a layer axis.
        valid: rows that hold a token; the others are not sent anywhere and give zeros.
        busy: devices that hold a token in this step, the same on all devices.
    """
    server = jnp.array(links.server)
    device = jnp.where(valid[:, None], tables.device[topk_ids], -1)
    slot = tables.slot[topk_ids]
    if transport in ("pairs", "ragged"):
        live = live_links(tables.needs, busy)
        out, rows = two_stage_experts(
            links,
            compute,
            x,
            topk_weights,
            device,
            slot,
            live,
            tables.eager & live,
            transport=transport,
            wire_dtype=wire_dtype,
        )
    else:
        need = (tables.needs & busy[None, None]).any()
        fixed = transport == "fixed"
        out, rows = all_to_all_experts(compute, server, need, x, topk_weights, device, slot, fixed, wire_dtype)
    there = server[device]
    here = server[jax.lax.axis_index(AXIS)]
    servers = jnp.array(sorted(set(links.server)))
    crossings = (device >= 0)[:, :, None] & (there[:, :, None] == servers[None, None]) & (servers != here)[None, None]
    remote = jnp.sum((device >= 0) & (there != here))
    traffic = Traffic(jnp.sum(device >= 0) - remote, remote, crossings.any(1).sum(), rows)
    return out, jax.tree.map(lambda a: a.astype(jnp.int32), traffic)
