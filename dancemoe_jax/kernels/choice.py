"""A router's choice of experts from its logits: the native call (choice.cc) and its twin in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.kernels.call import native_results


def choose_native(
    logits: Float[Array, "tokens experts"],
    correction: Float[Array, " experts"] | None = None,
    active: Bool[Array, " tokens"] | None = None,
    *,
    k: int,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """As `choose_xla`. A token's sums have one order: the same bits whatever other tokens there are.

    Tokens that are not active get the first k experts, with no weight.
    """
    shape = (len(logits), k)
    extra = () if correction is None else (correction.astype(jnp.float32),)
    weights, ids = native_results(
        "dancemoe_choice",
        [(shape, jnp.float32), (shape, jnp.int32)],
        logits,
        jnp.ones(len(logits), bool) if active is None else active,
        *extra,
        sigmoid=sigmoid,
        normalize=normalize,
        scale=np.float32(scale),
        groups=np.int64(groups),
        top_groups=np.int64(top_groups),
    )
    return weights, ids


def choose_xla(
    logits: Float[Array, "tokens experts"],
    correction: Float[Array, " experts"] | None = None,
    *,
    k: int,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """Weights and ids of each token's experts, best first; arguments as the fields of model.config.Routing.

    Args:
        correction: added for choosing, not for weighing.
        k: experts of a token; sigmoid: scores are the sigmoid of each logit, not the softmax of all.
    """
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
    choice = scores if correction is None else scores + correction.astype(jnp.float32)[None]
    if groups > 1:
        grouped = choice.reshape(len(logits), groups, -1)
        merit = jax.lax.top_k(grouped, 1 if correction is None else 2)[0].sum(-1)
        best = jax.lax.top_k(merit, top_groups)[1]
        open_groups = (best[:, :, None] == jnp.arange(groups)[None, None]).any(1)
        choice = jnp.where(open_groups[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    ids = jax.lax.top_k(choice, k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if normalize:
        # The smallest normal number guards a sigmoid router whose chosen scores all vanish.
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return weights * scale, ids
