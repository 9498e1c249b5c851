"""A scan over layers of one kind, whose large weights stay where they lie in the stack of all layers."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from dancemoe_jax.kernels.gpu_call import GpuKernels
from dancemoe_jax.kernels.linear import StackedWeight
from dancemoe_jax.kernels.norm import rms_norm_native, rms_norm_xla, rotated_native, rotated_xla

# Parameters of products, which native calls take where they lie.
_PRODUCTS = frozenset(
    ("q", "k", "v", "o", "q_down", "kv_down", "k_up", "v_up", "router", "shared_in", "shared_out", "shared_gate")
)


class LayerWeights:
    """One layer's part of each parameter of `Layers`, by the same names: arrays, or for products a StackedWeight.

    Attributes:
        norm: (x, scale, eps) -> x normed, natively where products are native.
        rotated: (heads, cosines, sines, interleaved, norm, eps) -> the heads normed and rotated, in the same way.
        split, joined: arrays cut along their last axis, (x, at) -> two, and put together, (first, second) -> one.
    """

    def __init__(self, names: Iterable[str], parts: dict[str, Any], native: bool, active: Bool[Array, " rows"] | None):
        self.norm = functools.partial(rms_norm_native, active=active) if native else rms_norm_xla
        self.rotated: Callable[..., Array] = functools.partial(rotated_native, active=active) if native else rotated_xla
        # XLA makes float32 of bfloat16 and back again on CPUs, even to copy it; of integers it does not.
        self.split: Callable[..., tuple[Array, Array]] = _by_bits(_split) if native else _split
        self.joined: Callable[..., Array] = _by_bits(_joined) if native else _joined
        for name in names:
            setattr(self, name, parts.get(name))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a layer of this kind has no parameter {name!r}")


def _split(x: Array, *, at: int) -> tuple[Array, Array]:
    first, second = jnp.split(x, [at], axis=-1)
    return first, second


def _joined(first: Array, second: Array) -> Array:
    return jnp.concatenate([first, second], axis=-1)


def _by_bits(move: Callable[..., Any]) -> Callable[..., Any]:
    """What moves numbers and computes nothing, done to their bits. Not differentiable."""

    def moved(*arrays: Array, **where: Any) -> Any:
        kind = arrays[0].dtype
        if kind.itemsize != 2:
            return move(*arrays, **where)
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
        return jax.tree.map(lambda made: jax.lax.bitcast_convert_type(made, kind), move(*bits, **where))

    return moved


def scan_run(
    body: Callable,
    layers: nnx.Module,
    numbers: range,
    carry: Any,
    inputs: tuple[Any, ...],
    *,
    remat: bool,
    native: bool,
    active: Bool[Array, " rows"] | None,
    gpu: GpuKernels,
) -> tuple[Any, Any]:
    """Go through one run of layers.

    Args:
        body: (carry, (layer: LayerWeights, number, *inputs)) -> (carry, aux).
        layers: the run's parameters, stacked; numbers: of its layers.
        inputs: pytrees with a leading axis over the run's layers.
        remat, native, active, gpu: as in `decoder.scan_layers`.

    Returns:
        carry, and `aux` of the layers stacked.
    """
    parts = {name: value[...] for name, value in vars(layers).items() if isinstance(value, nnx.Variable)}
    # In the order of the parameters: a set's order differs from process to process, and with it the program, so that no
    # start would find what an earlier one has compiled.
    stacks = {name: parts.pop(name) for name in ([n for n in parts if n in _PRODUCTS] if native or gpu else ())}

    def one(carry, own):
        sliced, number, *rest = own
        lying = {name: StackedWeight(stack, number - numbers.start, active, gpu) for name, stack in stacks.items()}
        return body(carry, (LayerWeights(vars(layers).keys(), sliced | lying, native, active), number, *rest))

    own = (parts, jnp.arange(numbers.start, numbers.stop, dtype=jnp.int32), *inputs)
    return jax.lax.scan(jax.checkpoint(one) if remat else one, carry, own)
