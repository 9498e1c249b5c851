"""The part of a migration that the thread that takes steps has: writes into free slots, and tables, between two steps.

All servers change their tables at the same step: each sees with every step how far all are (`Progress`).
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from dancemoe_jax.expert_parallel.migrate import Staged, commit
from dancemoe_jax.expert_parallel.pool import PoolLayout, write_rows
from dancemoe_jax.expert_parallel.tables import Tables
from dancemoe_jax.model.experts import ExpertWeights
from launch.engine.engine import Engine
from launch.migration.command import MigrationResult
from launch.migration.progress import Progress
from placement import Placement

_SHARE = 0.25  # of a step's time that writing may add to it

Call = tuple[int, list[tuple[int, ExpertWeights]]]
"""A device, and what goes to one of its banks at once."""


@dataclass(frozen=True, eq=False)
class InForce:
    """What is where, and the tables that say so."""

    placement: Placement
    slots: np.ndarray
    tables: Tables


@dataclass(eq=False)
class StagedRound:
    """A round that has been staged here, on its way into the pool.

    Attributes:
        number: of the command; stage: what this server's progress says once it is staged; one more once it is written.
        released: tables, slots and placement without what the round gives up; None where it gives up nothing.
        committed: those with what it brings.
        at_once: all happens at one boundary, because devices have no room beside what only they hold.
        writes: what has yet to be written; copies, nbytes: of all of it.
        result: of the command; gets the stalls.
    """

    number: int
    stage: int
    released: InForce | None
    committed: InForce
    at_once: bool
    writes: list[Call]
    copies: int
    nbytes: int
    result: MigrationResult
    step: str = "staged"  # then writing, written, committed
    over: threading.Event = field(default_factory=threading.Event)


def calls(layout: PoolLayout, staged: Staged) -> Iterator[Call]:
    """What is staged, in calls that each write one bank."""
    for device, rows in staged.writes.items():
        banks: dict[int, list[tuple[int, ExpertWeights]]] = {}
        for slot, weights in rows:
            banks.setdefault(layout.locate(slot)[0], []).append((slot, weights))
        for own in banks.values():
            count = write_rows(sum(leaf.nbytes for leaf in jax.tree.leaves(own[0][1])))
            for first in range(0, len(own), count):
                yield device, own[first : first + count]


class Committer:
    """Takes rounds that are staged into force, one at a time.

    Attributes:
        placement, slots: in force.
        ended: all rounds are over from now on.
    """

    def __init__(self, engine: Engine, placement: Placement, slots: np.ndarray, progress: Progress) -> None:
        self.placement, self.slots, self.ended = placement, slots, False
        self._engine, self._progress = engine, progress
        self._round: StagedRound | None = None
        self._calls_at_once = 1  # between two steps
        self._last = 0.0

    def carry_through(self, staged: StagedRound) -> bool:
        """Wait until a round is in force everywhere; false where it is not to be. For the thread that stages."""
        self._round = staged
        if self.ended:  # it may have been set before there was a round to end
            staged.over.set()
        self._engine.hold = True  # tables change between the same two steps everywhere
        self._progress.report(staged.number, staged.stage)
        staged.over.wait()
        self._engine.hold, self._round = False, None
        return staged.step == "committed"

    def end(self) -> None:
        """End the round under way, and every later one."""
        self.ended = True
        if staged := self._round:
            staged.over.set()

    def between(self) -> bool:
        """Do what is due between two steps; whether there is more that needs no step in between."""
        begin = time.monotonic()
        self._progress.look()
        staged = self._round
        if staged is None or staged.over.is_set():
            self._last = begin
            return False
        step, before = begin - self._last, staged.step
        if staged.number <= self._progress.given_up or self.ended:
            staged.over.set()
        else:
            self._advance(staged)
        if staged.step == "writing" and not staged.over.is_set():
            self._write_some(staged, step, begin)
        self._last = time.monotonic()
        if staged.step != before or before == "writing":
            staged.result.stalls_s.append(self._last - begin)
        return staged.step == "writing"

    def _advance(self, staged: StagedRound) -> None:
        """Change tables where all are far enough."""
        if staged.step == "staged" and staged.at_once:
            if self._progress.all_at(staged.number, staged.stage):
                self.write(staged.writes)
                self._adopt(staged, staged.committed)
        elif staged.step == "staged":
            if staged.released is None:
                staged.step = "writing"
            elif self._progress.all_at(staged.number, staged.stage):
                self._adopt(staged, staged.released)
        elif staged.step == "written" and self._progress.all_at(staged.number, staged.stage + 1):
            self._adopt(staged, staged.committed)

    def _write_some(self, staged: StagedRound, step: float, begin: float) -> None:
        """Write as much as may be written between two steps, by the seconds that the last step took."""
        now, staged.writes = staged.writes[: self._calls_at_once], staged.writes[self._calls_at_once :]
        self.write(now)
        took = time.monotonic() - begin
        self._calls_at_once = max(1, int(self._calls_at_once * min(2.0, _SHARE * step / max(took, 1e-6))))
        if not staged.writes:
            staged.step = "written"
            self._progress.report(staged.number, staged.stage + 1)

    def write(self, some: list[Call]) -> None:
        """Write into the pool. Between two steps."""
        writes: dict[int, list[tuple[int, ExpertWeights]]] = {}
        for device, rows in some:
            writes.setdefault(device, []).extend(rows)
        if writes:
            weights, shapes = self._engine.weights, self._engine.shapes
            pool = commit(weights.pool, shapes["layout"], self._engine.mesh, Staged(self.slots, writes))
            self._engine.weights = weights._replace(pool=jax.block_until_ready(pool))

    def _adopt(self, staged: StagedRound, new: InForce) -> None:
        self._engine.adopt(self._engine.weights._replace(tables=new.tables))
        self.placement, self.slots = new.placement, new.slots
        if new is staged.committed:
            staged.step = "committed"
            staged.over.set()
        else:
            staged.step = "writing"
