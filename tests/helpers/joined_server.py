"""A server that joins two others and adds the ranks of all devices: joined_server.py NAME COORDINATOR add | raise | sleep."""

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
with join(Cluster.from_dict({"server": tables}), server, coordinator=coordinator, timeout=60) as devices:
    print("owners", *(device.process_index for device in devices), flush=True)
    if then == "raise" and server == "edge-b":
        raise ValueError("no more")
    if then != "add":
        time.sleep(60)
    mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
    place = jax.NamedSharding(mesh, P("expert"))
    ranks = jax.make_array_from_callback((4,), place, lambda index: np.arange(4.0, dtype=np.float32)[index])
    add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "expert"), mesh=mesh, in_specs=P("expert"), out_specs=P()))
    print("sum", float(add(ranks).addressable_data(0)[0]), flush=True)
