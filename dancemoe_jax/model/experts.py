"""Computing experts: one SwiGLU expert, all experts densely (reference), and grouped by expert (training).

Serving computes experts out of a device's slots; that is slot_experts.py's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancemoe_jax.model.attention import along_last

# gpt-oss's SwiGLU: the sigmoid's argument is the gate times this.
_CLAMPED_SLOPE = 1.702


class ExpertWeights(NamedTuple):
    """Weights of one expert, or of many with leading axes; a pytree on the host or on a device.

    Attributes:
        w_in: [hidden, 2 * inner], gate, then up, side by side.
        w_out: [inner, hidden].
        b_in, b_out: biases [2 * inner], [hidden], or None.
        s_in, s_out: for int8 weights, float32 scale of each output channel [2 * inner], [hidden]; else None.
    """

    w_in: Any
    w_out: Any
    b_in: Any = None
    b_out: Any = None
    s_in: Any = None
    s_out: Any = None


def quantize(weights: ExpertWeights) -> ExpertWeights:
    """int8 weights with one scale per output channel: the largest weight of a channel becomes 127. On the host."""

    def rounded(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w = np.asarray(w, np.float32)
        scale = np.maximum(np.abs(w).max(axis=-2) / 127, np.finfo(np.float32).tiny)
        return np.rint(w / scale[..., None, :]).astype(np.int8), scale

    (w_in, s_in), (w_out, s_out) = rounded(weights.w_in), rounded(weights.w_out)
    return weights._replace(w_in=w_in, w_out=w_out, s_in=s_in, s_out=s_out)


def dequantize(weights: ExpertWeights) -> ExpertWeights:
    """Float32 weights in place of int8 ones with scales; others as they are. On the host."""
    if weights.s_in is None:
        return weights
    w_in, w_out = weights.w_in * weights.s_in[..., None, :], weights.w_out * weights.s_out[..., None, :]
    return weights._replace(w_in=w_in, w_out=w_out, s_in=None, s_out=None)


def expert(
    x: Float[Array, "*tokens hidden"], weights: ExpertWeights, limit: float = 0.0
) -> Float[Array, "*tokens hidden"]:
    """One expert on each row: `(silu(x gate) * (x up)) down`, or gpt-oss's clamped form with a `limit`."""
    inner = _linear(x, weights.w_in, weights.s_in, weights.b_in)
    return _linear(_gated(inner, limit), weights.w_out, weights.s_out, weights.b_out)


def swiglu(
    x: Float[Array, "*tokens hidden"], w_in: Float[Array, "hidden inner2"], w_out: Float[Array, "inner hidden"]
) -> Float[Array, "*tokens hidden"]:
    """A plain SwiGLU layer, gate and up side by side in `w_in`."""
    return expert(x, ExpertWeights(w_in, w_out))


def _linear(x, w, scale, bias):
    y = x @ w.astype(x.dtype)
    y = y if scale is None else (y * along_last(scale, y)).astype(x.dtype)
    return y if bias is None else y + along_last(bias, y)


def _gated(inner, limit):
    gate, up = jnp.split(inner, 2, axis=-1)
    if not limit:
        return jax.nn.silu(gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(_CLAMPED_SLOPE * gate) * (up + 1)


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
    inner = _gated(jnp.einsum("nbd,ndf->nbf", grouped, w_in[tile_expert]), 0.0)
    outputs = jnp.einsum("nbf,nfd->nbd", inner, w_out[tile_expert]).reshape(num_tiles * tile, -1)
    row_of = jnp.zeros(flat.size, jnp.int32).at[order].set(row.astype(jnp.int32)).reshape(tokens, k)
    return jnp.einsum("tkd,tk->td", outputs[row_of], topk_weights.astype(x.dtype))
