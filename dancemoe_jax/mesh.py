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


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding that deals array axis `axis` over the mesh."""
    return NamedSharding(mesh, P(*[None] * axis, AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
