"""The decoder: parameters as NNX modules, one layer as a pure function, and the whole model for training and reference.

Modules only hold parameters, stacked over runs of layers of one kind so that a `lax.scan` goes through each run; they are
plain pytrees and go through `jax.jit` and `jax.grad` as they are. How a layer's routed experts are computed is an argument
(`moe`): dense for the reference, grouped for training, dispatched over devices for serving (dispatch.py).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dancemoe_jax.kernels.gpu_call import GpuKernels
from dancemoe_jax.kernels.linear import StackedWeight, linear, linear_of_heads
from dancemoe_jax.kernels.norm import rms_norm_native, rms_norm_xla
from dancemoe_jax.model.attention import along_last, angles, attend
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.experts import ExpertWeights, dense_experts, swiglu
from dancemoe_jax.model.layer_weights import LayerWeights, scan_run
from dancemoe_jax.model.present import where_present
from dancemoe_jax.model.queries import grouped_qkv, latent_qkv
from dancemoe_jax.model.router import route


class _Init(NamedTuple):
    """Draws parameters of `count` layers."""

    rngs: nnx.Rngs
    count: int
    dtype: Any

    def normal(self, *shape: int, fan_in: int) -> nnx.Param:
        return _normal(self.rngs, (self.count, *shape), fan_in, self.dtype)

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones((self.count, *shape), self.dtype))

    def zeros(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.zeros((self.count, *shape), self.dtype))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype))


class Layers(nnx.Module):
    """Everything of a run of layers that is not a routed expert; leading axis: layer. Absent parts are None.

    Weights are [outputs, inputs], as checkpoints have them, those of several heads one after another. A dense layer has a
    plain SwiGLU in the place of the shared expert, and no router.
    """

    def __init__(self, config: ModelConfig, count: int, dense: bool, rngs: nnx.Rngs, dtype=jnp.float32):
        c, init, h = config, _Init(rngs, count, dtype), config.hidden_size
        self.attention_norm = init.ones(h)
        if c.latent is None:
            self._init_grouped(c, init)
        else:
            self._init_latent(c, init)
        self.o_bias = init.zeros(h) if c.o_bias else None
        self.sinks = init.zeros(c.num_heads) if c.sinks else None
        self.moe_norm = init.ones(h)
        routed = not dense
        self.router = init.normal(c.num_experts, h, fan_in=h) if routed else None
        self.router_bias = init.zeros(c.num_experts) if routed and c.routing.bias else None
        self.router_correction = init.zeros(c.num_experts) if routed and c.routing.correction else None
        shared = c.dense_size if dense else c.shared_expert_size
        self.shared_in = init.normal(2 * shared, h, fan_in=h) if shared else None
        self.shared_out = init.normal(h, shared, fan_in=shared) if shared else None
        self.shared_gate = init.normal(1, h, fan_in=h) if routed and c.shared_expert_gate else None

    def _init_grouped(self, c: ModelConfig, init: _Init) -> None:
        h, queries, keys = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = init.normal(queries, h, fan_in=h)
        self.k = init.normal(keys, h, fan_in=h)
        self.v = init.normal(keys, h, fan_in=h)
        self.o = init.normal(h, queries, fan_in=queries)
        self.q_bias = init.zeros(queries) if c.qkv_bias else None
        self.k_bias = init.zeros(keys) if c.qkv_bias else None
        self.v_bias = init.zeros(keys) if c.qkv_bias else None
        widths = {"": (0, 0), "head": (c.head_dim, c.head_dim)}
        q_norm, k_norm = widths.get(c.qk_norm, (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim))
        self.q_norm = init.ones(q_norm) if q_norm else None
        self.k_norm = init.ones(k_norm) if k_norm else None

    def _init_latent(self, c: ModelConfig, init: _Init) -> None:
        part, h, heads = c.latent, c.hidden_size, c.num_heads
        assert part is not None
        rank = part.q_rank
        self.q_down = init.normal(rank, h, fan_in=h) if rank else None
        self.q_down_norm = init.ones(rank) if rank else None
        self.q = init.normal(heads * (part.nope_dim + part.rope_dim), rank or h, fan_in=rank or h)
        self.kv_down = init.normal(part.kv_rank + part.rope_dim, h, fan_in=h)
        self.kv_norm = init.ones(part.kv_rank)
        self.k_up = init.normal(heads, part.nope_dim, part.kv_rank, fan_in=part.kv_rank)
        self.v_up = init.normal(heads, part.value_dim, part.kv_rank, fan_in=part.kv_rank)
        self.o = init.normal(h, heads * part.value_dim, fan_in=heads * part.value_dim)


class Experts(nnx.Module):
    """All routed experts in logical order, arrays as in ExpertWeights; leading axes: MoE layer, expert."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        c = config
        grid = (c.num_moe_layers, c.num_experts)
        self.w_in = _normal(rngs, (*grid, 2 * c.expert_size, c.hidden_size), c.hidden_size, dtype)
        self.w_out = _normal(rngs, (*grid, c.hidden_size, c.expert_size), c.expert_size, dtype)
        self.b_in = nnx.Param(jnp.zeros((*grid, 2 * c.expert_size), dtype)) if c.expert_bias else None
        self.b_out = nnx.Param(jnp.zeros((*grid, c.hidden_size), dtype)) if c.expert_bias else None

    @property
    def weights(self) -> ExpertWeights:
        parts = (self.w_in, self.w_out, self.b_in, self.b_out)
        return ExpertWeights(*(None if part is None else part[...] for part in parts))


