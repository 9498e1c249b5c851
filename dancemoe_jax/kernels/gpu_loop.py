"""The expert product on a GPU that the kernels are not for: a loop of fixed length, in XLA.

Its length is known beforehand, so the host need not ask how far it has come, and its products are sums that XLA fuses with
taking the weights out of the pool, so that none is copied first. They run without tensor cores: right, and slow for prompts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.experts import weighted_sum
from dancemoe_jax.kernels.gpu_experts import make_plan
from dancemoe_jax.kernels.swiglu import ExpertWeights, gated

_TILE = 8


def slot_experts_loop(
    banks: Sequence[ExpertWeights],
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    *,
    limit: float = 0.0,
    most_slots: int,
) -> Float[Array, "tokens hidden"]:
    """As `slot_experts_gpu`."""
    tokens, k = slots.shape
    plan = make_plan(slots, _TILE, most_slots)
    rows = jnp.concatenate([x[plan.order // k], jnp.zeros((_TILE, x.shape[1]), x.dtype)])

    def work(i, outputs):
        own, start, first = jax.lax.dynamic_slice_in_dim(rows, plan.start[i], _TILE), plan.start[i], 0
        result = jnp.zeros((_TILE, x.shape[1]), jnp.float32)
        for bank in banks:
            at, size = plan.slot[i] - first, len(bank.w_in)
            index = jnp.clip(at, 0, size - 1)
            inner = gated(_product(own, index, bank.w_in, bank.s_in, bank.b_in), limit)
            here = _product(inner.astype(x.dtype), index, bank.w_out, bank.s_out, bank.b_out)
            result = jnp.where((at >= 0) & (at < size), here, result)
            first += size
        # A tile may run into the rows of the next one, which comes later and overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(outputs, result, start, axis=0)

    empty = jax.lax.pcast(
        jnp.zeros(rows.shape, jnp.float32), tuple(jax.typeof(rows).manual_axis_type.varying), to="varying"
    )
    outputs = jax.lax.fori_loop(0, len(plan.slot), work, empty)
    place = jnp.argsort(plan.order)
    return weighted_sum(x, outputs[place].reshape(tokens, k, -1), slots, weights)


def _product(x, index, stack, scale, bias):
    """Sums of products in float32, of rows with the outputs of one expert."""

    def own(array):
        part = jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
        return (jax.lax.bitcast_convert_type(part, jnp.bfloat16) if part.dtype == jnp.uint16 else part).astype(
            jnp.float32
        )

    y = (x.astype(jnp.float32)[:, None] * own(stack)[None]).sum(-1)
    y = y if scale is None else y * own(scale)[None]
    return y if bias is None else y + own(bias)[None]
