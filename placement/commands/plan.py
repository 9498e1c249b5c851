"""`python -m placement plan`: profile and cluster in, placement.json out."""

import argparse
import json
import os
import time

from placement.commands.inputs import (
    add_cluster,
    add_json,
    add_prior,
    add_workload,
    check_plot,
    load_profile,
    read_workload,
    whole_number,
)
from placement.commands.output import print_costs, print_devices
from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.planner import optimum, plan
from placement.registry import STRATEGIES
from placement.text_table import print_text

_OPTIMUM = 2**19  # servers x layers x experts from which on the optimum takes longer than the plan of `latency`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_cluster(parser)
    add("--profile", required=True, metavar="P", help="profile.npz: what each server's users activate")
    add(
        "--strategy",
        default="dance",
        metavar="S",
        help=f"{', '.join(STRATEGIES)}, or FILE.py:FUNCTION (default: dance)",
    )
    add("--previous", metavar="OLD", help="placement.json in force; ties go to what moves least")
    add("--seed", type=whole_number, default=0, help="for strategies that draw at random (default: 0)")
    add("--out", required=True, metavar="NEW", help="placement.json to write")
    add("--plot", metavar="FILE.png", help="draw where copies live")
    add("--equal-slots", action="store_true", help="equally many experts on every device in each layer")
    add("--model", metavar="CONFIG", help="config.json for what the profile does not say")
    add("--groups", metavar="A+B,C+D", help="servers that latency plans together (default: it chooses)")
    add(
        "--jobs",
        type=whole_number,
        default=0,
        metavar="N",
        help="processes that plan many groups (default: one a core)",
    )
    add_prior(parser)
    add_workload(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Plan, write the placement and print what it costs.

    Raises:
        InputError: an input cannot be used, or the plan cannot be written.
    """
    check_plot(arguments)
    cluster = Cluster.from_toml(arguments.cluster)
    profile = load_profile(arguments.profile, arguments.model)
    previous = Placement.load(arguments.previous) if arguments.previous else None
    workload = read_workload(arguments)
    best = optimum(profile, cluster, prior=arguments.prior) if profile.counts.size <= _OPTIMUM else None
    start = time.perf_counter()
    groups = [group.split("+") for group in arguments.groups.split(",")] if arguments.groups else None
    options = {
        "groups": groups,
        "equal_slots": arguments.equal_slots,
        "prior": arguments.prior,
        "optimum": best,
        "workload": workload,
        "jobs": arguments.jobs or os.cpu_count() or 1,
    }
    placement = plan(profile, cluster, arguments.strategy, previous, arguments.seed, **options)
    seconds = time.perf_counter() - start
    placement.save(arguments.out)
    if arguments.plot:
        from placement.commands.plots import plot_placement

        plot_placement(placement, arguments.plot)
    if arguments.json:
        head = {"out": arguments.out, "strategy": placement.strategy, "planning_seconds": seconds}
        print(json.dumps({**head, **placement.predicted}))
        return
    title = f"{arguments.out}: {placement.strategy}, {profile.model}"
    print_devices(title, placement, placement.predicted["budget_bytes"])
    print()
    print_costs({placement.strategy: {**placement.predicted, "planning_seconds": seconds}}, cluster)
    if best is None:
        print("\ngap: not counted, since for so large a cluster the optimum takes longer than the plan")
    if "groups" in placement.predicted:
        together = (" + ".join(group) for group in placement.predicted["groups"])
        print(f"\nplanned in groups of servers that each hold every expert: {'; '.join(together)}")
    if arguments.equal_slots:
        equal, remote = placement.predicted["equal_slots"], placement.predicted["remote_share"]
        free = equal["remote_share_without"]
        words = "without the restriction there is no plan."
        if free is not None:
            filled = "; slots that the strategy leaves empty were filled" if remote < free else ""
            words = f"{free:.3f} without the restriction: it costs {remote - free:.3f}{filled}."
        print()
        print_text(
            f"equal slots: {equal['slots_per_layer']} of each layer on every device; remote share {remote:.3f},", words
        )