class Decoder(nnx.Module):
    """Embedding, decoder layers, final norm and head: what every device holds. Routed experts live apart.

    `runs` are the layers, one `Layers` for each of `config.runs`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        self.embedding = _normal(rngs, (config.vocab_size, config.hidden_size), config.hidden_size, dtype)
        for number, (a, b) in enumerate(config.runs):
            setattr(self, f"run_{number}", Layers(config, b - a, a in config.dense_layers, rngs, dtype))
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        shape = (config.vocab_size, config.hidden_size)
        self.head = None if config.tie_embeddings else _normal(rngs, shape, config.hidden_size, dtype)

    @property
    def runs(self) -> list[Layers]:
        """`run_0`, `run_1`, …: attributes, because Orbax takes no tree that has lists among names."""
        names = itertools.takewhile(lambda name: hasattr(self, name), (f"run_{i}" for i in itertools.count()))
        return [getattr(self, name) for name in names]


class Attention(NamedTuple):
    """How one layer attends, beside its queries, keys and values: `attend`'s last arguments."""

    scale: float
    window: Any
    sinks: Any
    value_width: int | None  # where values are the first entries of the keys

    def __call__(self, q, k, v, q_positions, k_positions):
        v = k[..., : self.value_width] if v is None else v
        return attend(q, k, v, q_positions, k_positions, self.scale, self.window, self.sinks)


def decoder_layer(
    config: ModelConfig,
    layer: LayerWeights,
    x: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    attention: Callable,
    moe: Callable,
    window: Int[Array, ""] | None = None,
    present: Bool[Array, ""] | None = None,
):
    """One layer on the residual stream `x`.

    Args:
        attention: (how: Attention, q, k, v) -> (heads' outputs, anything it wants handed back, such as a cache). v is
            None where the keys are the values too (latent attention).
        moe: (tokens [n, hidden], topk_weights, topk_ids, logits) -> (sum of routed experts, anything). Not called in a
            dense layer.
        present: whether any token counts; where none does, only `attention` and `moe` compute. None: some do.

    Returns:
        The new residual stream and what `attention` and `moe` (None in a dense layer) handed back.
    """
    latent = config.latent
    width = config.head_dim if latent is None else latent.nope_dim + latent.rope_dim
    turns = angles(config.rope, config.rope_dim, positions, x.dtype)

    def project(x):
        h = layer.norm(x, layer.attention_norm, config.rms_eps)
        return (grouped_qkv if latent is None else latent_qkv)(config, layer, h, turns)

    def finish(x, heads):
        heads = heads if latent is None else linear_of_heads(heads, layer.v_up)
        x = x + linear(heads.reshape(*heads.shape[:2], -1), layer.o)
        return x if layer.o_bias is None else x + along_last(layer.o_bias, x)

    def routed(x):
        h = layer.norm(x, layer.moe_norm, config.rms_eps).reshape(-1, config.hidden_size)
        how = (layer.router_bias, layer.router_correction)
        return h, None if layer.router is None else route(config, layer.router, h, *how)

    def visited_by_all(h):
        shared = swiglu(h, layer.shared_in, layer.shared_out)
        return shared if layer.shared_gate is None else jax.nn.sigmoid(linear(h, layer.shared_gate)) * shared

    with jax.named_scope("attention"):
        q, k, v = where_present(present, project, x)
        how = Attention(config.attention_scale or width**-0.5, window, layer.sinks, latent and latent.kv_rank)
        heads, kept = attention(how, q, k, v)
        x = where_present(present, finish, x, heads)
    with jax.named_scope("moe"):
        h, routing = where_present(present, routed, x)
        out, aux = (jnp.zeros_like(h), None) if routing is None else moe(h, *routing)
        if layer.shared_in is not None and layer.shared_out is not None:
            out = out + where_present(present, visited_by_all, h)
        return x + out.reshape(x.shape).astype(x.dtype), kept, aux


