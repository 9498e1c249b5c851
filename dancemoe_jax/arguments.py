"""Checks of what callers pass to public functions: shapes and kinds of numbers, read from the arguments' types alone.

They read no value of an array, so inside a jitted function they run once, when it is traced.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.errors import ArgumentError
from dancemoe_jax.mesh import AXIS

_KINDS = {"integers": np.integer, "booleans": np.bool_, "numbers": np.number}


def check_array(
    name: str, array: Any, kind: Literal["integers", "booleans", "numbers"], axes: Mapping[str, int | None]
) -> None:
    """Check one array argument.

    Args:
        name: of the argument, for the message.
        axes: length of each axis by the axis' name, in order; None = any length.

    Raises:
        ArgumentError: it is no array, has other axes, or holds something else.

    >>> check_array("tokens", np.zeros((4, 2)), "integers", {"devices": 4, "rows": None})
    Traceback (most recent call last):
    dancemoe_jax.errors.ArgumentError: tokens: float64 [4, 2], must be integers [devices = 4, rows]
    """
    words = ", ".join(axis if length is None else f"{axis} = {length}" for axis, length in axes.items())
    rule = f"must be {kind} [{words}]"
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape is None or dtype is None:
        try:
            array = np.asarray(array)
        except ValueError:  # lists of unequal lengths
            raise ArgumentError(f"{name}: no array, {rule}") from None
        shape, dtype = array.shape, array.dtype
    fits = len(shape) == len(axes) and all(
        length in (None, size) for size, length in zip(shape, axes.values(), strict=True)
    )
    if not fits or not jnp.issubdtype(dtype, _KINDS[kind]):
        raise ArgumentError(f"{name}: {dtype} {list(shape)}, {rule}")


def check_mesh(mesh: Any, devices: int) -> None:
    """Raise ArgumentError unless `mesh` is one of `make_mesh` over so many devices."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != (AXIS,):
        axes = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else type(mesh).__name__
        raise ArgumentError(f"mesh: {axes}, must be a mesh over the axis {AXIS!r}; make it with make_mesh")
    if mesh.size != devices:
        raise ArgumentError(
            f"mesh: {mesh.size} devices, layout: {devices}; both must be over the same devices in order"
        )
