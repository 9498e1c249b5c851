"""Noticing NaN and infinity in a step: which rows they are in, and from which layer on.

They would decide every token that follows. What is not finite in the residual stream stays so
through the layers above, so counting the layers that left a row finite tells where it began.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.model.config import ModelConfig


def finite_rows(x: Float[Array, "rows tokens width"], valid: Bool[Array, "rows tokens"]) -> Int[Array, " rows"]:
    """1 for rows whose tokens that count are all finite, 0 for the others.

    The sum of squares has to be finite too: a norm of what is larger makes zeros of it.
    """
    finite = jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))
    return (finite | ~valid).all(1).astype(jnp.int32)


def finite_tokens(*parts: Float[Array, "rows tokens heads width"] | None) -> Bool[Array, "rows tokens 1 1"]:
    """Of each token whether all of its numbers are finite."""
    finite = [jnp.isfinite(part).all((2, 3), keepdims=True) for part in parts if part is not None]
    return finite[0] if len(finite) == 1 else finite[0] & finite[1]


def all_finite(config: ModelConfig) -> int:
    """`StepResult.finite_layers` of a row in which everything is finite: its layers, and the logits."""
    return config.num_layers + 1


def not_finite(config: ModelConfig, finite_layers: int) -> str:
    """What is wrong with a row whose `StepResult.finite_layers` is less than `all_finite`, and what to do about it."""
    part = f"layer {finite_layers}" if finite_layers < config.num_layers else "the output head"
    return (
        f"its numbers are NaN or infinity from {part} on (layers 0 to {config.num_layers - 1}); serve the model with "
        "--dtype float32, and if that does not help, export or download its weights again"
    )
