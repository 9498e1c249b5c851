"""The one mesh axis: all devices of all servers, in cluster order. Made here and nowhere else."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "expert"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A 1-D mesh over `devices` (default: all), in the order given. Servers may own different numbers of them."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def on_cpu(mesh: Mesh) -> bool:
    """Whether its devices are CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding that splits array axis `axis` over the mesh."""
    return NamedSharding(mesh, P(*[None] * axis, AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put(tree: Any, sharding: Any) -> Any:
    """Arrays in a sharding (a tree of them, or one for all), from values that every process has."""

    def everywhere(array: Any, where: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(array, where)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda array: everywhere(array, sharding), tree)
    return jax.tree.map(everywhere, tree, sharding)


def shard_rows(mesh: Mesh, rows: Any) -> jax.Array:
    """Rows [devices, …] on their devices. Each process has to know those of its own devices only."""
    rows = np.asarray(rows)
    return jax.make_array_from_callback(rows.shape, sharded(mesh), lambda index: rows[index])


def own_rows(array: jax.Array) -> dict[int, np.ndarray]:
    """Of an array [devices, …], by device, the rows of this process's devices."""
    if array.is_fully_addressable:  # at a tenth of what asking for shards costs
        return dict(enumerate(np.asarray(array)))
    return {shard.index[0].start or 0: np.asarray(shard.data)[0] for shard in array.addressable_shards}
