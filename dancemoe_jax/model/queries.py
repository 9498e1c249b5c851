"""Queries, keys and values of one layer, in the two forms that models have them."""

import jax.numpy as jnp

from dancemoe_jax.kernels.linear import linear, linear_of_heads, linears
from dancemoe_jax.model.attention import along_last
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.layer_weights import LayerWeights

# Latent attention's inner norms have an epsilon of their own, whatever the configuration says of the others.
_LATENT_EPS = 1e-6


def grouped_qkv(config: ModelConfig, layer: LayerWeights, h, turns):
    """Queries, keys and values of one layer's (normed) input; queries and keys normed and rotated."""

    def heads(y, bias, norm):
        y = y if bias is None else y + along_last(bias, y)
        y = y.reshape(*y.shape[:2], -1, config.head_dim)
        if not config.clip_qkv:
            return y, norm
        if norm is not None:
            y = layer.norm(y.reshape(*y.shape[:2], -1, norm.shape[-1]), norm, config.rms_eps).reshape(y.shape)
        return jnp.clip(y, -config.clip_qkv, config.clip_qkv), None

    def rotated(y, bias, norm):
        y, norm = heads(y, bias, norm)
        return layer.rotated(y, *turns, config.rope.interleaved, norm, config.rms_eps)

    q, k, v = linears(h, (layer.q, layer.k, layer.v))
    return (
        rotated(q, layer.q_bias, layer.q_norm),
        rotated(k, layer.k_bias, layer.k_norm),
        heads(v, layer.v_bias, None)[0],
    )


def latent_qkv(config: ModelConfig, layer: LayerWeights, h, turns):
    """Queries and keys of latent attention in the narrow space: one key for all heads, which is also the value.

    A head's key is `k_up` times the narrow vector; multiplying the query by `k_up` instead gives the same product and
    leaves the narrow vector as what is cached (arXiv 2405.04434, appendix C).
    """
    part = config.latent
    assert part is not None
    if layer.q_down is not None and layer.q_down_norm is not None:
        low, kv = linears(h, (layer.q_down, layer.kv_down))
        queries = linear(layer.norm(low, layer.q_down_norm, _LATENT_EPS), layer.q)
    else:
        queries, kv = linears(h, (layer.q, layer.kv_down))
    q_nope, q_rope = layer.split(queries.reshape(*h.shape[:2], config.num_heads, -1), at=part.nope_dim)
    narrow, k_rope = layer.split(kv, at=part.kv_rank)
    narrow = layer.norm(narrow, layer.kv_norm, _LATENT_EPS)[:, :, None]
    k_rope, q_rope = (layer.rotated(rope, *turns, config.rope.interleaved) for rope in (k_rope[:, :, None], q_rope))
    q_narrow = linear_of_heads(q_nope, layer.k_up, transposed=True)
    return layer.joined(q_narrow, q_rope), layer.joined(narrow, k_rope), None