def scan_layers(
    config: ModelConfig,
    decoder: Decoder,
    body: Callable,
    carry,
    per_moe_layer,
    remat: bool = False,
    native: bool = False,
    active: Bool[Array, " rows"] | None = None,
    gpu: GpuKernels = None,
):
    """Go through all layers, run by run.

    Args:
        body: (carry, (layer: LayerWeights, index, window, own)) -> (carry, aux); `index` counts all layers, `own` is the
            layer's part of `per_moe_layer`, None in a dense layer.
        per_moe_layer: pytree with a leading axis over MoE layers.
        native: products go through native calls, which take weights where they lie; else each layer's are copied out of
            the stack first. Only the latter can be differentiated.
        active: rows that count, which the others' products need not be computed for.
        gpu: products go through a GPU's kernels, which do the same.

    Returns:
        carry, and `aux` of the MoE layers stacked in order.
    """
    windows = jnp.array(config.windows, jnp.int32) if any(config.windows) else None
    collected: list[Any] = []
    done = 0
    for (start, stop), layers in zip(config.runs, decoder.runs, strict=True):
        dense = start in config.dense_layers
        count = 0 if dense else stop - start
        whole = count == config.num_moe_layers
        own = None
        if not dense:
            own = per_moe_layer if whole else jax.tree.map(lambda a, i=done, n=count: a[i : i + n], per_moe_layer)
        window = None if windows is None else windows[start:stop]
        carry, aux = scan_run(
            body, layers, range(start, stop), carry, (window, own), remat=remat, native=native, active=active, gpu=gpu
        )
        done += count
        collected += [] if dense else [aux]
    if len(collected) == 1:
        return carry, collected[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected)


def head_logits(
    config: ModelConfig,
    decoder: Decoder,
    x: Float[Array, "*shape hidden"],
    native: bool = False,
    active: Bool[Array, " rows"] | None = None,
) -> Float[Array, "*shape vocab"]:
    norm = functools.partial(rms_norm_native, active=active) if native else rms_norm_xla
    x = norm(x, decoder.final_norm[...], config.rms_eps)
    head = decoder.embedding[...] if decoder.head is None else decoder.head[...]
    return linear(x, StackedWeight(head[None], 0, active) if native else head, jnp.float32)


def forward(
    config: ModelConfig,
    decoder: Decoder,
    experts: Experts,
    tokens: Int[ArrayLike, "batch tokens"],
    moe: Callable | None = None,
    remat: bool = False,
):
    """Logits of whole sequences on one device, without a cache.

    Args:
        moe: (h, weights: ExpertWeights, topk_weights, topk_ids, logits) -> (routed sum, aux). The default computes every
            expert for every token: slow, plainly right, the reference that all other paths are tested against.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Returns:
        Float32 logits [batch, tokens, vocab] and `aux` stacked over MoE layers.
    """

    def reference(h, weights, topk_weights, topk_ids, logits):
        return dense_experts(h, weights, topk_weights, topk_ids, config.swiglu_limit), topk_ids

    routed = moe or reference
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def body(x, stacked):
        layer, _, window, own = stacked
        x, _, aux = decoder_layer(
            config,
            layer,
            x,
            positions,
            attention=lambda how, q, k, v: (how(q, k, v, positions, positions), None),
            moe=lambda h, *routing: routed(h, own, *routing),
            window=window,
        )
        return x, aux

    x, aux = scan_layers(config, decoder, body, decoder.embedding[...][tokens], experts.weights, remat)
    return head_logits(config, decoder, x), aux
