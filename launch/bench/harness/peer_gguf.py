"""A random model of a shape as a GGUF file, which llama.cpp reads. Needs the package `gguf`."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.bench.harness.peer_shapes import cut, random_numbers

_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "deepseek_v2": "deepseek2"}
_SCALE = 0.02  # of most weights
_STEP = 1234560  # between the places that weights are cut from; a multiple of a block of q8_0


class _Tensor(NamedTuple):
    """One tensor: matrices have the file's type, the others are float32. `fill` takes the place of random numbers, which
    have `scale` as standard deviation."""

    name: str
    shape: tuple[int, ...]
    matrix: bool = True
    fill: float | None = None
    scale: float = _SCALE


def write_gguf(path: Path, config: dict[str, Any], kind: str) -> None:
    """Write a model with random weights.

    Args:
        config: the fields of its `config.json` (peer_shapes.Shape.config).
        kind: of its matrices: "float32", "bfloat16" or "q8_0". Norms and routers are float32, as converters leave them.
    """
    gguf: Any = importlib.import_module("gguf")
    stored = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
    of_matrix = stored.get(kind, gguf.GGMLQuantizationType.Q8_0)
    numbers = random_numbers()
    encoded: dict[tuple[int, float], np.ndarray] = {}
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[config["model_type"]])
    for key, value in _keys(config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key.format(arch=writer.arch), value)
    tensors = [(tensor, of_matrix if tensor.matrix else stored["float32"]) for tensor in _tensors(config)]
    for tensor, type_ in tensors:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, type_)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (tensor, type_) in enumerate(tensors):
        if tensor.fill is not None:
            data = np.full(tensor.shape, tensor.fill, np.float32).view(np.uint8)
        else:
            key = type_, tensor.scale
            if key not in encoded:
                encoded[key] = gguf.quantize(numbers * np.float32(tensor.scale), type_).view(np.uint8).reshape(-1)
            block, size = gguf.GGML_QUANT_SIZES[type_]
            count = math.prod(tensor.shape) // block * size
            data = cut(encoded[key], count, number * _STEP // block * size)
        writer.write_tensor_data(data)
    writer.close()


def _keys(config: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the model and of its (absent) tokenizer; `{arch}` stands for the architecture."""
    c = config
    experts = c.get("num_experts") or c.get("num_local_experts") or c["n_routed_experts"]
    keys = {
        "tokenizer.ggml.model": "none",
        "{arch}.vocab_size": c["vocab_size"],
        "{arch}.context_length": c["max_position_embeddings"],
        "{arch}.embedding_length": c["hidden_size"],
        "{arch}.block_count": c["num_hidden_layers"],
        "{arch}.feed_forward_length": c["intermediate_size"],
        "{arch}.attention.head_count": c["num_attention_heads"],
        "{arch}.attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "{arch}.rope.freq_base": float(c["rope_theta"]),
        "{arch}.expert_count": experts,
        "{arch}.expert_used_count": c["num_experts_per_tok"],
    }
    if "moe_intermediate_size" in c:
        keys["{arch}.expert_feed_forward_length"] = c["moe_intermediate_size"]
    if c["model_type"] == "deepseek_v2":
        return keys | _latent_keys(c)
    return keys | {
        "{arch}.attention.head_count_kv": c["num_key_value_heads"],
        "{arch}.attention.key_length": c["head_dim"],
        "{arch}.attention.value_length": c["head_dim"],
        "{arch}.rope.dimension_count": c["head_dim"],
    }


def _latent_keys(c: dict[str, Any]) -> dict[str, Any]:
    """Metadata of latent attention with the keys' and values' up-projections apart, and of shared experts."""
    return {
        "{arch}.attention.head_count_kv": 1,
        "{arch}.attention.key_length": c["kv_lora_rank"] + c["qk_rope_head_dim"],
        "{arch}.attention.value_length": c["kv_lora_rank"],
        "{arch}.attention.key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        "{arch}.attention.value_length_mla": c["v_head_dim"],
        "{arch}.attention.kv_lora_rank": c["kv_lora_rank"],
        "{arch}.attention.q_lora_rank": 0,
        "{arch}.rope.dimension_count": c["qk_rope_head_dim"],
        "{arch}.leading_dense_block_count": c["first_k_dense_replace"],
        "{arch}.expert_shared_count": c["n_shared_experts"],
        "{arch}.expert_weights_scale": float(c["routed_scaling_factor"]),
        "{arch}.expert_weights_norm": bool(c["norm_topk_prob"]),
        "{arch}.expert_gating_func": 1,  # softmax
    }


