"""Training as pure functions: the batch of a step, the loss, and one optimizer step.

Everything about step n follows from (config, seed, n), so a run resumed from a checkpoint continues as if never stopped.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer

from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, Experts, forward
from dancemoe_jax.model.experts import grouped_experts
from dancemoe_jax.model.router import router_losses


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        batch: sequences a step, spread evenly over the domains.
        context: tokens a sequence.
        warmup: steps of linear rise to `learning_rate`, followed by a cosine fall to a tenth of it.
        balance: weight of the load-balancing loss; z: weight of the router z-loss (means over layers).
    """

    steps: int = 5000
    batch: int = 12
    context: int = 256
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.01
    z: float = 1e-3
    seed: int = 0


class TrainState(NamedTuple):
    decoder: Decoder
    experts: Experts
    optimizer: optax.OptState
    step: jax.Array


class Metrics(NamedTuple):
    """Losses in nats a token; `domain_loss` [domains] in the order of the batch."""

    domain_loss: jax.Array
    balance: jax.Array
    z: jax.Array
    grad_norm: jax.Array


def schedule(train: TrainConfig) -> optax.Schedule:
    warmup = min(train.warmup, max(1, train.steps // 2))
    return optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, warmup, max(train.steps, warmup + 1), train.learning_rate / 10
    )


def optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind gradient clipping; only matrices decay, not norms' scales."""

    def decays(params):
        return jax.tree.map(lambda p: p.ndim > 2, params)

    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.adamw(schedule(train), b2=0.95, weight_decay=train.weight_decay, mask=decays),
    )


def init_state(config: ModelConfig, train: TrainConfig) -> TrainState:
    decoder, experts = Decoder(config, nnx.Rngs(train.seed)), Experts(config, nnx.Rngs(train.seed + 1))
    return TrainState(decoder, experts, optimizer(train).init(cast(Any, (decoder, experts))), jnp.zeros((), jnp.int32))


def batch_at(
    train: TrainConfig, domains: Sequence[Integer[np.ndarray, "_"]], step: int
) -> Integer[np.ndarray, "batch tokens"]:
    """Tokens [batch, context + 1] of a step: random windows, the same number from each domain, domain by domain."""
    rng = np.random.default_rng([train.seed, step])
    width = train.context + 1
    each = train.batch // len(domains)
    starts = [rng.integers(0, len(tokens) - width, each) for tokens in domains]
    rows = [tokens[s : s + width] for tokens, begin in zip(domains, starts, strict=True) for s in begin]
    return np.stack(rows).astype(np.int32)


def _training_moe(h, weights, topk_weights, topk_ids, logits):
    return grouped_experts(h, weights.w_in, weights.w_out, topk_weights, topk_ids), router_losses(logits, topk_ids)


def token_losses(
    config: ModelConfig, decoder: Decoder, experts: Experts, tokens: Int[ArrayLike, "batch tokens"]
) -> tuple[Float[Array, "batch tokens-1"], Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy [batch, tokens - 1] of each next token in nats, and the router losses averaged over layers."""
    tokens = jnp.asarray(tokens)
    logits, (balance, z) = forward(config, decoder, experts, tokens[:, :-1], moe=_training_moe, remat=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses, balance.mean(), z.mean()


@functools.partial(jax.jit, static_argnames=("config", "train", "num_domains"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    tokens: Int[ArrayLike, "batch tokens"],
    *,
    config: ModelConfig,
    train: TrainConfig,
    num_domains: int,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on tokens [batch, context + 1] ordered by domain."""

    def loss(params):
        decoder, experts = params
        losses, balance, z = token_losses(config, decoder, experts, tokens)
        return losses.mean() + train.balance * balance + train.z * z, (losses, balance, z)

    params: Any = (state.decoder, state.experts)  # optax's types know no tree of modules
    (_, (losses, balance, z)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer(train).update(grads, state.optimizer, params)
    decoder, experts = cast(tuple[Decoder, Experts], optax.apply_updates(params, updates))
    metrics = Metrics(losses.reshape(num_domains, -1).mean(1), balance, z, optax.tree.norm(grads))
    return TrainState(decoder, experts, opt_state, state.step + 1), metrics
