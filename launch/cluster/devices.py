"""From a cluster to a running mesh: the demo's own cluster, the devices to run it on, and what experts may take of them."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from launch.cluster.gpu import check_promise, prepare_gpu
from placement import Cluster, InputError


def cluster_devices(count: int) -> Sequence[Any]:
    """Devices to run a whole cluster in this process: the accelerators where there are enough, else virtual CPUs.

    Raises:
        InputError: this process uses JAX already, with fewer devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the devices are made once for a process
        if len(jax.devices("cpu")) < count:
            raise InputError(f"{count} devices: this process has {len(jax.devices('cpu'))} already") from None
    devices = jax.devices()
    return (devices if len(devices) >= count else jax.devices("cpu"))[:count]


def ordered_devices(cluster: Cluster) -> list[Any]:
    """All devices in the order of the cluster file, for `make_mesh`.

    Raises:
        InputError: a server has fewer devices than its file lists, or less memory on one, or more processes run than
            there are servers.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    ordered = []
    for index, server in enumerate(cluster.servers):
        own = [device for device in devices if device.process_index == index]
        if len(own) < len(server.devices):
            raise InputError(
                f"{cluster.source}: server {server.name} lists {len(server.devices)} devices, its process has {len(own)} "
                f"({devices[0].platform}); list what is there, or make them visible"
            )
        own = own[: len(server.devices)]
        _check_memory(cluster, server.name, own, cluster.memory[cluster.device_server == index].tolist())
        ordered += own
    return ordered


def _check_memory(cluster: Cluster, server: str, devices: Sequence[Any], promised: Sequence[int]) -> None:
    """Raise InputError where the file promises more than JAX has of an accelerator of this process."""
    for number, (device, memory) in enumerate(zip(devices, promised, strict=True)):
        if device.platform != "cpu" and device.process_index == jax.process_index():
            limit = (device.memory_stats() or {}).get("bytes_limit")
            if limit is not None:
                check_promise(str(cluster.source), f"{server} device {number}, as JAX sees it,", memory, limit, spare=0)


def prepare_devices(cluster: Cluster, index: int, own: str | None) -> list[int]:
    """Have JAX find a server's devices as its file lists them: before it looks for any.

    Args:
        own: address under which the other servers reach this one; None where there are none.

    Returns:
        The accelerators that the server's process takes (`visible_devices`).

    Raises:
        InputError: the file promises more memory than a card has.
    """
    cards, promised = visible_devices(cluster, index), cluster.memory[cluster.device_server == index].tolist()
    prepare_gpu(promised, cards, own, str(cluster.source))
    jax.config.update("jax_num_cpu_devices", len(cards))
    return cards


def visible_devices(cluster: Cluster, index: int) -> list[int]:
    """Accelerators for a server's process: servers of one machine share out what is there, in file order."""
    host, own = cluster.servers[index].host, len(cluster.servers[index].devices)
    shared = [len(server.devices) for server in cluster.servers[:index] if server.host == host]
    first = 0 if "CUDA_VISIBLE_DEVICES" in os.environ else sum(shared)
    return list(range(first, first + own))
