"""Command line: python -m launch COMMAND. Exit 0 done, 2 unusable input, 1 anything else."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch import log
from launch.cluster.processes import ServerFailed
from placement.files import InputError
from placement.version import version

_log = logging.getLogger("launch")

COMMANDS = {
    "demo": "serve a small model on three unequal servers, plan from what is seen, migrate while serving",
    "serve": "a model over the servers of a cluster, requests over HTTP or as JSON lines",
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
    """Run one command; returns the exit status. argv: default: those of this process, whose standard output then is for
    the command alone."""
    from_shell = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser(argv).parse_args(argv)
    log.configure(arguments.log_level, arguments.log_json, getattr(arguments, "server", None))
    if from_shell:
        log.explain_failed_threads()
        log.keep_output_clean()
    try:
        module = importlib.import_module(_MODULES.get(arguments.command, f"launch.commands.{arguments.command}"))
        return module.run(arguments) or 0
    except InputError as error:
        _log.error("launch %s: %s", arguments.command, " ".join(str(error).split()))
        return 2
    except ServerFailed as failed:
        _log.error("launch %s: %s", arguments.command, failed)
        return failed.status if failed.status in (1, 2) else 1
    except BrokenPipeError:  # the reader of our output left, as `head` does; nobody is there to be told
        log.discard_output()
        return 1
    except KeyboardInterrupt:
        _log.error("launch %s: interrupted", arguments.command)
        return 1
    except ValueError as error:
        if not _is_librarys(error):
            raise
        _log.error("launch %s: %s", arguments.command, " ".join(str(error).split()))
        return 2


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """For all commands, with the flags of the one that is run: the others' modules are not loaded."""
    parser = _Parser(prog="launch", description="Serve Mixture-of-Experts models from unequal servers.")
    parser.add_argument("--version", action="version", version=f"launch {version()} (dancemoe-jax)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if argv[:1] != [name]:
            continue
        if name == "bench":
            importlib.import_module(_MODULES[name]).add_arguments(command, argv[1] if argv[1:] else None)
        else:
            log.add_log_arguments(command)
            getattr(importlib.import_module("launch.arguments"), name)(command)
    return parser


def _is_librarys(error: ValueError) -> bool:
    """Whether it is the library's; where that was not loaded, it is none."""
    errors = sys.modules.get("dancemoe_jax.errors")
    return errors is not None and isinstance(error, errors.DanceMoEError)


if __name__ == "__main__":
    sys.exit(main())
