"""Shapes and sizes of a Mixture-of-Experts model, from the `config.json` of its Hugging Face directory.

Parameters are counted from the configuration, family by family, as the published checkpoints have them; multi-token
prediction layers are not counted. No weights are read.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.files import InputError, read_bytes, show

# Bits of one weight. Block formats add their scales: one byte for 32 weights, or one float32 for 128 x 128.
BITS = {
    "bf16": 16.0,
    "fp16": 16.0,
    "fp32": 32.0,
    "fp8": 8 + 32 / 128**2,
    "int8": 8.0,
    "int4": 4.0,
    "mxfp4": 4 + 8 / 32,
}
_TORCH = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class ModelShape:
    """What placing a model's experts needs to know of it.

    Attributes:
        name: of the model.
        family: `model_type` of the configuration.
        hidden_layers: number of all layers.
        layers: indices of those that have experts, [L].
        experts: experts per layer, E.
        top_k: experts per token and layer.
        hidden_size: width of the activations that travel.
        expert_matrix, expert_bias: parameters of one expert: in its matrices, and beside them.
        other_matrix, other_rest: parameters of all that is no expert: in matrices of attention and dense or shared
            feed-forward layers, and the rest (embeddings, norms, routers, biases).
        dtype: a key of `BITS` for the experts' matrices.
        base: a key of `BITS` for what the quantisation leaves alone.
    """

    name: str
    family: str
    hidden_layers: int
    layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden_size: int
    expert_matrix: int
    expert_bias: int
    other_matrix: int
    other_rest: int
    dtype: str
    base: str

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.expert_matrix + self.expert_bias

    @property
    def other_parameters(self) -> int:
        """Parameters of everything that is no expert."""
        return self.other_matrix + self.other_rest

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return self.expert_parameters * self.experts * len(self.layers) + self.other_parameters

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, rounded up."""
        return _bytes(self.expert_matrix * BITS[self.dtype] + self.expert_bias * BITS[self.base])

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is no expert; fp8 checkpoints quantize its matrices too, the others do not."""
        matrices = "fp8" if self.dtype == "fp8" else self.base
        return _bytes(self.other_matrix * BITS[matrices] + self.other_rest * BITS[self.base])

    @property
    def bytes(self) -> int:
        """Bytes of the model's weights, each once."""
        return self.expert_bytes * self.experts * len(self.layers) + self.other_bytes

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], dtype: str | None = None) -> "ModelShape":
        """Read a `config.json`, or the one in a folder.

        Args:
            path: the file or the folder.
            dtype: a key of `BITS` for the experts; default: the file's quantisation, else its dtype, else bf16.

        Raises:
            InputError: the file is no configuration of a known family, or a field is missing or no count.
        """
        path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            parsed = json.loads(read_bytes(path))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
        if not isinstance(parsed, dict):
            raise InputError(f"{path}: must be an object, the config.json of a model")
        return cls.from_dict(parsed, dtype, str(path))

    @classmethod
    def from_dict(cls, parsed: dict[str, Any], dtype: str | None = None, source: str = "config.json") -> "ModelShape":
        """Build from what the JSON parses to; see `from_config`.

        Raises:
            InputError: as `from_config`.
        """
        inner = parsed.get("text_config")
        if isinstance(inner, dict) and parsed.get("model_type") not in _FAMILIES:  # models that also see
            parsed = {**parsed, **inner}
        family = parsed.get("model_type")
        if not isinstance(family, str) or family not in _FAMILIES:
            raise InputError(f"{source}: model_type = {show(family)}: must be one of {', '.join(_FAMILIES)}")
        field = _Fields(parsed, source)
        expert_key, counted = _FAMILIES[family]
        numbers = counted(field)
        base = _TORCH.get(str(parsed.get("torch_dtype") or parsed.get("dtype")), "bf16")
        if dtype is not None and dtype not in BITS:
            raise InputError(f"--dtype: {show(dtype)} is unknown; choose from {', '.join(BITS)}")
        quantized = parsed.get("quantization_config")
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if dtype is None and method is not None and method not in BITS:
            raise InputError(
                f"{source}: quantization_config.quant_method = {show(method)}: its sizes are not known; give the "
                f"experts' type with --dtype, one of {', '.join(BITS)}"
            )
        layers, experts, top_k = numbers.layers, field.count(expert_key), _top_k(field)
        if not layers:
            raise InputError(f"{source}: no layer has experts; give the configuration of a Mixture-of-Experts model")
        if top_k > experts:
            raise InputError(f"{source}: {top_k} experts per token of {experts}; correct one")
        given = parsed.get("_name_or_path")
        name = given if isinstance(given, str) and given else Path(source).resolve().parent.name or family
        h, hidden = field.count("hidden_size"), field.count("num_hidden_layers")
        embeddings = field.count("vocab_size") * h * (1 if parsed.get("tie_word_embeddings", False) else 2)
        return cls(
            name=name.rstrip("/").rsplit("/", 1)[-1],
            family=family,
            hidden_layers=hidden,
            layers=layers,
            experts=experts,
            top_k=top_k,
            hidden_size=h,
            expert_matrix=numbers.expert_matrix,
            expert_bias=numbers.expert_bias,
            other_matrix=numbers.matrix,
            other_rest=numbers.rest + embeddings + h * (2 * hidden + 1),  # two norms a layer and a last one
            dtype=dtype or method or base,
            base=base,
        )


