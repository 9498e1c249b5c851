"""Root-mean-square norm: the native call (norm.cc) and its twin in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dancemoe_jax.kernels.call import native_call


def rms_norm_native(
    x: Float[Array, "*shape width"], scale: Float[Array, " width"], eps: float
) -> Float[Array, "*shape width"]:
    """As `rms_norm_xla`. Each row's sum of squares has one order: the same bits whatever other rows there are."""
    rows = x.reshape(-1, x.shape[-1])
    return native_call("dancemoe_norm", rows.shape, x.dtype, rows, scale, eps=np.float32(eps)).reshape(x.shape)


def rms_norm_xla(
    x: Float[Array, "*shape width"], scale: Float[Array, " width"], eps: float
) -> Float[Array, "*shape width"]:
    """Root-mean-square norm of the last axis, computed in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
