"""Live migration on one server of a cluster that serves: stage in the background, commit between steps in agreement.

Every process runs one and hears the same orders. A migration is a list of rounds (`placement.diff`); in each, a server
takes in at most what its staging memory holds, and every expert is covered before and after it:

    stage    a thread reads what is new on this server's devices, at most at the given rate
    release  once all have staged: tables without the copies that the round gives up
    write    into slots that no table names, so each server at its own pace, a few at a time between two steps
    commit   once all have written: tables with the new copies

How far each has come travels with every step as three numbers (`launch.engine`), so all change their tables at the same
step, without a message for it. Whoever cannot go on says so in the same way, and all stay with the last commit.
Decides nothing: orders come from `launch.migration.controller`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np

from dancemoe_jax.checkpoint.arena import Arena, staging_threads
from dancemoe_jax.expert_parallel.migrate import Staged, commit, rewrite, stage
from dancemoe_jax.expert_parallel.pool import WRITE_ROWS, local_devices
from dancemoe_jax.expert_parallel.tables import Tables
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.channel import Channel
from launch.cluster.priority import STAGING, give_way
from launch.engine.engine import Engine
from launch.engine.loading import Loaded
from launch.migration.command import MigrationCommand, MigrationResult
from placement import Placement, diff
from placement.migration.diff import Round

_LOOK_S = 0.5  # how often a thread that waits looks whether all is over
_Call = tuple[int, list[tuple[int, ExpertWeights]]]  # a device, and what goes to one of its banks at once
_SHARE = 0.25  # of a step's time that writing may add to it


class _Stopped(Exception):
    """Staging ends early."""


@dataclass(eq=False)
class _Job:
    """A round that has been staged here, on its way into the pool.

    Attributes:
        stage: what this server's progress says once it is staged; one more once it is written.
        released: tables, slots and placement without what the round gives up; None where it gives up nothing.
        committed: those with what it brings.
        at_once: all happens at one boundary, because devices have no room beside what only they hold.
    """

    order: int
    stage: int
    released: "_InForce | None"
    committed: "_InForce"
    at_once: bool
    writes: list[_Call]
    step: str = "staged"  # then writing, written, committed
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, eq=False)
class _InForce:
    """What is where, and the tables that say so."""

    placement: Placement
    slots: np.ndarray
    tables: Tables


class MigrationWorker:
    """Carries out orders on this server.

    `between` has to be called between any two steps, by the thread that takes them.

    Args:
        ring: wakes the cluster if it sleeps, from any thread.
        staging_bytes: host memory for experts on their way.
        bandwidth: bytes a second that staging reads at most; None is no limit.

    Attributes:
        placement, slots: in force; epoch: how many have been before.
        outcomes: of orders that have ended, in order.
        staged_bytes: host memory held now; peak_bytes: at most so far.
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
        self.engine: Engine = loaded.engine
        self.placement, self.slots, self.epoch = loaded.placement, loaded.slots, epoch
        self.outcomes: list[MigrationResult] = []
        self.changed = threading.Condition()
        self.stage_name = "idle"
        self.staged_bytes = self.peak_bytes = 0
        self._loaded, self._channel, self._wake = loaded, channel, wake
        self._staging_bytes, self._bandwidth = staging_bytes, bandwidth
        self._job: _Job | None = None
        self._given_up = 0  # the last order that somebody has given up
        self._outcome = MigrationResult(0)
        self._calls_at_once = 1  # of WRITE_ROWS experts, between two steps
        self._progress = threading.Lock()
        self._last = 0.0
        # Both stay: new memory and new threads would cost the next round as much as reading does.
        layout = self.engine.shapes["layout"]
        servers = {layout.server[device] for device in local_devices(self.engine.mesh)}
        self._arena = Arena(most=len(servers) * staging_bytes)
        number = staging_threads(int(np.max(loaded.profile.expert_bytes)))
        self._threads = ThreadPoolExecutor(number, "staging", lambda: give_way(STAGING))
        self._ended = False
        self._thread = threading.Thread(target=self._follow, name="mover", daemon=True)

    def start(self) -> None:
        """Listen to orders from now on. Compiles what writing takes; no step may run meanwhile."""
        unchanged = rewrite(self.engine.shapes["layout"], self.engine.mesh, self.slots, self._loaded.read)
        self._write(list(self._calls(unchanged)))
        self._thread.start()

    def end(self) -> None:
        """Follow no more orders."""
        self._ended = True
        if self._job is not None:
            self._job.over.set()
        self._thread.join(5)
        self._threads.shutdown(wait=False)

    def send(self, placement: Placement, likely: np.ndarray, reason: str) -> int:
        """Command all servers, this one included, to reach a placement. Returns its number."""
        number = len(self.outcomes) + 1
        self._channel.put(
            f"order/{number}", MigrationCommand(number, placement, likely, self.epoch + 1, reason).encode()
        )
        return number

    def give_up(self, number: int) -> None:
        """Have all servers end an order where it is; later than the last commit, nothing happens."""
        with self._progress:
            self.engine.migration_progress = self.engine.migration_progress._replace(given_up=number)
        self._wake()

    def wait(self, number: int, seconds: float) -> MigrationResult | None:
        """The outcome of an order here, or None if it has not ended within so many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.outcomes) >= number or self._ended, seconds)
            return self.outcomes[number - 1] if len(self.outcomes) >= number else None

    # ---- the thread that stages ----

    def _follow(self) -> None:
        while not self._ended:
            number = len(self.outcomes) + 1
            data = self._channel.get(f"order/{number}", _LOOK_S)
            if data is not None:
                self._carry_out(MigrationCommand.decode(data, self.placement))

    def _carry_out(self, order: MigrationCommand) -> None:
        outcome = self._outcome = MigrationResult(order.number)
        begin, before = time.monotonic(), self.placement
        try:
            rounds = diff(
                self.placement, order.placement, self._loaded.cluster, staging_bytes=self._staging_bytes
            ).rounds
            for index, step in enumerate(rounds):
                self._round(order, index, step)
        except _Stopped:
            outcome.failed = self._reason(order.number)
        except Exception as error:  # whatever it is, all go on serving from where they are
            outcome.failed = f"{self._name}: {' '.join(str(error).split())}"
            self._channel.put(f"failed/{order.number}", outcome.failed.encode())
            self.give_up(order.number)
        if self.placement is not before:
            self.epoch = order.epoch
        outcome.seconds = time.monotonic() - begin
        self._arena.reset()
        with self.changed:
            self.stage_name, self.staged_bytes, self._job = "idle", 0, None
            self.outcomes.append(outcome)
            self.changed.notify_all()

    def _round(self, order: MigrationCommand, index: int, step: Round) -> None:
        begin = time.monotonic()
        self.stage_name = f"staging round {index + 1}"
        resident, released = self.placement.resident.copy(), None
        for layer, expert, device in step.drops:
            resident[device, layer, expert] = False
        slots = self.slots
        if step.drops and not step.staged:
            slots = np.where(resident, slots, -1)
            released = self._in_force(order, resident.copy(), slots)
        for move in step.moves:
            resident[move.device, move.layer, move.expert] = True
        layout, mesh, read = self.engine.shapes["layout"], self.engine.mesh, self._reader(order.number, begin)
        staged = stage(layout, mesh, slots, resident, read, self._threads)
        self._outcome.staged += self.staged_bytes
        self._outcome.stage_s += time.monotonic() - begin
        committed = self._in_force(order, resident, staged.slots)
        job = _Job(order.number, 2 * index + 1, released, committed, step.staged, list(self._calls(staged)))
        self.stage_name = f"round {index + 1} staged"
        self._job = job
        self._report(job)
        job.over.wait()
        self._job = None
        self._arena.reset()
        if job.step != "committed":
            raise _Stopped
        self._outcome.rounds += 1
        self._outcome.moved += sum(len(rows) for rows in staged.writes.values())
        self._outcome.bytes += staged.nbytes
        self.staged_bytes = 0

    def _in_force(self, order: MigrationCommand, resident: np.ndarray, slots: np.ndarray) -> _InForce:
        placement = Placement(resident, order.placement.devices, order.placement.strategy, order.placement.model)
        return _InForce(placement, slots, self._loaded.tables(slots, order.likely))

    def _reader(self, number: int, begin: float) -> Callable[[int, int], ExpertWeights]:
        """Reads for staging: keeps the rate, keeps the books, and ends where the order has been given up."""
        total, lock = 0, threading.Lock()

        def read(layer: int, expert: int) -> ExpertWeights:
            nonlocal total
            if self._ended or self._given_up >= number:
                raise _Stopped
            weights = self._loaded.read(layer, expert, self._arena)
            with lock:
                total += sum(part.nbytes for part in jax.tree.leaves(weights))
                self.staged_bytes = total
                self.peak_bytes = max(self.peak_bytes, total)
                due = begin + total / self._bandwidth if self._bandwidth else 0.0
            time.sleep(max(0.0, due - time.monotonic()))
            return weights

        return read

    def _calls(self, staged: Staged) -> Iterator[_Call]:
        """What is staged, in calls that each write one bank."""
        layout = self.engine.shapes["layout"]
        for device, rows in staged.writes.items():
            banks: dict[int, list[tuple[int, ExpertWeights]]] = {}
            for slot, weights in rows:
                banks.setdefault(layout.locate(slot)[0], []).append((slot, weights))
            for own in banks.values():
                for first in range(0, len(own), WRITE_ROWS):
                    yield device, own[first : first + WRITE_ROWS]

    def _report(self, job: _Job, ahead: int = 0) -> None:
        with self._progress:
            self.engine.migration_progress = self.engine.migration_progress._replace(
                order=job.order, stage=job.stage + ahead
            )
        self._wake()

    def _reason(self, number: int) -> str:
        if self._ended:
            return f"{self._name} has stopped serving"
        told = self._channel.get(f"failed/{number}", 1.0)
        return told.decode() if told else "given up on request"

    @property
    def _name(self) -> str:
        return self._loaded.cluster.names[jax.process_index()] if jax.process_count() > 1 else "this process"

    # ---- the thread that takes steps ----

    def between(self) -> bool:
        """Do what is due between two steps; whether there is more that needs no step in between."""
        engine, begin = self.engine, time.monotonic()
        self._given_up = max(self._given_up, int(engine.received.given_up.max()))
        job = self._job
        if job is None or job.over.is_set():
            self._last = begin
            return False
        step, job_before = begin - self._last, job.step
        if job.order <= self._given_up or self._ended:
            job.over.set()
        elif job.step == "staged" and job.at_once:
            if self._all_at(job.order, job.stage):
                self._write(job.writes)
                self._adopt(job, job.committed)
        elif job.step == "staged":
            if job.released is None:
                job.step = "writing"
            elif self._all_at(job.order, job.stage):
                self._adopt(job, job.released)
        elif job.step == "written" and self._all_at(job.order, job.stage + 1):
            self._adopt(job, job.committed)
        if job.step == "writing" and not job.over.is_set():
            now, job.writes = job.writes[: self._calls_at_once], job.writes[self._calls_at_once :]
            self._write(now)
            took = time.monotonic() - begin
            self._calls_at_once = max(1, int(self._calls_at_once * min(2.0, _SHARE * step / max(took, 1e-6))))
            if not job.writes:
                job.step = "written"
                self._report(job, 1)
        self._last = time.monotonic()
        if job.step != job_before or job_before == "writing":
            self._outcome.stalls_s.append(self._last - begin)
        return job.step == "writing"

    def _write(self, calls: list[_Call]) -> None:
        writes: dict[int, list[tuple[int, ExpertWeights]]] = {}
        for device, rows in calls:
            writes.setdefault(device, []).extend(rows)
        if writes:
            weights, shapes = self.engine.weights, self.engine.shapes
            pool = commit(weights.pool, shapes["layout"], self.engine.mesh, Staged(self.slots, writes))
            self.engine.weights = weights._replace(pool=jax.block_until_ready(pool))

    def _adopt(self, job: _Job, new: _InForce) -> None:
        self.engine.adopt(self.engine.weights._replace(tables=new.tables))
        self.placement, self.slots = new.placement, new.slots
        if new is job.committed:
            job.step = "committed"
            job.over.set()
        else:
            job.step = "writing"

    def _all_at(self, order: int, at: int) -> bool:
        received = self.engine.received
        return bool((received.order == order).all() and (received.stage >= at).all())
