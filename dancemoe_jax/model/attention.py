"""Attention with rotary positions: their angles, and the masked product itself.

Whether keys come from the same chunk (training) or from a cache (serving) is the caller's business: attention takes the
position of every query and of every key and masks what lies in a query's future.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancemoe_jax.model.config import Rope


def along_last(vector: Float[Array, " width"], x: Float[Array, "*shape width"]) -> Float[Array, "*ones width"]:
    """A vector over the last axis of `x`, with axes of length 1 for the others: JAX may be told to add none by itself."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Radians per position of each rotating pair, float32 [dim / 2].

    Sources: linear interpolation, arXiv 2306.15595; yarn, arXiv 2309.00071, section 3.2; llama3, the Llama 3.1 report.
    """
    inverse = rope.theta ** -(np.arange(0, dim, 2) / dim)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "yarn":

        def pair_of(rotations: float) -> float:
            """The pair (a real number) that makes so many rotations over the original context."""
            return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high > low else 1e-3), 0, 1)
        inverse = inverse * (1 - ramp) + inverse / rope.factor * ramp
    elif rope.kind == "llama3":
        rotations = rope.original_max_position * inverse / (2 * math.pi)
        ramp = np.clip((rotations - rope.low_freq) / (rope.high_freq - rope.low_freq), 0, 1)
        inverse = inverse * ramp + inverse / rope.factor * (1 - ramp)
    return inverse.astype(np.float32)


def angles(
    rope: Rope, dim: int, positions: Int[Array, "batch tokens"], dtype: Any
) -> tuple[Float[Array, "batch tokens pairs"], Float[Array, "batch tokens pairs"]]:
    """Cosines and sines that rotate heads of width `dim` at these positions."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(rope, dim)[None, None]
    return (rope.amplitude * jnp.cos(angle)).astype(dtype), (rope.amplitude * jnp.sin(angle)).astype(dtype)


def attend(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads value"],
    q_positions: Int[Array, "batch tokens"],
    k_positions: Int[Array, "batch keys"],
    scale: float,
    window: Int[Array, ""] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch tokens heads value"]:
    """Softmax attention in which a query sees the keys at its own position and before.

    Args:
        window: how many keys a query sees at most, its own position included; 0 = all.
        sinks: a logit per head that joins the softmax and carries no value.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btgqd,bsgd->bgqts", q, k).astype(jnp.float32) * scale
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= (window == 0) | (distance < window)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)[..., : k.shape[1]]
    return jnp.einsum("bgqts,bsgd->btgqd", weights, v).reshape(batch, tokens, heads, v.shape[-1])
