"""What several commands print: tables of costs and of devices."""

from collections.abc import Iterator, Sequence
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
        "hops",
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
            f"{cost['hops']:.1f}",
            format_bytes(cost["bytes_per_token"]),
            f"{1e3 * cost['decode_network_seconds']:.1f} ms",
            format_bytes(cost["prefill_bytes"]),
            f"{cost['balance']:.2f}",
            _gap(cost),
            f"{cost['planning_seconds']:.2f} s",
        ]
        for name, cost in costs.items()
    ]
    hosted = any(cost["hops"] for cost in costs.values())
    if not hosted:
        place = columns.index("hops")
        columns, rows = ([line[:place] + line[place + 1 :] for line in lines] for lines in ([columns], rows))
        columns = columns[0]
    print_table(columns, rows)
    basis = " and ".join(sorted({cost["basis"] for cost in costs.values()}))
    print_text(
        "remote: share of calls, mean over servers. P(network): a token's layer needs another server; servers: distinct",
        f"remote ones per token and layer; both from {basis}. balance: busiest device over mean. decode: network time of a",
        "step. prefill: bytes of a prompt chunk. Both as --active and its fellows say. gap: remote calls of all servers",
        "together beyond the fewest possible, on the statistics planned on: there each server counts by its traffic.",
    )
    if hosted:
        print_text(*_hosted_words(costs))
    print()
    rows = [[name, *(f"{c['remote_share_by_server'][name]:.3f}" for c in costs.values())] for name in cluster.names]
    print_table(["remote share of", *costs], rows)


def _gap(cost: dict[str, Any]) -> str:
    if cost.get("gap") is None:
        return "-" if cost["hops"] or "gap" not in cost else "inf"
    return f"{cost['gap']:.1%}"


def _hosted_words(costs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What hops are, and where plans that host layers elsewhere are better or worse than those that can be served."""
    away = {name: cost for name, cost in costs.items() if cost["hops"]}
    home = {name: cost for name, cost in costs.items() if not cost["hops"]}
    yield "hops: a token's moves to a layer's host and home, where attention lives with the layer; remote is seen from there."
    yield f"python -m launch serve cannot follow such a plan ({', '.join(away)}) yet."
    for key, what in (("decode_network_seconds", "decode"), ("prefill_network_seconds", "prefill")):
        if home:
            best, other = (min(group, key=lambda name: group[name][key]) for group in (away, home))
            theirs, ours = away[best][key], home[other][key]
            word = "less" if theirs < ours else "more"
            yield (
                f"In {what} {best} needs {1e3 * theirs:.1f} ms of network, {word} than {other}'s {1e3 * ours:.1f} ms, the "
                "least of those that can be served."
            )


def print_devices(title: str, placement: Placement, budget: Sequence[int]) -> None:
    """One row per device."""
    per_device = zip(placement.devices, placement.resident.sum((1, 2)), placement.used_bytes, budget, strict=True)
    rows = [
        [server, str(device), str(number), format_bytes(used), format_bytes(room), f"{used / max(room, 1):.1%}"]
        for (server, device), number, used, room in per_device
    ]
    print_table(["server", "device", "experts", "used", "budget", "filled"], rows, title=title)
