"""What a model needs of a device's memory: reserved bytes, pages for keys and values, sizes as a profile, slots for experts."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dancemoe_jax.expert_parallel.pool import write_rows
from dancemoe_jax.inference.cache import PAGE
from dancemoe_jax.model.config import ModelConfig
from launch.cluster.example import ALONE
from launch.engine.pages import least_pages
from placement import Cluster, InputError, Profile

WORKSPACE_BYTES = 8 * 2**20
# What a step's arrays follow from, as compiled programs have it: programs of attention and the rows of one, rows of a tile.
_PROGRAMS, _ROWS, _TILE = 256, 64, 64
# A device computes for so many servers' rows at once.
_SERVERS = 4
# Tokens of a sequence that pages are kept for where nothing is said, and those that a step takes of it.
_USUAL_TOKENS, _CHUNK = 1024, 256


def reserved_bytes(config: ModelConfig, sequences: int, itemsize: int = 4, kv_cache: int | None = None) -> int:
    """Bytes on every device for all that is not an expert: other weights, key-value cache, workspace of a step.

    Args:
        kv_cache: bytes for keys and values; default: each sequence has room for as many tokens as most have, and one for
            the whole context.
    """
    workspace = workspace_bytes(config, sequences, itemsize)
    cache = _usual_pages(config, sequences) * page_bytes(config, itemsize) if kv_cache is None else kv_cache
    return config.other_params * itemsize + cache + workspace


def page_bytes(config: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of a page of the cache: keys and values of PAGE positions in one layer."""
    return PAGE * sum(config.cache_widths) * itemsize


def cache_pages(
    config: ModelConfig, memory: np.ndarray, experts: np.ndarray, sequences: int, itemsize: int = 4, chunk: int = 64
) -> int:
    """Pages of every device's cache: what is left beside experts where least is, at most what no sequence waits for.

    Args:
        memory: bytes of each device, [D]; experts: bytes that each has slots for, [D].
        chunk: tokens that a step takes of a sequence at most.

    Raises:
        InputError: that is not enough for one sequence.
    """
    left = int(np.min(memory - experts)) - config.other_params * itemsize - workspace_bytes(config, sequences, itemsize)
    least = least_pages(config.layer_windows, config.max_position, max(chunk, _CHUNK))
    pages, each = left // page_bytes(config, itemsize), page_bytes(config, itemsize)
    if pages < least:
        raise InputError(
            f"{pages * each} bytes are left for keys and values; one sequence of {config.max_position} tokens takes "
            f"{least * each}: give --kv-cache {least * each}B or more, a shorter --context, or devices more memory"
        )
    return min(pages, sequences * least)


def _usual_pages(config: ModelConfig, sequences: int) -> int:
    usual = least_pages(config.layer_windows, min(config.max_position, _USUAL_TOKENS), _CHUNK)
    return max(least_pages(config.layer_windows, config.max_position, _CHUNK), sequences * usual)


def workspace_bytes(config: ModelConfig, sequences: int, itemsize: int = 4, chunk: int = 64) -> int:
    """Bytes of a device for what a step, or a commit between two steps, has in between; a bound of what programs are
    compiled to need (engine.programs compares them).

    Args:
        sequences: batch slots of a device; chunk: prompt tokens of a step.
    """
    rows = max(sequences, chunk)
    experts = (rows * config.top_k + _TILE) * (4 * config.hidden_size + itemsize * config.expert_size)
    value = config.latent.kv_rank if config.latent else config.head_dim
    block = _ROWS if config.latent is None else 16
    attention = 4 * max(_PROGRAMS * block, rows * config.num_heads) * (value + 2)
    logits = sequences * config.vocab_size * (4 + itemsize)
    step = _SERVERS * experts + attention + logits + 16 * rows * config.hidden_size
    expert_bytes = config.expert_bytes(itemsize)
    return max(WORKSPACE_BYTES, step, write_rows(expert_bytes) * expert_bytes)


def model_profile(
    config: ModelConfig, cluster: Cluster, counts: np.ndarray, *, name: str, reserved: int, itemsize: int = 4
) -> Profile:
    """What was counted [servers, layers, experts], with the model's sizes."""
    return Profile(
        counts,
        cluster.names,
        model=name,
        top_k=config.top_k,
        hidden_size=config.hidden_size,
        expert_bytes=config.expert_bytes(itemsize),
        reserved_bytes=reserved,
    )


def slots_per_device(cluster: Cluster, reserved: int, expert_bytes: int) -> list[int]:
    """Experts that fit each device beside what is reserved.

    Raises:
        InputError: a device has room for none.
    """
    slots = (cluster.memory - reserved) // expert_bytes
    for (server, device), memory, count in zip(cluster.device_names, cluster.memory, slots, strict=True):
        if count < 1:
            raise InputError(
                f"{cluster.source}: {server} device {device}: memory of {memory} bytes is {reserved + expert_bytes - memory} "
                f"short of {reserved} reserved for all but experts and {expert_bytes} for one expert; give it more memory"
            )
    return [int(count) for count in slots]


def sizes(
    path: Path,
    config: ModelConfig,
    cluster: Cluster,
    *,
    dtype: str = "float32",
    int8: bool = False,
    sequences: int = 8,
    kv_cache: int | None = None,
) -> Profile:
    """What a model takes on the devices of a cluster, as the profile of users who are all alike."""
    itemsize = jnp.dtype(dtype).itemsize
    reserved = reserved_bytes(config, sequences, itemsize, kv_cache)
    alike = np.ones((len(cluster.names), config.num_moe_layers, config.num_experts), np.int64)
    profile = model_profile(config, cluster, alike, name=path.name, reserved=reserved, itemsize=itemsize)
    return dataclasses.replace(profile, expert_bytes=config.expert_bytes(itemsize, int8))


def alone(
    config: ModelConfig, sequences: int, *, itemsize: int = 4, int8: bool = False, kv_cache: int | None = None
) -> Cluster:
    """A cluster of one server, whose one device has room for the whole model."""
    experts = config.num_moe_layers * config.num_experts * config.expert_bytes(itemsize, int8)
    memory = reserved_bytes(config, sequences, itemsize, kv_cache) + experts
    server = {"name": ALONE, "devices": [{"memory": memory}]}
    return Cluster.from_dict({"server": [server]}, source="one server")
