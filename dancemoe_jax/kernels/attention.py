"""Attention over the used positions of a cache: the native call (attention.cc) and its twin in XLA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.call import native_call


def cached_attention_native(
    q: Float[Array, "rows tokens heads width"],
    keys: Array,
    values: Array | None,
    layer: Int[Array, ""] | int,
    slot: Int[Array, " rows"],
    start: Int[Array, " rows"],
    length: Int[Array, " rows"],
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    sinks: Float[Array, " heads"] | None = None,
    value_width: int | None = None,
) -> Float[Array, "rows tokens heads value"]:
    """As `cached_attention_xla`, at the cost of the positions that are used.

    A query's bits are the same whatever other rows and tokens there are, and however many threads.
    """
    extra = () if sinks is None else (sinks,)
    integers = (layer, slot, start, length, 0 if window is None else window)
    width: Any = value_width if values is None else values.shape[-1]
    return native_call(
        "dancemoe_attention",
        (*q.shape[:3], width),
        q.dtype,
        q,
        keys,
        keys if values is None else values,
        *(jnp.asarray(i, jnp.int32) for i in integers),
        *extra,
        scale=np.float32(scale),
    )


def cached_attention_xla(
    q: Float[Array, "rows tokens heads width"],
    keys: Array,
    values: Array | None,
    layer: Int[Array, ""] | int,
    slot: Int[Array, " rows"],
    start: Int[Array, " rows"],
    length: Int[Array, " rows"],
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    sinks: Float[Array, " heads"] | None = None,
    value_width: int | None = None,
) -> Float[Array, "rows tokens heads value"]:
    """Softmax attention of new tokens, whose keys are in the cache already, over their sequence's positions up to their own.

    Args:
        keys: [layers, slots, max_position, kv_heads, width], float32 or bfloat16 (or its bits as uint16).
        values: [layers, slots, max_position, kv_heads, value], or None: the first `value_width` entries of the keys.
        slot: the sequence in the cache of each row.
        start: position of each row's first token.
        length: how many tokens of a row count; the others, all of them in a row that rests, give zeros.
        window: how many positions a query sees at most, its own included; 0 = all.
        sinks: a logit per head that joins the softmax and carries no value.
    """
    rows, tokens, heads, width = q.shape

    def of_rows(cache):
        own = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)[slot]
        own = jax.lax.bitcast_convert_type(own, jnp.bfloat16) if own.dtype == np.uint16 else own
        return own.astype(q.dtype)

    k = of_rows(keys)
    v = k[..., :value_width] if values is None else of_rows(values)
    kv_heads = k.shape[2]
    grouped = q.reshape(rows, tokens, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btgqd,bsgd->bgqts", grouped, k, preferred_element_type=jnp.float32) * scale
    position = start[:, None] + jnp.arange(tokens)[None]
    distance = position[:, :, None] - jnp.arange(k.shape[1])[None, None]
    visible = distance >= 0
    if window is not None:
        visible &= (jnp.asarray(window) == 0) | (distance < window)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)[..., : k.shape[1]]
    out = jnp.einsum("bgqts,bsgd->btgqd", weights, v).reshape(rows, tokens, heads, v.shape[-1])
    counts = jnp.arange(tokens)[None] < length[:, None]
    return jnp.where(counts[:, :, None, None], out, 0).astype(q.dtype)
