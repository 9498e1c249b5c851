"""`python -m placement mix`: a profile of tasks and how often each server gets which, to a profile of servers."""

import argparse
import json

from placement.commands.inputs import add_cluster, add_json, load_profile
from placement.data.cluster import Cluster
from placement.data.mixture import mixed
from placement.files import read_toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_cluster(parser)
    add(
        "--tasks",
        required=True,
        metavar="P",
        help="profile.npz whose rows are tasks: `python -m placement convert --by task`",
    )
    what = "a table for each server: task = requests a second, or in any other unit that is the same for all"
    add("--rates", required=True, metavar="R.toml", help=what)
    add("--model", metavar="CONFIG", help="config.json for what the profile does not say")
    add("--out", required=True, metavar="NEW", help="profile.npz to write")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Mix, write the profile and print what it rests on.

    Raises:
        InputError: an input cannot be used, or the profile cannot be written.
    """
    cluster, tasks = Cluster.from_toml(arguments.cluster), load_profile(arguments.tasks, arguments.model)
    profile = mixed(tasks, read_toml(arguments.rates), cluster.names, arguments.rates)
    profile.save(arguments.out)
    tokens = profile.counts.sum((1, 2)) / (profile.counts.shape[1] * profile.top_k)
    worth = dict(zip(profile.servers, tokens.tolist(), strict=True))
    if arguments.json:
        print(json.dumps({"out": arguments.out, "tasks": tasks.servers, "tokens": worth}))
        return
    words = ", ".join(f"{name} {number:,.0f}" for name, number in worth.items())
    print(f"{arguments.out}: {len(tasks.servers)} tasks mixed for {len(worth)} servers; worth tokens: {words}")
