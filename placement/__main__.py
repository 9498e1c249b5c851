"""Command line: python -m placement plan | validate | compare. Exit 0 done, 2 unusable input, 1 anything else."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from placement.files import InputError, show
from placement.placement import Placement
from placement.planner import STRATEGIES, evaluate, plan
from placement.profile import Profile
from placement.types import Cluster
from placement.units import format_bytes


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        print(f"placement {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `head` does; nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="placement", description="Plan where copies of experts live on servers of unequal memory.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    command = _command(commands, "plan", run_plan, "choose a placement and write it")
    command.add_argument("--profile", required=True, metavar="P", help="profile.npz: what each server's users activate")
    command.add_argument("--strategy", default="dance", metavar="S", help=f"{', '.join(STRATEGIES)} (default: dance)")
    command.add_argument("--previous", metavar="OLD", help="placement.json in force; ties go to what moves least")
    command.add_argument("--seed", type=int, default=0, help="for strategies that draw at random (default: 0)")
    command.add_argument("--out", required=True, metavar="NEW", help="placement.json to write")

    command = _command(commands, "validate", run_validate, "check a placement against a cluster")
    command.add_argument("--placement", required=True, metavar="X", help="placement.json")

    command = _command(commands, "compare", run_compare, "plan with several strategies and show what each costs")
    command.add_argument("--profile", required=True, metavar="P", help="profile.npz to plan on")
    command.add_argument("--eval", metavar="P2", help="profile.npz to count costs on (default: the one planned on)")
    command.add_argument("--strategies", default=",".join(STRATEGIES), metavar="A,B", help="default: all")
    command.add_argument("--seed", type=int, default=0, help="for strategies that draw at random (default: 0)")
    return parser


def _command(commands: Any, name: str, run: Any, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what)
    parser.set_defaults(run=run)
    parser.add_argument("--cluster", required=True, metavar="C", help="cluster.toml: servers, devices and links")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def run_plan(arguments: argparse.Namespace) -> None:
    """plan: profile and cluster in, placement.json out."""
    cluster, profile = Cluster.from_toml(arguments.cluster), Profile.load(arguments.profile)
    previous = Placement.load(arguments.previous) if arguments.previous else None
    start = time.perf_counter()
    placement = plan(profile, cluster, arguments.strategy, previous, arguments.seed)
    seconds = time.perf_counter() - start
    placement.save(arguments.out)
    if arguments.json:
        head = {"out": arguments.out, "strategy": placement.strategy, "planning_seconds": seconds}
        print(json.dumps({**head, **placement.predicted}))
        return
    title = f"{arguments.out}: {placement.strategy}, {profile.model}"
    _print_devices(title, placement, placement.predicted["budget_bytes"])
    print()
    _print_costs({placement.strategy: {**placement.predicted, "planning_seconds": seconds}}, cluster)


def run_validate(arguments: argparse.Namespace) -> None:
    """validate: does this placement fit this cluster?"""
    cluster, placement = Cluster.from_toml(arguments.cluster), Placement.load(arguments.placement)
    placement.validate(cluster)
    budget = (cluster.memory - placement.model.get("reserved_bytes", 0)).tolist()
    if arguments.json:
        used = placement.used_bytes.tolist()
        print(json.dumps({"valid": True, "strategy": placement.strategy, "used_bytes": used, "budget_bytes": budget}))
        return
    _print_devices(f"{arguments.placement}: valid on {arguments.cluster}", placement, budget)


def run_compare(arguments: argparse.Namespace) -> None:
    """compare: the same inputs through several strategies."""
    cluster, profile = Cluster.from_toml(arguments.cluster), Profile.load(arguments.profile)
    evaluation = Profile.load(arguments.eval) if arguments.eval else profile
    names = [name.strip() for name in arguments.strategies.split(",")]
    for name in names:  # all of them before the first one runs
        if name not in STRATEGIES:
            raise InputError(f"--strategies: {show(name)} is unknown; choose from {', '.join(STRATEGIES)}")
    costs = {}
    for name in names:
        start = time.perf_counter()
        placement = plan(profile, cluster, name, seed=arguments.seed)
        seconds = time.perf_counter() - start
        costs[name] = {**evaluate(evaluation, cluster, placement), "planning_seconds": seconds}
    if arguments.json:
        inputs = {"cluster": cluster.source, "profile": profile.source, "eval": evaluation.source}
        print(json.dumps({**inputs, "model": profile.model, "strategies": costs}))
        return
    _print_costs(costs, cluster)


def _print_costs(costs: dict[str, dict[str, Any]], cluster: Cluster) -> None:
    """One row per strategy, then one per server."""
    columns = ["strategy", "remote", "P(network)", "servers", "bytes/token", "balance", "planned"]
    rows = [
        [
            name,
            f"{cost['remote_share']:.3f}",
            f"{cost['network_probability']:.3f}",
            f"{cost['distinct_remote_servers']:.3f}",
            format_bytes(cost["bytes_per_token"]),
            f"{cost['balance']:.2f}",
            f"{cost['planning_seconds']:.2f} s",
        ]
        for name, cost in costs.items()
    ]
    _print_table(columns, rows)
    basis = " and ".join(sorted({cost["basis"] for cost in costs.values()}))
    print("remote: share of calls, mean over servers. P(network): a token's layer needs another server;")
    print(f"servers: distinct remote ones per token and layer; both from {basis}. balance: busiest device over mean.\n")
    rows = [[name, *(f"{c['remote_share_by_server'][name]:.3f}" for c in costs.values())] for name in cluster.names]
    _print_table(["remote share of", *costs], rows)


def _print_devices(title: str, placement: Placement, budget: Sequence[int]) -> None:
    """One row per device."""
    per_device = zip(placement.devices, placement.resident.sum((1, 2)), placement.used_bytes, budget, strict=True)
    rows = [
        [server, str(device), str(number), format_bytes(used), format_bytes(room), f"{used / max(room, 1):.1%}"]
        for (server, device), number, used, room in per_device
    ]
    print(title)
    _print_table(["server", "device", "experts", "used", "budget", "filled"], rows)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
