"""Model shapes: one frozen, hashable dataclass, read from and written to a Hugging Face `config.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """A model directory, checkpoint or prompt that cannot be used; the message is one line with the remedy."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes of a decoder whose feed-forward layers are all mixtures of experts.

    Attributes:
        hidden_size: width of the residual stream.
        expert_size: inner width of one routed SwiGLU expert.
        shared_expert_size: inner width of the expert that every token visits; 0 = none.
        top_k: routed experts per token and layer.
        norm_topk: whether the `top_k` router weights are rescaled to sum to one.
        qk_norm: RMSNorm on each head's query and key before the rotary embedding.
        max_position: longest sequence (prompt and output) in tokens.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int
    shared_expert_size: int = 0
    max_position: int = 512
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6
    norm_topk: bool = True
    qk_norm: bool = True
    tie_embeddings: bool = True
    eos_token: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "shared_expert_size" else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ModelError(f"config: {field.name} = {value!r}, must be an integer of at least {least}")
            if field.type is float and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ModelError(f"config: {field.name} = {value!r}, must be a positive number")
            if field.type is bool and not isinstance(value, bool):
                raise ModelError(f"config: {field.name} = {value!r}, must be true or false")
        if self.eos_token is not None and not (type(self.eos_token) is int and 0 <= self.eos_token < self.vocab_size):
            raise ModelError(f"config: eos_token = {self.eos_token!r}, must be a token below {self.vocab_size} or none")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config: num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"config: head_dim = {self.head_dim} is odd, rotary positions need an even one")
        if self.top_k > self.num_experts:
            raise ModelError(f"config: top_k = {self.top_k} exceeds num_experts = {self.num_experts}")

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate, up and down projections."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def other_params(self) -> int:
        """Parameters of everything that is not a routed expert, replicated on every device."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_heads + 2 * self.num_kv_heads) + (2 * d if self.qk_norm else 0)
        layer = attention + 2 * h + h * self.num_experts + 3 * h * self.shared_expert_size
        embeddings = self.vocab_size * h * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + h

    def cache_bytes(self, sequences: int, itemsize: int = 4) -> int:
        """Bytes of the key-value cache of so many sequences of `max_position` tokens."""
        return 2 * self.num_layers * sequences * self.max_position * self.num_kv_heads * self.head_dim * itemsize

    @classmethod
    def from_hf(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` (a file, or the directory that holds it) of a supported architecture.

        Raises:
            ModelError: the file is missing or malformed, lacks a field, or names another architecture.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file; a model directory needs config.json") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(fields, dict) or fields.get("model_type") != "qwen3_moe":
            kind = fields.get("model_type") if isinstance(fields, dict) else type(fields).__name__
            raise ModelError(f"{path}: model_type = {kind!r} is not supported; supported: 'qwen3_moe'")
        unsupported = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
                       "attention_bias": False, "hidden_act": "silu"}  # fmt: skip
        for key, only in unsupported.items():
            if fields.get(key) not in (None, only):
                raise ModelError(f"{path}: {key} = {fields[key]!r} is not supported, only {only!r}")
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ModelError(f"{path}: rope parameters are {rope!r}, not an object")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ModelError(
                f"{path}: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported, only 'default'"
            )
        eos = fields.get("eos_token_id")
        # Some models list several; the first is the one that ends a document.
        eos_token: Any = eos[0] if isinstance(eos, list) and eos else eos
        try:
            return cls(
                vocab_size=fields["vocab_size"],
                hidden_size=fields["hidden_size"],
                num_layers=fields["num_hidden_layers"],
                num_heads=fields["num_attention_heads"],
                num_kv_heads=fields["num_key_value_heads"],
                head_dim=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
                # transformers 5 writes num_local_experts, earlier ones num_experts.
                num_experts=fields["num_local_experts" if "num_local_experts" in fields else "num_experts"],
                top_k=fields["num_experts_per_tok"],
                expert_size=fields["moe_intermediate_size"],
                max_position=fields["max_position_embeddings"],
                rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
                rms_eps=fields.get("rms_norm_eps", 1e-6),
                norm_topk=fields.get("norm_topk_prob", False),
                tie_embeddings=fields.get("tie_word_embeddings", False),
                eos_token=eos_token,
            )
        except KeyError as error:
            raise ModelError(f"{path}: field {error.args[0]!r} is missing") from None
        except ModelError as error:
            raise ModelError(f"{path}: {str(error).removeprefix('config: ')}") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(f"{path}: a field has the wrong type or value ({error})") from None

    def to_hf(self) -> dict[str, Any]:
        """The fields of `config.json` for this model, as transformers reads them.

        Raises:
            ModelError: the model has a part that the `qwen3_moe` layout has no place for.
        """
        if self.shared_expert_size or not self.qk_norm:
            raise ModelError("config: the qwen3_moe layout has no shared experts and always has qk_norm")
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_size,
            "norm_topk_prob": self.norm_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "eos_token_id": self.eos_token,
            "bos_token_id": None,
            "torch_dtype": "bfloat16",
        }
