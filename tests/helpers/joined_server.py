"""A server that joins two others: joined_server.py NAME COORDINATOR THEN.

THEN is "add" (the ranks of all devices), "steps" (the same again and again), "raise" (edge-b does), or "sleep" (a minute, and
nothing is done about a server that goes).
"""

import sys
import time

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from launch.cluster.join import join
from launch.log import configure
from placement import Cluster

tables = [{"name": f"edge-{x}", "devices": [{"memory": 1}] * n} for x, n in (("a", 1), ("b", 1), ("c", 2))]
configure()
server, coordinator, then = sys.argv[1:]
lost = (lambda name: None) if then == "sleep" else None
cluster = Cluster.from_dict({"server": tables})
with join(cluster, server, coordinator=coordinator, timeout=60, lost=lost) as devices:
    print("owners", *(device.process_index for device in devices), flush=True)
    if then == "raise" and server == "edge-b":
        raise ValueError("no more")
    if then in ("raise", "sleep"):
        time.sleep(60)
    mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
    place = jax.NamedSharding(mesh, P("expert"))
    ranks = jax.make_array_from_callback((4,), place, lambda index: np.arange(4.0, dtype=np.float32)[index])
    add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "expert"), mesh=mesh, in_specs=P("expert"), out_specs=P()))
    print("sum", float(add(ranks).addressable_data(0)[0]), flush=True)
    while then == "steps":
        add(ranks).block_until_ready()
