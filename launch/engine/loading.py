"""One server's share of a model, loaded onto its devices and ready to serve. Takes no step."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import placement
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.expert_parallel.pool import PoolLayout, fill_pool, pool_layout
from dancemoe_jax.expert_parallel.tables import Tables, assign_slots, routing_tables
from dancemoe_jax.inference.steps import Weights, place_decoder, place_tables
from dancemoe_jax.kernels.library import Kernels
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.experts import ExpertWeights
from launch.engine.engine import Engine
from launch.engine.memory import cache_pages, sizes, slots_per_device
from placement import Cluster, Placement, Profile
from placement.costs.network_use import likely_links
from placement.costs.routing import serving_server
from placement.data.problem import Problem
from placement.migration.adapt import fitted
from placement.scheduling import chunks_of


@dataclasses.dataclass
class Loaded:
    """This process's share of a model, ready to serve.

    Attributes:
        placement: what is where; slots: int32 [devices, layers, experts], where in the pool.
        profile: the model's sizes, with users who are all alike.
        read: (layer, expert, arena = None) -> its weights on the host, as `ExpertFile.read`.
        check: (layer, expert, weights, whole): raises ModelError where weights from elsewhere are not this model's
            (`ExpertFile.check`).
        problem: of the profile on the cluster; default: built from them.
    """

    engine: Engine
    cluster: Cluster
    placement: Placement
    slots: np.ndarray
    profile: Profile
    read: Callable[..., ExpertWeights]
    check: Callable[..., None] = lambda *_: None
    problem: Problem = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if self.problem is None:
            self.problem = Problem.build(self.profile, self.cluster)

    def likely(self, resident: np.ndarray, profile: Profile) -> np.ndarray:
        """Which links' rows go unasked under a placement, where users are as the profile says: bool [servers, layers,
        servers]."""
        problem = self.problem if profile is self.profile else Problem.build(profile, self.cluster)
        return likely_links(problem, self.serving(resident))

    def tables(self, slots: np.ndarray, likely: np.ndarray) -> Tables:
        """Routing tables of an assignment, on the devices."""
        layout: PoolLayout = self.engine.shapes["layout"]
        tables = routing_tables(layout, slots, serving=self.serving(slots >= 0), likely=likely)
        return place_tables(tables, self.engine.mesh)

    def serving(self, resident: np.ndarray) -> np.ndarray:
        """Whose copies serve each server; statistics play no part, so any profile of the model gives the same."""
        return serving_server(self.problem, self.problem.held(resident))


def load(
    path: Path,
    config: ModelConfig,
    cluster: Cluster,
    devices: list[Any],
    *,
    dtype: str = "float32",
    int8: bool = False,
    sequences: int = 8,
    kv_cache: int | None = None,
    chunk: int = 64,
    wide: bool = False,
    kernels: Kernels = "auto",
    placed: Placement | None = None,
    profile: Profile | None = None,
    fits: bool = False,
    read: Callable[[int, int], ExpertWeights] | None = None,
    fingerprint: str = "",
) -> Loaded:
    """Load this process's share of a model onto its devices. All processes call it with the same arguments.

    Args:
        devices: all devices of the cluster in mesh order.
        dtype, int8: of the weights; sequences, chunk, wide: see `Engine`; kv_cache: see `sizes`; kernels: how steps compute
            on CPUs (dancemoe_jax.kernels.library).
        placed: what is where; default: planned for users who are all alike.
        profile: what `sizes` gives for these arguments, where the caller has it.
        fits: `placed` was made from that profile (`plan`, `fitted`), so that it is not fitted again.
        read: reads experts of this process where not straight from the checkpoint.
        fingerprint: of the model (`ExpertFile`).

    Raises:
        InputError: a device has room for no expert, or the placement is for another model or cluster.
        ModelError: the checkpoint cannot be used.
    """
    file = ExpertFile(path, jnp.dtype(dtype), int8, fingerprint)
    profile = profile or sizes(path, config, cluster, dtype=dtype, int8=int8, sequences=sequences, kv_cache=kv_cache)
    reserved, expert_bytes = int(np.max(profile.reserved_bytes)), int(np.max(profile.expert_bytes))
    layout = pool_layout(slots_per_device(cluster, reserved, expert_bytes), cluster.device_server)
    if placed is None:
        placed = placement.plan(profile, cluster, "uniform")
    elif not fits:
        placed = fitted(placed, profile, cluster)
    mesh = make_mesh(devices)
    slots = assign_slots(layout, placed.resident)
    pool = fill_pool(mesh, layout, slots, read or file.read)
    weights = Weights(place_decoder(file.decoder(), mesh), pool, None)  # pyright: ignore[reportArgumentType]
    itemsize, held = jnp.dtype(dtype).itemsize, np.array(layout.capacity) * expert_bytes
    widest = chunks_of(chunk, config.max_position)[-1] if wide else chunk
    pages = cache_pages(config, cluster.memory, held, sequences, itemsize, widest)
    how: dict[str, Any] = {"wide": wide, "kernels": kernels, "pages": pages}
    engine = Engine(config, layout, mesh, weights, cluster.device_server, sequences, chunk, **how)
    loaded = Loaded(engine, cluster, placed, slots, profile, file.read, file.check)
    engine.weights = weights._replace(tables=loaded.tables(slots, loaded.likely(placed.resident, profile)))
    return loaded
