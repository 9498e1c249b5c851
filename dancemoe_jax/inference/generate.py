"""Greedy generation from prompts, on top of the serving steps (steps.py). No batching over time: that is launch's engine."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.errors import ModelError
from dancemoe_jax.expert_parallel.dispatch import Transport
from dancemoe_jax.expert_parallel.pool import PoolLayout, local_devices
from dancemoe_jax.inference.steps import Weights, decode_step, init_state, prefill
from dancemoe_jax.mesh import own_rows, shard_rows
from dancemoe_jax.model.config import ModelConfig


def generate(
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    config: ModelConfig,
    layout: PoolLayout,
    mesh: Mesh,
    chunk: int = 64,
    transport: Transport | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt, prompts dealt over the devices in turn.

    Args:
        prompts: token ids, at least one each.
        max_tokens: tokens to generate for each prompt, fewer where the end-of-text token or the context ends it.

    Returns:
        The generated tokens of each prompt, end-of-text not included. Where several processes run this together, each
        gets those of the prompts on its own devices, and empty lists for the others.

    Raises:
        ModelError: an empty prompt, one that leaves no room in the context, or ids outside the vocabulary.
    """
    for number, prompt in enumerate(prompts):
        check_prompt(config, prompt, f"prompt {number}")
    per_device = max(1, -(-len(prompts) // mesh.size))
    state = init_state(config, mesh, per_device, weights.decoder.embedding[...].dtype)
    grid = (mesh.size, per_device)
    length = np.zeros(grid, np.int32)
    padded = np.zeros((*grid, -(-config.max_position // chunk) * chunk), np.int32)
    for i, prompt in enumerate(prompts):
        padded[i % mesh.size, i // mesh.size, : len(prompt)] = prompt
        length[i % mesh.size, i // mesh.size] = len(prompt)
    shapes: Any = {"config": config, "layout": layout, "mesh": mesh, "transport": transport}
    current = np.zeros(grid, np.int32)
    sequences = np.broadcast_to(np.arange(per_device, dtype=np.int32), grid)
    for start in range(0, int(length.max()), chunk):
        lengths = np.clip(length - start, 0, chunk)
        rows = (padded[:, :, start : start + chunk], sequences, np.full(grid, start, np.int32), lengths)
        state, result = prefill(weights, state, *(shard_rows(mesh, part) for part in rows), **shapes)
        for device, tokens in own_rows(result.tokens).items():
            current[device] = np.where(lengths[device] > 0, tokens, current[device])
    outputs: list[list[int]] = [[] for _ in prompts]
    active = (length > 0) & np.isin(np.arange(mesh.size), local_devices(mesh))[:, None]
    elsewhere = jax.process_count() > 1
    for _ in range(max_tokens):
        for i, output in enumerate(outputs):
            at = (i % mesh.size, i // mesh.size)
            if active[at] and current[at] == config.eos_token:
                active[at] = False
            elif active[at]:
                output.append(int(current[at]))
                active[at] = len(prompts[i]) + len(output) < config.max_position and len(output) < max_tokens
        if not (active.any() or elsewhere):
            break
        rows = (current, length, active, active.any(1, keepdims=True).astype(np.int32))
        state, result = decode_step(weights, state, *(shard_rows(mesh, part) for part in rows), **shapes)
        elsewhere = jax.process_count() > 1 and bool(np.asarray(result.control).any())
        length = length + active
        for device, tokens in own_rows(result.tokens).items():
            current[device] = np.where(active[device], tokens, current[device])
    return outputs


def check_prompt(config: ModelConfig, prompt: Sequence[int], name: str) -> None:
    """Raises ModelError where a prompt cannot be served."""
    if not 1 <= len(prompt) < config.max_position:
        raise ModelError(
            f"{name}: {len(prompt)} tokens; the model's context of {config.max_position} takes 1 to "
            f"{config.max_position - 1} and leaves room for one more"
        )
    if not all(0 <= token < config.vocab_size for token in prompt):
        raise ModelError(f"{name}: token ids must lie in 0..{config.vocab_size - 1}")
