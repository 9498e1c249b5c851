"""Computing experts out of a device's slots: cost follows the assignments that exist, never the size of the pool."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancemoe_jax.expert_parallel.pool import BFLOAT16_BITS, ExpertPool, PoolLayout
from dancemoe_jax.model.experts import ExpertWeights, expert


def slot_experts(
    layout: PoolLayout,
    pool: ExpertPool,
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    *,
    tile: int,
    limit: float = 0.0,
) -> Float[Array, "tokens hidden"]:
    """Weighted sum over each token's assignments to slots of this device's pool (inside shard_map).

    Assignments are sorted by slot and worked off in tiles of one expert each; a loop over the tiles that exist takes each
    expert's weights out of the pool where they lie, so the cost follows what is active, never the size of the pool.

    Args:
        slots: slot of each assignment; -1 for none (its weight does not matter).
        tile: rows computed at once; a few for decode, more for prefill.
        limit: of the experts' SwiGLU (ModelConfig.swiglu_limit).
    """
    tokens, k = slots.shape
    count = tokens * k
    key = jnp.where(slots < 0, jnp.iinfo(jnp.int32).max, slots).reshape(-1)
    order = jnp.argsort(key)
    key = key[order]
    index = jnp.arange(count)
    new_group = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    rank = index - jax.lax.cummax(jnp.where(new_group, index, 0))
    starts_tile = (rank % tile == 0) & (key < jnp.iinfo(jnp.int32).max)
    tile_start = jnp.nonzero(starts_tile, size=count, fill_value=0)[0]
    rows = jnp.concatenate([x[order // k], jnp.zeros((tile, x.shape[1]), x.dtype)])

    def take(bank: ExpertWeights):
        def one(array, row):
            own = jax.lax.dynamic_index_in_dim(array, row, keepdims=False)
            return jax.lax.bitcast_convert_type(own, jnp.bfloat16) if array.dtype == BFLOAT16_BITS else own

        return lambda row: jax.tree.map(lambda array: one(array, row), bank)

    branches = [take(bank) for bank in pool.banks]
    starts = jnp.array(layout.starts, jnp.int32)

    def work(i, outputs):
        start = tile_start[i]
        bank = jnp.sum(key[start] >= starts) - 1
        own = jax.lax.switch(bank, branches, key[start] - starts[bank])
        result = expert(jax.lax.dynamic_slice_in_dim(rows, start, tile), own, limit)
        # A tile may run into the rows of the next expert: that expert's own tiles come later and overwrite them.
        return jax.lax.dynamic_update_slice_in_dim(outputs, result, start, axis=0)

    outputs = jax.lax.fori_loop(0, starts_tile.sum(), work, jnp.zeros_like(rows))
    outputs = outputs[jnp.argsort(order)].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", outputs, jnp.where(slots < 0, 0.0, weights).astype(x.dtype))