def _bytes(bits: float) -> int:
    return -int(-bits // 8)


@dataclass(frozen=True)
class _Fields:
    """The counts of a configuration, checked one by one."""

    parsed: dict[str, Any]
    source: str

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.parsed.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**40:
            raise InputError(f"{self.source}: {key} = {show(value)}: must be an integer from {least}")
        return value


@dataclass(frozen=True)
class _Numbers:
    """What one family has: the layers with experts, one expert's parameters, and all others but norms and embeddings."""

    layers: tuple[int, ...]
    expert_matrix: int
    matrix: int
    rest: int
    expert_bias: int = 0


def _top_k(field: _Fields) -> int:
    return field.count("num_experts_per_tok", field.parsed.get("experts_per_token"))


def _attention(field: _Fields) -> tuple[int, int, int]:
    """Grouped-query attention of one layer: parameters, and the widths of its queries and of its keys."""
    h, heads = field.count("hidden_size"), field.count("num_attention_heads")
    width = field.count("head_dim", max(h // heads, 1))
    query, key = heads * width, field.count("num_key_value_heads", heads) * width
    return h * (2 * query + 2 * key), query, key


def _mixtral(field: _Fields) -> _Numbers:
    h, layers, experts = (field.count(key) for key in ("hidden_size", "num_hidden_layers", "num_local_experts"))
    attention, _, _ = _attention(field)
    return _Numbers(
        tuple(range(layers)), 3 * h * field.count("intermediate_size"), layers * attention, layers * h * experts
    )


def _olmoe(field: _Fields) -> _Numbers:
    h, layers, experts = (field.count(key) for key in ("hidden_size", "num_hidden_layers", "num_experts"))
    attention, query, key = _attention(field)
    rest = layers * (h * experts + query + key)  # router, norms of queries and keys
    return _Numbers(tuple(range(layers)), 3 * h * field.count("intermediate_size"), layers * attention, rest)


def _qwen(field: _Fields) -> _Numbers:
    """Qwen2-MoE has a gated shared expert and biases; Qwen3-MoE neither, but norms of each head's query and key."""
    h, layers, experts = (field.count(key) for key in ("hidden_size", "num_hidden_layers", "num_experts"))
    dense, step = field.parsed.get("mlp_only_layers") or [], field.count("decoder_sparse_step", 1)
    if not isinstance(dense, list):
        raise InputError(f"{field.source}: mlp_only_layers = {show(dense)}: must be a list of layers")
    sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    attention, query, key = _attention(field)
    matrix = layers * attention
    if len(sparse) < layers:
        matrix += (layers - len(sparse)) * 3 * h * field.count("intermediate_size")
    rest = len(sparse) * h * experts
    if field.parsed["model_type"] == "qwen2_moe":
        matrix += len(sparse) * 3 * h * field.count("shared_expert_intermediate_size")
        rest += len(sparse) * h + layers * (query + 2 * key)
    else:
        rest += layers * 2 * (query // field.count("num_attention_heads"))
    return _Numbers(sparse, 3 * h * field.count("moe_intermediate_size"), matrix, rest)


def _deepseek(field: _Fields) -> _Numbers:
    """Latent attention; the first layers are dense; shared experts run for every token and are no experts here."""
    h, layers, experts = (field.count(key) for key in ("hidden_size", "num_hidden_layers", "n_routed_experts"))
    heads, latent, value = (field.count(key) for key in ("num_attention_heads", "kv_lora_rank", "v_head_dim"))
    nope, rope = field.count("qk_nope_head_dim"), field.count("qk_rope_head_dim")
    dense, step = field.count("first_k_dense_replace", 0, least=0), field.count("moe_layer_freq", 1)
    sparse = tuple(i for i in range(layers) if i >= dense and i % step == 0)
    width, query = field.count("moe_intermediate_size"), heads * (nope + rope)
    rank = field.count("q_lora_rank", 0, least=0)
    attention = (h * rank + rank * query if rank else h * query) + h * (latent + rope)
    attention += latent * heads * (nope + value) + heads * value * h
    shared = 3 * h * width * field.count("n_shared_experts", 0, least=0)
    matrix = layers * attention + len(sparse) * shared
    if len(sparse) < layers:
        matrix += (layers - len(sparse)) * 3 * h * field.count("intermediate_size")
    rest = layers * (rank + latent) + len(sparse) * (
        h * experts + experts * (field.parsed["model_type"] == "deepseek_v3")
    )
    return _Numbers(sparse, 3 * h * width, matrix, rest)


def _gpt_oss(field: _Fields) -> _Numbers:
    """Biases everywhere, one attention sink per head."""
    h, layers, experts = (field.count(key) for key in ("hidden_size", "num_hidden_layers", "num_local_experts"))
    attention, query, key = _attention(field)
    width = field.count("intermediate_size")
    rest = layers * (query + 2 * key + h + field.count("num_attention_heads") + (h + 1) * experts)
    return _Numbers(tuple(range(layers)), 3 * h * width, layers * attention, rest, 2 * width + h)


_FAMILIES: dict[str, tuple[str, Callable[[_Fields], _Numbers]]] = {
    "mixtral": ("num_local_experts", _mixtral),
    "deepseek_v2": ("n_routed_experts", _deepseek),
    "deepseek_v3": ("n_routed_experts", _deepseek),
    "qwen2_moe": ("num_experts", _qwen),
    "qwen3_moe": ("num_experts", _qwen),
    "olmoe": ("num_experts", _olmoe),
    "gpt_oss": ("num_local_experts", _gpt_oss),
}
