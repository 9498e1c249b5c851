"""The router: which experts a token goes to and with what weight, and the two losses that keep it healthy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancemoe_jax.kernels.choice import choose_native, choose_xla
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
    choose: Callable[..., Any] = choose_xla
    if isinstance(router, StackedWeight) and router.gpu is None:
        choose = functools.partial(choose_native, active=router.active)
    topk_weights, topk_ids = choose(
        logits,
        correction,
        k=config.top_k,
        sigmoid=routing.score == "sigmoid",
        normalize=routing.normalize,
        scale=routing.scale,
        groups=routing.groups,
        top_groups=routing.top_groups,
    )
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
