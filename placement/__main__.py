"""Command line: python -m placement COMMAND; see --help. Exit 0 done, 2 unusable input, 1 anything else."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from placement.files import InputError
from placement.version import version

# Each is a module of placement/commands, with `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "plan": "choose a placement and write it",
    "validate": "check a placement against a cluster",
    "compare": "plan with several strategies and show what each costs",
    "advise": "how fast a model would run, what is in the way, what would help",
    "diff": "what moves between two placements, how long it takes, if it pays",
    "simulate": "serve requests with several strategies' plans",
    "convert": "read and write other engines' files",
    "mix": "profiles of tasks to a profile of servers, by how often each gets which",
    "drift": "how unlike servers are, and how far they moved",
    "model": "shapes and sizes of a model's config.json",
    "bench": "time and memory of planning, and how they grow",
}

_ONE_LINE = {ord("\n"): "\\n", ord("\r"): "\\r"}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.translate(_ONE_LINE)}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="placement", description="Plan where copies of experts live on servers of unequal memory.")
    parser.add_argument("--version", action="version", version=f"placement {version()} (dancemoe-jax)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if argv[:1] == [name]:
            module = importlib.import_module(f"placement.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        line = str(error).translate(_ONE_LINE)  # a file's name may hold anything
        print(f"placement {arguments.command}: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `head` does; nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
