"""The router: which experts a token goes to and with what weight, and the two losses that keep it healthy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.linear import StackedWeight, linear
from dancemoe_jax.model.config import ModelConfig


def route(
    config: ModelConfig,
    router: Array | StackedWeight,
    h: Float[Array, "tokens hidden"],
    bias: Float[Array, " experts"] | None = None,
    correction: Float[Array, " experts"] | None = None,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Float[Array, "tokens experts"]]:
    """Choose `top_k` experts for each token (config.Routing says how).

    Args:
        router: weight [experts, hidden].
        bias: of the logits; correction: of the choice alone.

    Returns:
        topk_weights, topk_ids and the logits they come from, all float32 or int32.
    """
    routing = config.routing
    logits = linear(h.astype(jnp.float32), router)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None]
    scores = jax.nn.sigmoid(logits) if routing.score == "sigmoid" else jax.nn.softmax(logits)
    choice = scores if correction is None else scores + correction.astype(jnp.float32)[None]
    if routing.groups > 1:
        grouped = choice.reshape(len(h), routing.groups, -1)
        merit = jax.lax.top_k(grouped, 2 if routing.correction else 1)[0].sum(-1)
        best = jax.lax.top_k(merit, routing.top_groups)[1]
        open_groups = (best[:, :, None] == jnp.arange(routing.groups)[None, None]).any(1)
        choice = jnp.where(open_groups[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    topk_ids = jax.lax.top_k(choice, config.top_k)[1]
    topk_weights = jnp.take_along_axis(scores, topk_ids, axis=1)
    if routing.normalize:
        # The smallest normal number guards a sigmoid router whose chosen scores all vanish.
        topk_weights = topk_weights / jnp.maximum(topk_weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return topk_weights * routing.scale, topk_ids, logits


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
