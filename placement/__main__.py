"""Command line: python -m placement COMMAND; see --help. Exit 0 done, 2 unusable input, 1 anything else."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from placement import bench, data_commands, simulate_command, time_commands
from placement.files import InputError, show
from placement.placement import Placement
from placement.planner import STRATEGIES, evaluate, optimum, plan
from placement.profile import Profile
from placement.statistics import DEFAULT_PRIOR
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
    command.add_argument("--plot", metavar="FILE.png", help="draw where copies live")
    command.add_argument(
        "--equal-slots", action="store_true", help="equally many experts on every device in each layer"
    )
    command.add_argument("--model", metavar="CONFIG", help="config.json for what the profile does not say")
    _prior(command)
    time_commands.add_workload(command)

    command = _command(commands, "validate", run_validate, "check a placement against a cluster")
    command.add_argument("--placement", required=True, metavar="X", help="placement.json")

    command = _command(commands, "compare", run_compare, "plan with several strategies and show what each costs")
    command.add_argument("--profile", required=True, metavar="P", help="profile.npz to plan on")
    command.add_argument("--eval", metavar="P2", help="profile.npz to count costs on (default: the one planned on)")
    command.add_argument("--strategies", default=",".join(STRATEGIES), metavar="A,B", help="default: all")
    command.add_argument("--seed", type=int, default=0, help="for strategies that draw at random (default: 0)")
    command.add_argument("--plot", metavar="FILE.png", help="draw remote share against P(network), with the frontier")
    _prior(command)
    time_commands.add_workload(command)

    command = _command(commands, "diff", run_diff, "what moves between two placements, how long it takes, if it pays")
    time_commands.add_diff(command)

    command = _command(commands, "simulate", run_simulate, "serve requests with several strategies' plans", False)
    simulate_command.add_arguments(command)

    command = _command(commands, "convert", data_commands.run_convert, "read and write other engines' files", False)
    data_commands.add_convert(command)
    command = _command(commands, "drift", run_drift, "how unlike servers are, and how far they moved", None)
    data_commands.add_drift(command)
    command = _command(commands, "model", run_model, "shapes and sizes of a model's config.json", None)
    data_commands.add_model(command)
    command = _command(commands, "bench", run_bench, "time and memory of planning, and how they grow", None)
    bench.add_arguments(command)
    return parser


def _prior(command: argparse.ArgumentParser) -> None:
    what = (
        f"pseudo-assignments that draw thin statistics towards the other servers' (default: {DEFAULT_PRIOR:g}; 0: none)"
    )
    command.add_argument("--prior", type=_at_least_0, default=DEFAULT_PRIOR, metavar="N", help=what)


def _at_least_0(text: str) -> float:
    value = float(text)
    if not 0 <= value < 2**53:
        raise ValueError
    return value


def _command(
    commands: Any, name: str, run: Any, what: str, needs_cluster: bool | None = True
) -> argparse.ArgumentParser:
    """A command; it needs a cluster, takes one (False), or has nothing to do with one (None)."""
    parser = commands.add_parser(name, help=what, description=what)
    parser.set_defaults(run=run)
    if needs_cluster is not None:
        text = "cluster.toml: servers, devices and links"
        parser.add_argument("--cluster", required=needs_cluster, metavar="C", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def run_plan(arguments: argparse.Namespace) -> None:
    """plan: profile and cluster in, placement.json out."""
    _check_plot(arguments)
    cluster = Cluster.from_toml(arguments.cluster)
    profile = data_commands.load_profile(arguments.profile, arguments.model)
    previous = Placement.load(arguments.previous) if arguments.previous else None
    workload = time_commands.read_workload(arguments)
    best = optimum(profile, cluster, prior=arguments.prior)
    start = time.perf_counter()
    options = {"equal_slots": arguments.equal_slots, "prior": arguments.prior, "optimum": best, "workload": workload}
    placement = plan(profile, cluster, arguments.strategy, previous, arguments.seed, **options)
    seconds = time.perf_counter() - start
    placement.save(arguments.out)
    if arguments.plot:
        from placement.plots import plot_placement

        plot_placement(placement, arguments.plot)
    if arguments.json:
        head = {"out": arguments.out, "strategy": placement.strategy, "planning_seconds": seconds}
        print(json.dumps({**head, **placement.predicted}))
        return
    title = f"{arguments.out}: {placement.strategy}, {profile.model}"
    _print_devices(title, placement, placement.predicted["budget_bytes"])
    print()
    _print_costs({placement.strategy: {**placement.predicted, "planning_seconds": seconds}}, cluster)
    if arguments.equal_slots:
        equal, remote = placement.predicted["equal_slots"], placement.predicted["remote_share"]
        free = equal["remote_share_without"]
        print(
            f"\nequal slots: {equal['slots_per_layer']} of each layer on every device; remote share {remote:.3f}, ",
            end="",
        )
        if free is None:
            print("without the restriction there is no plan.")
        else:
            filled = "; slots that the strategy leaves empty were filled" if remote < free else ""
            print(f"{free:.3f} without the restriction: it costs {remote - free:.3f}{filled}.")


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
    _check_plot(arguments)
    cluster, profile = Cluster.from_toml(arguments.cluster), Profile.load(arguments.profile)
    evaluation = Profile.load(arguments.eval) if arguments.eval else profile
    names = [name.strip() for name in arguments.strategies.split(",")]
    for name in names:  # all of them before the first one runs
        if name not in STRATEGIES:
            raise InputError(f"--strategies: {show(name)} is unknown; choose from {', '.join(STRATEGIES)}")
    workload = time_commands.read_workload(arguments)
    best, costs = optimum(profile, cluster, prior=arguments.prior), {}
    for name in names:
        start = time.perf_counter()
        options = {"prior": arguments.prior, "optimum": best, "workload": workload}
        placement = plan(profile, cluster, name, seed=arguments.seed, **options)
        seconds = time.perf_counter() - start
        found = {"gap": placement.predicted["gap"], "planning_seconds": seconds}
        costs[name] = {**evaluate(evaluation, cluster, placement, workload=workload), **found}
    if arguments.plot:
        from placement.plots import plot_costs

        plot_costs(costs, f"{profile.model} on {len(cluster.names)} servers", arguments.plot)
    if arguments.json:
        inputs = {"cluster": cluster.source, "profile": profile.source, "eval": evaluation.source}
        print(json.dumps({**inputs, "model": profile.model, "strategies": costs}))
        return
    _print_costs(costs, cluster)


def run_simulate(arguments: argparse.Namespace) -> None:
    """simulate: requests through each strategy's placement."""
    simulate_command.run_simulate(arguments, _print_table)


