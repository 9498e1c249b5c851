"""One of three servers that generate together under random placements: generating_server.py NAME COORDINATOR COUNT.

Prints, for each placement, the texts of the prompts that live on its devices, as one line of JSON.
"""

import json
import sys

import numpy as np

from dancemoe_jax import decode_step, generate, migrate, prefill
from launch.cluster.join import join
from placement import Cluster
from tests.helpers.cluster_of_devices import PROMPTS, Small, random_resident

tables = [{"name": f"edge-{x}", "devices": [{"memory": 1}] * n} for x, n in (("a", 1), ("b", 1), ("c", 2))]
server, coordinator, count = sys.argv[1:]
with join(Cluster.from_dict({"server": tables}), server, coordinator=coordinator, timeout=60) as devices:
    small = Small.make(devices=devices)
    rng = np.random.default_rng(0)
    slots, weights = small.place(random_resident(rng))
    for _ in range(int(count)):
        texts = generate(weights, PROMPTS, 8, chunk=8, **small.shapes)
        print("texts", json.dumps({n: text for n, text in enumerate(texts) if text}), flush=True)
        pool, slots = migrate(
            weights.pool, slots, random_resident(rng), small.read, layout=small.layout, mesh=small.mesh
        )
        likely = rng.random((3, small.config.num_moe_layers, 3)) < 0.5
        weights = weights._replace(pool=pool, tables=small.tables(slots, likely))
    print("compiled", prefill._cache_size() + decode_step._cache_size(), flush=True)
