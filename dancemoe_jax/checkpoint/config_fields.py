"""Checks of the fields of a `config.json` that all families share; families.py says what the fields mean."""

from typing import Any

from dancemoe_jax.errors import ModelError, show

Fields = dict[str, Any]


def check_counts(fields: Fields) -> None:
    """Raise ModelError where a count is absurd, before anything is made of so many parts."""
    for key, most in _MOST.items():
        value = fields.get(key)
        if isinstance(value, int | float) and not abs(value) <= most:
            raise ModelError(f"{key} = {show(value)}, must be at most {most}")


# Ten times the largest published ones and more.
_LAYERS, _EXPERTS, _WIDTH = 2**12, 2**14, 2**20
_MOST = {
    "num_hidden_layers": _LAYERS,
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": _EXPERTS,
    "vocab_size": 2**28,
    "max_position_embeddings": 2**31,
} | dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ),
    _WIDTH,
)


def only(fields: Fields, key: str, *allowed: Any) -> None:
    """Raise ModelError where a field has a value that no family here can compute with."""
    if fields.get(key) is not None and fields[key] not in allowed:
        raise ModelError(f"{key} = {show(fields[key])} is not supported, only {' or '.join(map(repr, allowed))}")


def check_quantization(fields: Fields) -> None:
    """Raise ModelError for weights stored in a way that tensor_files.py cannot decode."""
    method = (fields.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "fp8", "mxfp4"):
        raise ModelError(
            f"weights quantized by {show(method)} are not supported, only fp8 blocks and mxfp4; use the model's unquantized "
            "weights"
        )


def first(fields: Fields, *keys: str) -> Any:
    """The first of several names of one field; transformers has renamed some over time."""
    return next((fields[key] for key in keys if fields.get(key) is not None), None) or fields[keys[0]]
