"""Computing experts: one SwiGLU expert, all experts densely (reference), and grouped by expert (training).

Serving computes experts out of a device's slots; that is pool.py's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def swiglu(
    x: Float[Array, "*tokens hidden"], w_in: Float[Array, "hidden inner2"], w_out: Float[Array, "inner hidden"]
) -> Float[Array, "*tokens hidden"]:
    """`(silu(x gate) * (x up)) down` with gate and up side by side in `w_in`."""
    return _gated(x @ w_in) @ w_out


def _gated(inner):
    gate, up = jnp.split(inner, 2, axis=-1)
    return jax.nn.silu(gate) * up


def dense_experts(
    x: Float[Array, "tokens hidden"],
    w_in: Float[Array, "experts hidden inner2"],
    w_out: Float[Array, "experts inner hidden"],
    topk_weights: Float[Array, "tokens k"],
    topk_ids: Int[Array, "tokens k"],
) -> Float[Array, "tokens hidden"]:
    """Every expert on every token, then the weighted sum of the chosen ones."""
    outputs = jax.vmap(swiglu, in_axes=(None, 0, 0), out_axes=1)(x, w_in, w_out)
    chosen = jnp.take_along_axis(outputs, topk_ids[:, :, None], axis=1)
    return jnp.einsum("tkd,tk->td", chosen, topk_weights.astype(chosen.dtype))


def grouped_experts(
    x: Float[Array, "tokens hidden"],
    w_in: Float[Array, "experts hidden inner2"],
    w_out: Float[Array, "experts inner hidden"],
    topk_weights: Float[Array, "tokens k"],
    topk_ids: Int[Array, "tokens k"],
    tile: int = 64,
) -> Float[Array, "tokens hidden"]:
    """The chosen experts only, differentiable and without dropping a token.

    Assignments are sorted by expert and each expert's group is padded to whole tiles, so that all work is one batched
    product of `assignments / tile + experts` tiles whatever the router decides.
    """
    experts, (tokens, k) = w_in.shape[0], topk_ids.shape
    flat = topk_ids.reshape(-1)
    order = jnp.argsort(flat)
    counts = jnp.bincount(flat, length=experts)
    tiles = -(-counts // tile)
    last_tile = jnp.cumsum(tiles)
    num_tiles = flat.size // tile + experts
    tile_expert = jnp.searchsorted(last_tile, jnp.arange(num_tiles), side="right").clip(max=experts - 1)
    rank = jnp.arange(flat.size) - (jnp.cumsum(counts) - counts)[flat[order]]
    row = (last_tile - tiles)[flat[order]] * tile + rank
    # Rows that pad a group read an all-zero token, so they add nothing to any gradient.
    source = jnp.full(num_tiles * tile, tokens, jnp.int32).at[row].set((order // k).astype(jnp.int32))
    grouped = jnp.concatenate([x, jnp.zeros_like(x[:1])])[source].reshape(num_tiles, tile, -1)
    inner = _gated(jnp.einsum("nbd,ndf->nbf", grouped, w_in[tile_expert]))
    outputs = jnp.einsum("nbf,nfd->nbd", inner, w_out[tile_expert]).reshape(num_tiles * tile, -1)
    row_of = jnp.zeros(flat.size, jnp.int32).at[order].set(row.astype(jnp.int32)).reshape(tokens, k)
    return jnp.einsum("tkd,tk->td", outputs[row_of], topk_weights.astype(x.dtype))
