"""Grouped-query attention with rotary positions: RMSNorm, the rotation, and the masked product itself.

Whether keys come from the same chunk (training) or from a cache (serving) is the caller's business: attention takes the
position of every query and of every key and masks what lies in a query's future.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rms_norm(
    x: Float[Array, "*shape width"], scale: Float[Array, " width"], eps: float
) -> Float[Array, "*shape width"]:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)).astype(x.dtype) * scale


def rotate(
    x: Float[Array, "batch tokens heads dim"], positions: Int[Array, "batch tokens"], theta: float
) -> Float[Array, "batch tokens heads dim"]:
    """Rotary embedding, halves convention (the first half of a head pairs with the second)."""
    dim = x.shape[-1]
    inverse_wavelength = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[..., None, None].astype(jnp.float32) * inverse_wavelength
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    q_positions: Int[Array, "batch tokens"],
    k_positions: Int[Array, "batch keys"],
) -> Float[Array, "batch tokens heads dim"]:
    """Softmax attention in which a query sees the keys at its own position and before."""
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btgqd,bsgd->bgqts", q, k).astype(jnp.float32) * dim**-0.5
    visible = k_positions[:, None, :] <= q_positions[:, :, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgqts,bsgd->btgqd", weights, v).reshape(batch, tokens, heads, dim)
