"""`python -m launch bench WHAT`: what this software takes, measured on the machine that runs it."""

import argparse
import importlib

from launch.log import add_log_arguments

WHAT = {
    "load": "memory and speed of loading one server's share of a large checkpoint",
    "requests": "load on any server of OpenAI's API: time to first token, for each further one, goodput",
    "testbed": "requests of a routing trace on servers joined by real links, by strategy",
    "shift": "users of the servers change what they work on: serving with and without migration",
    "migrate": "what running requests notice of migrations",
    "scaling": "how a step grows with devices, layers and experts",
    "peers": "decode and prefill beside llama.cpp and transformers, on the same shapes",
    "gpu": "one GPU: is what it computes right, and how near to its own rates are steps",
    "programs": "what steps would do on a GPU, compiled without one: launches, waits, copies, memory",
    "exchange": "one step across servers: time and bytes by how rows travel",
}


def add_arguments(parser: argparse.ArgumentParser, chosen: str | None) -> None:
    """The flags of the chosen benchmark; only its module is loaded."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="what")
    for name, what in WHAT.items():
        command = commands.add_parser(name, help=what, description=what)
        if name == chosen:
            add_log_arguments(command)
            module = importlib.import_module(f"launch.bench.{name}")
            module.add_arguments(command)
            command.set_defaults(bench=module.run)


def run(args: argparse.Namespace) -> int | None:
    return args.bench(args)
