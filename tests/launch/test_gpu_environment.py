"""What CUDA, NCCL and XLA are told before JAX starts, and a card that has less than its file promises."""

import os

import numpy as np
import pytest

from launch.cluster import devices as cluster_devices
from launch.cluster import gpu
from placement import Cluster, InputError

GB = 10**9
NAMES = (
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "NCCL_SOCKET_IFNAME",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
)


@pytest.fixture
def environment(monkeypatch):
    """No settings of the user's, a plugin, and one card of 80 GB."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu, "has_gpu_plugin", lambda: True)
    monkeypatch.setattr(gpu, "card_memory", lambda cards: [80 * GB] * len(cards))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return monkeypatch


def test_a_server_with_cards_tells_xla_cuda_and_nccl(environment):
    gpu.prepare_gpu([60 * GB], [0], "127.0.0.1")
    flags = os.environ["XLA_FLAGS"].split()
    assert "--xla_gpu_shard_autotuning=false" in flags
    assert "--xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer=false" in flags
    # JAX's share holds what is promised where CUDA shows 1 % less of a card than its driver.
    assert 60 * GB < float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) * 0.99 * 80 * GB < 61 * GB
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_users_own_settings_win(environment):
    mine = {
        "XLA_FLAGS": "--xla_gpu_shard_autotuning=true --xla_dump_to=x",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    os.environ.update(mine)
    gpu.prepare_gpu([60 * GB], [0], "127.0.0.1")
    assert os.environ["XLA_FLAGS"].startswith(mine["XLA_FLAGS"])
    assert os.environ["XLA_FLAGS"].count("shard_autotuning") == 1
    assert {name: os.environ[name] for name in list(mine)[1:]} == dict(list(mine.items())[1:])


def test_without_jaxs_part_for_gpus_nothing_is_set(environment):
    environment.setattr(gpu, "has_gpu_plugin", lambda: False)
    gpu.prepare_gpu([60 * GB], [0], "127.0.0.1")
    assert not set(NAMES) & set(os.environ)


def test_a_file_that_promises_more_than_the_card_has_is_refused_with_both_figures(environment):
    with pytest.raises(
        InputError, match=r"c.toml: card 1 has 80000000000 bytes.* promises 79900000000: give memory = 79"
    ):
        gpu.prepare_gpu([10 * GB, 79_900_000_000], [0, 1], None, "c.toml")


class Device:
    platform, process_index, id = "gpu", 0, 0

    def memory_stats(self):
        return {"bytes_limit": 60 * GB}


def test_what_jax_may_take_of_a_card_is_what_the_file_promises_or_more(environment):
    environment.setattr(cluster_devices.jax, "devices", lambda *_: [Device()])
    for memory, wrong in ((60 * GB, False), (60 * GB + 1, True)):
        cluster = Cluster.from_dict({"server": [{"name": "a", "devices": [{"memory": memory}]}]}, source="c.toml")
        if not wrong:
            assert len(cluster_devices.ordered_devices(cluster)) == 1
            continue
        with pytest.raises(InputError, match=f"c.toml: a device 0.* has {60 * GB} bytes.* promises {memory}"):
            cluster_devices.ordered_devices(cluster)


def test_an_interface_is_found_by_its_address():
    assert gpu.interface_of("127.0.0.1") == gpu.interface_of("localhost") == "lo"
    assert gpu.interface_of("203.0.113.9") is None
    assert gpu.interface_of("no such name.invalid") is None


def test_cards_are_those_that_cuda_shows(environment):
    assert gpu._visible([0, 2]) == [0, 2]
    os.environ["CUDA_VISIBLE_DEVICES"] = "3, GPU-abc"
    assert gpu._visible([0, 1]) == [3, "GPU-abc"]


def test_large_experts_are_written_one_by_one():
    from dancemoe_jax.expert_parallel.pool import WRITE_BYTES, WRITE_ROWS, write_rows

    sizes = np.array([1, WRITE_BYTES // WRITE_ROWS, WRITE_BYTES // 3, WRITE_BYTES, 3 * WRITE_BYTES])
    assert [write_rows(int(size)) for size in sizes] == [8, 8, 3, 1, 1]
