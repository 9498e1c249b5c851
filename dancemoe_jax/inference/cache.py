"""The cache of keys and values: how it is stored, how a step's rows go into it, and how they attend to what is there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from dancemoe_jax.expert_parallel.pool import BFLOAT16_BITS, local_devices
from dancemoe_jax.inference.finite import finite_tokens
from dancemoe_jax.kernels.attention import cached_attention_native
from dancemoe_jax.kernels.gpu_attention import cached_attention_gpu
from dancemoe_jax.kernels.gpu_call import GpuKernels
from dancemoe_jax.kernels.zeros import zeros
from dancemoe_jax.mesh import on_cpu, sharded
from dancemoe_jax.model.present import where_present


def empty_cache(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Keys or values [layers, devices * sequences, max_position, heads, width] of no tokens yet.

    On CPUs bfloat16 is kept as its bits, as in the pool: XLA would turn all of a cache into float32 to change a row of it.
    """
    if not on_cpu(mesh):
        return jnp.zeros(shape, dtype, device=sharded(mesh, 1))
    dtype = BFLOAT16_BITS if dtype == jnp.bfloat16 else dtype
    own = (shape[0], shape[1] // mesh.size, *shape[2:])
    parts = [zeros(own, dtype, mesh.devices[device]) for device in local_devices(mesh)]
    return jax.make_array_from_single_device_arrays(shape, sharded(mesh, 1), parts)


class CacheRows(NamedTuple):
    """Where a step's rows of one device are in its cache.

    Attributes:
        sequences: of each row; None: row after row, all that the cache has room for.
        positions: of each token; max_position for one that does not count.
        valid: which tokens count.
        native: whether native calls attend.
        gpu: kernels that attend on a GPU.
        present: whether any does; None where that is not asked.
    """

    sequences: Int[Array, " rows"] | None
    positions: Int[Array, "rows chunk"]
    valid: Bool[Array, "rows chunk"]
    native: bool
    gpu: GpuKernels = None
    present: Bool[Array, ""] | None = None


def attend_cached(rows: CacheRows, layer, caches, how, q, *new):
    """Put new keys and values of one layer into the caches; what the queries make of all up to their own positions.

    A token whose keys or values are not finite gets NaN, and leaves zeros in the caches: the sequence that has the place
    next weighs what lies behind its own tokens with zero, and zero times NaN is NaN.

    Args:
        caches: keys, and values or None.
        how: model.decoder.Attention.
        q, new: of the step's tokens; new keys and values as `caches`.

    Returns:
        The heads' outputs, and the caches.
    """
    sequence = jnp.arange(len(rows.positions)) if rows.sequences is None else rows.sequences
    finite = finite_tokens(*new)

    def cached(cache, part):
        if cache is None:
            return None
        stored = _as_stored(jnp.where(finite, part, 0), cache.dtype)
        return cache.at[layer, sequence[:, None], rows.positions].set(stored, mode="drop")

    caches = [cached(cache, part) for cache, part in zip(caches, new, strict=True)]
    keys: Any = caches[0]
    values = caches[1]
    start, length = rows.positions[:, 0], rows.valid.sum(1)
    if rows.gpu:
        where = (layer, sequence, start, length)
        heads = cached_attention_gpu(q, keys, values, *where, **how._asdict(), how=rows.gpu)
        return jnp.where(finite, heads, jnp.nan), caches
    if rows.native:
        heads = cached_attention_native(q, keys, values, layer, sequence, start, length, **how._asdict())
        return jnp.where(finite, heads, jnp.nan), caches
    own = (layer,) if rows.sequences is None else (layer, sequence)

    def attended(q):
        k, v = _as_computed(keys[own]), None if values is None else _as_computed(values[own])
        every = jnp.broadcast_to(jnp.arange(k.shape[1])[None], k.shape[:2])
        return how(q, k, v, jnp.where(rows.valid, rows.positions, 0), every)

    return jnp.where(finite, where_present(rows.present, attended, q), jnp.nan), caches


def _as_stored(part, dtype):
    if dtype != BFLOAT16_BITS:
        return part.astype(dtype)
    return jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), BFLOAT16_BITS)


def _as_computed(part):
    return jax.lax.bitcast_convert_type(part, jnp.bfloat16) if part.dtype == BFLOAT16_BITS else part
