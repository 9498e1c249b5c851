"""How fast a card takes steps of published shapes, against what it copies and multiplies when it does nothing else."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancemoe_jax.expert_parallel.pool import ExpertPool, pool_layout
from dancemoe_jax.expert_parallel.tables import assign_slots, routing_tables
from dancemoe_jax.inference.state import State, init_state
from dancemoe_jax.inference.steps import Weights, decode_step, place_decoder, place_tables, prefill
from dancemoe_jax.kernels.library import Kernels
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder
from dancemoe_jax.model.experts import ExpertWeights

CONTEXT = 1024  # positions that a decoded token sees
BATCHES = (1, 8, 64)
PROMPTS = ((1, 64), (1, 1024), (8, 256), (64, 64))  # how many at once, and tokens of each
_IN_A_ROW = 8  # decode steps that are begun before any is waited for
_RUNS = 5
_MOST_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the card was measured to do: bytes read and written a second by a copy, operations a second by a matmul."""

    copy: float
    matmul: float


def measure_ceilings(device: Any) -> Ceilings:
    """Large copies and products of bfloat16; small ones on a CPU, where it is the script that is tried."""
    small = device.platform == "cpu"
    with jax.default_device(device):
        a = jnp.ones(2**18 if small else 2**30, jnp.bfloat16)
        grow = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, a: a * jnp.bfloat16(1.0009765), a))
        copy = 10 * 2 * a.nbytes / _seconds(lambda: grow(a))
        x = jnp.ones((128 if small else 8192,) * 2, jnp.bfloat16)
        product = jax.jit(lambda x: x @ x)
        return Ceilings(copy, 2 * len(x) ** 3 / _seconds(lambda: product(x)))


