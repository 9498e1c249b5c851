"""The next token of every sequence of a step, each by its own request's rules, where the logits are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dancemoe_jax.mesh import AXIS
from dancemoe_jax.sampling import mark_seen, sample


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="seen")
def choose(seen, tokens, valid, fresh, logits, rules, index, *, mesh):
    """Next tokens int32 [devices, rows], and what their requests have seen, the step's own tokens included.

    Args:
        seen: bool [devices, rows, vocab]; tokens, valid: [devices, rows, some]; fresh: [devices, rows], new requests.
        logits: [devices, rows, vocab], or [devices, 1, vocab] for the same in all rows.
        rules: SamplingRows of [devices, rows]; index: [devices, rows], tokens that the request has been given before.
    """

    def local(seen, tokens, valid, fresh, logits, rules, index):
        seen = mark_seen(seen[0], tokens[0], valid[0], fresh[0])
        logits = jnp.broadcast_to(logits[0], seen.shape)
        return seen[None], sample(logits, jax.tree.map(lambda a: a[0], rules), index[0], seen)[None]

    own: Any = P(AXIS)
    run = jax.shard_map(local, mesh=mesh, in_specs=own, out_specs=own)
    return run(seen, tokens, valid, fresh, logits, rules, index)
