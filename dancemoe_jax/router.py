"""The router: which experts a token goes to and with what weight, and the two losses that keep it healthy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancemoe_jax.config import ModelConfig


def route(
    config: ModelConfig, router: Float[Array, "hidden experts"], h: Float[Array, "tokens hidden"]
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Float[Array, "tokens experts"]]:
    """Choose `top_k` experts for each token.

    Returns:
        topk_weights, topk_ids and the logits they come from, all float32 or int32.
    """
    logits = h.astype(jnp.float32) @ router.astype(jnp.float32)
    topk_weights, topk_ids = jax.lax.top_k(jax.nn.softmax(logits), config.top_k)
    if config.norm_topk:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdims=True)
    return topk_weights, topk_ids, logits


def router_losses(
    logits: Float[Array, "tokens experts"], topk_ids: Int[Array, "tokens k"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Load-balancing loss `E * sum_e f_e p_e` (1 when even) and z-loss `mean(logsumexp^2)`.

    `f_e` is the share of assignments and `p_e` the mean probability of expert e. Both are taken over the whole batch,
    all domains together: balance then asks that every expert be used by *somebody*, and leaves experts free to
    specialise in a domain. Sources: Switch Transformer, section 2.2; ST-MoE, section 3.1.
    """
    experts = logits.shape[-1]
    share = jnp.zeros(experts).at[topk_ids.reshape(-1)].add(1.0) / topk_ids.size
    probability = jax.nn.softmax(logits).mean(0)
    balance = experts * jnp.sum(jax.lax.stop_gradient(share) * probability)
    return balance, jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
