"""Live migration on one server of a cluster that serves: stage in the background, commit between steps in agreement.

Every process runs one and receives the same commands. A migration is a list of rounds (`placement.diff`); in each, a server
takes in at most what its staging memory holds, and every expert is covered before and after it:

    stage    a thread reads what is new on this server's devices, at most at the given rate (`launch.migration.staging`)
    release  once all have staged: tables without the copies that the round gives up
    write    into slots that no table names, so each server at its own pace, a few at a time between two steps
    commit   once all have written: tables with the new copies (these three: `launch.migration.committing`)

A server that cannot go on says so with its next step, and all stay with the last commit. Decides nothing: commands come
from `launch.migration.controller`.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import jax
import numpy as np

from dancemoe_jax.expert_parallel.migrate import rewrite
from launch.cluster.channel import Channel, ChannelLost
from launch.engine.loading import Loaded
from launch.migration.command import MigrationCommand, MigrationResult
from launch.migration.committing import Committer, calls
from launch.migration.progress import Progress
from launch.migration.staging import Stager, Stopped
from placement import Placement, diff
from placement.migration.diff import Round

_LOOK_S = 0.5  # how often a thread that waits looks whether all is over
_END_S = 5.0  # for the thread to end


class MigrationWorker:
    """Carries out commands on this server.

    `between` has to be called between any two steps, by the thread that takes them.

    Args:
        wake: wakes the cluster if it sleeps, from any thread.
        staging_bytes: host memory for experts on their way.
        bandwidth: bytes a second that staging reads at most; None is no limit.

    Attributes:
        epoch: placements that have been in force before the present one.
        results: of commands that have ended, in order.
        stage_name: what is under way.
    """

    def __init__(
        self,
        loaded: Loaded,
        channel: Channel,
        wake: Callable[[], None],
        *,
        staging_bytes: int = 2**30,
        bandwidth: float | None = None,
        epoch: int = 0,
    ) -> None:
        self.epoch, self.stage_name = epoch, "idle"
        self.results: list[MigrationResult] = []
        self._changed = threading.Condition()
        self._loaded, self._channel, self._staging_bytes = loaded, channel, staging_bytes
        self._progress = Progress(loaded.engine, wake)
        self._committer = Committer(loaded.engine, loaded.placement, loaded.slots, self._progress)
        self._stager = Stager(loaded, self._progress, staging_bytes, bandwidth)
        self._ended = False
        self._thread = threading.Thread(target=self._follow, name="migration worker", daemon=True)

    @property
    def placement(self) -> Placement:
        """In force on this server."""
        return self._committer.placement

    @property
    def slots(self) -> np.ndarray:
        """Where the experts are in the pool: int32 [devices, layers, experts]."""
        return self._committer.slots

    @property
    def staged_bytes(self) -> int:
        """Host memory that staged experts take now."""
        return self._stager.staged_bytes

    @property
    def peak_bytes(self) -> int:
        """Host memory that they took at most so far."""
        return self._stager.peak_bytes

    def start(self) -> None:
        """Receive commands from now on. Compiles what writing takes; no step may run meanwhile."""
        layout, mesh = self._loaded.engine.shapes["layout"], self._loaded.engine.mesh
        self._committer.write(list(calls(layout, rewrite(layout, mesh, self.slots, self._loaded.read))))
        self._thread.start()

    def end(self) -> None:
        """Follow no more commands."""
        self._ended = True
        self._stager.ended = True
        self._committer.end()
        self._thread.join(_END_S)
        self._stager.end()

    def between(self) -> bool:
        """Do what is due between two steps; whether there is more that needs no step in between."""
        return self._committer.between()

    def send(self, placement: Placement, likely: np.ndarray, reason: str) -> int:
        """Command all servers, this one included, to reach a placement; the command's number. One process sends, one at a
        time."""
        number = len(self.results) + 1
        command = MigrationCommand(number, placement, likely, self.epoch + 1, reason)
        self._channel.put(f"command/{number}", command.encode())
        return number

    def give_up(self, number: int) -> None:
        """Have all servers end a command where it is; later than the last commit, nothing happens."""
        self._progress.give_up(number)

    def wait(self, number: int, seconds: float) -> MigrationResult | None:
        """The result of a command here, or None if it has not ended within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.results) >= number or self._ended, seconds)
            return self.results[number - 1] if len(self.results) >= number else None

    def _follow(self) -> None:
        with suppress(ChannelLost):  # the first server has gone, which others say
            self._follow_commands()

    def _follow_commands(self) -> None:
        while not self._ended:
            number = len(self.results) + 1
            data = self._channel.get(f"command/{number}", _LOOK_S)
            if data is not None:
                self._carry_out(MigrationCommand.decode(data, self.placement))

    def _carry_out(self, command: MigrationCommand) -> None:
        result = MigrationResult(command.number)
        begin, before = time.monotonic(), self.placement
        try:
            rounds = diff(
                self.placement, command.placement, self._loaded.cluster, staging_bytes=self._staging_bytes
            ).rounds
            for index, step in enumerate(rounds):
                self._round(command, index, step, result)
        except Stopped:
            result.failed = self._reason(command.number)
        except Exception as error:  # whatever it is, all go on serving from where they are
            result.failed = f"{self._name}: {' '.join(str(error).split())}"
            self._channel.put(f"failed/{command.number}", result.failed.encode())
            self.give_up(command.number)
        if self.placement is not before:
            self.epoch = command.epoch
        result.seconds = time.monotonic() - begin
        self._stager.forget()
        with self._changed:
            self.stage_name = "idle"
            self.results.append(result)
            self._changed.notify_all()

    def _round(self, command: MigrationCommand, index: int, step: Round, result: MigrationResult) -> None:
        self.stage_name = f"staging round {index + 1}"
        staged = self._stager.stage(command, index, step, self.placement, self.slots, result)
        self.stage_name = f"round {index + 1} staged"
        if not self._committer.carry_through(staged):
            raise Stopped
        self._stager.forget()
        result.rounds += 1
        result.moved += staged.copies
        result.bytes += staged.nbytes

    def _reason(self, number: int) -> str:
        if self._ended:
            return f"{self._name} has stopped serving"
        message = self._channel.get(f"failed/{number}", 1.0)
        return message.decode() if message else "given up on request"

    @property
    def _name(self) -> str:
        return self._loaded.cluster.names[jax.process_index()] if jax.process_count() > 1 else "this process"
