"""The command `simulate`: its arguments, what it runs, what it prints."""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from placement.commands.inputs import add_cluster, add_json
from placement.commands.output import print_table
from placement.costs.network_use import likely_links
from placement.costs.routing import serving_server
from placement.data.arrivals import Arrivals
from placement.data.cluster import Cluster
from placement.data.problem import Problem
from placement.data.profile import Profile
from placement.files import InputError, read_json, show
from placement.migration.decide import Policy
from placement.planner import STRATEGIES, plan
from placement.simulation.grid import Cell, Grid, run_grid, trends
from placement.simulation.independent.events import Simulation, simulate
from placement.simulation.independent.replan import Replan
from placement.simulation.independent.unit_costs import Compute
from placement.simulation.lockstep.predict import StepCosts, lock_step
from placement.units import format_bytes

# What the paper reports of its simulation, as cuts of mean time (section 4 of its evaluation).
_PAPER = {"gpus": "9-19 %", "bandwidth_small": "over 55 %", "bandwidth_large": "35 %"}


def _above_zero(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_above_zero.__name__, _count.__name__ = "number above 0", "whole number from 1"  # argparse names them in its messages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_cluster(parser, required=False)
    add("--profile", required=True, metavar="P", help="profile.npz to plan on")
    add("--eval", metavar="P2", help="profile.npz of what users do then (default: the one planned on)")
    add("--strategies", default=",".join(STRATEGIES), metavar="A,B", help="default: all")
    add(
        "--arrivals",
        metavar="A",
        help="requests: t_s,prompt_tokens,output_tokens and optionally server; or a trace of Azure, BurstGPT, Mooncake",
    )
    add("--stretch", type=_above_zero, default=1.0, metavar="F", help="factor on the times of --arrivals (default: 1)")
    add(
        "--gap",
        type=_above_zero,
        metavar="S",
        help="Poisson, mean seconds between requests of a server; with "
        "--arrivals the file gives lengths alone (default without --arrivals: 10)",
    )
    add("--duration", type=_above_zero, metavar="S", help="seconds of arrivals (default: 3600, or the whole file)")
    add("--prompt-tokens", type=_count, default=128, metavar="N", help="without --arrivals (default: 128)")
    add("--output-tokens", type=_count, default=64, metavar="N", help="without --arrivals (default: 64)")
    add("--batch", type=_count, default=32, metavar="N", help="sequences a server decodes at once (default: 32)")
    add("--shift", type=_above_zero, metavar="S", help="after S seconds the servers' workloads trade places")
    add("--replan", type=_above_zero, metavar="S", help="plan again every S seconds and migrate where it pays")
    add(
        "--device-flops",
        type=_above_zero,
        default=50e12,
        metavar="F",
        help="operations/s reached by a device of speed 1 (default: 5e13)",
    )
    add(
        "--device-bandwidth",
        type=_above_zero,
        default=500e9,
        metavar="B",
        help="bytes of weights/s it reads (default: 5e11)",
    )
    add("--prefill-token", type=_above_zero, metavar="S", help="measured seconds of a prompt token, all layers")
    add("--decode-step", type=_above_zero, metavar="S", help="measured seconds of a decode step of one sequence")
    add(
        "--lock-step",
        action="store_true",
        help="all servers take their steps together, as python -m launch serve does, in "
        "place of a loop of each server's own",
    )
    add(
        "--costs",
        metavar="C.json",
        help="with --lock-step: measured seconds of steps at home, as python -m launch bench "
        "testbed --json prints them under costs",
    )
    add(
        "--sequences",
        type=_count,
        default=4,
        metavar="N",
        help="with --lock-step: sequences a device serves at once (4)",
    )
    add(
        "--chunk",
        type=_count,
        default=64,
        metavar="N",
        help="with --lock-step: prompt tokens of a step on a device (64)",
    )
    add("--seed", type=int, default=0, help="of arrivals and of strategies that draw (default: 0)")
    add(
        "--grid",
        action="store_true",
        help="the paper's grid on clusters of its own: 4 to 256 GPUs, 100 to 1000 Mbit/s, gaps 8 to 15 s",
    )
    add("--jobs", type=_count, metavar="N", help="processes for --grid (default: one per core)")
    add("--plot", metavar="FILE.png", help="draw latency by strategy")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Serve the requests under each strategy's plan and print what they waited for.

    Raises:
        InputError: an input cannot be used.
    """
    names = [name.strip() for name in arguments.strategies.split(",")]
    for name in names:
        if name not in STRATEGIES:
            raise InputError(f"--strategies: {show(name)} is unknown; choose from {', '.join(STRATEGIES)}")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: must be at least 0")
    if arguments.plot:
        from placement.commands.plots import check_path

        check_path(arguments.plot)
    names = list(dict.fromkeys(names))
    if arguments.grid:
        _run_grid(arguments, tuple(names))
        return
    if not arguments.cluster:
        raise InputError("--cluster: missing; only --grid builds clusters of its own")
    cluster, profile = Cluster.from_toml(arguments.cluster), Profile.load(arguments.profile)
    evaluation = Profile.load(arguments.eval) if arguments.eval else profile
    problem = Problem.build(evaluation, cluster)
    planned = Problem.build(profile, cluster)
    if planned.shape != problem.shape or (planned.expert_bytes != problem.expert_bytes).any():
        raise InputError(f"{evaluation.source}: another model than {profile.source}'s; use profiles of the same model")
    arrivals = _arrivals(arguments, cluster)
    compute = _compute(arguments, problem)
    if arguments.lock_step:
        _run_lock_step(arguments, profile, cluster, problem, arrivals, compute, names)
        return
    if arguments.costs:
        raise InputError("--costs: only --lock-step reads them; add it, or give --prefill-token and --decode-step")
    done: dict[str, Simulation] = {}
    for name in names:
        resident = plan(profile, cluster, name, seed=arguments.seed).resident
        replan = _replan(arguments, cluster, name)
        options = {"batch": arguments.batch, "shift": arguments.shift, "replan": replan}
        done[name] = simulate(problem, resident, arrivals, compute, **options)
    if arguments.plot:
        from placement.commands.plots import plot_latencies

        title = f"{profile.model}: {len(arrivals)} requests on {len(cluster.names)} servers"
        plot_latencies({name: result.latency for name, result in done.items()}, title, arguments.plot)
    if arguments.json:
        figures = {name: result.summary(cluster.names) for name, result in done.items()}
        inputs = {"cluster": cluster.source, "profile": profile.source, "eval": evaluation.source}
        print(json.dumps({**inputs, "model": profile.model, "compute": vars(compute), "strategies": figures}))
        return
    _print_simulations(done, cluster, arrivals)


def _run_lock_step(
    arguments: argparse.Namespace,
    profile: Profile,
    cluster: Cluster,
    problem: Problem,
    arrivals: Arrivals,
    compute: Compute,
    names: Sequence[str],
) -> None:
    for option in ("shift", "replan", "plot"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option}: not with --lock-step; leave one out")
    costs = _costs(arguments.costs, compute)
    planned, done = Problem.build(profile, cluster), {}
    for name in names:
        resident = plan(profile, cluster, name, seed=arguments.seed).resident
        # The runtime is told by the profile that was planned on which rows go unasked.
        likely = likely_links(planned, serving_server(planned, planned.held(resident)))
        options = {"sequences": arguments.sequences, "chunk": arguments.chunk, "seed": arguments.seed}
        done[name] = lock_step(problem, resident, arrivals, costs, likely=likely, **options).summary()
    if arguments.json:
        inputs = {"cluster": cluster.source, "profile": profile.source, "eval": arguments.eval or profile.source}
        print(json.dumps({**inputs, "model": profile.model, "costs": vars(costs), "strategies": done}))
        return
    rows = []
    for name, figures in done.items():
        times = [figures["latency"][key] for key in ("mean", "p50", "p95", "p99")]
        times += [figures[key] for key in ("first_token", "compute", "network", "waiting")]
        rows.append([name, *(f"{seconds:.2f} s" for seconds in times)])
    print_table(["strategy", "mean", "p50", "p95", "p99", "first token", "computing", "network", "waiting"], rows)
    print(
        f"{len(arrivals)} requests in {arrivals.seconds[-1]:.0f} s, all servers in lock-step. Times from arrival to the last"
    )
    print("token. See placement/lockstep.py for what is modelled.")


def _costs(path: str | None, compute: Compute) -> StepCosts:
    """Measured costs; without a file those of one speed of devices, which compute side by side."""
    if path is None:
        return StepCosts((0.0, 0.0, compute.prefill_token), (compute.decode_step, 0.0, compute.decode_token))
    return StepCosts.from_dict(read_json(path), path)


def _arrivals(arguments: argparse.Namespace, cluster: Cluster) -> Arrivals:
    servers, seed = cluster.names, arguments.seed
    lengths = np.array([[arguments.prompt_tokens, arguments.output_tokens]])
    if arguments.arrivals:
        duration = math.inf if arguments.duration is None or arguments.gap else float(arguments.duration)
        listed = Arrivals.load(arguments.arrivals, servers, stretch=arguments.stretch, duration=duration, seed=seed)
        if arguments.gap is None:
            return listed
        lengths = np.stack([listed.prompt, listed.output], 1)
    gap, duration = arguments.gap or 10.0, arguments.duration or 3600.0
    if duration / gap * len(servers) > 10**7:
        raise InputError(f"--duration {duration:g}: gives over 10 million requests; shorten it or raise --gap")
    drawn = Arrivals.poisson(len(servers), gap, duration, lengths, seed)
    if not len(drawn):
        raise InputError(f"--duration {duration:g}: no request comes in this time; raise it or lower --gap")
    return drawn


def _compute(arguments: argparse.Namespace, problem: Problem) -> Compute:
    compute = Compute.roofline(problem, arguments.device_flops, arguments.device_bandwidth)
    if arguments.prefill_token:
        compute = replace(compute, prefill_token=arguments.prefill_token)
    if arguments.decode_step:  # split as the roofline splits it
        scale = arguments.decode_step / (compute.decode_step + compute.decode_token)
        step, token = compute.decode_step * scale, compute.decode_token * scale
        compute = replace(compute, decode_step=step, decode_token=token)
    return compute


def _replan(arguments: argparse.Namespace, cluster: Cluster, name: str) -> Replan | None:
    if arguments.replan is None:
        return None

    def planner(problem: Problem, previous: np.ndarray) -> np.ndarray:
        return STRATEGIES[name](problem, previous=previous, seed=arguments.seed)

    return Replan(planner, cluster.load_bandwidth, Policy(name, interval=arguments.replan))


def _print_simulations(done: Mapping[str, Simulation], cluster: Cluster, arrivals: Arrivals) -> None:
    columns = ["strategy", "mean", "p50", "p95", "p99", "first token", "sent", "port", "device", "migrations"]
    rows = []
    for name, result in done.items():
        figures = result.summary(cluster.names)
        times = [f"{figures['latency'][key]:.2f} s" for key in ("mean", "p50", "p95", "p99")]
        busiest = f"{figures['port_utilisation']:.0%}", f"{result.device_utilisation.max():.0%}"
        adopted = sum(migration["adopted"] for migration in result.migrations)
        first = f"{figures['first_token']:.2f} s"
        rows.append([name, *times, first, format_bytes(figures["bytes"]), *busiest, str(adopted)])
    print_table(columns, rows)
    print(
        f"{len(arrivals)} requests in {arrivals.seconds[-1]:.0f} s. Times from arrival to the last token. port, device:"
    )
    print("share of the time in which the busiest one works. See placement/simulate.py for what is modelled.")
    if len(cluster.names) > 6:
        return
    print()
    pairs = [(n, m) for n in range(len(cluster.names)) for m in range(len(cluster.names)) if n != m]
    rows = [
        [f"{cluster.names[n]} -> {cluster.names[m]}"]
        + [f"{format_bytes(r.link_bytes[n, m])} ({r.link_utilisation[n, m]:.0%})" for r in done.values()]
        for n, m in pairs
    ]
    if rows:
        print_table(["bytes (utilisation) of", *done], rows)


def _run_grid(arguments: argparse.Namespace, names: tuple[str, ...]) -> None:
    for option in ("cluster", "arrivals", "gap", "duration", "shift", "replan", "costs", "lock_step"):
        if getattr(arguments, option) not in (None, False):
            raise InputError(f"--{option.replace('_', '-')}: --grid has its own; leave it out")
    profile = Profile.load(arguments.profile)
    evaluation = Profile.load(arguments.eval) if arguments.eval else profile
    lengths = ((arguments.prompt_tokens, arguments.output_tokens),)
    grid = Grid(strategies=names, lengths=lengths, seed=arguments.seed)
    start, cells = time.perf_counter(), {}
    total = len(grid.gpus) * len(grid.bandwidths) * len(grid.gaps) * len(names)
    for cell, figures in _progress(run_grid(grid, profile, evaluation, arguments.jobs), total):
        cells[cell] = figures
    seconds = time.perf_counter() - start
    cells = {cell: cells[cell] for cell in sorted(cells, key=lambda c: (names.index(c[0]), *c[1:]))}
    if arguments.plot:
        from placement.commands.plots import plot_grid

        plot_grid(cells, f"{profile.model}: {lengths[0][0]} prompt, {lengths[0][1]} output tokens", arguments.plot)
    if arguments.json:
        keys = ("strategy", "gpus", "mbps", "gap_s")
        listed = [{**dict(zip(keys, cell, strict=True)), **figures} for cell, figures in cells.items()]
        print(json.dumps({"model": profile.model, "seconds": seconds, "cells": listed, "trends": trends(cells, grid)}))
        return
    _print_grid(cells, grid)
    print(f"\n{total} simulations of {profile.model} in {seconds:.0f} s.")


def _print_grid(cells: Mapping[Cell, Mapping[str, Any]], grid: Grid) -> None:
    rows = []
    for gpus in grid.gpus:
        for bandwidth in grid.bandwidths:
            for gap in grid.gaps:
                figures = [cells[name, gpus, bandwidth, gap] for name in grid.strategies]
                times = [f"{f['mean']:.1f}{'*' if f['backlog'] else ''}" for f in figures]
                rows.append([f"{gpus} GPUs, {bandwidth:g} Mbit/s, {gap:g} s", *times])
    print_table(["mean latency, s", *grid.strategies], rows)
    print("*: requests come faster than they are served, so the mean grows with the time simulated.\n")
    names = {
        "gpus": f"{min(grid.gpus)} -> {max(grid.gpus)} GPUs",
        "bandwidth_small": f"{min(grid.bandwidths):g} -> {max(grid.bandwidths):g} Mbit/s, {min(grid.gpus)} GPUs",
        "bandwidth_large": f"the same, {max(grid.gpus)} GPUs",
    }
    ours = trends(cells, grid)
    rows = []
    for key, name in names.items():
        cuts = [ours[strategy][key] for strategy in grid.strategies]
        shown = ["-" if cut is None else f"{100 * cut[0]:.0f} to {100 * cut[1]:.0f} %" for cut in cuts]
        rows.append([name, _PAPER[key], *shown])
    print_table(["cut of mean time", "paper", *grid.strategies], rows)
    print("Least and largest over the other axes, without cells marked *.")


def _progress(results: Any, total: int) -> Any:
    """Pass results on; a bar on a terminal, a line per tenth elsewhere, both on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(results, "simulating", total=total, console=Console(stderr=True))
        return
    for i, result in enumerate(results, 1):
        if i * 10 // total > (i - 1) * 10 // total:
            print(f"simulated {i} of {total}", file=sys.stderr, flush=True)
        yield result
