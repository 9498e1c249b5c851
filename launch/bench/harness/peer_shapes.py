"""Published Mixture-of-Experts shapes with layers cut, for comparing engines: the fields of their `config.json`."""

import dataclasses
from typing import Any

import numpy as np

# Small, so that the head costs next to nothing: a model of a few layers would else be mostly head.
VOCABULARY = 1024
_BASE = 1 << 22  # random numbers that all weights are cut from


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model's shape.

    Attributes:
        fields: of its `config.json`, without the number of layers.
        layers: how many are measured by default.
    """

    name: str
    fields: dict[str, Any]
    layers: int

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """The fields of `config.json` with this many layers."""
        usual = {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
        }
        return usual | self.fields | {"num_hidden_layers": layers or self.layers}


_QWEN3 = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1e6,
}
_MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "rope_theta": 1e6,
}
_DEEPSEEK = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000,
}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", _QWEN3, 2),
        Shape("mixtral-8x7b", _MIXTRAL, 1),
        Shape("deepseek-v2-lite", _DEEPSEEK, 3),
    )
}


def random_numbers() -> np.ndarray:
    """Standard normal float32 numbers, [2**22]: weights are cut from them, as drawing gigabytes of them takes minutes."""
    return np.random.default_rng(0).standard_normal(_BASE, np.float32)


def cut(numbers: np.ndarray, count: int, start: int) -> np.ndarray:
    """`count` entries of `numbers` from `start` on, which begin again at the end."""
    start %= len(numbers)
    first = numbers[start : start + count]
    return first if len(first) == count else np.concatenate([first, np.resize(numbers, count - len(first))])
