"""The decoder: parameters as NNX modules, one layer as a pure function, and the whole model for training and reference.

Modules only hold parameters, stacked over layers so that one `lax.scan` runs them; they are plain pytrees and go through
`jax.jit` and `jax.grad` as they are. How a layer's routed experts are computed is an argument (`moe`): dense for the
reference, grouped for training, dispatched over devices for serving (dispatch.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from dancemoe_jax.attention import attend, rms_norm, rotate
from dancemoe_jax.config import ModelConfig
from dancemoe_jax.experts import dense_experts, swiglu
from dancemoe_jax.router import route


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype))


class Layers(nnx.Module):
    """Everything of the decoder layers that is not a routed expert; leading axis: layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        c, n = config, config.num_layers
        self.attention_norm = nnx.Param(jnp.ones((n, c.hidden_size), dtype))
        self.q = _normal(rngs, (n, c.hidden_size, c.num_heads, c.head_dim), c.hidden_size, dtype)
        self.k = _normal(rngs, (n, c.hidden_size, c.num_kv_heads, c.head_dim), c.hidden_size, dtype)
        self.v = _normal(rngs, (n, c.hidden_size, c.num_kv_heads, c.head_dim), c.hidden_size, dtype)
        self.o = _normal(rngs, (n, c.num_heads, c.head_dim, c.hidden_size), c.num_heads * c.head_dim, dtype)
        self.q_norm = nnx.Param(jnp.ones((n, c.head_dim), dtype)) if c.qk_norm else None
        self.k_norm = nnx.Param(jnp.ones((n, c.head_dim), dtype)) if c.qk_norm else None
        self.moe_norm = nnx.Param(jnp.ones((n, c.hidden_size), dtype))
        self.router = _normal(rngs, (n, c.hidden_size, c.num_experts), c.hidden_size, dtype)
        shared = c.shared_expert_size
        self.shared_in = _normal(rngs, (n, c.hidden_size, 2 * shared), c.hidden_size, dtype) if shared else None
        self.shared_out = _normal(rngs, (n, shared, c.hidden_size), shared, dtype) if shared else None


class Experts(nnx.Module):
    """All routed experts in logical order. `w_in` holds gate, then up, side by side."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        c = config
        grid = (c.num_layers, c.num_experts)
        self.w_in = _normal(rngs, (*grid, c.hidden_size, 2 * c.expert_size), c.hidden_size, dtype)
        self.w_out = _normal(rngs, (*grid, c.expert_size, c.hidden_size), c.expert_size, dtype)


class Decoder(nnx.Module):
    """Embedding, decoder layers, final norm and head: what every device holds. Routed experts live apart."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        self.embedding = _normal(rngs, (config.vocab_size, config.hidden_size), config.hidden_size, dtype)
        self.layers = Layers(config, rngs, dtype)
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        shape = (config.hidden_size, config.vocab_size)
        self.head = None if config.tie_embeddings else _normal(rngs, shape, config.hidden_size, dtype)


def qkv(config: ModelConfig, layer: Layers, h, positions):
    """Queries, keys and values of one layer's (normed) input; queries and keys normed and rotated."""
    q = jnp.einsum("btd,dhk->bthk", h, layer.q[...])
    k = jnp.einsum("btd,dhk->bthk", h, layer.k[...])
    v = jnp.einsum("btd,dhk->bthk", h, layer.v[...])
    if layer.q_norm is not None and layer.k_norm is not None:
        q = rms_norm(q, layer.q_norm[...], config.rms_eps)
        k = rms_norm(k, layer.k_norm[...], config.rms_eps)
    return rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta), v


def decoder_layer(
    config: ModelConfig,
    layer: Layers,
    x: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    attention: Callable,
    moe: Callable,
):
    """One layer on the residual stream `x`.

    Args:
        attention: (q, k, v) -> (heads' outputs, anything it wants handed back, such as a cache).
        moe: (tokens [n, hidden], topk_weights, topk_ids, logits) -> (sum of routed experts, anything).

    Returns:
        The new residual stream and what `attention` and `moe` handed back.
    """
    with jax.named_scope("attention"):
        heads, kept = attention(*qkv(config, layer, rms_norm(x, layer.attention_norm[...], config.rms_eps), positions))
        x = x + jnp.einsum("bthk,hkd->btd", heads, layer.o[...])
    with jax.named_scope("moe"):
        h = rms_norm(x, layer.moe_norm[...], config.rms_eps).reshape(-1, config.hidden_size)
        routed, aux = moe(h, *route(config, layer.router[...], h))
        if layer.shared_in is not None and layer.shared_out is not None:
            routed = routed + swiglu(h, layer.shared_in[...], layer.shared_out[...])
        return x + routed.reshape(x.shape).astype(x.dtype), kept, aux


def head_logits(
    config: ModelConfig, decoder: Decoder, x: Float[Array, "*shape hidden"]
) -> Float[Array, "*shape vocab"]:
    x = rms_norm(x, decoder.final_norm[...], config.rms_eps)
    head = decoder.embedding[...].T if decoder.head is None else decoder.head[...]
    return (x @ head).astype(jnp.float32)


def forward(
    config: ModelConfig,
    decoder: Decoder,
    experts: Experts,
    tokens: Int[ArrayLike, "batch tokens"],
    moe: Callable | None = None,
    remat: bool = False,
):
    """Logits of whole sequences on one device, without a cache.

    Args:
        moe: (h, w_in, w_out, topk_weights, topk_ids, logits) -> (routed sum, aux). The default computes every expert
            for every token: slow, plainly right, the reference that all other paths are tested against.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Returns:
        Float32 logits [batch, tokens, vocab] and the per-layer `aux` stacked over layers.
    """
    moe = moe or _reference_moe
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def body(x, stacked):
        layer, own = stacked
        x, _, aux = decoder_layer(
            config, layer, x, positions,
            attention=lambda q, k, v: (attend(q, k, v, positions, positions), None),
            moe=lambda h, *routing: moe(h, own.w_in[...], own.w_out[...], *routing),
        )  # fmt: skip
        return x, aux

    x = decoder.embedding[...][tokens]
    x, aux = jax.lax.scan(jax.checkpoint(body) if remat else body, x, (decoder.layers, experts))
    return head_logits(config, decoder, x), aux


def _reference_moe(h, w_in, w_out, topk_weights, topk_ids, logits):
    return dense_experts(h, w_in, w_out, topk_weights, topk_ids), topk_ids
