"""One SwiGLU expert in XLA: its weights, and what it computes. Differentiable."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancemoe_jax.kernels.linear import StackedWeight, linear, stacked_linears_native

# gpt-oss's SwiGLU: the sigmoid's argument is the gate times this.
_CLAMPED_SLOPE = 1.702


class ExpertWeights(NamedTuple):
    """Weights of one expert, or of many with leading axes; a pytree on the host or on a device.

    Attributes:
        w_in: [2 * inner, hidden], rows of gate, then of up: [outputs, inputs], as checkpoints have them.
        w_out: [hidden, inner].
        b_in, b_out: biases [2 * inner], [hidden], or None.
        s_in, s_out: for int8 weights, float32 scale of each output channel [2 * inner], [hidden]; else None.
    """

    w_in: Any
    w_out: Any
    b_in: Any = None
    b_out: Any = None
    s_in: Any = None
    s_out: Any = None


def expert(
    x: Float[Array, "*tokens hidden"], weights: ExpertWeights, limit: float = 0.0
) -> Float[Array, "*tokens hidden"]:
    """One expert on each row: `(silu(x gate) * (x up)) down`, or gpt-oss's clamped form with a `limit`."""
    inner = _scaled_linear(x, weights.w_in, weights.s_in, weights.b_in)
    w_out = weights.w_out
    if isinstance(w_out, StackedWeight) and w_out.gpu is None and weights.s_out is None and not limit:
        (y,) = stacked_linears_native(inner, [w_out.stack], w_out.layer, w_out.active, gated=True)
        return y if weights.b_out is None else y + _along_last(weights.b_out, y)
    return _scaled_linear(gated(inner, limit), weights.w_out, weights.s_out, weights.b_out)


def gated(inner: Float[Array, "*tokens inner2"], limit: float = 0.0) -> Float[Array, "*tokens inner"]:
    """What gates do to the first product: halves are gate and up."""
    gate, up = jnp.split(inner, 2, axis=-1)
    return gate_up(gate, up, limit)


def gate_up(gate: Float[Array, "*shape"], up: Float[Array, "*shape"], limit: float) -> Float[Array, "*shape"]:
    """What gates do to two products, entry by entry."""
    if not limit:
        return jax.nn.silu(gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(_CLAMPED_SLOPE * gate) * (up + 1)


def _scaled_linear(x, w, scale, bias):
    y = linear(x, w)
    y = y if scale is None else (y * _along_last(scale, y)).astype(x.dtype)
    return y if bias is None else y + _along_last(bias, y)


def _along_last(vector, x):
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))
