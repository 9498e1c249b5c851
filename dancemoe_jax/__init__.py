"""DanceMoE in JAX: Mixture-of-Experts inference from unequal servers, with experts that move while serving.

A placement, as `resident` bool [devices, layers, experts], comes from outside (the package `placement`, or anything
else); what is in here runs it: `fill_pool` and `routing_tables` put it in force, `prefill` and `decode_step` serve,
`migrate` changes it between two steps.
"""

from dancemoe_jax.checkpoint import bundled_model, load_model
from dancemoe_jax.config import ModelConfig, ModelError
from dancemoe_jax.generate import Weights, decode_step, generate, init_state, place_decoder, place_tables, prefill
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.migrate import commit, migrate, stage
from dancemoe_jax.pool import ExpertPool, fill_pool, pool_layout, resident_bytes
from dancemoe_jax.tables import assign_slots, routing_tables

__all__ = [
    "ExpertPool",
    "ModelConfig",
    "ModelError",
    "Weights",
    "assign_slots",
    "bundled_model",
    "commit",
    "decode_step",
    "fill_pool",
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
