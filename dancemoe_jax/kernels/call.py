"""One native call, also inside shard_map."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def native_call(name: str, shape: tuple[int, ...], dtype: Any, *arguments: jax.Array, **attributes: Any) -> jax.Array:
    """Result of the native call `name`; varies over a mesh's axes as its arguments do together."""
    # Scalars go as vectors of one: the layout of an array without axes would itself be an array without elements.
    arguments = tuple(jnp.reshape(a, 1) if jnp.ndim(a) == 0 else a for a in arguments)
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arguments))

    def varying(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(a).manual_axis_type.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    arguments = tuple(map(varying, arguments))
    like, where = jax.typeof(arguments[0]), {}
    if axes:
        sharding = NamedSharding(like.sharding.mesh, P(*[None] * len(shape)))
        where = {"sharding": sharding, "manual_axis_type": like.manual_axis_type}
    result = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), **where)
    return jax.ffi.ffi_call(name, result)(*arguments, **attributes)
