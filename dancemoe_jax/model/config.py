"""Model shapes: frozen, hashable dataclasses, one for each part of a decoder in which families differ.

families.py reads them from a Hugging Face `config.json`; nothing else knows a family by its name.
"""

import dataclasses
import math
from typing import Any

from dancemoe_jax.errors import ModelError, show

ROPE_KINDS = ("default", "linear", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        kind: `"default"`; `"linear"`, positions divided by `factor`; `"yarn"` (arXiv 2309.00071) and `"llama3"`, which
            stretch the long wavelengths by `factor` and leave the short ones.
        original_max_position: context that the model was first trained with (yarn, llama3).
        beta_fast, beta_slow, truncate: rotations over that context between which yarn's ramp runs; ends rounded or not.
        low_freq, high_freq: the same for llama3.
        amplitude: multiplies cosine and sine.
        interleaved: neighbours of a head form the pairs that rotate; otherwise its first half pairs with its second.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq: float = 1.0
    high_freq: float = 4.0
    amplitude: float = 1.0
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class Latent:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one narrow vector.

    Attributes:
        kv_rank: width of that vector, which is what the cache holds, beside `rope_dim` of a key all heads share.
        q_rank: the same for queries; 0 = queries straight from the residual stream.
        nope_dim, rope_dim, value_dim: of each head: key without position, key with position, value.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int = 0


@dataclasses.dataclass(frozen=True)
class Routing:
    """How router logits become experts and their weights.

    Attributes:
        score: `"softmax"` over all experts, or `"sigmoid"` of each.
        normalize: whether the chosen experts' weights are rescaled to sum to one.
        scale: what they are multiplied by in the end.
        groups, top_groups: experts come in equal groups and are chosen from the best groups only; 1 = no groups. A group
            is as good as its best expert, or, with `correction`, as its two best.
        correction: a learned bias per expert is added for choosing, not for weighing (DeepSeek-V3).
        bias: the router's linear map has a bias.
    """

    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    correction: bool = False
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes of a decoder whose feed-forward layers are mixtures of experts, all or all but a few.

    Attributes:
        hidden_size: width of the residual stream.
        expert_size: inner width of one routed SwiGLU expert.
        shared_expert_size: inner width of the expert that every token visits; 0 = none.
        shared_expert_gate: whether a learned sigmoid scales that expert's output.
        dense_layers: layers with a plain SwiGLU of width `dense_size` in place of the experts.
        top_k: routed experts per token and layer.
        qk_norm: RMSNorm of queries and keys before the rotary embedding: `"head"` each head for itself, `"all"` over all
            heads together, `""` none.
        qkv_bias, o_bias, expert_bias: whether those linear maps have biases.
        clip_qkv: queries, keys and values are cut to this magnitude; 0 = not.
        latent: latent attention; `head_dim` and `num_kv_heads` are then not used.
        sinks: a learned logit per head takes part in attention's softmax and carries no value.
        windows: for each layer how many keys a query sees, its own included; 0 = all. Empty = all everywhere.
        attention_scale: what attention's logits are multiplied by; 0 = the head's width to the power of -1/2.
        swiglu_limit: cut of gate and up projection in gpt-oss's form of SwiGLU; 0 = the plain form.
        max_position: longest sequence (prompt and output) in tokens.
        family: the layout its checkpoints are stored in (families.py).
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
    shared_expert_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_size: int = 0
    max_position: int = 512
    rope: Rope = Rope()
    rms_eps: float = 1e-6
    routing: Routing = Routing()
    qk_norm: str = "head"
    qkv_bias: bool = False
    o_bias: bool = False
    expert_bias: bool = False
    clip_qkv: float = 0.0
    latent: Latent | None = None
    sinks: bool = False
    windows: tuple[int, ...] = ()
    attention_scale: float = 0.0
    swiglu_limit: float = 0.0
    tie_embeddings: bool = True
    eos_token: int | None = None
    family: str = "qwen3_moe"

    def __post_init__(self):
        _check_fields(
            self, optional=("shared_expert_size", "dense_size", "clip_qkv", "attention_scale", "swiglu_limit")
        )
        _check_fields(self.rope)
        _check_fields(self.routing)
        _check_choice("rope kind", self.rope.kind, ROPE_KINDS)
        _check_choice("routing score", self.routing.score, ("softmax", "sigmoid"))
        _check_choice("qk_norm", self.qk_norm, ("", "head", "all"))
        if self.latent is not None:
            _check_fields(self.latent, optional=("q_rank",))
        elif self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config: num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.rope_dim % 2:
            name = "head_dim" if self.latent is None else "rope_dim"
            raise ModelError(f"config: {name} = {self.rope_dim} is odd, rotary positions need an even one")
        if self.eos_token is not None and not (type(self.eos_token) is int and 0 <= self.eos_token < self.vocab_size):
            raise ModelError(
                f"config: eos_token = {show(self.eos_token)}, must be a token below {self.vocab_size} or none"
            )
        if self.top_k > self.num_experts:
            raise ModelError(f"config: top_k = {self.top_k} exceeds num_experts = {self.num_experts}")
        groups, top_groups = self.routing.groups, self.routing.top_groups
        if self.num_experts % groups or top_groups > groups:
            raise ModelError(
                f"config: routing takes {top_groups} of {groups} groups; {self.num_experts} experts must divide evenly "
                "into the groups, and no more groups can be taken than there are"
            )
        if self.top_k > top_groups * self.num_experts // groups:
            raise ModelError(
                f"config: top_k = {self.top_k} exceeds the {top_groups * self.num_experts // groups} experts of "
                f"{top_groups} groups"
            )
        if self.routing.correction and groups > 1 and self.num_experts < 2 * groups:
            raise ModelError(
                f"config: {groups} groups of {self.num_experts} experts; groups are judged by two experts each"
            )
        wrong = [i for i in self.dense_layers if type(i) is not int or not 0 <= i < self.num_layers]
        if wrong or len(set(self.dense_layers)) >= self.num_layers:
            raise ModelError(
                f"config: dense_layers = {show(list(self.dense_layers))} must be some, not all, of the layers "
                f"0..{self.num_layers - 1}"
            )
        if self.dense_layers and not self.dense_size:
            raise ModelError("config: dense_size = 0, must be the width of the dense layers")
        if self.windows and (
            len(self.windows) != self.num_layers or not all(type(w) is int and w >= 0 for w in self.windows)
        ):
            raise ModelError(
                f"config: windows = {show(list(self.windows))}, must be one number for each layer, or none"
            )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with routed experts. Placements, counts and experts are indexed by the place in this list."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - len(set(self.dense_layers))

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Maximal runs (first, last + 1) of neighbouring layers of the same kind, dense or with experts."""
        dense = [i in self.dense_layers for i in range(self.num_layers)]
        starts = [0, *(i for i in range(1, self.num_layers) if dense[i] != dense[i - 1])]
        return tuple(zip(starts, [*starts[1:], self.num_layers], strict=True))

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """How many positions a token of each layer sees at most, its own included; 0 = all."""
        return self.windows or (0,) * self.num_layers

    @property
    def rope_dim(self) -> int:
        """How many entries of a head's query and key rotate with the position."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def cache_widths(self) -> tuple[int, int]:
        """Numbers that the cache keeps of one token and layer: key side, value side (0 = part of the key side)."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim, 0
        return self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate, up and down projections and their biases."""
        biases = 2 * self.expert_size + self.hidden_size if self.expert_bias else 0
        return 3 * self.hidden_size * self.expert_size + biases

    def expert_bytes(self, itemsize: int = 4, int8: bool = False) -> int:
        """Bytes of one routed expert in a pool; int8 weights have a float32 scale per output channel."""
        if not int8:
            return self.expert_params * itemsize
        weights, channels = 3 * self.hidden_size * self.expert_size, 2 * self.expert_size + self.hidden_size
        return weights + 4 * channels + (self.expert_params - weights) * itemsize

    @property
    def other_params(self) -> int:
        """Parameters of everything that is not a routed expert, replicated on every device."""
        h, dense = self.hidden_size, len(set(self.dense_layers))
        routing = h * self.num_experts + self.num_experts * (self.routing.correction + self.routing.bias)
        shared = 3 * h * self.shared_expert_size + (h if self.shared_expert_gate else 0)
        layers = self.num_layers * (self._attention_params + 2 * h)
        layers += self.num_moe_layers * (routing + shared) + dense * 3 * h * self.dense_size
        return layers + self.vocab_size * h * (1 if self.tie_embeddings else 2) + h

    @property
    def _attention_params(self) -> int:
        h, heads = self.hidden_size, self.num_heads
        if (c := self.latent) is not None:
            query = (c.q_rank or h) * heads * (c.nope_dim + c.rope_dim) + (h * c.q_rank + c.q_rank if c.q_rank else 0)
            keys = h * (c.kv_rank + c.rope_dim) + c.kv_rank + c.kv_rank * heads * (c.nope_dim + c.value_dim)
            return query + keys + heads * c.value_dim * h + (h if self.o_bias else 0)
        both = heads + 2 * self.num_kv_heads
        norms = {"": 0, "head": 2, "all": heads + self.num_kv_heads}[self.qk_norm] * self.head_dim
        biases = (both * self.head_dim if self.qkv_bias else 0) + (h if self.o_bias else 0)
        return h * self.head_dim * (both + heads) + norms + biases + (heads if self.sinks else 0)


def _check_fields(part: Any, optional: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.type is int and (type(value) is not int or value < (field.name not in optional)):
            least = 0 if field.name in optional else 1
            raise ModelError(f"config: {field.name} = {show(value)}, must be an integer of at least {least}")
        if field.type is float and not (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value < math.inf
            and (value > 0 or field.name in optional)
        ):
            raise ModelError(f"config: {field.name} = {show(value)}, must be a positive number")
        if field.type is bool and not isinstance(value, bool):
            raise ModelError(f"config: {field.name} = {show(value)}, must be true or false")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ModelError(f"config: {name} = {show(value)} is not supported; supported: {', '.join(map(repr, choices))}")
