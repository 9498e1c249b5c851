"""From a cluster to a running mesh: the demo's own cluster, the devices to run it on, and what experts may take of them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dancemoe_jax.config import ModelConfig
from placement import Cluster, InputError, Profile

# Servers of the demo: name, and for each device its share of all slots. One, one and two devices, no two alike.
DEMO_SERVERS = (("edge-a", (0.22,)), ("edge-b", (0.27,)), ("edge-c", (0.21, 0.30)))
WORKSPACE_BYTES = 8 * 2**20


def reserved_bytes(config: ModelConfig, sequences: int, itemsize: int = 4) -> int:
    """Bytes on every device for all that is not an expert: other weights, key-value cache, workspace of a step."""
    return config.other_params * itemsize + config.cache_bytes(sequences, itemsize) + WORKSPACE_BYTES


def demo_cluster(config: ModelConfig, reserved: int, copies: float = 1.3, itemsize: int = 4) -> Cluster:
    """Three servers whose devices together hold `copies` of all experts beside what is reserved."""
    slots = round(copies * config.num_moe_layers * config.num_experts)
    expert_bytes = config.expert_bytes(itemsize)
    servers: list[dict[str, Any]] = [
        {"name": name, "devices": [{"memory": reserved + round(share * slots) * expert_bytes} for share in shares]}
        for name, shares in DEMO_SERVERS
    ]
    network = {"bandwidth": "500Mbps", "latency": "0.2ms"}
    return Cluster.from_dict({"server": servers, "network": network}, source="demo cluster")


def model_profile(
    config: ModelConfig, cluster: Cluster, counts: np.ndarray, *, name: str, reserved: int, itemsize: int = 4
) -> Profile:
    """What was counted [servers, layers, experts], with the model's sizes."""
    return Profile(
        counts, cluster.names, model=name, top_k=config.top_k, hidden_size=config.hidden_size,
        expert_bytes=config.expert_bytes(itemsize), reserved_bytes=reserved,
    )  # fmt: skip


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
