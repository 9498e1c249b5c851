"""What several commands print: tables of costs, of devices, and tables as such."""

import sys
from collections.abc import Sequence
from typing import Any

from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.units import format_bytes


def print_costs(costs: dict[str, dict[str, Any]], cluster: Cluster) -> None:
    """One row per strategy, then one per server."""
    columns = [
        "strategy",
        "remote",
        "P(network)",
        "servers",
        "bytes/token",
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
    print("remote: share of calls, mean over servers. P(network): a token's layer needs another server;")
    print(f"servers: distinct remote ones per token and layer; both from {basis}. balance: busiest device over mean.")
    print("decode: network time of a step. prefill: bytes of a prompt chunk. Both as --active and its fellows say.")
    print("gap: remote calls beyond the fewest possible, on the statistics planned on.\n")
    rows = [[name, *(f"{c['remote_share_by_server'][name]:.3f}" for c in costs.values())] for name in cluster.names]
    print_table(["remote share of", *costs], rows)


def print_devices(title: str, placement: Placement, budget: Sequence[int]) -> None:
    """One row per device."""
    per_device = zip(placement.devices, placement.resident.sum((1, 2)), placement.used_bytes, budget, strict=True)
    rows = [
        [server, str(device), str(number), format_bytes(used), format_bytes(room), f"{used / max(room, 1):.1%}"]
        for (server, device), number, used, room in per_device
    ]
    print(title)
    print_table(["server", "device", "experts", "used", "budget", "filled"], rows)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal, aligned text elsewhere; the first column is text, the others are figures."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    width = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.rjust(width[i]) if i else cell.ljust(width[i]) for i, cell in enumerate(row)).rstrip())
