"""How much of a device's memory keys and values get: what is left beside experts, or what the user says, never too little."""

import dataclasses

import numpy as np
import pytest

from launch.engine.memory import alone, cache_pages, page_bytes, reserved_bytes, workspace_bytes
from launch.engine.pages import least_pages
from placement import InputError
from tests.helpers.cluster_of_devices import CONFIG

LONG = dataclasses.replace(CONFIG, max_position=4096)
LEAST = least_pages(LONG.layer_windows, 4096, 256)
EXPERTS = 5 * LONG.expert_bytes()


def memory(pages):
    """Of a device with room for so many pages beside five experts and everything else."""
    return LONG.other_params * 4 + workspace_bytes(LONG, 8) + EXPERTS + pages * page_bytes(LONG)


def test_every_device_has_as_many_pages_as_the_one_with_the_least_room():
    sizes = np.array([memory(LEAST + 40), memory(LEAST + 7) + 3, memory(LEAST + 90)])
    assert cache_pages(LONG, sizes, np.full(3, EXPERTS), 8) == LEAST + 7
    # More than all sequences can ever use is left alone.
    assert cache_pages(LONG, np.array([memory(100 * LEAST)]), np.array([EXPERTS]), 8) == 8 * LEAST


def test_less_than_one_sequence_needs_is_refused_with_the_remedy():
    with pytest.raises(
        InputError, match=rf"one sequence of 4096 tokens takes {LEAST * page_bytes(LONG)}: give --kv-cache"
    ):
        cache_pages(LONG, np.array([memory(LEAST - 1)]), np.array([EXPERTS]), 8)


def test_the_context_is_a_limit_and_what_is_said_is_reserved():
    assert reserved_bytes(LONG, 8) - reserved_bytes(LONG, 8, kv_cache=0) < 8 * LEAST * page_bytes(LONG) / 3
    assert reserved_bytes(LONG, 1) - reserved_bytes(LONG, 1, kv_cache=0) == LEAST * page_bytes(LONG)
    given = LEAST * page_bytes(LONG) + 5
    (server,) = alone(LONG, 8, kv_cache=given).memory.tolist()
    experts = LONG.num_moe_layers * LONG.num_experts * LONG.expert_bytes()
    assert cache_pages(LONG, np.array([server]), np.array([experts]), 8) == LEAST


def test_a_window_reserves_its_span():
    windows = dataclasses.replace(LONG, windows=(0, 128, 128))
    assert reserved_bytes(windows, 1) < reserved_bytes(LONG, 1) - page_bytes(LONG) * 2 * (4096 - 128 - 512) / 32
