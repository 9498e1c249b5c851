"""What serving steps carry on from one to the next: the paged cache, who has which pages, and counts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.errors import ArgumentError
from dancemoe_jax.inference.cache import PAGE, empty_cache, own_pages
from dancemoe_jax.mesh import put, shard_rows, sharded
from dancemoe_jax.model.config import ModelConfig


class State(NamedTuple):
    """What steps carry on. S: sequences a device serves at once.

    Attributes:
        k, v: cache [devices * P, PAGE, kv_heads, head_dim] of P pages a device, sharded over devices. With latent attention
            k is the narrow vector and the shared key, [devices * P, PAGE, 1, kv_rank + rope_dim], v is None.
        pages: int32 [devices, layers, S, blocks], which page of its device holds each block of PAGE positions of a
            sequence; P where none does. Steps only read it.
        counts: int32 [devices, MoE layers, experts], assignments of the tokens that entered at each device, since the start.
    """

    k: jax.Array
    v: jax.Array | None
    pages: jax.Array
    counts: jax.Array


def init_state(config: ModelConfig, mesh: Mesh, sequences: int, dtype=jnp.float32, pages: int | None = None) -> State:
    """Empty caches for `sequences` sequences on each device, and zero counts.

    Args:
        pages: of a device; no sequence has any of them yet (`place_pages`). Default: each sequence has pages for the whole
            context.

    Raises:
        ArgumentError: `sequences` or `pages` is not at least one.
    """
    if sequences < 1:
        raise ArgumentError(f"sequences: {sequences}, must be at least 1 on each device")
    if pages is not None and pages < 1:
        raise ArgumentError(f"pages: {pages}, must be at least 1 on each device")
    heads = config.num_kv_heads if config.latent is None else 1
    table = own_pages(config.num_layers, sequences, config.max_position)
    if pages is None:
        pages = table.size
    else:
        table = np.full_like(table, pages)
    shape = (mesh.size * pages, PAGE, heads)
    counts = jnp.zeros((mesh.size, config.num_moe_layers, config.num_experts), jnp.int32, device=sharded(mesh))
    key_width, value_width = config.cache_widths
    keys = empty_cache(mesh, (*shape, key_width // heads), dtype)
    values = empty_cache(mesh, (*shape, value_width // heads), dtype) if value_width else None
    every = put(np.broadcast_to(table, (mesh.size, *table.shape)), sharded(mesh))
    return State(keys, values, every, counts)


def place_pages(mesh: Mesh, pages: np.ndarray) -> jax.Array:
    """`State.pages` on the devices, each process giving its own devices' part of int32 [devices, layers, sequences, blocks]."""
    return shard_rows(mesh, np.ascontiguousarray(pages))
