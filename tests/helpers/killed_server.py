"""A server of `launch serve` that kills itself with SIGKILL at a phase of a migration, in a process of its own.

Phases are those of `PHASES`, and "none", which only serves. What has to be imported is imported before the process is
forked, which takes most of the time that a server takes to start.
"""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
from jax._src import compiler  # lets only the first process of a program write to the cache

import launch.migration.journal
import launch.migration.planner_process
import launch.migration.staging
from launch.__main__ import main
from launch.migration.committing import Committer
from launch.migration.record import NAME
from launch.migration.worker import MigrationWorker

FIRST_ONLY = ("planning", "before the record", "record written", "before the rename", "after the rename")
EVERYWHERE = ("staging", "between rounds", "before writing", "after writing", "before tables", "after tables")
PHASES = (*FIRST_ONLY, *EVERYWHERE)


def fatal(
    call: Callable[..., Any], left: int, *, after: bool = False, when: Callable[..., bool] = lambda *_: True
) -> Any:
    """`call`, of which the left-th call that counts is the last thing this process does."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        counts = bool(when(*args))
        left -= counts
        if counts and left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if counts and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def inject(phase: str, n: int) -> None:
    """Have this process die at a phase."""

    def record(source: Any, target: Any) -> bool:
        return os.path.basename(target) == NAME and carried[0]

    def carried_out(*_: Any) -> bool:
        return carried[0]

    def carry_out(*args: Any) -> None:
        carried[0] = True
        following(*args)

    carried, following = [False], MigrationWorker._carry_out  # whether a migration has begun
    MigrationWorker._carry_out = carry_out
    if phase == "planning":
        # The question has gone to the process that plans, and no answer has come.
        vars(launch.migration.planner_process)["pickle"] = SimpleNamespace(
            **{**vars(pickle), "load": fatal(pickle.load, n)}
        )
    elif phase == "staging":
        stage = launch.migration.staging.stage
        launch.migration.staging.stage = lambda *args: stage(*args[:4], fatal(args[4], n))
    elif phase == "between rounds":
        MigrationWorker._round = fatal(MigrationWorker._round, n, after=True)
    elif phase.endswith("writing"):
        Committer.write = fatal(Committer.write, n, after=phase == "after writing", when=carried_out)
    elif phase.endswith("tables"):
        Committer._adopt = fatal(Committer._adopt, n, after=phase == "after tables")
    elif phase == "before the record":
        launch.migration.journal.write_record = fatal(launch.migration.journal.write_record, 1, when=carried_out)
    elif phase == "record written":
        os.fsync = fatal(os.fsync, 1, when=carried_out)
    elif phase.endswith("the rename"):
        os.replace = fatal(os.replace, 1, after=phase == "after the rename", when=record)
    elif phase != "none":
        raise ValueError(phase)


def run(cache: str, phase: str, n: int, command: list[str], printed: str) -> None:
    """Be a server: `python -m launch` with a command; what it prints goes to the files `printed`.out and `printed`.err."""
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{printed}.{ending}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Every server has programs of its own, under names of their own.
    vars(compiler)["distributed"] = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
    inject(phase, n)
    sys.exit(main(command))
