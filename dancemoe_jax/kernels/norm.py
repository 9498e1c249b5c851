"""Root-mean-square norm and rotary positions: the native calls (norm.cc) and their twins in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dancemoe_jax.kernels.call import native_call


def rms_norm_native(
    x: Float[Array, "*shape width"],
    scale: Float[Array, " width"],
    eps: float,
    active: Bool[Array, " rows"] | None = None,
) -> Float[Array, "*shape width"]:
    """As `rms_norm_xla`. Each row's sum of squares has one order: the same bits whatever other rows there are.

    Args:
        active: which of the rows (of x's first axes, as many as there are entries) count; the others give zeros.
    """
    rows = x.reshape(-1, x.shape[-1])
    active = jnp.ones(len(rows), bool) if active is None else active
    y = native_call("dancemoe_norm", rows.shape, x.dtype, rows, scale, active, eps=np.float32(eps))
    return y.reshape(x.shape)


def rms_norm_xla(
    x: Float[Array, "*shape width"], scale: Float[Array, " width"], eps: float
) -> Float[Array, "*shape width"]:
    """Root-mean-square norm of the last axis, computed in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def rotated_native(
    x: Float[Array, "batch tokens heads dim"],
    cosines: Float[Array, "batch tokens pairs"],
    sines: Float[Array, "batch tokens pairs"],
    interleaved: bool,
    norm: Float[Array, " width"] | None = None,
    eps: float = 0.0,
    active: Bool[Array, " rows"] | None = None,
) -> Float[Array, "batch tokens heads dim"]:
    """As `rotated_xla`. A token's bits are the same whatever other tokens there are; those that are not active give zeros."""
    batch, tokens, heads, dim = x.shape
    rows = batch * tokens
    y = native_call(
        "dancemoe_rotated",
        (rows, heads, dim),
        x.dtype,
        x.reshape(rows, heads, dim),
        cosines.reshape(rows, -1),
        sines.reshape(rows, -1),
        jnp.ones(rows, bool) if active is None else active,
        *(() if norm is None else (norm,)),
        eps=np.float32(eps),
        interleaved=interleaved,
    )
    return y.reshape(x.shape)


def rotated_xla(
    x: Float[Array, "batch tokens heads dim"],
    cosines: Float[Array, "batch tokens pairs"],
    sines: Float[Array, "batch tokens pairs"],
    interleaved: bool,
    norm: Float[Array, " width"] | None = None,
    eps: float = 0.0,
) -> Float[Array, "batch tokens heads dim"]:
    """Rotary embedding of heads, normed before where there is a norm.

    Args:
        cosines, sines: of each pair's angle, in the type of x.
        interleaved: a pair are neighbors; else the second is half a head behind the first.
        norm: scale of a norm over each head, or over all of a token's heads together; eps: of that norm.
    """
    if norm is not None:
        x = rms_norm_xla(x.reshape(*x.shape[:2], -1, norm.shape[-1]), norm, eps).reshape(x.shape)
    cos, sin = cosines[:, :, None], sines[:, :, None]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
