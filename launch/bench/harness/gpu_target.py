"""Steps compiled for a GPU on a machine that has none: devices to compile for and abstract arguments.

The compiler comes with the extra `gpu-compiler`. What it makes is what a card would be given, but
for autotuning, which needs the card. Nothing runs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from dancemoe_jax.expert_parallel.pool import ExpertPool, PoolLayout, pool_layout
from dancemoe_jax.expert_parallel.tables import Tables
from dancemoe_jax.inference.state import State, init_state
from dancemoe_jax.inference.steps import Weights, decode_step, prefill
from dancemoe_jax.mesh import make_mesh, replicated, sharded
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.gpu import has_gpu_plugin
from launch.engine.control_word import WIDTH
from placement import InputError

_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 registers_per_block_limit: 65536
  registers_per_core_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  fpus_per_core: 128 core_count: {cores} threads_per_core_limit: {threads} shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {block} l2_cache_size: {cache} clock_rate_ghz: {clock} memory_bandwidth: {bandwidth}
  device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
# From the makers' data sheets and CUDA's table of compute capabilities.
# The first is what data centers have, the second has the instructions and shared memory of consumer cards.
CARDS: dict[str, dict[str, Any]] = {
    "sm_90": {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "cores": 132,
        "threads": 2048,
        "shared": 233472,
        "block": 232448,
        "cache": 52428800,
        "clock": 1.98,
        "bandwidth": 3352320000000,
        "memory": 84929347584,
    },
    "sm_86": {
        "name": "NVIDIA A10",
        "major": 8,
        "minor": 6,
        "cores": 72,
        "threads": 1536,
        "shared": 102400,
        "block": 101376,
        "cache": 6291456,
        "clock": 1.695,
        "bandwidth": 600000000000,
        "memory": 25769803776,
    },
}


def target_mesh(topology: str = "1x1x1", card: str = "sm_90") -> Mesh:
    """The mesh of a cluster that is not there.

    Args:
        topology: slices x hosts x cards of a host.
        card: one of `CARDS`.

    Raises:
        InputError: the compiler for GPUs is not installed.
    """
    if not has_gpu_plugin():
        raise InputError(
            "compiling for a GPU: JAX's compiler for GPUs is not installed; pip install 'dancemoe-jax[gpu-compiler]'"
        )
    config = _CARD.format(**CARDS[card])
    return make_mesh(topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology).devices)


def abstract_weights(config: ModelConfig, layout: PoolLayout, mesh: Mesh, dtype: Any, int8: bool) -> Weights:
    """Shapes of all that a step reads."""
    devices, hidden, inner = mesh.size, config.hidden_size, config.expert_size
    own, everywhere = sharded(mesh), replicated(mesh)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    decoder = jax.tree.map(placed, nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype)))

    def bank(count: int) -> ExpertWeights:
        def array(*shape: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((devices * count, *shape), of, sharding=own)

        bias = (array(2 * inner), array(hidden)) if config.expert_bias else (None, None)
        scale = (array(2 * inner, of=jnp.float32), array(hidden, of=jnp.float32)) if int8 else (None, None)
        of = jnp.int8 if int8 else dtype
        return ExpertWeights(array(2 * inner, hidden, of=of), array(hidden, inner, of=of), *bias, *scale)

    layers, experts = config.num_moe_layers, config.num_experts
    by_source = jax.ShapeDtypeStruct((devices, layers, experts), jnp.int32, sharding=own)
    needs = jax.ShapeDtypeStruct((layers, devices, devices, devices), bool, sharding=everywhere)
    eager = jax.ShapeDtypeStruct((layers, devices, devices), bool, sharding=everywhere)
    return Weights(decoder, ExpertPool(tuple(map(bank, layout.banks))), Tables(by_source, by_source, needs, eager))


def lower_step(
    config: ModelConfig,
    mesh: Mesh,
    *,
    sequences: int,
    chunk: int = 0,
    dtype: Any = jnp.bfloat16,
    int8: bool = False,
    capacity: list[int] | None = None,
    one_server: bool = False,
    **steps: Any,
) -> Any:
    """A decode step, or with a `chunk` a prefill of so many tokens, as a lowered program that can be compiled.

    Args:
        sequences: batch slots of a device.
        capacity: slots of each device; default: each has room for every expert.
        one_server: all devices are of one server; default: each is one.
        steps: what else steps take.
    """
    devices = mesh.size
    room = config.num_moe_layers * config.num_experts
    layout = pool_layout(capacity or [room] * devices, [0] * devices if one_server else range(devices))
    weights = abstract_weights(config, layout, mesh, dtype, int8)
    empty = jax.eval_shape(lambda: init_state(config, mesh, sequences, dtype))
    own: Any = sharded(mesh)
    where = State(own, own if empty.v is not None else None, own, own)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), empty, where)

    def rows(*shape: int, of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices, *shape), of, sharding=sharded(mesh))

    shapes = {"config": config, "layout": layout, "mesh": mesh, **steps}
    grid = rows(sequences)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # where newer versions of Pallas look for the card
        if chunk:
            return prefill.lower(weights, state, rows(1, chunk), *[rows(1)] * 3, rows(WIDTH), **shapes)
        return decode_step.lower(weights, state, grid, grid, rows(sequences, of=bool), rows(WIDTH), **shapes)
