"""This project beside its peers: the serving engine on one device, with random weights."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancemoe_jax import fill_pool, make_mesh, place_decoder, place_tables, pool_layout
from dancemoe_jax.checkpoint.families import config_from_fields
from dancemoe_jax.expert_parallel.tables import assign_slots, routing_tables
from dancemoe_jax.inference.steps import Weights
from dancemoe_jax.mesh import shard_rows
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder
from dancemoe_jax.model.experts import ExpertWeights, quantize
from launch.bench.harness.peer_shapes import cut, random_numbers
from launch.cluster.devices import cluster_devices
from launch.engine.engine import Engine
from launch.engine.request import Request

_EXPERTS = 8  # different ones that are drawn; all slots are filled with copies of them


class Ours:
    """An engine with one device that holds all experts.

    Args:
        fields: the model's `config.json`.
        kind: "float32", "bfloat16", or "int8" for int8 experts with bfloat16 for the rest.
        sequences, context: most sequences at once, and tokens of each.
        kernels: "auto" or "xla"; wide: as `Engine` takes it.
    """

    def __init__(
        self, fields: dict[str, Any], kind: str, sequences: int, context: int, kernels: str, wide: bool | None
    ) -> None:
        config = dataclasses.replace(config_from_fields(fields, "config.json"), max_position=context)
        dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
        mesh = make_mesh(cluster_devices(1))
        layout = pool_layout([config.num_moe_layers * config.num_experts])
        slots = assign_slots(layout, np.ones((1, config.num_moe_layers, config.num_experts), bool))
        drawn = _experts(config, kind)
        pool = fill_pool(mesh, layout, slots, lambda layer, expert: drawn[(layer + expert) % len(drawn)])
        decoder = nnx.jit(lambda: Decoder(config, nnx.Rngs(0), dtype))()
        tables = place_tables(routing_tables(layout, slots), mesh)
        weights = Weights(place_decoder(decoder, mesh), pool, tables)
        self._engine = Engine(
            config,
            layout,
            mesh,
            weights,
            np.zeros(1, int),
            sequences,
            wide=wide is not False and kernels != "xla",
            kernels=kernels,
        )
        self._vocabulary, self._rng = config.vocab_size, np.random.default_rng(0)
        jax.block_until_ready(weights)

    def prefill(self, tokens: int) -> float:
        """Seconds from a request's start to its first token."""
        request = Request(0, self._tokens(tokens), 1, 0.0)
        begin = time.perf_counter()
        self._engine.submit(request)
        while not self._engine.idle:
            self._engine.step()
        return time.perf_counter() - begin

    def decode(self, batch: int, used: int, steps: int) -> list[float]:
        """Seconds of each step of `batch` requests whose prompts of `used` tokens are in the cache already.

        The tokens fed are random, as the peers': greedy text of random weights soon repeats itself.
        """
        engine = self._engine
        requests = [Request(0, self._tokens(used), steps + 2 * batch, 0.0) for _ in range(batch)]
        for request in requests:
            engine.submit(request)
        engine.batch.admit()
        for request in requests:
            request.done = used
        fed = self._rng.integers(self._vocabulary, size=(steps + 2 * batch, *engine.last.shape), dtype=np.int32)
        ready = [shard_rows(engine.mesh, tokens) for tokens in fed]
        seconds, begin = [], time.perf_counter()
        while len(seconds) < steps:
            before = engine.tokens_processed["decode"]
            engine.step()
            # The next step runs already, so time goes on between two calls.
            end = time.perf_counter()
            # They begin to decode one after another; what counts is a step of all.
            if engine.tokens_processed["decode"] - before == batch:
                seconds.append(end - begin)
            begin = end
            engine.last = ready.pop()
        for request in requests:
            request.cancelled = True
        engine.step()
        return seconds

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(0, self._vocabulary, count).tolist()


def _experts(config: ModelConfig, kind: str) -> list[ExpertWeights]:
    """A few random experts in the pool's type."""
    numbers = random_numbers() * np.float32(0.02)
    hidden, inner = config.hidden_size, config.expert_size
    drawn = []
    for i in range(_EXPERTS):
        w_in = cut(numbers, 2 * inner * hidden, 2 * i * 1234567).reshape(2 * inner, hidden)
        w_out = cut(numbers, inner * hidden, (2 * i + 1) * 1234567).reshape(hidden, inner)
        own = ExpertWeights(w_in, w_out)
        if kind == "int8":
            drawn.append(quantize(own))
        else:
            drawn.append(jax.tree.map(lambda a: a.astype(jnp.dtype(kind)), own))
    return drawn
