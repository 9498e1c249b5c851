"""The example cluster of the demo and of `serve` without a cluster file: three servers with one, one and two devices."""

from typing import Any

from dancemoe_jax.model.config import ModelConfig
from placement import Cluster

# The name of a server that serves alone, without a cluster file.
ALONE = "local"
# Servers of the demo: name, and for each device its share of all slots. One, one and two devices, no two alike.
DEMO_SERVERS = (("edge-a", (0.22,)), ("edge-b", (0.27,)), ("edge-c", (0.21, 0.30)))


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
