"""The command `simulate`: what it runs, what it prints."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from placement.commands.grid import Cell, Grid, run_grid, trends
from placement.commands.simulate_flags import add_arguments, read_arrivals, read_compute, read_costs
from placement.costs.network_use import likely_links
from placement.costs.routing import serving_server
from placement.data.arrivals import Arrivals
from placement.data.cluster import Cluster
from placement.data.problem import Problem
from placement.data.profile import Profile
from placement.files import InputError
from placement.migration.decide import Policy
from placement.planner import plan
from placement.registry import strategy_named, strategy_names
from placement.simulation.independent.events import Simulation, simulate
from placement.simulation.independent.replan import Replan
from placement.simulation.independent.unit_costs import Compute
from placement.simulation.lockstep.predict import lock_step
from placement.text_table import print_table, print_text
from placement.units import format_bytes

__all__ = ["add_arguments", "run"]

# What the paper reports of its simulation, as cuts of mean time (section 4 of its evaluation).
_PAPER = {"gpus": "9-19 %", "bandwidth_small": "over 55 %", "bandwidth_large": "35 %"}


def run(arguments: argparse.Namespace) -> None:
    """Serve the requests under each strategy's plan and print what they waited for.

    Raises:
        InputError: an input cannot be used.
    """
    names = strategy_names(arguments.strategies)
    if arguments.plot:
        from placement.commands.plots import check_path

        check_path(arguments.plot)
    if arguments.grid:
        _run_grid(arguments, tuple(names))
        return
    for flag in ("gpus", "bandwidths", "requests", "one_group"):
        if getattr(arguments, flag):
            raise InputError(
                f"--{flag.replace('_', '-')}: only --grid builds clusters of its own; add it, or leave this out"
            )
    if not arguments.cluster:
        raise InputError("--cluster: missing; only --grid builds clusters of its own")
    cluster, profile = Cluster.from_toml(arguments.cluster), Profile.load(arguments.profile)
    evaluation = Profile.load(arguments.eval) if arguments.eval else profile
    problem = replace(Problem.build(evaluation, cluster), dispatch=arguments.dispatch)
    planned = Problem.build(profile, cluster)
    if planned.shape != problem.shape or (planned.expert_bytes != problem.expert_bytes).any():
        raise InputError(f"{evaluation.source}: another model than {profile.source}'s; use profiles of the same model")
    arrivals = read_arrivals(arguments, cluster)
    compute = read_compute(arguments, problem)
    if arguments.lock_step:
        _run_lock_step(arguments, profile, cluster, problem, arrivals, compute, names)
        return
    if arguments.costs:
        raise InputError("--costs: only --lock-step reads them; add it, or give --prefill-token and --decode-step")
    done: dict[str, Simulation] = {}
    for name in names:
        planned = plan(profile, cluster, name, seed=arguments.seed, prior=arguments.prior)
        replan = _replan(arguments, cluster, name)
        options = {"batch": arguments.batch, "chunk": arguments.chunk, "shift": arguments.shift, "replan": replan}
        options["host"] = planned.host
        done[name] = simulate(problem, planned.resident, arrivals, compute, **options)
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
    for option in ("shift", "replan", "plot", "dispatch"):
        if getattr(arguments, option) not in (None, "ours"):
            raise InputError(f"--{option}: not with --lock-step; leave one out")
    costs = read_costs(arguments.costs, compute)
    planned, done = Problem.build(profile, cluster), {}
    for name in names:
        chosen = plan(profile, cluster, name, seed=arguments.seed, prior=arguments.prior)
        # The runtime is told by the profile that was planned on which rows go unasked.
        likely = likely_links(planned, serving_server(planned, planned.held(chosen.resident)))
        options = {"sequences": arguments.sequences, "chunks": (arguments.chunk,), "seed": arguments.seed}
        options |= {"likely": likely, "host": chosen.host}
        done[name] = lock_step(problem, chosen.resident, arrivals, costs, **options).summary()
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
    print_text(
        f"{len(arrivals)} requests in {arrivals.seconds[-1]:.0f} s, all servers in lock-step. Times from arrival to the",
        "last token. See placement/simulation/lockstep/predict.py for what is modelled.",
    )


def _replan(arguments: argparse.Namespace, cluster: Cluster, name: str) -> Replan | None:
    if arguments.replan is None:
        return None

    def planner(problem: Problem, previous: np.ndarray) -> np.ndarray:
        return strategy_named(name)(problem, previous=previous, seed=arguments.seed)

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
    print_text(
        f"{len(arrivals)} requests in {arrivals.seconds[-1]:.0f} s. Times from arrival to the last token. port, device:",
        "share of the time in which the busiest one works. See placement/simulation/independent/events.py for what is",
        "modelled.",
    )
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
    for option in ("cluster", "arrivals", "duration", "shift", "replan", "costs", "lock_step", "dispatch"):
        if getattr(arguments, option) not in (None, False, "ours"):
            raise InputError(f"--{option.replace('_', '-')}: --grid has its own; leave it out")
    profile = Profile.load(arguments.profile)
    evaluation = Profile.load(arguments.eval) if arguments.eval else profile
    lengths = ((arguments.prompt_tokens, arguments.output_tokens),)
    chosen: dict[str, Any] = {key: getattr(arguments, key) for key in ("gpus", "bandwidths", "requests")}
    chosen["gaps"] = None if arguments.gap is None else (arguments.gap,)
    chosen = {key: value for key, value in chosen.items() if value is not None}
    options = {"seed": arguments.seed, "prior": arguments.prior, "groups": not arguments.one_group}
    grid = Grid(strategies=names, lengths=lengths, **options, **chosen)
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
    print_text("*: requests come faster than they are served, so the mean grows with the time simulated.")
    print()
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
