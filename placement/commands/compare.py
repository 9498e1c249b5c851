"""`python -m placement compare`: the same inputs through several strategies, side by side."""

import argparse
import json
import time
from typing import Any

from placement.commands.inputs import (
    STRATEGIES_HELP,
    add_cluster,
    add_dispatch,
    add_json,
    add_prior,
    add_workload,
    check_plot,
    read_workload,
    whole_number,
)
from placement.commands.output import print_costs, print_text
from placement.data.cluster import Cluster
from placement.data.profile import Profile
from placement.files import InputError
from placement.planner import evaluate, network_bound, optimum, plan
from placement.registry import HOSTED, STRATEGIES, strategy_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_cluster(parser)
    add("--profile", required=True, metavar="P", help="profile.npz to plan on")
    add("--eval", metavar="P2", help="profile.npz to count costs on (default: the one planned on)")
    add("--strategies", default=",".join(STRATEGIES), metavar="A,B", help=STRATEGIES_HELP)
    add("--seed", type=whole_number, default=0, help="for strategies that draw at random (default: 0)")
    add("--plot", metavar="FILE.png", help="draw remote share against P(network), with the frontier")
    add("--bound", action="store_true", help="certify how low P(network) could be at best; takes about a minute")
    add_dispatch(parser)
    add_prior(parser)
    add_workload(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Plan with each strategy and print what each plan costs.

    Raises:
        InputError: an input cannot be used.
    """
    check_plot(arguments)
    cluster, profile = Cluster.from_toml(arguments.cluster), Profile.load(arguments.profile)
    evaluation = Profile.load(arguments.eval) if arguments.eval else profile
    names = strategy_names(arguments.strategies)
    workload = read_workload(arguments)
    if arguments.bound and all(name in HOSTED for name in names):
        raise InputError("--bound: of plans that leave attention at home; add one to --strategies, such as latency")
    best, costs = optimum(profile, cluster, prior=arguments.prior), {}
    for name in names:
        start = time.perf_counter()
        options = {"prior": arguments.prior, "optimum": best, "workload": workload}
        placement = plan(profile, cluster, name, seed=arguments.seed, **options)
        seconds = time.perf_counter() - start
        found = {"gap": placement.predicted["gap"], "planning_seconds": seconds}
        served = evaluate(evaluation, cluster, placement, workload=workload, dispatch=arguments.dispatch)
        costs[name] = {**served, **found}
    bound = None
    if arguments.bound:
        known = min(cost["network_probability"] for cost in _at_home(costs).values())
        bound = network_bound(evaluation, cluster, known)
    if arguments.plot:
        from placement.commands.plots import plot_costs

        plot_costs(costs, f"{profile.model} on {len(cluster.names)} servers", arguments.plot)
    if arguments.json:
        inputs = {"cluster": cluster.source, "profile": profile.source, "eval": evaluation.source}
        print(json.dumps({**inputs, "model": profile.model, "bound": bound, "strategies": costs}))
        return
    print_costs(costs, cluster)
    if bound is not None:
        above = (
            f"{name} {cost['network_probability'] / max(bound, 1e-9) - 1:.1%}" for name, cost in _at_home(costs).items()
        )
        print()
        print_text(
            f"bound: no plan with attention at home has P(network) below {bound:.3f} on {evaluation.source}, whatever it was",
            "planned on.",
            f"Above it: {', '.join(above)}.",
        )


def _at_home(costs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of plans that the bound is of."""
    return {name: cost for name, cost in costs.items() if name not in HOSTED}
