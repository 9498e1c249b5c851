"""The model families: what each one's `config.json` means.

The only module that knows families by name. A family is a function from `config.json` to the arguments of ModelConfig, and
where its tensors' names differ from the usual ones (sources.py reads them).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dancemoe_jax.checkpoint.config_fields import Fields, check_counts, check_quantization, first, only
from dancemoe_jax.errors import ModelError, show
from dancemoe_jax.files import read_json
from dancemoe_jax.model.config import Latent as LatentShape
from dancemoe_jax.model.config import ModelConfig, Rope, Routing


class Family(NamedTuple):
    """One family: arguments of ModelConfig from the fields of `config.json`, and names that differ from the usual."""

    config: Callable[[Fields], dict[str, Any]]
    moe: str = "mlp"
    router: str = "gate"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"
    fused: bool = False


def read_config(path: str | Path) -> ModelConfig:
    """Read `config.json` (a file, or the directory that holds it) of a supported family.

    Both of transformers' ways to write rotary positions are read, `rope_parameters` and the older `rope_theta` with
    `rope_scaling`.

    Raises:
        ModelError: the file is missing or malformed, lacks a field, or asks for what no family here has.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    return config_from_fields(read_json(path, "a model directory needs config.json, download it again"), str(path))


def config_from_fields(fields: Any, where: str) -> ModelConfig:
    """The same from the parsed fields; `where` is named in errors."""
    kind = fields.get("model_type") if isinstance(fields, dict) else type(fields).__name__
    if not isinstance(fields, dict) or not isinstance(kind, str) or kind not in FAMILIES | _OTHER_NAMES:
        known = ", ".join([*FAMILIES, *_OTHER_NAMES])
        raise ModelError(f"{where}: model_type = {show(kind)} is not supported; supported: {known}")
    kind = _OTHER_NAMES.get(kind, kind)
    fields = fields | {"model_type": kind}
    try:
        check_counts(fields)
        only(fields, "hidden_act", "silu")
        check_quantization(fields)
        return ModelConfig(**{**_common(fields), **FAMILIES[kind].config(fields), "family": kind})
    except KeyError as error:
        raise ModelError(f"{where}: field {error.args[0]!r} is missing") from None
    except ModelError as error:
        raise ModelError(f"{where}: {str(error).removeprefix('config: ')}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise ModelError(f"{where}: a field has the wrong type or value ({error})") from None


def fields_of(config: ModelConfig) -> Fields:
    """The fields of `config.json` for a model in the Qwen3-MoE layout, as transformers reads them.

    Raises:
        ModelError: the model has a part that this layout has no place for.
    """
    fields = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_size or config.expert_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.routing.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope.theta,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": config.eos_token,
        "bos_token_id": None,
        "torch_dtype": "bfloat16",
    }
    if config_from_fields(fields, "config") != config:
        raise ModelError(
            "config: the model has parts that the qwen3_moe layout has no place for, such as shared experts"
        )
    return fields


def _common(fields: Fields) -> dict[str, Any]:
    eos = fields.get("eos_token_id")
    heads = fields["num_attention_heads"]
    max_position = fields["max_position_embeddings"]
    rope = _rope(fields, max_position)
    if rope.kind == "yarn":  # many a model's card tells users to add it, and to leave max_position_embeddings as it is
        max_position = max(max_position, int(rope.factor * rope.original_max_position))
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "num_experts": first(fields, "num_experts", "num_local_experts", "n_routed_experts"),
        "top_k": fields["num_experts_per_tok"],
        "max_position": max_position,
        "rope": rope,
        "rms_eps": fields.get("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
        "qk_norm": "",
        # Some models list several; the first is the one that ends a document.
        "eos_token": eos[0] if isinstance(eos, list) and eos else eos,
    }


