"""What several commands print: tables of costs and of devices."""

from collections.abc import Sequence
from typing import Any

from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.text_table import print_table, print_text
from placement.units import format_bytes


def print_costs(costs: dict[str, dict[str, Any]], cluster: Cluster) -> None:
    """One row per strategy, then one per server."""
    columns = [
        "strategy",
        "remote",
        "P(network)",
        "servers",
        "bytes a token",
        "decode",
        "prefill",
        "balance",
        "gap",
        "planned",
    ]
    rows = [
        [
            name,
            f"{cost['remote_share']:.3f}",
            f"{cost['network_probability']:.3f}",
            f"{cost['distinct_remote_servers']:.3f}",
            format_bytes(cost["bytes_per_token"]),
            f"{1e3 * cost['decode_network_seconds']:.1f} ms",
            format_bytes(cost["prefill_bytes"]),
            f"{cost['balance']:.2f}",
            "inf" if cost["gap"] is None else f"{cost['gap']:.1%}",
            f"{cost['planning_seconds']:.2f} s",
        ]
        for name, cost in costs.items()
    ]
    print_table(columns, rows)
    basis = " and ".join(sorted({cost["basis"] for cost in costs.values()}))
    print_text(
        "remote: share of calls, mean over servers. P(network): a token's layer needs another server; servers: distinct",
        f"remote ones per token and layer; both from {basis}. balance: busiest device over mean. decode: network time of a",
        "step. prefill: bytes of a prompt chunk. Both as --active and its fellows say. gap: remote calls of all servers",
        "together beyond the fewest possible, on the statistics planned on: there each server counts by its traffic.",
    )
    print()
    rows = [[name, *(f"{c['remote_share_by_server'][name]:.3f}" for c in costs.values())] for name in cluster.names]
    print_table(["remote share of", *costs], rows)


def print_devices(title: str, placement: Placement, budget: Sequence[int]) -> None:
    """One row per device."""
    per_device = zip(placement.devices, placement.resident.sum((1, 2)), placement.used_bytes, budget, strict=True)
    rows = [
        [server, str(device), str(number), format_bytes(used), format_bytes(room), f"{used / max(room, 1):.1%}"]
        for (server, device), number, used, room in per_device
    ]
    print_table(["server", "device", "experts", "used", "budget", "filled"], rows, title=title)
