"""Greedy generation from prompts, on top of the serving steps (steps.py). No batching over time: that is launch's engine."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.arguments import check_mesh
from dancemoe_jax.errors import ArgumentError, ModelError
from dancemoe_jax.expert_parallel.dispatch import Transport
from dancemoe_jax.expert_parallel.pool import PoolLayout, local_devices
from dancemoe_jax.inference.finite import all_finite, not_finite
from dancemoe_jax.inference.prompts import check_prompt
from dancemoe_jax.inference.state import State, init_state
from dancemoe_jax.inference.steps import StepResult, Weights, decode_step, prefill
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
    """Greedy continuation of each prompt, prompts shared out over the devices in turn.

    Args:
        weights: the model, its experts placed.
        prompts: token ids, at least one each.
        max_tokens: tokens to generate for each prompt, fewer where the end-of-text token or the context ends it.
        config, layout, mesh: what the weights were made with.
        chunk: tokens of each prompt in one prefill step.
        transport: as in `decode_step`.

    Returns:
        The generated tokens of each prompt, end-of-text not included. Where several processes run this together, each
        gets those of the prompts on its own devices, and empty lists for the others.

    Raises:
        RequestError: an empty prompt, one that leaves no room in the context, or ids outside the vocabulary.
        ArgumentError: config, layout and mesh are not those of the weights, or a number makes no sense.
        ModelError: the model makes NaN or infinity of a prompt.
    """
    check_mesh(mesh, len(layout.capacity))
    if max_tokens < 0 or chunk < 1:
        raise ArgumentError(f"max_tokens, chunk: {max_tokens}, {chunk}; must be at least 0 and at least 1")
    for number, prompt in enumerate(prompts):
        check_prompt(config, prompt, f"prompt {number}")
    shapes: Any = {"config": config, "layout": layout, "mesh": mesh, "transport": transport}
    grid = (mesh.size, max(1, -(-len(prompts) // mesh.size)))
    state, length, current = _prefill_all(weights, prompts, grid, chunk, shapes)
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
        _check_finite(config, result, active)
        elsewhere = jax.process_count() > 1 and bool(np.asarray(result.control).any())
        length = length + active
        for device, tokens in own_rows(result.tokens).items():
            current[device] = np.where(active[device], tokens, current[device])
    return outputs


def _prefill_all(
    weights: Weights, prompts: Sequence[Sequence[int]], grid: tuple[int, int], chunk: int, shapes: dict[str, Any]
) -> tuple[State, np.ndarray, np.ndarray]:
    """All prompts, chunk by chunk: the state, and of each [device, sequence] its length and its first new token."""
    config, mesh = shapes["config"], shapes["mesh"]
    state = init_state(config, mesh, grid[1], weights.decoder.embedding[...].dtype)
    length, current = np.zeros((2, *grid), np.int32)
    padded = np.zeros((*grid, -(-config.max_position // chunk) * chunk), np.int32)
    for i, prompt in enumerate(prompts):
        padded[i % mesh.size, i // mesh.size, : len(prompt)] = prompt
        length[i % mesh.size, i // mesh.size] = len(prompt)
    sequences = np.broadcast_to(np.arange(grid[1], dtype=np.int32), grid)
    for start in range(0, int(length.max()), chunk):
        lengths = np.clip(length - start, 0, chunk)
        rows = (padded[:, :, start : start + chunk], sequences, np.full(grid, start, np.int32), lengths)
        state, result = prefill(weights, state, *(shard_rows(mesh, part) for part in rows), **shapes)
        _check_finite(config, result, lengths > 0)
        for device, tokens in own_rows(result.tokens).items():
            current[device] = np.where(lengths[device] > 0, tokens, current[device])
    return state, length, current


def _check_finite(config: ModelConfig, result: StepResult, active: np.ndarray) -> None:
    """Raise ModelError where a row [devices, sequences] that counts is not finite."""
    for device, layers in own_rows(result.finite_layers).items():
        for sequence in np.flatnonzero(active[device] & (layers < all_finite(config))):
            number = int(sequence) * len(active) + device
            raise ModelError(f"prompt {number}: {not_finite(config, int(layers[sequence]))}")