def _seconds(call: Callable[[], Any]) -> float:
    """Median of a few runs, after two that compile and warm up."""
    jax.block_until_ready(call())
    jax.block_until_ready(call())
    taken = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def cut(config: ModelConfig, memory: int, itemsize: int, int8: bool) -> ModelConfig:
    """As many layers, the dense ones first, as half of the memory holds; at most four."""
    layer = config.num_experts * config.expert_bytes(itemsize, int8)
    layers = max(1 + len(config.dense_layers), min(_MOST_LAYERS, int(memory / 2) // layer))
    return dataclasses.replace(config, num_layers=layers, max_position=2 * CONTEXT)


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same kind of model, small enough to try the script on a CPU."""
    latent = config.latent and dataclasses.replace(config.latent, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
    return dataclasses.replace(
        config,
        vocab_size=256,
        hidden_size=64,
        num_layers=1 + len(config.dense_layers),
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        expert_size=32,
        shared_expert_size=config.shared_expert_size and 32,
        dense_size=config.dense_size and 64,
        max_position=2 * CONTEXT,
        latent=latent,
    )


class Model:
    """A model of random weights on one device.

    Attributes:
        expert_bytes: of one expert; other_bytes: of all that every step reads.
    """

    def __init__(self, config: ModelConfig, device: Any, int8: bool) -> None:
        self.config, self.mesh = config, make_mesh([device])
        layers, experts = config.num_moe_layers, config.num_experts
        layout = pool_layout([layers * experts])
        slots = assign_slots(layout, np.ones((1, layers, experts), bool))
        with jax.default_device(device):
            pool = ExpertPool((_random_bank(config, layers * experts, int8),))
            decoder = Decoder(config, nnx.Rngs(0), jnp.bfloat16)
        tables = place_tables(routing_tables(layout, slots), self.mesh)
        self.weights = Weights(place_decoder(decoder, self.mesh), pool, tables)
        self.shapes: dict[str, Any] = {"config": config, "layout": layout, "mesh": self.mesh}
        self.expert_bytes = config.expert_bytes(2, int8)
        embedding = config.vocab_size * config.hidden_size * (0 if config.tie_embeddings else 2)
        self.other_bytes = config.other_params * 2 - embedding

    def decode(self, batch: int, kernels: Kernels) -> dict[str, float]:
        """Seconds and least bytes of a decode step of so many sequences, one after another as in the engine, which begins one
        before it has read the one before."""
        rng = np.random.default_rng(0)
        positions = np.full((1, batch), CONTEXT, np.int32)
        state = init_state(self.config, self.mesh, batch, jnp.bfloat16)
        run = _Run(state)

        def step() -> Any:
            tokens = rng.integers(0, self.config.vocab_size, (1, batch)).astype(np.int32)
            run.state, result = decode_step(
                self.weights, run.state, tokens, positions, positions > 0, **self.shapes, kernels=kernels
            )
            return result

        seconds = _seconds(lambda: [step() for _ in range(_IN_A_ROW)][-1]) / _IN_A_ROW
        routed = np.asarray(step().routed)
        cache = self.config.num_layers * batch * CONTEXT * sum(self.config.cache_widths) * 2
        return {"seconds": seconds, "bytes": self._read(routed) + cache, "operations": self._operations(batch, batch)}

    def prefill(self, size: tuple[int, int], kernels: Kernels) -> dict[str, float]:
        """The same of a chunk of so many prompts at once, of so many tokens each."""
        prompts, chunk = size
        rng, zero = np.random.default_rng(0), np.zeros((1, prompts), np.int32)
        own = np.arange(prompts, dtype=np.int32)[None]
        run = _Run(init_state(self.config, self.mesh, prompts, jnp.bfloat16))

        def step() -> Any:
            tokens = rng.integers(0, self.config.vocab_size, (1, prompts, chunk)).astype(np.int32)
            run.state, result = prefill(
                self.weights, run.state, tokens, own, zero, zero + chunk, **self.shapes, kernels=kernels
            )
            return result

        seconds, routed = _seconds(step), np.asarray(step().routed)
        return {
            "seconds": seconds,
            "bytes": self._read(routed),
            "operations": self._operations(prompts * chunk, prompts),
        }

    def _read(self, routed: np.ndarray) -> float:
        """Bytes of the experts that were chosen, each once, and of all other weights."""
        layers = routed.shape[2]
        active = sum(len(np.unique(routed[:, :, layer])) for layer in range(layers))
        return active * self.expert_bytes + self.other_bytes

    def _operations(self, tokens: int, rows: int) -> float:
        """Of the products with weights, logits for each row; attention's own are not counted, so that a share is never
        flattered."""
        config = self.config
        experts = config.num_moe_layers * config.top_k * 3 * config.hidden_size * config.expert_size
        head = config.vocab_size * config.hidden_size
        return 2 * tokens * (experts + self.other_bytes / 2 - head) + 2 * rows * head


@dataclasses.dataclass
class _Run:
    """The state that a step gives to the next one."""

    state: State


def _random_bank(config: ModelConfig, count: int, int8: bool) -> ExpertWeights:
    hidden, inner = config.hidden_size, config.expert_size

    def weight(seed: int, *shape: int) -> jax.Array:
        key = jax.random.key(seed)
        if int8:
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[-1] ** -0.5)

    def scale(width: int, inputs: int) -> jax.Array | None:
        return jnp.full((count, width), inputs**-0.5 / 73, jnp.float32) if int8 else None

    return ExpertWeights(
        weight(0, count, 2 * inner, hidden),
        weight(1, count, hidden, inner),
        s_in=scale(2 * inner, hidden),
        s_out=scale(hidden, inner),
    )


def with_shares(found: dict[str, float], ceilings: Ceilings) -> dict[str, float]:
    """A step's figures with the share of the least time that reading, or computing, takes at the card's own rates."""
    reading, computing = found["bytes"] / ceilings.copy, found["operations"] / ceilings.matmul
    shares = {"of_memory_floor": reading / found["seconds"], "of_matmul_rate": computing / found["seconds"]}
    return {**found, **shares, "of_floor": max(reading, computing) / max(found["seconds"], math.ulp(0))}
