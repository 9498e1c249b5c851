"""Shapes and sizes of a Mixture-of-Experts model, from the `config.json` of its Hugging Face directory.

Parameters are counted from the configuration, family by family, as the published checkpoints have them; multi-token
prediction layers are not counted. No weights are read.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from placement.data.quantization import BITS, quantization, quantization_beside
from placement.files import InputError, is_name, read_json, show

_MOST_LAYERS, _MOST_EXPERTS = 10**4, 10**5
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
        dtype: type of the experts' matrices, a key of `BITS` or the name of a quantisation.
        base: a key of `BITS` for what the quantisation leaves alone.
        expert_bits, matrix_bits, embedding_bits: bits of one weight in the experts' matrices, in `other_matrix`, and in the
            embeddings, with the scales that belong to it.
        embeddings: parameters among `other_rest` that are embeddings.
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
    expert_bits: float
    matrix_bits: float
    embedding_bits: float
    embeddings: int

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
        return _bytes(self.expert_matrix * self.expert_bits + self.expert_bias * BITS[self.base])

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is no expert."""
        rest = (self.other_rest - self.embeddings) * BITS[self.base] + self.embeddings * self.embedding_bits
        return _bytes(self.other_matrix * self.matrix_bits + rest)

    @property
    def bytes(self) -> int:
        """Bytes of the model's weights, each once."""
        return self.expert_bytes * self.experts * len(self.layers) + self.other_bytes

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], dtype: str | None = None) -> "ModelShape":
        """Read a `config.json`, or the one in a folder.

        Args:
            path: the file or the folder.
            dtype: a key of `BITS` for the experts; default: the quantisation that the file or one beside it (of GPTQModel or
                ModelOpt) tells, else its dtype, else bf16.

        Raises:
            InputError: the file is no configuration of a known family, a field is missing or no count, or the sizes of its
                quantisation are not known.
        """
        path = Path(path) / "config.json" if os.path.isdir(path) else Path(path)
        parsed = read_json(path)
        if not isinstance(parsed, dict):
            raise InputError(f"{path}: must be an object, the config.json of a model")
        beside = None if parsed.get("quantization_config") or parsed.get("quantization") else quantization_beside(path)
        return cls.from_dict(parsed if beside is None else {**parsed, "quantization_config": beside}, dtype, str(path))

    @classmethod
    def from_dict(cls, parsed: dict[str, Any], dtype: str | None = None, source: str = "config.json") -> "ModelShape":
        """Build from what the JSON parses to; see `from_config`.

        Raises:
            InputError: as `from_config`.
        """
        inner = parsed.get("text_config")
        if isinstance(inner, dict) and not _is_known(parsed.get("model_type")):  # models that also see
            parsed = {**parsed, **inner}
        family = parsed.get("model_type")
        if not _is_known(family):
            raise InputError(
                f"{source}: model_type = {show(family)}: must be one of {', '.join(_FAMILIES)}; for another model give convert "
                "--name, --top-k, --hidden-size and --expert-bytes in place of --model"
            )
        if dtype is not None and dtype not in BITS:
            raise InputError(f"--dtype: {show(dtype)} is unknown; choose from {', '.join(BITS)}")
        field = _Fields(parsed, source)
        expert_key, counted = _FAMILIES[family]
        numbers = counted(field)
        layers, experts, top_k = numbers.layers, field.count(expert_key, most=_MOST_EXPERTS), _top_k(field)
        if not layers:
            raise InputError(f"{source}: no layer has experts; give the configuration of a Mixture-of-Experts model")
        if top_k > experts:
            raise InputError(f"{source}: {top_k} experts per token of {experts}; correct one")
        base = _TORCH.get(str(parsed.get("torch_dtype") or parsed.get("dtype")), "bf16")
        h, hidden = field.count("hidden_size"), field.count("num_hidden_layers", most=_MOST_LAYERS)
        width = max(numbers.expert_matrix // (3 * h), 1)
        sizes = quantization(parsed, base, dtype, h, width, source)
        embeddings = field.count("vocab_size") * h * (1 if parsed.get("tie_word_embeddings", False) else 2)
        return cls(
            name=_name(parsed, source, family),
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
            dtype=sizes.dtype,
            base=base,
            expert_bits=sizes.expert,
            matrix_bits=sizes.matrix,
            embedding_bits=sizes.embedding,
            embeddings=embeddings,
        )


def _is_known(family: Any) -> TypeGuard[str]:
    return isinstance(family, str) and family in _FAMILIES


def _name(parsed: dict[str, Any], source: str, family: str) -> str:
    """The model's name: as the configuration says it, else the folder's."""
    given = parsed.get("_name_or_path")
    name = given if is_name(given) else Path(source).resolve().parent.name
    name = name.rstrip("/").rsplit("/", 1)[-1]
    return name if is_name(name) else family


def _bytes(bits: float) -> int:
    return -int(-bits // 8)


@dataclass(frozen=True)
class _Fields:
    """The counts of a configuration, checked one by one."""

    parsed: dict[str, Any]
    source: str

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = 2**31) -> int:
        value = self.parsed.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(f"{self.source}: {key} = {show(value)}: must be an integer from {least} to {most}")
        return value


@dataclass(frozen=True)
class _Numbers:
    """What one family has: the layers with experts, one expert's parameters, and all others but norms and embeddings."""

    layers: tuple[int, ...]
    expert_matrix: int
    matrix: int
    rest: int
    expert_bias: int = 0


def _sizes(field: _Fields, experts: str) -> tuple[int, int, int]:
    """Hidden size, all layers, experts of a layer."""
    hidden, layers = field.count("hidden_size"), field.count("num_hidden_layers", most=_MOST_LAYERS)
    return hidden, layers, field.count(experts, most=_MOST_EXPERTS)


def _top_k(field: _Fields) -> int:
    other = field.parsed.get("num_experts_per_tok") is None and field.parsed.get("experts_per_token") is not None
    return field.count("experts_per_token" if other else "num_experts_per_tok")


def _attention(field: _Fields) -> tuple[int, int, int]:
    """Grouped-query attention of one layer: parameters, and the widths of its queries and of its keys."""
    h, heads = field.count("hidden_size"), field.count("num_attention_heads")
    width = field.count("head_dim", max(h // heads, 1))
    query, key = heads * width, field.count("num_key_value_heads", heads) * width
    return h * (2 * query + 2 * key), query, key


def _mixtral(field: _Fields) -> _Numbers:
    h, layers, experts = _sizes(field, "num_local_experts")
    attention, _, _ = _attention(field)
    return _Numbers(
        tuple(range(layers)), 3 * h * field.count("intermediate_size"), layers * attention, layers * h * experts
    )


def _olmoe(field: _Fields) -> _Numbers:
    h, layers, experts = _sizes(field, "num_experts")
    attention, query, key = _attention(field)
    rest = layers * (h * experts + query + key)  # router, norms of queries and keys
    return _Numbers(tuple(range(layers)), 3 * h * field.count("intermediate_size"), layers * attention, rest)


def _qwen(field: _Fields) -> _Numbers:
    """Qwen2-MoE has a gated shared expert and biases; Qwen3-MoE neither, but norms of each head's query and key."""
    h, layers, experts = _sizes(field, "num_experts")
    dense, step = field.parsed.get("mlp_only_layers") or [], field.count("decoder_sparse_step", 1)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise InputError(f"{field.source}: mlp_only_layers = {show(dense)}: must be a list of layers")
    dense = set(dense)
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
    h, layers, experts = _sizes(field, "n_routed_experts")
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
        h * experts + experts * (field.parsed["model_type"] != "deepseek_v2")
    )
    return _Numbers(sparse, 3 * h * width, matrix, rest)


def _gpt_oss(field: _Fields) -> _Numbers:
    """Biases everywhere, one attention sink per head."""
    h, layers, experts = _sizes(field, "num_local_experts")
    attention, query, key = _attention(field)
    width = field.count("intermediate_size")
    rest = layers * (query + 2 * key + h + field.count("num_attention_heads") + (h + 1) * experts)
    return _Numbers(tuple(range(layers)), 3 * h * width, layers * attention, rest, 2 * width + h)


_FAMILIES: dict[str, tuple[str, Callable[[_Fields], _Numbers]]] = {
    "mixtral": ("num_local_experts", _mixtral),
    "deepseek_v2": ("n_routed_experts", _deepseek),
    "deepseek_v3": ("n_routed_experts", _deepseek),
    "kimi_k2": ("n_routed_experts", _deepseek),  # DeepSeek-V3 in all but name
    "qwen2_moe": ("num_experts", _qwen),
    "qwen3_moe": ("num_experts", _qwen),
    "olmoe": ("num_experts", _olmoe),
    "gpt_oss": ("num_local_experts", _gpt_oss),
}
