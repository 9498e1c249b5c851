"""Checks of what callers pass to the serving steps; they run once for each shape, when a step is traced."""

from typing import Any

from jax.sharding import Mesh

from dancemoe_jax.arguments import check_array, check_mesh
from dancemoe_jax.errors import ArgumentError
from dancemoe_jax.expert_parallel.pool import PoolLayout, check_pool
from dancemoe_jax.inference.cache import PAGE, blocks_of
from dancemoe_jax.model.config import ModelConfig


def check_model(weights: Any, state: Any, config: ModelConfig, layout: PoolLayout, mesh: Mesh) -> int:
    """How many sequences each device has room for; raises ArgumentError where the parts do not belong together."""
    check_mesh(mesh, len(layout.capacity))
    check_pool(layout, weights.pool)
    grid = {"devices": mesh.size, "MoE layers": config.num_moe_layers, "experts": config.num_experts}
    check_array("weights.tables.device", weights.tables.device, "integers", grid)
    check_array("weights.tables.slot", weights.tables.slot, "integers", grid)
    check_array("state.counts", state.counts, "integers", grid)
    check_array("state.k", state.k, "numbers", {"pages": None, "page": PAGE, "heads": None, "width": None})
    if len(state.k) % mesh.size:
        raise ArgumentError(f"state.k: {len(state.k)} pages, must be shared evenly by the {mesh.size} devices of mesh")
    blocks = blocks_of(config.max_position)
    table = {"devices": mesh.size, "layers": config.num_layers, "sequences": None, "blocks": blocks}
    check_array("state.pages", state.pages, "integers", table)
    return state.pages.shape[2]


def check_rest(rest: tuple[Any, Any, Any], config: ModelConfig, mesh: Mesh, tokens: int, sequences: int) -> None:
    """Raise ArgumentError unless the optional arguments of a step (control, routing, last) fit its mesh, its tokens of each
    device and the sequences that there is room for."""
    control, routing, last = rest
    if control is not None:
        check_array("control", control, "integers", {"devices": mesh.size, "words": None})
    if routing is not None:
        each = {"devices": mesh.size, "tokens": tokens, "MoE layers": config.num_moe_layers, "k": config.top_k}
        check_array("routing.ids", routing.ids, "integers", each)
        check_array("routing.weights", routing.weights, "numbers", each)
    if last is not None:
        check_array("last", last, "integers", {"devices": mesh.size, "sequences": sequences})
