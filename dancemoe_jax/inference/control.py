"""What every device tells all others with each step: whether it has tokens, and words that mean nothing here."""

import jax
import jax.numpy as jnp

from dancemoe_jax.mesh import AXIS


def share_control(busy, control):
    """Of every device whether it has tokens, and its control words: the one exchange that every step has."""
    own = busy[None].astype(jnp.int32)
    if control is not None:
        own = jnp.concatenate([own, control[0]])
    here = jnp.arange(jax.lax.axis_size(AXIS)) == jax.lax.axis_index(AXIS)
    everyone = jax.lax.psum(jnp.where(here[:, None], own[None], 0), AXIS)
    return everyone[:, 0] > 0, None if control is None else everyone[:, 1:]
