"""A whole model over devices of this process, ready for the serving steps: for commands that need no cluster."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dancemoe_jax.checkpoint import ExpertFile
from dancemoe_jax.config import ModelConfig
from dancemoe_jax.generate import Weights, place_decoder, place_tables
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.pool import fill_pool, pool_layout
from dancemoe_jax.tables import assign_slots, routing_tables
from launch.cluster import cluster_devices
from placement import InputError

DTYPES = ("float32", "bfloat16", "float16")
# Contexts of published models reach 131,072 tokens and more, and each sequence's cache is made for the whole of it.
LONGEST_CONTEXT = 4096


class Local(NamedTuple):
    """A placed model: `shapes` holds the static arguments of the steps (config, layout, mesh)."""

    config: ModelConfig
    weights: Weights
    shapes: dict[str, Any]


def add_model_arguments(parser) -> None:
    """The flags of `load`."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations (float32)")
    parser.add_argument("--int8", action="store_true", help="hold routed experts as int8, a scale per output channel")
    parser.add_argument("--devices", type=int, default=1, help="devices to deal the experts over (1)")
    parser.add_argument("--context", type=int, help=f"longest sequence (the model's, at most {LONGEST_CONTEXT})")


def read_shape(path: Path, args: Any) -> ModelConfig:
    """The model's configuration with the context that `--context` leaves of it.

    Raises:
        InputError: a flag is out of range.
    """
    config = ModelConfig.from_hf(path)
    if not 1 <= args.devices <= 64:
        raise InputError(f"--devices {args.devices}: must be from 1 to 64")
    context = min(config.max_position, LONGEST_CONTEXT) if args.context is None else args.context
    if not 2 <= context <= config.max_position:
        raise InputError(f"--context {context}: must be from 2 to the model's own {config.max_position}")
    return dataclasses.replace(config, max_position=context)


def load(path: Path, config: ModelConfig, args: Any, placement_seed: int | None = None) -> Local:
    """Deal the experts over the devices, one copy each; with a seed at random and with a quarter more copies."""
    file = ExpertFile(path, jnp.dtype(args.dtype), args.int8)
    mesh = make_mesh(cluster_devices(args.devices))
    resident = _deal(config, mesh.size) if placement_seed is None else _scatter(config, mesh.size, placement_seed)
    layout = pool_layout([max(1, int(held)) for held in resident.sum((1, 2))], range(mesh.size))
    slots = assign_slots(layout, resident)
    tables = place_tables(routing_tables(layout, slots), mesh)
    weights = Weights(place_decoder(file.decoder(), mesh), fill_pool(mesh, layout, slots, file.read), tables)
    jax.block_until_ready(weights)
    return Local(config, weights, {"config": config, "layout": layout, "mesh": mesh})


def _deal(config: ModelConfig, devices: int) -> np.ndarray:
    """bool [devices, layers, experts]: the experts of every layer in turn."""
    expert = np.arange(config.num_moe_layers * config.num_experts)
    dealt = expert % devices == np.arange(devices)[:, None]
    return dealt.reshape(devices, config.num_moe_layers, config.num_experts)


def _scatter(config: ModelConfig, devices: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = (config.num_moe_layers, config.num_experts)
    resident = rng.random((devices, *grid)) < 0.25 / devices
    home = rng.integers(0, devices, grid)
    return resident | (home == np.arange(devices)[:, None, None])
