"""The paged cache of keys and values: what a sequence's tokens leave there, and how a step's rows attend to it.

A page holds one layer's keys (or values) of PAGE positions of one sequence; all layers and sequences of a device share its
pages. Which page holds what is a table that the caller writes, between two steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dancemoe_jax.expert_parallel.pool import BFLOAT16_BITS, local_devices
from dancemoe_jax.inference.finite import finite_tokens
from dancemoe_jax.inference.step_rows import StepRows
from dancemoe_jax.kernels.attention import cached_attention_native, cached_attention_xla
from dancemoe_jax.kernels.gpu_attention import cached_attention_gpu
from dancemoe_jax.kernels.gpu_call import GpuKernels
from dancemoe_jax.kernels.zeros import zeros
from dancemoe_jax.mesh import on_cpu, sharded
from dancemoe_jax.model.present import where_present

PAGE = 32  # positions


def blocks_of(positions: int) -> int:
    """How many pages so many positions of one layer take.

    >>> blocks_of(32), blocks_of(33)
    (1, 2)
    """
    return -(-positions // PAGE)


def own_pages(layers: int, sequences: int, max_position: int) -> np.ndarray:
    """A table in which every sequence has all of its pages for itself, int32 [layers, sequences, blocks]."""
    blocks = blocks_of(max_position)
    return np.arange(layers * sequences * blocks, dtype=np.int32).reshape(layers, sequences, blocks)


def empty_cache(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Keys or values [devices * pages, PAGE, heads, width] of no tokens yet.

    On CPUs bfloat16 is kept as its bits, as in the pool: XLA would turn all of a cache into float32 to change a row of it.
    """
    if not on_cpu(mesh):
        return jnp.zeros(shape, dtype, device=sharded(mesh))
    dtype = BFLOAT16_BITS if dtype == jnp.bfloat16 else dtype
    own = (shape[0] // mesh.size, *shape[1:])
    parts = [zeros(own, dtype, mesh.devices[device]) for device in local_devices(mesh)]
    return jax.make_array_from_single_device_arrays(shape, sharded(mesh), parts)


class Cache(NamedTuple):
    """One device's cache, as a step uses it.

    Attributes:
        pages: which page holds each block of a sequence's positions.
        native: whether native calls attend.
        gpu: kernels that attend on a GPU.
        on_cpu: whether the step may look how many positions are used.
    """

    pages: Int[Array, "layers sequences blocks"]
    native: bool
    gpu: GpuKernels
    on_cpu: bool


def attend_cached(cache: Cache, rows: StepRows, layer, caches, how, q, *new):
    """Put new keys and values of one layer into the caches; what the queries make of all up to their own positions.

    A token whose keys or values are not finite gets NaN, and leaves zeros in the caches: the sequence that has the page
    next weighs what lies behind its own tokens with zero, and zero times NaN is NaN.

    Args:
        caches: keys, and values or None.
        how: model.decoder.Attention.
        q, new: of the step's tokens; new keys and values as `caches`.

    Returns:
        The heads' outputs, and the caches.
    """
    present = rows.valid.any() if cache.on_cpu else None
    finite, *stored = where_present(present, functools.partial(_with_finite, caches), *new)
    page = cache.pages[layer, rows.owners, rows.positions // PAGE]
    page, offset = jnp.where(rows.valid, page, len(caches[0])), rows.positions % PAGE

    both: list[Any] = [
        None if kept is None else kept.at[page, offset].set(part, mode="drop")
        for kept, part in zip(caches, stored, strict=True)
    ]
    keys, values = both
    where = (cache.pages, layer, rows.slots, rows.starts, rows.lengths)
    if cache.gpu:
        heads = cached_attention_gpu(rows.to_grid(q), keys, values, *where, **how._asdict(), how=cache.gpu)
    elif cache.native:
        heads = cached_attention_native(rows.to_grid(q), keys, values, *where, **how._asdict())
    else:
        heads = cached_attention_xla(rows.to_grid(q), keys, values, *where, **how._asdict(), used=cache.on_cpu)
    spoiled = where_present(present, lambda heads: jnp.where(finite, rows.from_grid(heads), jnp.nan), heads)
    return spoiled, both


def _with_finite(caches, *new):
    """Which tokens are finite, and the new keys and values as the caches store them, zeros of the other tokens."""
    finite = finite_tokens(*new)
    return finite, *(
        None if kept is None else _as_stored(jnp.where(finite, part, 0), kept.dtype)
        for kept, part in zip(caches, new, strict=True)
    )


def _as_stored(part, dtype):
    if dtype != BFLOAT16_BITS:
        return part.astype(dtype)
    return jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), BFLOAT16_BITS)
