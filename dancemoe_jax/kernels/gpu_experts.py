"""Grouped expert product on a GPU, straight out of a pool's banks by slot number: two kernels, whatever is active.

    plan   assignments sorted by slot and cut into tiles of one slot's rows (plain jnp, static shapes)
    up     inner[row] = gated(x[token of row] · w_in[slot])        one kernel
    down   y[assignment of row] = inner[row] · w_out[slot]         one kernel
    sum    over a token's k assignments, in their order, so the same bits every time (plain jnp)

No weight is copied, int8 is multiplied out in registers, nothing waits for the host. Its reference is
kernels.experts.slot_experts_xla.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.experts import weighted_sum
from dancemoe_jax.kernels.gpu_call import GpuKernels, dot, kernel_call, power_of_two
from dancemoe_jax.kernels.swiglu import ExpertWeights, gate_up

_NONE = jnp.iinfo(jnp.int32).max


class Blocks(NamedTuple):
    """What one program computes: so many rows and outputs, the inputs in pieces of `inputs`."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Assignments by tile: rows of one slot, at most a block's.

    Attributes:
        order: int32 [assignments], the assignment of each sorted row.
        slot: int32 [tiles], -1 for a tile that is not there; start: its first sorted row; rows: how many.
    """

    order: Array
    slot: Array
    start: Array
    rows: Array


def fits(banks: Sequence[ExpertWeights]) -> bool:
    """Whether the kernels take these banks. Pallas counts in 32 bits up to 2**32 bytes, too few for one byte a number."""
    weights = [w for bank in banks for w in (bank.w_in, bank.w_out)]
    return not any(w.dtype.itemsize == 1 and 2**31 <= math.prod(w.shape) <= 2**32 for w in weights) and all(
        w.dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8) for w in weights
    )


def blocks_for(rows: int, outputs: int, inputs: int, itemsize: int) -> Blocks:
    """Few rows read weights, many compute: blocks for either, whose three stages fit the shared memory of an RTX 30 card."""
    tall = rows > 256
    narrow = 32 if outputs <= 2048 and not tall else 64  # enough programs to keep a card's cores busy
    piece = (128 if narrow == 32 else 64) // (2 if itemsize == 4 else 1)
    return Blocks(64 if tall else 16, min(narrow, power_of_two(outputs)), min(piece, power_of_two(inputs)), 4, 3)


def make_plan(slots: Int[Array, "tokens k"], tile: int, most_slots: int) -> Plan:
    """Cut assignments into tiles.

    Args:
        slots: of each assignment, -1 for none.
        most_slots: distinct slots that can occur at most; bounds the number of tiles.
    """
    count = slots.size
    key = jnp.where(slots < 0, _NONE, slots).reshape(-1)
    key, order = jax.lax.sort_key_val(key, jnp.arange(count, dtype=jnp.int32))
    index = jnp.arange(count, dtype=jnp.int32)
    first = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    begins = ((index - jax.lax.cummax(jnp.where(first, index, 0))) % tile == 0) & (key < _NONE)
    tiles = min(count, min(most_slots, count) + count // tile)
    # The i-th tile begins where i + 1 beginnings have been counted: comparisons, because a scatter would need atomics.
    counted = jnp.cumsum(begins, dtype=jnp.int32)
    start = jnp.sum(counted[None] <= jnp.arange(tiles, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    there = start < count
    slot = jnp.where(there, key[jnp.minimum(start, count - 1)], -1).astype(jnp.int32)
    end = jnp.minimum(jnp.concatenate([start[1:], jnp.full(1, count, jnp.int32)]), (key < _NONE).sum(dtype=jnp.int32))
    return Plan(order, slot, start, jnp.where(there, end - start, 0))


def slot_experts_gpu(
    banks: Sequence[ExpertWeights],
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    *,
    limit: float = 0.0,
    most_slots: int,
    how: GpuKernels,
) -> Float[Array, "tokens hidden"]:
    """As `slot_experts_xla`; sums are float32 throughout, what lies between the two products is in the type of x.

    Args:
        most_slots: distinct slots that can occur at most: a layer's experts.
    """
    (tokens, k), hidden, inner = slots.shape, x.shape[1], banks[0].w_out.shape[2]
    count, itemsize = tokens * k, x.dtype.itemsize
    up, down = blocks_for(count, inner, hidden, itemsize), blocks_for(count, hidden, inner, itemsize)
    plan = make_plan(slots, up.rows, most_slots)
    # A tile may reach past the last row: what is indexed by row is a tile longer.
    order = jnp.pad(plan.order, (0, up.rows))
    tiles = (plan.slot, plan.start, plan.rows)

    def run(kernel, rows_of, blocks, parts, width, dtype, name):
        flat = [part for bank in parts for part in bank if part is not None]
        kernel = functools.partial(kernel, blocks, [tuple(p is not None for p in bank) for bank in parts], limit)
        grid = (len(plan.slot), -(-width // blocks.outputs))
        result = jax.ShapeDtypeStruct((count + blocks.rows, width), dtype)
        arguments = [*rows_of, *tiles, *flat]
        (out,) = kernel_call(
            kernel, grid, [result], arguments, name=name, how=how, warps=blocks.warps, stages=blocks.stages
        )
        return out

    into = [(bank.w_in, bank.b_in, bank.s_in) for bank in banks]
    out_of = [(bank.w_out, bank.b_out, bank.s_out) for bank in banks]
    between = run(_up, (x, order // k), up, into, inner, x.dtype, "experts_up")
    y = run(_down, (between, order), down, out_of, hidden, jnp.float32, "experts_down")
    # Assignments to no slot have rows that nobody wrote.
    y = jnp.where((slots < 0)[:, :, None], 0.0, y[:count].reshape(tokens, k, hidden))
    return weighted_sum(x, y, slots, weights)


class _Tile(NamedTuple):
    """One program's rows and outputs, and which of them are there."""

    slot: Array
    row: Array
    rows_there: Array
    column: Array
    columns_there: Array


