"""Grouped expert product out of a pool's banks: the native call (experts.cc) and its twin in XLA.

Weights lie as checkpoints have them, [outputs, inputs]. Both give each token's weighted sum over its assignments, and cost
what the active slots cost, whatever the size of the pool.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.call import native_call
from dancemoe_jax.kernels.swiglu import ExpertWeights, expert


def slot_experts_native(
    banks: Sequence[ExpertWeights],
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    *,
    limit: float = 0.0,
) -> Float[Array, "tokens hidden"]:
    """As `slot_experts_xla`. Activations between the two products and each expert's result stay float32.

    Each number is one sum in one order: the same bits whatever else is in the call.
    """
    parts = [part for bank in banks for part in bank if part is not None]
    return native_call(
        "dancemoe_experts",
        x.shape,
        jnp.float32,
        x,
        slots.astype(jnp.int32),
        weights.astype(jnp.float32),
        *parts,
        limit=np.float32(limit),
        biased=banks[0].b_in is not None,
        scaled=banks[0].s_in is not None,
    )


def slot_experts_xla(
    banks: Sequence[ExpertWeights],
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    *,
    limit: float = 0.0,
    tile: int = 8,
) -> Float[Array, "tokens hidden"]:
    """Weighted sum over each token's assignments to slots, numbered across the banks; in float32, on `sum_grid`.

    Assignments are sorted by slot and worked off in tiles of one expert each; a loop over the tiles that exist takes each
    expert's weights out of the pool where they lie, so the cost follows what is active, never the size of the pool.

    Args:
        banks: experts of some slots each, a slot axis in front; uint16 weights are the bits of bfloat16.
        slots: slot of each assignment; -1 for none (its weight does not matter).
        limit: of gpt-oss's clamped SwiGLU; 0 for the plain one.
        tile: rows computed at once; a few for decode, more for prefill.
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
        def one(array, place):
            own = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
            return jax.lax.bitcast_convert_type(own, jnp.bfloat16) if array.dtype == jnp.uint16 else own

        return lambda place: jax.tree.map(lambda array: one(array, place), bank)

    branches = [take(bank) for bank in banks]
    starts = jnp.array(np.cumsum([0, *(len(bank.w_in) for bank in banks[:-1])]), jnp.int32)

    def work(i, outputs):
        start = tile_start[i]
        bank = jnp.sum(key[start] >= starts) - 1
        own = jax.lax.switch(bank, branches, key[start] - starts[bank])
        result = expert(jax.lax.dynamic_slice_in_dim(rows, start, tile), own, limit)
        # A tile may run into the rows of the next expert: that expert's own tiles come later and overwrite them.
        return jax.lax.dynamic_update_slice_in_dim(outputs, result, start, axis=0)

    outputs = jax.lax.fori_loop(0, starts_tile.sum(), work, jnp.zeros_like(rows))
    return weighted_sum(x, outputs[jnp.argsort(order)].reshape(tokens, k, -1), slots, weights)


def weighted_sum(
    x: Float[Array, "tokens hidden"],
    outputs: Float[Array, "tokens k hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
) -> Float[Array, "tokens hidden"]:
    """Float32 sums of experts' results for tokens x, on `sum_grid`; an assignment to slot -1 has no weight."""
    # Where there is no slot, a tile of another expert may have left anything, infinity too: zero times that is NaN.
    outputs = jnp.where(slots[:, :, None] < 0, 0.0, outputs.astype(jnp.float32))
    weights = jnp.where(slots < 0, 0.0, weights).astype(jnp.float32)
    if x.dtype == jnp.float32:
        return jnp.einsum("tkd,tk->td", outputs, weights)
    # Adding to a number this large, whose neighbors are one grid step away, rounds to the grid.
    large = 1.5 * 2**23 * sum_grid(x)[:, None, None]
    return ((outputs * weights[:, :, None] + large) - large).sum(1)


def sum_grid(x: Float[Array, "tokens hidden"]) -> Float[Array, " tokens"]:
    """Step of the grid that a token's weighted expert results are rounded to before they are added, for activations of 16 bits.

    Sums of multiples of one step are exact in float32 up to 2**24 steps, so they do not depend on their order: not on which
    device computes which expert, nor on how partial sums are combined. All that take part know the step, because it follows
    from the token's own activations: 2**-16 of the power of two above their largest magnitude. A sum that leaves the range,
    256 times that magnitude, is rounded as any float32 sum is. (The way of Demmel and Nguyen, "Fast reproducible
    floating-point summation", ARITH 2013, with the step given in advance.)
    """
    exponent = jnp.frexp(jnp.abs(x.astype(jnp.float32)).max(-1))[1]
    return jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -60) - 16)