def _tensors(c: dict[str, Any]) -> Iterator[_Tensor]:
    """All tensors, shapes as numpy has them: outputs before inputs."""
    h, vocabulary = c["hidden_size"], c["vocab_size"]
    # Large, as in trained models: a token's experts depend on the token first. Else what all sequences share, their prompt,
    # has them call the same experts, and a step reads fewer than ours does.
    yield _Tensor("token_embd.weight", (vocabulary, h), scale=1.0)
    yield _Tensor("output.weight", (vocabulary, h))
    yield _Tensor("output_norm.weight", (h,), False, 1.0)
    for number in range(c["num_hidden_layers"]):
        layer = f"blk.{number}."
        yield _Tensor(layer + "attn_norm.weight", (h,), False, 1.0)
        yield _Tensor(layer + "ffn_norm.weight", (h,), False, 1.0)
        yield from (_latent if c["model_type"] == "deepseek_v2" else _grouped)(layer, c)
        if number < c.get("first_k_dense_replace", 0):
            yield from _gated(layer, "", (), c["intermediate_size"], h)
            continue
        experts = c.get("num_experts") or c.get("num_local_experts") or c["n_routed_experts"]
        inner = c.get("moe_intermediate_size", c["intermediate_size"])
        yield _Tensor(layer + "ffn_gate_inp.weight", (experts, h), False)
        yield from _gated(layer, "_exps", (experts,), inner, h)
        if c.get("n_shared_experts"):
            yield from _gated(layer, "_shexp", (), inner * c["n_shared_experts"], h)


def _gated(layer: str, of: str, lead: tuple[int, ...], inner: int, hidden: int) -> Iterator[_Tensor]:
    yield _Tensor(f"{layer}ffn_gate{of}.weight", (*lead, inner, hidden))
    yield _Tensor(f"{layer}ffn_up{of}.weight", (*lead, inner, hidden))
    yield _Tensor(f"{layer}ffn_down{of}.weight", (*lead, hidden, inner))


def _grouped(layer: str, c: dict[str, Any]) -> Iterator[_Tensor]:
    h, queries, keys = (
        c["hidden_size"],
        c["num_attention_heads"] * c["head_dim"],
        c["num_key_value_heads"] * c["head_dim"],
    )
    yield _Tensor(layer + "attn_q.weight", (queries, h))
    yield _Tensor(layer + "attn_k.weight", (keys, h))
    yield _Tensor(layer + "attn_v.weight", (keys, h))
    yield _Tensor(layer + "attn_output.weight", (h, queries))
    if c["model_type"] == "qwen3_moe":
        yield _Tensor(layer + "attn_q_norm.weight", (c["head_dim"],), False, 1.0)
        yield _Tensor(layer + "attn_k_norm.weight", (c["head_dim"],), False, 1.0)


def _latent(layer: str, c: dict[str, Any]) -> Iterator[_Tensor]:
    h, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    yield _Tensor(layer + "attn_q.weight", (heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]), h))
    yield _Tensor(layer + "attn_kv_a_mqa.weight", (rank + c["qk_rope_head_dim"], h))
    yield _Tensor(layer + "attn_kv_a_norm.weight", (rank,), False, 1.0)
    yield _Tensor(layer + "attn_k_b.weight", (heads, rank, c["qk_nope_head_dim"]))
    yield _Tensor(layer + "attn_v_b.weight", (heads, c["v_head_dim"], rank))
    yield _Tensor(layer + "attn_output.weight", (h, heads * c["v_head_dim"]))