def _tile(blocks, width, slot_ref, start_ref, rows_ref):
    t = pl.program_id(0)
    lane, column = jnp.arange(blocks.rows), pl.program_id(1) * blocks.outputs + jnp.arange(blocks.outputs)
    return _Tile(slot_ref[t], start_ref[t] + lane, lane < rows_ref[t], column, column < width)


def _each_bank(banks, refs, slot, run):
    """Call `run` with the bank that holds a slot: its row there, its weight, bias and scale."""
    refs, first = list(refs), 0
    for present in banks:
        parts: list[Any] = [refs.pop(0) if there else None for there in present]
        size = parts[0].shape[0]

        @pl.when((slot >= first) & (slot < first + size))
        def _(parts=parts, first=first):
            run(slot - first, *parts)

        first += size


def _product(blocks, x_ref, x_rows, rows_there, w_ref, index, columns, columns_there, carry_shape):
    """Sums of rows of x with rows `columns` (one list, or several for as many sums) of the weight `w_ref[index]`."""
    inputs = x_ref.shape[1]

    def piece(i, sums):
        at = i * blocks.inputs + jnp.arange(blocks.inputs)
        there = at < inputs
        x = triton.load(x_ref.at[x_rows[:, None], at[None]], mask=rows_there[:, None] & there[None], other=0.0)

        def one(column, total):
            mask = columns_there[:, None] & there[None]
            w = triton.load(w_ref.at[index, column[:, None], at[None]], mask=mask, other=0)
            return total + dot(x, w.astype(x.dtype), transposed=True)

        return tuple(one(column, total) for column, total in zip(columns, sums, strict=True))

    zeros = tuple(jnp.zeros(carry_shape, jnp.float32) for _ in columns)
    return jax.lax.fori_loop(0, -(-inputs // blocks.inputs), piece, zeros)


def _outputs(total, index, column, there, bias, scale):
    """Scaled, with the bias."""
    if scale is not None:
        total = total * triton.load(scale.at[index, column], mask=there, other=0.0)[None]
    if bias is not None:
        total = total + triton.load(bias.at[index, column], mask=there, other=0.0).astype(jnp.float32)[None]
    return total


def _up(blocks, banks, limit, x_ref, token_ref, slot_ref, start_ref, rows_ref, *refs):
    *refs, out_ref = refs
    inner = out_ref.shape[1]
    tile = _tile(blocks, inner, slot_ref, start_ref, rows_ref)
    token = triton.load(token_ref.at[tile.row], mask=tile.rows_there, other=0)

    def run(index, w_ref, bias, scale):
        columns, there = (tile.column, inner + tile.column), tile.columns_there
        shape = (blocks.rows, blocks.outputs)
        sums = _product(blocks, x_ref, token, tile.rows_there, w_ref, index, columns, there, shape)
        gate, up = (_outputs(s, index, c, there, bias, scale) for s, c in zip(sums, columns, strict=True))
        at = out_ref.at[tile.row[:, None], tile.column[None]]
        mask = tile.rows_there[:, None] & there[None]
        triton.store(at, gate_up(gate, up, limit).astype(out_ref.dtype), mask=mask)

    _each_bank(banks, refs, tile.slot, run)


def _down(blocks, banks, limit, inner_ref, order_ref, slot_ref, start_ref, rows_ref, *refs):
    *refs, out_ref = refs
    tile = _tile(blocks, out_ref.shape[1], slot_ref, start_ref, rows_ref)

    def run(index, w_ref, bias, scale):
        shape, there = (blocks.rows, blocks.outputs), tile.columns_there
        (total,) = _product(blocks, inner_ref, tile.row, tile.rows_there, w_ref, index, (tile.column,), there, shape)
        total = _outputs(total, index, tile.column, there, bias, scale)
        # Rows that are not there have a place each, so that none is named twice.
        spare = out_ref.shape[0] - blocks.rows + jnp.arange(blocks.rows)
        target = jnp.where(tile.rows_there, triton.load(order_ref.at[tile.row], mask=tile.rows_there, other=0), spare)
        at = out_ref.at[target[:, None], tile.column[None]]
        triton.store(at, total, mask=tile.rows_there[:, None] & there[None])

    _each_bank(banks, refs, tile.slot, run)
