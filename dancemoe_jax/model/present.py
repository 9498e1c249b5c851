"""Leaving out what a device without a token need not compute."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def where_present(present: Bool[Array, ""] | None, compute: Callable, *arguments: Any) -> Any:
    """compute(*arguments), or zeros in its place, which cost nothing, where nothing is present; None: something is."""
    if present is None:
        return compute(*arguments)
    axes = tuple(jax.typeof(present).manual_axis_type.varying)
    shapes = jax.eval_shape(compute, *arguments)

    def nothing(*_: Any) -> Any:
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
        return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros

    return jax.lax.cond(present, compute, nothing, *arguments)
