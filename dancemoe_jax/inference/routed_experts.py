"""One layer's routed experts as a step computes them, and what it counts of them."""

import jax.numpy as jnp

from dancemoe_jax.expert_parallel.dispatch import dispatch


def routed_experts(step, compute, valid, busy, own, h, topk_weights, topk_ids, logits):
    """One layer's routed experts, wherever they are: their sum, and (traffic, counts, ids) of the layer."""
    layer_tables, given = own
    if given is not None:
        topk_ids, topk_weights = given.ids, given.weights.astype(topk_weights.dtype)
    routed, traffic = dispatch(
        compute,
        step.layout.links,
        layer_tables,
        h,
        topk_weights,
        topk_ids,
        valid.reshape(-1),
        busy,
        transport=step.transport,
        wire_dtype=step.wire_dtype,
    )
    ones = jnp.broadcast_to(valid.reshape(-1, 1), topk_ids.shape).astype(jnp.int32)
    return routed, (traffic, jnp.zeros(step.config.num_experts, jnp.int32).at[topk_ids].add(ones), topk_ids)
