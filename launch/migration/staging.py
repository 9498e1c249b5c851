"""The part of a migration that has a thread of its own: reads a round's experts into host memory, at most at a given rate."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from dancemoe_jax.checkpoint.arena import Arena, staging_threads
from dancemoe_jax.expert_parallel.migrate import stage
from dancemoe_jax.expert_parallel.pool import local_devices
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.priority import STAGING, give_way
from launch.engine.loading import Loaded
from launch.migration.command import MigrationCommand, MigrationResult
from launch.migration.committing import InForce, StagedRound, calls
from launch.migration.progress import Progress
from placement import Placement
from placement.migration.diff import Round


class Stopped(Exception):
    """Staging ends early."""


class Stager:
    """Stages rounds, one at a time.

    Args:
        staging_bytes: host memory for experts on their way.
        bandwidth: bytes a second that it reads at most; None is no limit.

    Attributes:
        staged_bytes: host memory held now; peak_bytes: at most so far.
        ended: nothing is read any more.
    """

    def __init__(self, loaded: Loaded, progress: Progress, staging_bytes: int, bandwidth: float | None) -> None:
        self.staged_bytes = self.peak_bytes = 0
        self.ended = False
        self._loaded, self._progress, self._bandwidth = loaded, progress, bandwidth
        # Both stay: new memory and new threads would cost the next round as much as reading does.
        layout, mesh = loaded.engine.shapes["layout"], loaded.engine.mesh
        servers = {layout.server[device] for device in local_devices(mesh)}
        self._arena = Arena(most=len(servers) * staging_bytes)
        number = staging_threads(int(np.max(loaded.profile.expert_bytes)))
        self._threads = ThreadPoolExecutor(number, "staging", lambda: give_way(STAGING))

    def end(self) -> None:
        """Read nothing any more."""
        self.ended = True
        self._threads.shutdown(wait=False)

    def forget(self) -> None:
        """What was staged is not needed any more."""
        self._arena.reset()
        self.staged_bytes = 0

    def stage(
        self,
        command: MigrationCommand,
        index: int,
        step: Round,
        placement: Placement,
        slots: np.ndarray,
        result: MigrationResult,
    ) -> StagedRound:
        """Read a round's experts.

        Args:
            index: of the round; placement, slots: before it.

        Raises:
            Stopped: the command has been given up, or nothing is read any more.
            ModelError, OSError: an expert cannot be read.
        """
        begin, engine = time.monotonic(), self._loaded.engine
        resident, released = placement.resident.copy(), None
        for layer, expert, device in step.drops:
            resident[device, layer, expert] = False
        if step.drops and not step.staged:
            slots = np.where(resident, slots, -1)
            released = self._in_force(command, resident.copy(), slots)
        for move in step.moves:
            resident[move.device, move.layer, move.expert] = True
        layout, read = engine.shapes["layout"], self._reader(command.number, begin)
        staged = stage(layout, engine.mesh, slots, resident, read, self._threads)
        result.staged += self.staged_bytes
        result.stage_s += time.monotonic() - begin
        committed = self._in_force(command, resident, staged.slots)
        return StagedRound(
            command.number,
            2 * index + 1,
            released,
            committed,
            at_once=step.staged,
            writes=list(calls(layout, staged)),
            copies=sum(len(rows) for rows in staged.writes.values()),
            nbytes=staged.nbytes,
            result=result,
        )

    def _in_force(self, command: MigrationCommand, resident: np.ndarray, slots: np.ndarray) -> InForce:
        placement = Placement(resident, command.placement.devices, command.placement.strategy, command.placement.model)
        return InForce(placement, slots, self._loaded.tables(slots, command.likely))

    def _reader(self, number: int, begin: float) -> Callable[[int, int], ExpertWeights]:
        """Reads for staging: keeps the rate, keeps the books, and ends where the command has been given up."""
        total, lock = 0, threading.Lock()

        def read(layer: int, expert: int) -> ExpertWeights:
            nonlocal total
            if self.ended or self._progress.given_up >= number:
                raise Stopped
            weights = self._loaded.read(layer, expert, self._arena)
            with lock:
                total += sum(part.nbytes for part in jax.tree.leaves(weights))
                self.staged_bytes = total
                self.peak_bytes = max(self.peak_bytes, total)
                due = begin + total / self._bandwidth if self._bandwidth else 0.0
            time.sleep(max(0.0, due - time.monotonic()))
            return weights

        return read