def _rope(fields: Fields, max_position: int, **more: Any) -> Rope:
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ModelError(f"rope parameters are {show(given)}, not an object")
    theta = given.get("rope_theta") or fields.get("rope_theta") or _DEFAULT_THETA.get(fields["model_type"], 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    only({"rope type": kind}, "rope type", "default", "linear", "yarn", "llama3")
    if kind == "default":
        return Rope(theta=float(theta), **more)
    original = fields.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    if kind == "llama3":
        more |= {"low_freq": given["low_freq_factor"], "high_freq": given["high_freq_factor"]}
    if kind == "yarn":
        factor = given.get("factor") or max_position / (original or max_position)
        amplitude = given.get("attention_factor") or (
            _mscale(factor, given.get("mscale") or 1) / _mscale(factor, given["mscale_all_dim"])
            if given.get("mscale") and given.get("mscale_all_dim")
            else _mscale(factor, 1)
        )
        more |= {
            "beta_fast": given.get("beta_fast") or 32.0,
            "beta_slow": given.get("beta_slow") or 1.0,
            "truncate": given.get("truncate", True),
            "amplitude": amplitude,
            "factor": factor,
        }
    else:
        more["factor"] = given["factor"]
    more = {key: value if isinstance(value, bool) else float(value) for key, value in more.items()}
    return Rope(theta=float(theta), kind=kind, original_max_position=original or max_position, **more)


_DEFAULT_THETA = {"mixtral": 1e6, "gpt_oss": 150000.0}


def _mscale(factor: float, weight: float) -> float:
    """How yarn stretches attention's logits for a context `factor` times longer (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def _dense_layers(fields: Fields) -> tuple[int, ...]:
    """Dense layers of the Qwen families: listed, or all but every n-th."""
    step, listed = fields.get("decoder_sparse_step") or 1, fields.get("mlp_only_layers") or []
    return tuple(i for i in range(fields["num_hidden_layers"]) if i in listed or (i + 1) % step)


def _windows(fields: Fields, default: Callable[[int], bool]) -> tuple[int, ...]:
    """Each layer's window from `layer_types`, or where that is absent for the layers that `default` names."""
    kinds = fields.get("layer_types") or [
        "sliding_attention" if default(i) else "full_attention" for i in range(fields["num_hidden_layers"])
    ]
    for kind in kinds:
        only({"layer_types": kind}, "layer_types", "sliding_attention", "full_attention")
    return tuple(fields["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds)


def _mixtral(fields: Fields) -> dict[str, Any]:
    windows = _windows(fields | {"layer_types": None}, lambda _: True) if fields.get("sliding_window") else ()
    return {"expert_size": fields["intermediate_size"], "windows": windows}


def _qwen2(fields: Fields) -> dict[str, Any]:
    only(fields, "qkv_bias", True)
    sliding = fields.get("use_sliding_window") and fields.get("sliding_window")
    last = fields.get("max_window_layers", 0)
    return {
        "expert_size": fields["moe_intermediate_size"],
        "shared_expert_size": fields["shared_expert_intermediate_size"],
        "shared_expert_gate": True,
        "dense_layers": _dense_layers(fields),
        "dense_size": fields["intermediate_size"],
        "routing": Routing(normalize=fields.get("norm_topk_prob", False)),
        "qkv_bias": True,
        "windows": _windows(fields, lambda i: i % 2 == 0 and i < last) if sliding else (),
    }


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.get("attention_bias", False)
    sliding = fields.get("use_sliding_window") and fields.get("sliding_window")
    dense = _dense_layers(fields)
    return {
        "expert_size": fields["moe_intermediate_size"],
        "dense_layers": dense,
        "dense_size": fields["intermediate_size"] if dense else 0,
        "routing": Routing(normalize=fields.get("norm_topk_prob", False)),
        "qk_norm": "head",
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": _windows(fields | {"layer_types": None}, lambda _: True) if sliding else (),
    }


def _olmoe(fields: Fields) -> dict[str, Any]:
    bias = fields.get("attention_bias", False)
    return {
        "expert_size": fields["intermediate_size"],
        "routing": Routing(normalize=fields.get("norm_topk_prob", False)),
        "qk_norm": "all",
        "qkv_bias": bias,
        "o_bias": bias,
        "clip_qkv": fields.get("clip_qkv") or 0.0,
        "rms_eps": fields.get("rms_norm_eps", 1e-5),
    }


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    only(fields, "swiglu_alpha", 1.702)
    only(fields, "attention_bias", True)
    return {
        "head_dim": fields.get("head_dim") or 64,
        "expert_size": fields["intermediate_size"],
        "routing": Routing(bias=True),
        "qkv_bias": True,
        "o_bias": True,
        "expert_bias": True,
        "sinks": True,
        "windows": _windows(fields, lambda i: i % 2 == 0),
        "swiglu_limit": fields.get("swiglu_limit", 7.0),
        "rms_eps": fields.get("rms_norm_eps", 1e-5),
    }


def _deepseek(fields: Fields) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        only(fields, key, False)
    only(fields, "moe_layer_freq", 1)
    latent = LatentShape(
        kv_rank=fields["kv_lora_rank"],
        nope_dim=fields["qk_nope_head_dim"],
        rope_dim=fields["qk_rope_head_dim"],
        value_dim=fields["v_head_dim"],
        q_rank=fields.get("q_lora_rank") or 0,
    )
    interleaved = True if fields["model_type"] == "deepseek_v2" else fields.get("rope_interleave", True)
    rope = _rope(fields, fields["max_position_embeddings"], interleaved=interleaved)
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    stretch = _mscale(rope.factor, given["mscale_all_dim"]) if given.get("mscale_all_dim") else 1.0
    dense = min(fields.get("first_k_dense_replace", 0), fields["num_hidden_layers"])
    return {
        "head_dim": latent.rope_dim,
        "expert_size": fields["moe_intermediate_size"],
        "shared_expert_size": (fields.get("n_shared_experts") or 0) * fields["moe_intermediate_size"],
        "dense_layers": tuple(range(dense)),
        "dense_size": fields["intermediate_size"] if dense else 0,
        "rope": rope,
        "latent": latent,
        "attention_scale": (latent.nope_dim + latent.rope_dim) ** -0.5 * (stretch**2 if rope.kind != "default" else 1),
    }


def _deepseek_v2(fields: Fields) -> dict[str, Any]:
    # Published models do not normalize, and the two implementations there are disagree about what it would mean.
    only(fields, "norm_topk_prob", False)
    only(fields, "scoring_func", "softmax")
    only(fields, "topk_method", "greedy", "group_limited_greedy")
    groups = {}
    if fields.get("topk_method") == "group_limited_greedy":
        groups = {"groups": fields["n_group"], "top_groups": fields["topk_group"]}
    scale = float(fields.get("routed_scaling_factor", 1.0))
    return _deepseek(fields) | {"routing": Routing(normalize=False, scale=scale, **groups)}


def _deepseek_v3(fields: Fields) -> dict[str, Any]:
    only(fields, "scoring_func", "sigmoid")
    only(fields, "topk_method", "noaux_tc")
    routing = Routing(
        score="sigmoid",
        normalize=fields.get("norm_topk_prob", True),
        correction=True,
        scale=float(fields.get("routed_scaling_factor", 2.5)),
        groups=fields.get("n_group") or 1,
        top_groups=fields.get("topk_group") or 1,
    )
    return _deepseek(fields) | {"routing": routing}


FAMILIES = {
    "mixtral": Family(_mixtral, moe="block_sparse_moe", expert=("w1", "w3", "w2")),
    "deepseek_v2": Family(_deepseek_v2),
    "deepseek_v3": Family(_deepseek_v3),
    "qwen2_moe": Family(_qwen2, shared="shared_expert"),
    "qwen3_moe": Family(_qwen3),
    "olmoe": Family(_olmoe),
    "gpt_oss": Family(_gpt_oss, router="router", fused=True),
}
_OTHER_NAMES = {"kimi_k2": "deepseek_v3"}  # the same in all but the name
