"""Computing experts: all of them densely (reference), and grouped by expert (training).

What one expert is and computing experts out of a device's slots are the kernels' (kernels/swiglu.py, kernels/experts.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.linear import StackedWeight
from dancemoe_jax.kernels.swiglu import ExpertWeights, expert, gated


def quantize(weights: ExpertWeights) -> ExpertWeights:
    """int8 weights with one scale per output channel: the largest weight of a channel becomes 127. On the host."""

    def rounded(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w = np.asarray(w, np.float32)
        scale = np.maximum(np.abs(w).max(axis=-1) / 127, np.finfo(np.float32).tiny)
        return np.rint(w / scale[..., None]).astype(np.int8), scale

    (w_in, s_in), (w_out, s_out) = rounded(weights.w_in), rounded(weights.w_out)
    return weights._replace(w_in=w_in, w_out=w_out, s_in=s_in, s_out=s_out)


def dequantize(weights: ExpertWeights) -> ExpertWeights:
    """Float32 weights in place of int8 ones with scales; others as they are. On the host."""
    if weights.s_in is None:
        return weights
    w_in, w_out = weights.w_in * weights.s_in[..., None], weights.w_out * weights.s_out[..., None]
    return weights._replace(w_in=w_in, w_out=w_out, s_in=None, s_out=None)


def swiglu(
    x: Float[Array, "*tokens hidden"], w_in: Array | StackedWeight, w_out: Array | StackedWeight
) -> Float[Array, "*tokens hidden"]:
    """A plain SwiGLU layer, rows of gate, then of up in `w_in` [2 * inner, hidden]; `w_out` [hidden, inner]."""
    return expert(x, ExpertWeights(w_in, w_out))


def dense_experts(
    x: Float[Array, "tokens hidden"],
    weights: ExpertWeights,
    topk_weights: Float[Array, "tokens k"],
    topk_ids: Int[Array, "tokens k"],
    limit: float = 0.0,
) -> Float[Array, "tokens hidden"]:
    """Every expert (`weights` has an expert axis in front) on every token, then the weighted sum of the chosen ones."""
    outputs = jax.vmap(lambda own: expert(x, own, limit), out_axes=1)(weights)
    chosen = jnp.take_along_axis(outputs, topk_ids[:, :, None], axis=1)
    return jnp.einsum("tkd,tk->td", chosen, topk_weights.astype(chosen.dtype))


def grouped_experts(
    x: Float[Array, "tokens hidden"],
    w_in: Float[Array, "experts inner2 hidden"],
    w_out: Float[Array, "experts hidden inner"],
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
    inner = gated(jnp.einsum("nbd,nfd->nbf", grouped, w_in[tile_expert]), 0.0)
    outputs = jnp.einsum("nbf,ndf->nbd", inner, w_out[tile_expert]).reshape(num_tiles * tile, -1)
    row_of = jnp.zeros(flat.size, jnp.int32).at[order].set(row.astype(jnp.int32)).reshape(tokens, k)
    return jnp.einsum("tkd,tk->td", outputs[row_of], topk_weights.astype(x.dtype))