def run_diff(arguments: argparse.Namespace) -> None:
    """diff: from one placement to another."""
    time_commands.run_diff(arguments, _print_table)


def run_bench(arguments: argparse.Namespace) -> None:
    """bench: strategies at several sizes."""
    bench.run_bench(arguments, _print_table)


def run_drift(arguments: argparse.Namespace) -> None:
    """drift: between servers, and between windows."""
    data_commands.run_drift(arguments, _print_table)


def run_model(arguments: argparse.Namespace) -> None:
    """model: what a configuration says of sizes."""
    data_commands.run_model(arguments, _print_table)


def _check_plot(arguments: argparse.Namespace) -> None:
    """Refuse a figure that could not be written before any work."""
    if arguments.plot:
        from placement.plots import check_path

        check_path(arguments.plot)


def _print_costs(costs: dict[str, dict[str, Any]], cluster: Cluster) -> None:
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
    _print_table(columns, rows)
    basis = " and ".join(sorted({cost["basis"] for cost in costs.values()}))
    print("remote: share of calls, mean over servers. P(network): a token's layer needs another server;")
    print(f"servers: distinct remote ones per token and layer; both from {basis}. balance: busiest device over mean.")
    print("decode: network time of a step. prefill: bytes of a prompt chunk. Both as --active and its fellows say.")
    print("gap: remote calls beyond the fewest possible, on the statistics planned on.\n")
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
