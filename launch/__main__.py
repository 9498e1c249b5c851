"""Command line: python -m launch COMMAND. Exit 0 done, 2 unusable input, 1 anything else."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dancemoe_jax.errors import DanceMoEError
from placement import InputError

COMMANDS = {
    "demo": "serve a small model on three unequal servers, plan from what is seen, migrate while serving",
    "serve": "a model over the servers of a cluster, one process each, requests as JSON lines",
    "migrate": "look at, start and stop migrations of a cluster that serves",
    "calibrate": "measure links and devices of a running cluster, for the planner",
    "generate": "continue prompts",
    "score": "logits of given token ids, to compare with other implementations",
    "convert": "a model between its Hugging Face directory and Orbax checkpoints, one expert readable at a time",
    "bench": "measure loading, exchanges across servers, and strategies on real links",
    "train": "train a small mixture of experts on text by domain",
    "evaluate": "quality of a model on held-out text, and how its routing differs by domain",
}


_MODULES = {"demo": "launch.demo.run", "bench": "launch.bench.run"}  # the others are in launch/commands


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="launch", description="Serve Mixture-of-Experts models from unequal servers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if argv[:1] == [name]:  # importing jax takes seconds: only for the command that is run
            module = importlib.import_module(_MODULES.get(name, f"launch.commands.{name}"))
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (InputError, DanceMoEError) as error:
        print(f"launch {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `head` does; nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"launch {arguments.command}: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
