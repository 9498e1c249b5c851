"""The library of native CPU calls: found beside the package, or built once into the user's cache, or done without.

The calls themselves are in experts.py, linear.py, attention.py, norm.py, choice.py, argmax.py and zeros.py, each with its twin
in XLA.
"""

import ctypes
import functools
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dancemoe_jax.kernels import build

# "auto": native calls on CPUs where they can be had, XLA elsewhere. "xla": always XLA.
Kernels = Literal["auto", "xla"]

TARGETS = tuple(
    f"dancemoe_{name}" for name in ("experts", "linear", "attention", "argmax", "norm", "rotated", "choice", "zeros")
)

_log = logging.getLogger(__name__)


def use_native(kernels: Kernels, platform: str, dtype: Any = jnp.float32) -> bool:
    """Whether steps on this platform ("cpu", "gpu", …) with activations of this type take the native calls."""
    if kernels not in ("auto", "xla"):
        raise ValueError(f"kernels = {kernels!r}: must be 'auto' or 'xla'")
    suited = platform == "cpu" and dtype in (jnp.float32, jnp.bfloat16)
    return kernels == "auto" and suited and load() is not None


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library with its calls registered in JAX, or None, which is said once with what it costs."""
    try:
        path = build.SOURCES / build.LIBRARY
        return _registered(path if path.exists() else _built())
    except (build.BuildError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
        _log.warning(
            "no native CPU calls (%s): steps run through XLA, several times slower; install g++ or clang++", reason
        )
        return None


def _registered(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    library.dancemoe_instruction_set.restype = ctypes.c_char_p
    library.dancemoe_use_instruction_set.restype = ctypes.c_bool
    return library


def _built() -> Path:
    """The library in the user's cache, built there if it is not yet."""
    compiler = build.find_compiler()
    if compiler is None:
        raise build.BuildError("there is no C++ compiler")
    path = cache_folder() / f"{build.fingerprint(compiler, version('jaxlib'))}.so"
    if not path.exists():
        build.build(path, jax.ffi.include_dir(), compiler)
    return path


def cache_folder() -> Path:
    """Where this user's caches are, by the platform's rule."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dancemoe-jax"
    return Path.home() / ".cache" / "dancemoe-jax"
