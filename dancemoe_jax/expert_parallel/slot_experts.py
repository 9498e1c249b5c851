"""Computing experts out of a device's slots: cost follows the assignments that exist, never the size of the pool."""

from jaxtyping import Array, Float, Int

from dancemoe_jax.expert_parallel.pool import ExpertPool
from dancemoe_jax.kernels.experts import slot_experts_native, slot_experts_xla
from dancemoe_jax.kernels.gpu_call import GpuKernels
from dancemoe_jax.kernels.gpu_experts import fits, slot_experts_gpu
from dancemoe_jax.kernels.gpu_loop import slot_experts_loop


def slot_experts(
    pool: ExpertPool,
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    *,
    native: bool,
    tile: int,
    limit: float = 0.0,
    gpu: GpuKernels = None,
    most_slots: int | None = None,
) -> Float[Array, "tokens hidden"]:
    """Weighted sum over each token's assignments to slots of this device's pool (inside shard_map).

    Args:
        slots: slot of each assignment; -1 for none (its weight does not matter).
        native: whether the native call computes it (kernels.library.use_native) or XLA.
        tile: rows that XLA computes at once; a few for decode, more for prefill.
        limit: of the experts' SwiGLU (ModelConfig.swiglu_limit).
        gpu: kernels that compute it on a GPU, where they take such a pool (kernels.gpu_call.gpu_kernels).
        most_slots: distinct slots that can occur at most: a layer's experts; None: any number.
    """
    if native:
        return slot_experts_native(pool.banks, x, slots, weights, limit=limit)
    if gpu:
        most = most_slots or slots.size
        if gpu == "loop" or not fits(pool.banks):
            return slot_experts_loop(pool.banks, x, slots, weights, limit=limit, most_slots=most)
        return slot_experts_gpu(pool.banks, x, slots, weights, limit=limit, most_slots=most, how=gpu)
    return slot_experts_xla(pool.banks, x, slots, weights, limit=limit, tile=tile)
