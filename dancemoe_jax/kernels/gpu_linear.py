"""Products of a few rows with one layer's weight of a stacked array, on a GPU, read where it lies.

A library call would have the layer's weight copied out of the stack first, which with few rows costs more than the product.
Its reference is kernels.linear.stacked_linear_xla.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.gpu_call import GpuKernels, dot, kernel_call, power_of_two

# With more rows the product takes so long that the copy does not count, and a library computes it better.
MOST_ROWS = 256


class _Blocks(NamedTuple):
    rows: int
    outputs: int
    inputs: int


def stacked_linear_gpu(
    x: Float[Array, "*rows inputs"],
    weight: Array,
    layer: Int[Array, ""] | int,
    *,
    dtype: Any = None,
    transposed: bool = False,
    how: GpuKernels,
) -> Float[Array, "*rows outputs"]:
    """x times the transpose of `weight[layer]`, for at most `MOST_ROWS` rows; arguments as of `stacked_linear_xla`."""
    heads = weight.shape[1:-2]
    groups, inputs, outputs = math.prod(heads), x.shape[-1], weight.shape[-1 if transposed else -2]
    rows = x.reshape(-1, groups, inputs)
    weight = weight.reshape(weight.shape[0], groups, *weight.shape[-2:])
    height = min(64, power_of_two(len(rows)))
    width = min(power_of_two(outputs), 16 if outputs <= 1024 else 32 if outputs <= 8192 else 64)
    # Three stages of both operands fit the shared memory of an RTX 30 card.
    piece = (128 if height + width <= 64 else 64) // (2 if x.dtype.itemsize == 4 else 1)
    blocks = _Blocks(height, width, min(piece, power_of_two(inputs)))
    grid = (-(-len(rows) // blocks.rows), -(-outputs // blocks.outputs), groups)
    result = jax.ShapeDtypeStruct((len(rows), groups, outputs), dtype or x.dtype)
    arguments = [rows, weight, jnp.asarray(layer, jnp.int32).reshape(1)]
    kernel = functools.partial(_multiply, blocks, transposed)
    (y,) = kernel_call(kernel, grid, [result], arguments, name="linear", how=how, stages=3)
    return y.reshape(*x.shape[: x.ndim - 1 - len(heads)], *heads, outputs)


def _multiply(blocks, transposed, x_ref, weight_ref, layer_ref, out_ref):
    row = pl.program_id(0) * blocks.rows + jnp.arange(blocks.rows)
    column = pl.program_id(1) * blocks.outputs + jnp.arange(blocks.outputs)
    rows_there, columns_there = row < x_ref.shape[0], column < out_ref.shape[2]
    inputs, layer, group = x_ref.shape[2], layer_ref[0], pl.program_id(2)

    def piece(i, total):
        at = i * blocks.inputs + jnp.arange(blocks.inputs)
        there = at < inputs
        x = triton.load(x_ref.at[row[:, None], group, at[None]], mask=rows_there[:, None] & there[None], other=0.0)
        if transposed:
            place, mask = (at[:, None], column[None]), there[:, None] & columns_there[None]
        else:
            place, mask = (column[:, None], at[None]), columns_there[:, None] & there[None]
        w = triton.load(weight_ref.at[layer, group, *place], mask=mask, other=0)
        return total + dot(x, w.astype(x.dtype), transposed=not transposed)

    zeros = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
    total = jax.lax.fori_loop(0, -(-inputs // blocks.inputs), piece, zeros)
    place = out_ref.at[row[:, None], group, column[None]]
    triton.store(place, total.astype(out_ref.dtype), mask=rows_there[:, None] & columns_there[None])
