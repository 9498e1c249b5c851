"""Products of rows with one layer's weight of a stacked array: the native call (linear.cc) and its twin in XLA.

A scan over layers that took its layer's weight as an input would copy it first. Here the whole array and the layer's number
are arguments. A weight without a layer axis (an LM head, an embedding) is a stack of one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.kernels.call import native_call
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
    outputs = weight.shape[-1 if transposed else -2]
    extra = () if scale is None else (scale.astype(jnp.float32),)
    heads = weight.shape[1:-2]
    rows = x.reshape(-1, *heads, x.shape[-1])
    layer = jnp.asarray(layer, jnp.int32)
    shape = (len(rows), *heads, outputs)
    active = jnp.ones(len(rows), bool) if active is None else active
    arguments = (rows, weight, layer, active, *extra)
    y = native_call("dancemoe_linear", shape, dtype or x.dtype, *arguments, transposed=transposed)
    return y.reshape(*x.shape[:-1], outputs)


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
