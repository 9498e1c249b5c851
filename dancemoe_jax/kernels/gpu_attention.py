"""Attention on a GPU over the cache where it lies, up to the positions that are used: no layer, sequence or context is copied.

One program takes a block of queries that share keys (the tokens of a row times the heads of one group) and one part of the
positions; long contexts are cut into parts so that few rows keep a whole card busy. The parts' sums are put together in
plain jnp, in one order. Its reference is kernels.attention.cached_attention_xla.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.gpu_call import GpuKernels, dot, kernel_call, power_of_two

_LOW = -1e30  # a logit of nothing, finite, so that no infinities are subtracted
# Programs that a step should have, so that every core of a card has work.
_PROGRAMS = 256
_LEAST_PART = 256


class _Shape(NamedTuple):
    """What a program is compiled for; see `cached_attention_gpu`."""

    group: int
    tokens: int
    width: int
    value: int
    shared: bool
    block: int
    keys: int
    part: int
    scale: float


def cached_attention_gpu(
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
    how: GpuKernels,
) -> Float[Array, "rows tokens heads value"]:
    """As `cached_attention_xla`. Weights are rounded to the type of the values for the second product."""
    rows, tokens, heads, width = q.shape
    positions, kv_heads = pages.shape[2] * keys.shape[1], keys.shape[2]
    value = int(value_width or width) if values is None else values.shape[-1]
    group = heads // kv_heads
    block = min(power_of_two(tokens * group), 64 if width <= 128 else 16)
    blocks = -(-tokens * group // block)
    wished = max(1, _PROGRAMS // (rows * kv_heads * blocks))
    part = max(_LEAST_PART, power_of_two(-(-positions // wished)))
    parts = -(-positions // part)
    piece = (64 if width <= 128 else 32) // (2 if q.dtype.itemsize == 4 else 1)
    shape = _Shape(group, tokens, width, value, values is None, block, min(piece, part), part, float(scale))
    scalars = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(0 if window is None else window, jnp.int32)])
    # Queries of one group of heads side by side: [rows, kv_heads, tokens * group, width].
    grouped = q.reshape(rows, tokens, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(rows, kv_heads, tokens * group, width)
    lead = (parts, rows, kv_heads, blocks * block)
    results = [jax.ShapeDtypeStruct((*lead, value), jnp.float32), *[jax.ShapeDtypeStruct(lead, jnp.float32)] * 2]
    where = [scalars, pages, slot.astype(jnp.int32), start.astype(jnp.int32), length.astype(jnp.int32)]
    sums, most, total = kernel_call(
        functools.partial(_attend, shape),
        (rows * kv_heads, blocks, parts),
        results,
        [grouped, keys, *([] if values is None else [values]), *where],
        name="attention",
        how=how,
    )
    out = _together(sums, most, total, sinks)[:, :, : tokens * group]
    out = out.reshape(rows, kv_heads, tokens, group, value).transpose(0, 2, 1, 3, 4)
    return out.reshape(rows, tokens, heads, value).astype(q.dtype)


def _together(sums, most, total, sinks):
    """One softmax out of the parts' weighted sums, maxima and sums of weights; rows that saw nothing give zeros."""
    highest = most.max(0)
    factor = jnp.exp(most - highest[None])
    weight, out = (total * factor).sum(0), (sums * factor[..., None]).sum(0)
    if sinks is not None:
        kv_heads, lanes = weight.shape[1:]
        group = len(sinks) // kv_heads
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), (1, -(-lanes // group)))[None, :, :lanes]
        both = jnp.maximum(highest, sink)
        fade = jnp.exp(highest - both)
        weight, out = weight * fade + jnp.exp(sink - both), out * fade[..., None]
    return out / jnp.where(weight == 0, 1, weight)[..., None]


def _attend(shape: _Shape, q_ref, keys_ref, *refs):
    *refs, out_ref, most_ref, total_ref = refs
    values_ref = None if shape.shared else refs.pop(0)
    scalars_ref, pages_ref, slot_ref, start_ref, length_ref = refs
    page_size, kv_heads = keys_ref.shape[1:3]
    row, head = pl.program_id(0) // kv_heads, pl.program_id(0) % kv_heads
    lane = pl.program_id(1) * shape.block + jnp.arange(shape.block)
    token = lane // shape.group
    start, length = start_ref[row], length_ref[row]
    there, own = token < length, start + token
    layer, window = scalars_ref[0], scalars_ref[1]
    first_token, begin = pl.program_id(1) * shape.block // shape.group, pl.program_id(2) * shape.part
    # Positions that some query of the block sees, in this part.
    last = start + jnp.minimum(((pl.program_id(1) + 1) * shape.block - 1) // shape.group, length - 1)
    end = jnp.where(first_token < length, jnp.minimum(begin + shape.part, last + 1), begin)
    seen = jnp.where(window > 0, jnp.maximum(begin, start + first_token - window + 1), begin)
    columns = _columns(shape.value if shape.shared else shape.width, shape.width)
    q = [_load(q_ref.at[row, head, lane[:, None], at[None]], there[:, None] & ok[None]) for at, ok in columns]
    value_at, value_there = _columns(shape.value, shape.value)[0]

    def piece(i, carry):
        acc, most, total = carry
        position = begin + i * shape.keys + jnp.arange(shape.keys)
        exists = position < end
        page = triton.load(pages_ref.at[layer, slot_ref[row], position // page_size], mask=exists, other=0)
        index = (page[:, None], (position % page_size)[:, None], head)
        k = [_load(keys_ref.at[*index, at[None]], exists[:, None] & ok[None]) for at, ok in columns]
        v = k[0]
        if values_ref is not None:
            v = _load(values_ref.at[*index, value_at[None]], exists[:, None] & value_there[None])
        scores = functools.reduce(jnp.add, (dot(a, b.astype(a.dtype), True) for a, b in zip(q, k, strict=True)))
        distance = own[:, None] - position[None]
        visible = (distance >= 0) & exists[None] & there[:, None] & ((window == 0) | (distance < window))
        scores = jnp.where(visible, scores * shape.scale, _LOW)
        higher = jnp.maximum(most, scores.max(1))
        weights = jnp.where(visible, jnp.exp(scores - higher[:, None]), 0.0)
        fade = jnp.exp(most - higher)
        return acc * fade[:, None] + dot(weights.astype(v.dtype), v), higher, total * fade + weights.sum(1)

    zeros = jnp.zeros(shape.block, jnp.float32)
    carry = (jnp.zeros((shape.block, value_at.shape[0]), jnp.float32), zeros + _LOW, zeros)
    pieces = jnp.maximum(end - begin + shape.keys - 1, 0) // shape.keys
    acc, most, total = jax.lax.fori_loop((seen - begin) // shape.keys, pieces, piece, carry)
    at = (pl.program_id(2), row, head, lane)
    triton.store(most_ref.at[*at], most)
    triton.store(total_ref.at[*at], total)
    place = out_ref.at[pl.program_id(2), row, head, lane[:, None], value_at[None]]
    triton.store(place, acc, mask=(lane >= 0)[:, None] & value_there[None])


def _columns(first: int, width: int) -> list[tuple[Any, Any]]:
    """Columns of a vector in blocks of powers of two, and which of them are there: the first so many, then the rest."""
    found = []
    for begin, end in ((0, first), (first, width)):
        if end > begin:
            at = begin + jnp.arange(power_of_two(end - begin))
            found.append((at, at < end))
    return found


def _load(at, mask):
    return triton.load(at, mask=mask, other=0.0)
