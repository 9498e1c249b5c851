"""Under which names, and in which layout, a checkpoint keeps each parameter of a model. Reads no file."""

from typing import Any, NamedTuple

import numpy as np

from dancemoe_jax.checkpoint.families import FAMILIES
from dancemoe_jax.model.config import ModelConfig


class Source(NamedTuple):
    """Where a parameter's numbers are stored.

    Attributes:
        names: tensors; several follow one another on the parameter's first axis.
        span: (start, stop, width) where the parameter [heads, rows, inputs] is part of each head's `width` stored rows.
        row: index on the stored tensor's leading axis, where one tensor holds many experts.
        interleaved: the stored last axis alternates between the parameter's first half and its second.
        transposed: stored as [inputs, outputs], unlike the parameter.
    """

    names: tuple[str, ...]
    span: tuple[int, int, int] | None = None
    row: int | None = None
    interleaved: bool = False
    transposed: bool = False


def whole_sources(config: ModelConfig) -> dict[str, Source]:
    """Decoder field -> source, for what is not in a layer."""
    sources = {
        "embedding": Source(("model.embed_tokens.weight",)),
        "final_norm": Source(("model.norm.weight",)),
        "head": Source(("lm_head.weight",)),
    }
    return {field: s for field, s in sources.items() if field != "head" or not config.tie_embeddings}


def layer_sources(config: ModelConfig, index: int) -> dict[str, Source]:
    """Layers field -> source, for one layer; fields that the configuration does not have are left out by the caller."""
    family, layer = FAMILIES[config.family], f"model.layers.{index}"
    moe, attention = f"{layer}.{family.moe}", f"{layer}.self_attn"
    shared = f"{layer}.mlp" if index in config.dense_layers else f"{moe}.{family.shared}"
    sources = {
        "attention_norm": Source((f"{layer}.input_layernorm.weight",)),
        "moe_norm": Source((f"{layer}.post_attention_layernorm.weight",)),
        "o": Source((f"{attention}.o_proj.weight",)),
        "o_bias": Source((f"{attention}.o_proj.bias",)),
        "sinks": Source((f"{attention}.sinks",)),
        "router": Source((f"{moe}.{family.router}.weight",)),
        "router_bias": Source((f"{moe}.{family.router}.bias",)),
        "router_correction": Source((f"{moe}.{family.router}.e_score_correction_bias",)),
        "shared_in": Source((f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight")),
        "shared_out": Source((f"{shared}.down_proj.weight",)),
        "shared_gate": Source((f"{moe}.shared_expert_gate.weight",)),
    }
    if (latent := config.latent) is None:
        for part in "qkv":
            sources[part] = Source((f"{attention}.{part}_proj.weight",))
            sources[f"{part}_bias"] = Source((f"{attention}.{part}_proj.bias",))
            sources[f"{part}_norm"] = Source((f"{attention}.{part}_norm.weight",))
        return sources
    both = latent.nope_dim + latent.value_dim
    kv_up = (f"{attention}.kv_b_proj.weight",)
    return sources | {
        "q": Source((f"{attention}.{'q_b_proj' if latent.q_rank else 'q_proj'}.weight",)),
        "q_down": Source((f"{attention}.q_a_proj.weight",)),
        "q_down_norm": Source((f"{attention}.q_a_layernorm.weight",)),
        "kv_down": Source((f"{attention}.kv_a_proj_with_mqa.weight",)),
        "kv_norm": Source((f"{attention}.kv_a_layernorm.weight",)),
        "k_up": Source(kv_up, span=(0, latent.nope_dim, both)),
        "v_up": Source(kv_up, span=(latent.nope_dim, both, both)),
    }


def stored_dtype(name: str, dtype: Any) -> np.dtype:
    """The type to keep a tensor in where weights are to be `dtype`: biases that decide between experts stay float32."""
    return np.dtype(np.float32) if name.endswith("e_score_correction_bias") else np.dtype(dtype)


def expert_sources(config: ModelConfig, layer: int, expert: int) -> dict[str, Source]:
    """ExpertWeights field -> source, for one expert; `layer` counts MoE layers."""
    family = FAMILIES[config.family]
    experts = f"model.layers.{config.moe_layers[layer]}.{family.moe}.experts"
    if family.fused:
        return {
            "w_in": Source((f"{experts}.gate_up_proj",), row=expert, interleaved=True, transposed=True),
            "w_out": Source((f"{experts}.down_proj",), row=expert, transposed=True),
            "b_in": Source((f"{experts}.gate_up_proj_bias",), row=expert, interleaved=True),
            "b_out": Source((f"{experts}.down_proj_bias",), row=expert),
        }
    gate, up, down = (f"{experts}.{expert}.{name}.weight" for name in family.expert)
    return {"w_in": Source((gate, up)), "w_out": Source((down,))}
