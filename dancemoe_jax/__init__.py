"""DanceMoE in JAX: Mixture-of-Experts inference from unequal servers, with experts that move while serving.

A placement, as `resident` bool [devices, layers, experts], comes from outside (the package `placement`, or anything
else); what is in here runs it: `fill_pool` and `routing_tables` put it in force, `prefill` and `decode_step` serve,
`migrate` changes it between two steps.
"""

from dancemoe_jax.checkpoint.reader import bundled_model, load_model
from dancemoe_jax.errors import ModelError
from dancemoe_jax.expert_parallel.migrate import commit, migrate, stage
from dancemoe_jax.expert_parallel.pool import ExpertPool, fill_pool, pool_layout, resident_bytes
from dancemoe_jax.expert_parallel.tables import assign_slots, routing_tables
from dancemoe_jax.inference.generate import generate
from dancemoe_jax.inference.steps import Weights, decode_step, init_state, place_decoder, place_tables, prefill
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.model.config import ModelConfig

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
