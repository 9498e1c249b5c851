"""The likeliest token of rows of logits: the native call (argmax.cc) and its twin in XLA."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.kernels.call import native_call


def likeliest_native(logits: Float[Array, "rows vocab"], active: Bool[Array, " rows"]) -> Int[Array, " rows"]:
    """As `likeliest_xla`, at the cost of the rows that count."""
    return native_call("dancemoe_argmax", logits.shape[:1], jnp.int32, logits, active)


def likeliest_xla(logits: Float[Array, "rows vocab"], active: Bool[Array, " rows"]) -> Int[Array, " rows"]:
    """Index of each row's largest logit, of several such the first one; 0 in rows that do not count."""
    return jnp.where(active, jnp.argmax(logits, -1), 0).astype(jnp.int32)
