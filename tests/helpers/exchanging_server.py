"""One of three servers that exchange rows by random need: exchanging_server.py NAME COORDINATOR CALLS LAYERS.

Each call has new tables, tokens, busy devices and unasked pairs, drawn alike everywhere; the device compares what it gets
with what it must be. Prints the worst error and how much was exchanged.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dancemoe_jax import make_mesh, pool_layout, routing_tables
from dancemoe_jax.expert_parallel.links import live_links
from dancemoe_jax.expert_parallel.two_stage import two_stage_experts
from dancemoe_jax.mesh import AXIS, own_rows, put, replicated, shard_rows
from launch.cluster.join import join
from placement import Cluster
from tests.helpers.cluster_of_devices import DEVICE_SERVER

DEVICES, EXPERTS, TOP_K, HIDDEN, TOKENS = 4, 12, 4, 16, 11
SERVERS = [{"name": f"edge-{x}", "devices": [{"memory": 1}] * n} for x, n in (("a", 1), ("b", 1), ("c", 2))]


def draw(rng, layers, scale):
    """Residents, tables and tokens of one call."""
    resident = rng.random((DEVICES, layers, EXPERTS)) < rng.random((1, layers, 1)) * 0.8
    home = rng.integers(0, DEVICES, (layers, EXPERTS))
    resident |= home == np.arange(DEVICES)[:, None, None]
    slots = np.where(resident, np.cumsum(resident, 2) - 1, -1)
    tables = routing_tables(LAYOUT, slots, likely=rng.random((3, layers, 3)) < 0.5)
    shape = (DEVICES, layers, TOKENS)
    held = np.zeros((DEVICES, layers, EXPERTS, HIDDEN), np.float32)
    device, layer, expert = np.nonzero(resident)
    held[device, layer, slots[device, layer, expert]] = scale[expert]
    busy = rng.random(DEVICES) < 0.7
    valid = (rng.random(shape) < rng.random((DEVICES, layers, 1))) & busy[:, None, None]
    ids = np.argsort(rng.random((*shape, EXPERTS)), -1)[..., :TOP_K].astype(np.int32)
    at = (np.arange(DEVICES)[:, None, None, None], np.arange(layers)[:, None, None], ids)
    place = np.where(valid[..., None], tables.device[at], -1).astype(np.int32)
    x, weights = rng.normal(size=(*shape, HIDDEN)), rng.random((*shape, TOP_K))
    own = (x.astype(np.float32), weights.astype(np.float32), ids, place, tables.slot[at], held)
    return own, (tables.needs, tables.eager), busy


def layers_of(x, weights, ids, place, slot, held, needs, eager, busy, scale):
    def layer(_, inputs):
        x, weights, ids, place, slot, held, needs, eager = inputs

        def compute(x, slots, weights):
            return jnp.einsum("nk,nkh->nh", jnp.where(slots < 0, 0, weights), x[:, None] * held[slots])

        live = live_links(needs, busy)
        got, rows = two_stage_experts(
            LAYOUT.links, compute, x, weights, place, slot, live, eager & live, transport="pairs"
        )
        expected = jnp.einsum("nk,nkh->nh", jnp.where(place < 0, 0, weights), x[:, None] * scale[ids])
        return None, (jnp.abs(got - expected).max(), rows)

    own = [part[0] for part in (x, weights, ids, place, slot, held)]
    error, rows = jax.lax.scan(layer, None, (*own, needs, eager))[1]
    # Without a collective of all, a device could run ahead by a whole call: a harder test of what is point to point.
    return error.max()[None], rows.sum()[None]


server, coordinator, calls, layers = sys.argv[1:]
LAYOUT = pool_layout([EXPERTS] * DEVICES, DEVICE_SERVER)
with join(Cluster.from_dict({"server": SERVERS}), server, coordinator=coordinator, timeout=60) as devices:
    mesh = make_mesh(devices)
    scale = np.random.default_rng(99).normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    specs = (*(P(AXIS) for _ in range(6)), P(), P(), P(), P())
    step = jax.jit(jax.shard_map(layers_of, mesh=mesh, in_specs=specs, out_specs=P(AXIS)))
    worst, sent = 0.0, 0
    for call in range(int(calls)):
        own, pairs, busy = draw(np.random.default_rng(call), int(layers), scale)
        everywhere = put((*pairs, busy, scale), replicated(mesh))
        error, rows = step(*(shard_rows(mesh, part) for part in own), *everywhere)
        worst = max(worst, *(float(e) for e in own_rows(error).values()))
        sent += sum(int(r) for r in own_rows(rows).values())
    print("done", worst, sent, step._cache_size(), flush=True)
