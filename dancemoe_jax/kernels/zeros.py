"""Memory for weights and caches of CPU devices: the native call (zeros.cc) puts it on large pages, its twin is XLA's.

A core that reads pages of 4 kB spends about half its time on looking up where they are. Systems give large ones only to
programs that ask, which XLA does not.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dancemoe_jax.kernels.library import load

_LARGE = 2**22  # bytes from which on it is worth while


def zeros(shape: tuple[int, ...], dtype: Any, device: Any) -> jax.Array:
    """Zeros on one device, on large pages where it is a CPU and the system has some to give."""
    result = jax.ShapeDtypeStruct(shape, dtype)
    small = result.size * result.dtype.itemsize < _LARGE
    if small or device.platform != "cpu" or load() is None:
        return jnp.zeros(shape, dtype, device=device)
    with jax.default_device(device):
        return jax.jit(lambda: jax.ffi.ffi_call("dancemoe_zeros", result)())()
