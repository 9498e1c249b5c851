"""DanceMoE in JAX: Mixture-of-Experts inference from unequal servers, with experts that move while serving.

A placement, as `resident` bool [devices, layers, experts], comes from outside (the package `placement`, or anything
else); what is in here runs it: `fill_pool` and `routing_tables` put it in force, `prefill` and `decode_step` serve,
`migrate` changes it between two steps. Every error for input that cannot be used is a `DanceMoEError`.
"""

from dancemoe_jax.checkpoint.reader import ExpertFile, Model, bundled_model, load_model
from dancemoe_jax.errors import ArgumentError, DanceMoEError, ModelError, PlacementError, RequestError
from dancemoe_jax.expert_parallel.migrate import Staged, commit, migrate, stage
from dancemoe_jax.expert_parallel.pool import ExpertPool, PoolLayout, fill_pool, pool_layout, resident_bytes
from dancemoe_jax.expert_parallel.tables import Tables, assign_slots, routing_tables
from dancemoe_jax.inference.generate import generate
from dancemoe_jax.inference.sampling import SamplingParams
from dancemoe_jax.inference.steps import (
    State,
    StepResult,
    Weights,
    decode_step,
    init_state,
    place_decoder,
    place_tables,
    prefill,
)
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, Experts, forward
from dancemoe_jax.model.experts import ExpertWeights

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
