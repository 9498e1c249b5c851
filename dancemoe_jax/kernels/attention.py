"""Attention over the used positions of a paged cache: the native call (attention.cc) and its twin in XLA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.call import native_call, varying_together

CHUNK = 256  # positions that are looked at together, counted from a sequence's first; whole pages
_LOW = float(np.finfo(np.float32).min)


def cached_attention_native(
    q: Float[Array, "rows tokens heads width"],
    keys: Array,
    values: Array | None,
    pages: Int[Array, "layers slots blocks"],
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

    A query's bits are the same whatever other rows and tokens there are, however many threads, and wherever its pages lie.
    """
    extra = () if sinks is None else (sinks,)
    integers = (pages, layer, slot, start, length, 0 if window is None else window)
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
    pages: Int[Array, "layers slots blocks"],
    layer: Int[Array, ""] | int,
    slot: Int[Array, " rows"],
    start: Int[Array, " rows"],
    length: Int[Array, " rows"],
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    sinks: Float[Array, " heads"] | None = None,
    value_width: int | None = None,
    used: bool = True,
) -> Float[Array, "rows tokens heads value"]:
    """Softmax attention of new tokens, whose keys are in the cache already, over their sequence's positions up to their own.

    Chunks of positions are worked off one after another; one that a row sees nothing of changes none of its bits.

    Args:
        keys: [pages, page, kv_heads, width], float32 or bfloat16 (or its bits as uint16).
        values: [pages, page, kv_heads, value], or None: the first `value_width` entries of the keys.
        pages: which page holds each block of positions of a sequence; what lies outside the cache is not there.
        slot: the sequence in `pages` of each row.
        start: position of each row's first token.
        length: how many tokens of a row count; the others, all of them in a row that rests, give zeros.
        window: how many positions a query sees at most, its own included; 0 = all.
        sinks: a logit per head that joins the softmax and carries no value.
        used: stop after the last position that is used, which a GPU would have to ask the host for; else after the last
            that there can be.
    """
    rows, tokens, heads, width = q.shape
    _, page, kv_heads, _ = keys.shape
    value = value_width if values is None else values.shape[-1]
    assert value is not None
    table = jax.lax.dynamic_index_in_dim(pages, layer, keepdims=False)[slot]  # [rows, blocks]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % (blocks := CHUNK // page))), constant_values=len(keys))
    reach = jnp.asarray(0 if window is None else window, jnp.int32)
    own = start[:, None] + jnp.arange(tokens)[None]
    counts = jnp.arange(tokens)[None] < length[:, None]
    grouped = q.reshape(rows, tokens, kv_heads, heads // kv_heads, width)

    def of_chunk(number):
        here = jax.lax.dynamic_slice_in_dim(table, number * blocks, blocks, axis=1)
        k = _of_pages(keys, here, q.dtype)
        scores = jnp.einsum("btgqd,bsgd->bgqts", grouped, k, preferred_element_type=jnp.float32) * scale
        distance = own[:, :, None] - (number * CHUNK + jnp.arange(CHUNK))[None, None]
        visible = (distance >= 0) & counts[:, :, None] & ((reach == 0) | (distance < reach))
        return scores, visible[:, None, None], k[..., :value] if values is None else _of_pages(values, here, q.dtype)

    lead = (rows, kv_heads, heads // kv_heads, tokens)
    begin = (jnp.zeros((*lead, value), jnp.float32), jnp.full(lead, _LOW, jnp.float32), jnp.zeros(lead, jnp.float32))
    carry: Any = varying_together([*begin, q])[:3]
    chunks = -(-jnp.where(length > 0, start + length, 0).max() // CHUNK) if used else table.shape[1] // blocks
    out, most, total = jax.lax.fori_loop(0, chunks, lambda n, c: _joined(c, *of_chunk(n)), carry)
    if sinks is not None:
        out, total = _with_sinks(out, most, total, sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1))
    out = jnp.where(counts[:, None, None, :, None], out / jnp.where(total == 0, 1, total)[..., None], 0)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, tokens, heads, value).astype(q.dtype)


def _joined(carry, scores, visible, v):
    """Sums of values, maxima and sums of weights, with those of one more chunk."""
    out, most, total = carry
    higher = jnp.maximum(most, jnp.where(visible, scores, _LOW).max(-1))
    weights, fade = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0), jnp.exp(most - higher)
    mixed = jnp.einsum("bgqts,bsgd->bgqtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out * fade[..., None] + mixed, higher, total * fade + weights.sum(-1)


def _of_pages(cache, pages, dtype):
    """What pages [rows, blocks] hold, one after another: [rows, positions, heads, width]."""
    found = cache.at[pages].get(mode="fill", fill_value=0).reshape(len(pages), -1, *cache.shape[2:])
    return (jax.lax.bitcast_convert_type(found, jnp.bfloat16) if found.dtype == np.uint16 else found).astype(dtype)


def _with_sinks(out, most, total, sink):
    both = jnp.maximum(most, sink)
    fade = jnp.exp(most - both)
    return out * fade[..., None], total * fade + jnp.exp(sink - both)
