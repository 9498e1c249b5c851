"""Products of rows with one layer's weight of a stacked array: the native call (linear.cc) and its twin in XLA.

A scan over layers that took its layer's weight as an input would copy it first. Here the whole array and the layer's number
are arguments. A weight without a layer axis (an LM head, an embedding) is a stack of one.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.kernels.call import native_results
from dancemoe_jax.kernels.gpu_call import GpuKernels
from dancemoe_jax.kernels.gpu_linear import MOST_ROWS, stacked_linear_gpu


class StackedWeight(NamedTuple):
    """One layer's weight, left where it lies. Products with it are native, or a GPU's kernels.

    Attributes:
        stack: the weights of all layers.
        layer: the layer's number.
        active: rows that count; a native product's others are zeros and cost nothing. None: all.
        gpu: the GPU's kernels that compute products; None: native calls.
    """

    stack: Array
    layer: Int[Array, ""] | int
    active: Bool[Array, " rows"] | None = None
    gpu: GpuKernels = None


def linear(
    x: Float[Array, "*rows inputs"], weight: Array | StackedWeight, dtype: Any = None
) -> Float[Array, "*rows outputs"]:
    """x times the transpose of `weight` [outputs, inputs], in the type of x or in `dtype`."""
    if isinstance(weight, StackedWeight):
        return _stacked(x, weight, dtype=dtype)
    y = x @ weight.astype(x.dtype).T
    return y if dtype is None else y.astype(dtype)


def linears(x: Float[Array, "*rows inputs"], weights: Sequence[Array | StackedWeight]) -> list[Array]:
    """`linear` of each weight, in one native call where they are native."""
    first = weights[0]
    if not isinstance(first, StackedWeight) or first.gpu is not None:
        return [linear(x, weight) for weight in weights]
    stacks = [weight.stack for weight in weights if isinstance(weight, StackedWeight)]
    return stacked_linears_native(x, stacks, first.layer, first.active)


def linear_of_heads(
    x: Float[Array, "*rows heads inputs"], weight: Array | StackedWeight, transposed: bool = False
) -> Float[Array, "*rows heads outputs"]:
    """The same with a weight for each head: [heads, outputs, inputs], or if `transposed` [heads, inputs, outputs]."""
    if isinstance(weight, StackedWeight):
        return _stacked(x, weight, transposed=transposed)
    return jnp.einsum("...hi,hio->...ho" if transposed else "...hi,hoi->...ho", x, weight)


def _stacked(x, weight: StackedWeight, dtype: Any = None, transposed: bool = False):
    stack, layer, active, gpu = weight
    if gpu is None:
        return stacked_linear_native(x, stack, layer, active, dtype=dtype, transposed=transposed)
    if x.size // x.shape[-1] // math.prod(stack.shape[1:-2]) > MOST_ROWS:
        return stacked_linear_xla(x, stack, layer, dtype=dtype, transposed=transposed)
    return stacked_linear_gpu(x, stack, layer, dtype=dtype, transposed=transposed, how=gpu)


def stacked_linear_native(
    x: Float[Array, "*rows inputs"],
    weight: Array,
    layer: Int[Array, ""] | int,
    active: Bool[Array, " rows"] | None = None,
    scale: Float[Array, "layers outputs"] | None = None,
    dtype: Any = None,
    transposed: bool = False,
) -> Float[Array, "*rows outputs"]:
    """As `stacked_linear_xla`. Each number is one sum in one order: the same bits whatever other rows there are."""
    scales = () if scale is None else (scale,)
    return stacked_linears_native(x, [weight], layer, active, scales, dtype, transposed)[0]


def stacked_linears_native(
    x: Float[Array, "*rows inputs"],
    weights: Sequence[Array],
    layer: Int[Array, ""] | int,
    active: Bool[Array, " rows"] | None = None,
    scales: Sequence[Array] = (),
    dtype: Any = None,
    transposed: bool = False,
    gated: bool = False,
) -> list[Array]:
    """`stacked_linear_native` of each of several weights of one type, in one call; `scales` of all of them or none.

    With `gated` x is [*rows, 2 * inputs], gates in front: the weights meet silu(gate) * up, in the type of x.
    """
    heads = weights[0].shape[1:-2]
    outputs = [weight.shape[-1 if transposed else -2] for weight in weights]
    rows = x.reshape(-1, *heads, x.shape[-1])
    found = native_results(
        "dancemoe_linear",
        [((len(rows), *heads, width), dtype or x.dtype) for width in outputs],
        rows,
        jnp.asarray(layer, jnp.int32),
        jnp.ones(len(rows), bool) if active is None else active,
        *weights,
        *(scale.astype(jnp.float32) for scale in scales),
        transposed=transposed,
        scaled=bool(scales),
        gated=gated,
    )
    return [y.reshape(*x.shape[:-1], width) for y, width in zip(found, outputs, strict=True)]


def stacked_linear_xla(
    x: Float[Array, "*rows inputs"],
    weight: Array,
    layer: Int[Array, ""] | int,
    active: Bool[Array, " rows"] | None = None,
    scale: Float[Array, "layers outputs"] | None = None,
    dtype: Any = None,
    transposed: bool = False,
) -> Float[Array, "*rows outputs"]:
    """x times the transpose of `weight[layer]`.

    Args:
        weight: [layers, outputs, inputs], float32, bfloat16 (or its bits as uint16), or int8 with a `scale`. With heads,
            [layers, heads, outputs, inputs]: x is then [..., heads, inputs].
        active: rows of x that count, all leading axes in one; the others give zeros.
        scale: of each output of int8 weights.
        dtype: of the result; default: that of x.
        transposed: the weight's last two axes are [inputs, outputs].
    """
    own = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    own = jax.lax.bitcast_convert_type(own, jnp.bfloat16) if own.dtype == jnp.uint16 else own
    own = jnp.swapaxes(own, -1, -2) if transposed else own
    product = "...i,oi->...o" if own.ndim == 2 else "...hi,hoi->...ho"
    y = jnp.einsum(product, x, own.astype(x.dtype), preferred_element_type=jnp.float32)
    if scale is not None:
        own_scale = jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)
        y = y * jnp.expand_dims(own_scale, tuple(range(y.ndim - own_scale.ndim)))
    if active is not None:
        y = jnp.where(active.reshape(*x.shape[: 1 - own.ndim], *[1] * (own.ndim - 1)), y, 0)
    return y.astype(dtype or x.dtype)
