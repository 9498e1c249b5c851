"""DanceMoE in JAX: Mixture-of-Experts inference from unequal servers, with experts that move while serving.

A placement, as `resident` bool [devices, layers, experts], comes from outside (the package `placement`, or anything
else); what is in here runs it: `fill_pool` and `routing_tables` put it in force, `prefill` and `decode_step` serve,
`migrate` changes it between two steps. Every error for input that cannot be used is a `DanceMoEError`.

Names are loaded when they are asked for, JAX with the first that needs it: tokenizers and chat templates need none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancemoe_jax.checkpoint.bundled import bundled_model
    from dancemoe_jax.checkpoint.reader import ExpertFile, Model, load_model
    from dancemoe_jax.errors import ArgumentError, DanceMoEError, ModelError, PlacementError, RequestError
    from dancemoe_jax.expert_parallel.migrate import Staged, commit, migrate, stage
    from dancemoe_jax.expert_parallel.pool import ExpertPool, PoolLayout, fill_pool, pool_layout, resident_bytes
    from dancemoe_jax.expert_parallel.tables import Tables, assign_slots, routing_tables
    from dancemoe_jax.inference.generate import generate
    from dancemoe_jax.inference.sampling_params import SamplingParams
    from dancemoe_jax.inference.state import State, init_state
    from dancemoe_jax.inference.steps import StepResult, Weights, decode_step, place_decoder, place_tables, prefill
    from dancemoe_jax.mesh import make_mesh
    from dancemoe_jax.model.config import ModelConfig
    from dancemoe_jax.model.decoder import Decoder, Experts, forward
    from dancemoe_jax.model.experts import ExpertWeights

_HOMES = {
    "bundled_model": "dancemoe_jax.checkpoint.bundled",
    "ExpertFile": "dancemoe_jax.checkpoint.reader",
    "Model": "dancemoe_jax.checkpoint.reader",
    "load_model": "dancemoe_jax.checkpoint.reader",
    "ArgumentError": "dancemoe_jax.errors",
    "DanceMoEError": "dancemoe_jax.errors",
    "ModelError": "dancemoe_jax.errors",
    "PlacementError": "dancemoe_jax.errors",
    "RequestError": "dancemoe_jax.errors",
    "Staged": "dancemoe_jax.expert_parallel.migrate",
    "commit": "dancemoe_jax.expert_parallel.migrate",
    "migrate": "dancemoe_jax.expert_parallel.migrate",
    "stage": "dancemoe_jax.expert_parallel.migrate",
    "ExpertPool": "dancemoe_jax.expert_parallel.pool",
    "PoolLayout": "dancemoe_jax.expert_parallel.pool",
    "fill_pool": "dancemoe_jax.expert_parallel.pool",
    "pool_layout": "dancemoe_jax.expert_parallel.pool",
    "resident_bytes": "dancemoe_jax.expert_parallel.pool",
    "Tables": "dancemoe_jax.expert_parallel.tables",
    "assign_slots": "dancemoe_jax.expert_parallel.tables",
    "routing_tables": "dancemoe_jax.expert_parallel.tables",
    "generate": "dancemoe_jax.inference.generate",
    "SamplingParams": "dancemoe_jax.inference.sampling_params",
    "State": "dancemoe_jax.inference.state",
    "StepResult": "dancemoe_jax.inference.steps",
    "Weights": "dancemoe_jax.inference.steps",
    "decode_step": "dancemoe_jax.inference.steps",
    "init_state": "dancemoe_jax.inference.state",
    "place_decoder": "dancemoe_jax.inference.steps",
    "place_tables": "dancemoe_jax.inference.steps",
    "prefill": "dancemoe_jax.inference.steps",
    "make_mesh": "dancemoe_jax.mesh",
    "ModelConfig": "dancemoe_jax.model.config",
    "Decoder": "dancemoe_jax.model.decoder",
    "Experts": "dancemoe_jax.model.decoder",
    "forward": "dancemoe_jax.model.decoder",
    "ExpertWeights": "dancemoe_jax.model.experts",
}

__all__ = [
    "ArgumentError",
    "DanceMoEError",
    "Decoder",
    "ExpertFile",
    "ExpertPool",
    "ExpertWeights",
    "Experts",
    "Model",
    "ModelConfig",
    "ModelError",
    "PlacementError",
    "PoolLayout",
    "RequestError",
    "SamplingParams",
    "Staged",
    "State",
    "StepResult",
    "Tables",
    "Weights",
    "assign_slots",
    "bundled_model",
    "commit",
    "decode_step",
    "fill_pool",
    "forward",
    "generate",
    "init_state",
    "load_model",
    "make_mesh",
    "migrate",
    "place_decoder",
    "place_tables",
    "pool_layout",
    "prefill",
    "resident_bytes",
    "routing_tables",
    "stage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
