"""Which tensors a model directory must hold for a configuration, and their shapes. Reads no file."""

import re
from collections.abc import Iterator

import numpy as np
from flax import nnx

from dancemoe_jax.checkpoint.sources import Source, expert_sources, layer_sources, whole_sources
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder


def expected_tensors(config: ModelConfig, experts: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names and stored shapes of a whole model, or of all of it but the routed experts."""
    decoder = abstract_decoder(config)
    for field, source in whole_sources(config).items():
        yield from _stored_shapes(source, getattr(decoder, field).shape, config)
    for (start, stop), layers in zip(config.runs, decoder.runs, strict=True):
        for index in range(start, stop):
            sources = layer_sources(config, index)
            for field in present(layers, sources):
                yield from _stored_shapes(sources[field], getattr(layers, field).shape[1:], config)
    shapes = expert_shapes(config)
    for layer, expert in np.ndindex(config.num_moe_layers, config.num_experts if experts else 0):
        for field, source in expert_sources(config, layer, expert).items():
            yield from _stored_shapes(source, shapes[field], config)


# Buffers that can be computed again, and scales of quantized caches and activations, which this runtime has none of.
_SPARE = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|self_attn)(\.[kqv]_proj)?\.(kv|k|v|q|prob)_scale$|\.input_scale$")


def is_spare(config: ModelConfig, name: str) -> bool:
    """Whether a model is complete without a tensor that its configuration does not ask for.

    That is so for layers past the last one, which predict several tokens at once (DeepSeek-V3), a head that is stored
    though it is tied to the embedding, and what `_SPARE` says.
    """
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and len(layer[1]) < 10 and int(layer[1]) >= config.num_layers:
        return config.family == "deepseek_v3"
    return bool(_SPARE.search(name)) or (name == "lm_head.weight" and config.tie_embeddings)


def _stored_shapes(
    source: Source, shape: tuple[int, ...], config: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    shape = (shape[0] // len(source.names), *shape[1:])
    if source.transposed:
        shape = shape[::-1]
    if source.span is not None:
        shape = (shape[0] * source.span[2], shape[2])
    if source.row is not None:
        shape = (config.num_experts, *shape)
    for name in source.names:
        yield name, shape


def expert_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.expert_size
    return {"w_in": (2 * inner, hidden), "w_out": (hidden, inner), "b_in": (2 * inner,), "b_out": (hidden,)}


def abstract_decoder(config: ModelConfig) -> Decoder:
    """The decoder's structure and shapes without its memory."""
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))


def present(module: nnx.Module, sources: dict[str, Source]) -> list[str]:
    """The fields that this module really has (a tied model has no head)."""
    return [field for field in sources if getattr(module, field, None) is not None]
