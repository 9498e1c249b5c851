"""Pallas kernels for NVIDIA GPUs: whether a platform takes them, and one call, also inside shard_map.

Triton's lowering is what reaches Ampere, Ada and Hopper alike in every JAX that is supported; it is to go one day, and
Pallas' other lowering is for Hopper and newer today. So the kernels keep to what both have, nothing outside these
modules knows which it is, and where there is no kernel steps run through XLA.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dancemoe_jax.kernels.call import alike, varying_together

# Compiled for the card, or carried out operation by operation on any device, for tests; "loop" for GPUs that the kernels are
# not for, where the expert product is a loop that does not wait (gpu_loop.py) and the rest XLA's; None: XLA throughout.
GpuKernels = Literal["compiled", "interpreted", "loop"] | None
# The least compute capability that Triton compiles for.
_LEAST = 8.0


def gpu_kernels(kernels: str, devices: Iterable[Any]) -> GpuKernels:
    """Which kernels steps on these devices take, the same on all of them.

    Args:
        kernels: "auto" or "xla" (kernels.library.Kernels).
        devices: of the mesh, or devices that are compiled for and not there.
    """
    devices = list(devices)
    if kernels != "auto" or any(device.platform not in ("gpu", "cuda") for device in devices):
        return None
    return "compiled" if all(map(_compiles, devices)) else "loop"


def _compiles(device: Any) -> bool:
    """Whether Triton compiles for a GPU."""
    capability = getattr(device, "compute_capability", None)
    return "NVIDIA" in device.device_kind and (capability is None or float(capability) >= _LEAST)


def kernel_call(
    kernel: Callable,
    grid: tuple[int, ...],
    results: Sequence[jax.ShapeDtypeStruct],
    arguments: Sequence[jax.Array],
    *,
    name: str,
    how: GpuKernels,
    warps: int = 4,
    stages: int = 2,
) -> list[jax.Array]:
    """Run `kernel` once for every point of a grid. Results vary over a mesh's axes as the arguments do together."""
    arguments = varying_together(arguments)
    out_shape = [alike(one.shape, one.dtype, arguments) for one in results]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out_shape,
            in_specs=[pl.no_block_spec] * len(arguments),
            out_specs=[pl.no_block_spec] * len(out_shape),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=how == "interpreted",
            name=name,
        )(*arguments)


def dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a times b, or times the transpose of b, in float32: of float32 exactly so, not in TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size`: a block's length."""
    return max(least, 1 << (size - 1).bit_length())
