"""A whole model over devices of this process, ready for the serving steps: for commands that need no cluster."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.expert_parallel.pool import fill_pool, pool_layout
from dancemoe_jax.expert_parallel.tables import assign_slots, routing_tables
from dancemoe_jax.inference.steps import Weights, place_decoder, place_tables
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.model.config import ModelConfig
from launch.cluster.compile_cache import use_compile_cache
from launch.cluster.devices import cluster_devices


class Local(NamedTuple):
    """A placed model: `shapes` holds the static arguments of the steps (config, layout, mesh)."""

    config: ModelConfig
    weights: Weights
    shapes: dict[str, Any]


def load(path: Path, config: ModelConfig, args: Any, placement_seed: int | None = None) -> Local:
    """Shard the experts over the devices, one copy each; with a seed at random and with a quarter more copies.

    What is compiled is kept in the user's cache folder, as of a server.
    """
    use_compile_cache(None)
    file = ExpertFile(path, jnp.dtype(args.dtype), args.int8)
    mesh = make_mesh(cluster_devices(args.devices))
    resident = _shard(config, mesh.size) if placement_seed is None else _scatter(config, mesh.size, placement_seed)
    layout = pool_layout([max(1, int(held)) for held in resident.sum((1, 2))], range(mesh.size))
    slots = assign_slots(layout, resident)
    tables = place_tables(routing_tables(layout, slots), mesh)
    weights = Weights(place_decoder(file.decoder(), mesh), fill_pool(mesh, layout, slots, file.read), tables)
    jax.block_until_ready(weights)
    return Local(config, weights, {"config": config, "layout": layout, "mesh": mesh, "kernels": args.kernels})


def _shard(config: ModelConfig, devices: int) -> np.ndarray:
    """bool [devices, layers, experts]: the experts of every layer in turn."""
    expert = np.arange(config.num_moe_layers * config.num_experts)
    own = expert % devices == np.arange(devices)[:, None]
    return own.reshape(devices, config.num_moe_layers, config.num_experts)


def _scatter(config: ModelConfig, devices: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = (config.num_moe_layers, config.num_experts)
    resident = rng.random((devices, *grid)) < 0.25 / devices
    home = rng.integers(0, devices, grid)
    return resident | (home == np.arange(devices)[:, None, None])
