"""`python -m placement validate`: does a placement fit a cluster?"""

import argparse
import json

from placement.commands.inputs import add_cluster, add_json
from placement.commands.output import print_devices
from placement.data.cluster import Cluster
from placement.data.placement import Placement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster(parser)
    parser.add_argument("--placement", required=True, metavar="X", help="placement.json")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Check and print what each device holds.

    Raises:
        InputError: it does not fit, or a file cannot be used.
    """
    cluster, placement = Cluster.from_toml(arguments.cluster), Placement.load(arguments.placement)
    placement.validate(cluster)
    budget = (cluster.memory - placement.model.get("reserved_bytes", 0)).tolist()
    if arguments.json:
        used = placement.used_bytes.tolist()
        print(json.dumps({"valid": True, "strategy": placement.strategy, "used_bytes": used, "budget_bytes": budget}))
        return
    print_devices(f"{arguments.placement}: valid on {arguments.cluster}", placement, budget)
