"""One native call, also inside shard_map."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def native_call(name: str, shape: Sequence[int], dtype: Any, *arguments: jax.Array, **attributes: Any) -> jax.Array:
    """Result of the native call `name`; varies over a mesh's axes as its arguments do together."""
    return native_results(name, [(shape, dtype)], *arguments, **attributes)[0]


def native_results(
    name: str, results: Sequence[tuple[Sequence[int], Any]], *arguments: jax.Array, **attributes: Any
) -> Sequence[jax.Array]:
    """All results, of these shapes and types, of a native call that has several."""
    # Scalars go as vectors of one: the layout of an array without axes would itself be an array without elements.
    arguments = varying_together([jnp.reshape(a, 1) if jnp.ndim(a) == 0 else a for a in arguments])
    like = [alike(shape, dtype, arguments) for shape, dtype in results]
    return jax.ffi.ffi_call(name, like)(*arguments, **attributes)


def varying_together(arguments: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The arguments, each varying over every mesh axis that one of them varies over."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arguments))

    def varying(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(a).manual_axis_type.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return tuple(map(varying, arguments))


def alike(shape: Sequence[int], dtype: Any, arguments: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """A result that varies as `arguments`, which vary alike."""
    like, where = jax.typeof(arguments[0]), {}
    if like.manual_axis_type.varying:
        sharding = NamedSharding(like.sharding.mesh, P(*[None] * len(shape)))
        where = {"sharding": sharding, "manual_axis_type": like.manual_axis_type}
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), **where)
