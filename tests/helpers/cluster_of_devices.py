"""What the runtime's tests share: a small model on four unequal devices of three servers, under random placements."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancemoe_jax import (
    ModelConfig,
    Weights,
    assign_slots,
    fill_pool,
    make_mesh,
    place_decoder,
    place_tables,
    pool_layout,
    routing_tables,
)
from dancemoe_jax.model.decoder import Decoder, Experts, forward
from placement import Cluster, Placement

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    top_k=3,
    expert_size=16,
    max_position=48,
)
DEVICE_SERVER = np.array([0, 1, 2, 2])
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [4, 6], [60, 2, 8, 1, 33, 12, 7, 7, 7]]
CAPACITY = (7, 10, 8, 16)
EXPERT = 1000
CLUSTER = Cluster.from_dict(
    {
        "server": [
            {"name": "a", "devices": [{"memory": CAPACITY[0] * EXPERT}]},
            {"name": "b", "devices": [{"memory": CAPACITY[1] * EXPERT}]},
            {"name": "c", "devices": [{"memory": CAPACITY[2] * EXPERT}, {"memory": CAPACITY[3] * EXPERT}]},
        ],
        "network": {"bandwidth": "500Mbps", "latency": "1ms"},
    }
)


def random_resident(rng, capacity=CAPACITY, config=CONFIG) -> np.ndarray:
    """A valid placement: every expert somewhere, then more copies until every device is full or holds all experts."""
    grid = (config.num_moe_layers, config.num_experts)
    resident = np.zeros((len(capacity), *grid), bool)
    for layer, expert in rng.permutation(np.argwhere(np.ones(grid, bool))):
        room = [d for d, most in enumerate(capacity) if resident[d].sum() < most]
        resident[rng.choice(room), layer, expert] = True
    for device, most in enumerate(capacity):
        free = rng.permutation(np.argwhere(~resident[device]))[: most - int(resident[device].sum())]
        resident[device][tuple(free.T)] = True
    return resident


def placement_of(resident, source="test") -> Placement:
    """On the devices of `CLUSTER`."""
    layers, experts = resident.shape[1:]
    model = {
        "name": "small",
        "layers": layers,
        "experts": experts,
        "top_k": 3,
        "expert_bytes": EXPERT,
        "reserved_bytes": 0,
    }
    return Placement(resident, CLUSTER.device_names, "random", model, source=source)


@dataclasses.dataclass
class Small:
    """A model, its experts on the host, and a mesh that runs it."""

    config: ModelConfig
    decoder: Decoder
    experts: Experts
    mesh: Any
    layout: Any
    device_server: np.ndarray

    @classmethod
    def make(cls, seed=0, capacity=CAPACITY, device_server=DEVICE_SERVER, devices=None, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        decoder, experts = Decoder(config, nnx.Rngs(seed)), Experts(config, nnx.Rngs(seed + 1))
        # Sharper routing, so that tokens differ in where they go.
        for layers in decoder.runs:
            if layers.router is not None:
                layers.router = nnx.Param(layers.router[...] * 4)
        mesh = make_mesh(devices or jax.devices()[: len(capacity)])
        return cls(config, decoder, experts, mesh, pool_layout(capacity, device_server), np.asarray(device_server))

    @property
    def shapes(self):
        return {"config": self.config, "layout": self.layout, "mesh": self.mesh}

    def read(self, layer, expert, arena=None):
        return jax.tree.map(lambda a: np.asarray(a[layer, expert]), self.experts.weights)

    def place(self, resident):
        """Slots and weights under a placement."""
        slots = assign_slots(self.layout, resident)
        pool = fill_pool(self.mesh, self.layout, slots, self.read)
        return slots, Weights(place_decoder(self.decoder, self.mesh), pool, self.tables(slots))

    def tables(self, slots, likely=None):
        return place_tables(routing_tables(self.layout, slots, likely=likely), self.mesh)

    def reference_logits(self, tokens):
        """Float32 [tokens, vocab] of one sequence from the dense model on one device."""
        return np.asarray(forward(self.config, self.decoder, self.experts, jnp.asarray(tokens)[None])[0][0])

    def reference_text(self, prompt, count):
        """Greedy continuation by the dense model, every prefix computed anew."""
        text = list(prompt)
        step = jax.jit(lambda tokens: forward(self.config, self.decoder, self.experts, tokens)[0])
        for _ in range(count):
            padded = np.zeros((1, self.config.max_position), np.int32)
            padded[0, : len(text)] = text
            text.append(int(np.argmax(step(padded)[0, len(text) - 1])))
        return text[len(prompt) :]
