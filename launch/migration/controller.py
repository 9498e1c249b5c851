"""Decides when experts move: replans from what users activate, and migrates where that pays. Runs on the first server.

Every interval a plan is made from a decaying window of counts, with the placement in force as its start. It is adopted
where it saves more over the horizon than transfer and stall cost, by a margin, and where it would have saved in each of
the last intervals too: a workload that changes faster than that moves nothing. Every decision is a line and a record.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from launch.cluster.channel import Channel, ChannelLost
from launch.engine.loading import Loaded
from launch.migration.command import MigrationResult
from launch.migration.decision import Decision, limited
from launch.migration.journal import Journal
from launch.migration.observations import Observations
from launch.migration.planner_process import Planning
from launch.migration.revision import Revision
from launch.migration.worker import MigrationWorker
from placement import Cluster, InputError, Placement, Profile
from placement.migration.adapt import adapt
from placement.migration.decide import Confirmation, Figures, Policy

log = logging.getLogger(__name__)

CONTROLLER = "controller"  # name of the thread that revises the placement
_END_S = 5.0  # for a revision to end, when serving does
T = TypeVar("T")


class Controller:
    """The planning side of live migration.

    Args:
        state: folder for the record of the placement in force and of decisions.
        limits: memory of devices ("edge-a/0") in bytes, where it is to be less than the cluster file says.

    Attributes:
        moving: number of the command under way, or None.
    """

    def __init__(
        self,
        loaded: Loaded,
        worker: MigrationWorker,
        channel: Channel,
        state: Path,
        policy: Policy,
        limits: Mapping[str, int],
    ) -> None:
        self.loaded, self.worker, self.policy, self.limits = loaded, worker, policy, dict(limits)
        self.journal = Journal(state)
        self.observations = Observations(loaded.profile, channel, policy.half_life)
        self.moving: int | None = None
        self._waiting: Confirmation[Placement] = Confirmation()
        self._busy, self._ended = threading.Lock(), threading.Event()
        self._planning = Planning()
        self._thread = threading.Thread(target=self._revise, name=CONTROLLER, daemon=True)

    def start(self, reason: str = "start") -> None:
        """Record what is in force and why, and revise it from now on."""
        self.record(reason)
        if self.policy.interval:
            self._thread.start()

    def end(self) -> None:
        """Revise no more, and have the thread out of the channel, which may end with the program."""
        self._ended.set()
        self._planning.end()
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _revise(self) -> None:
        while not self._ended.wait(self.policy.interval):
            with self._busy:
                if self._ended.is_set():
                    return
                try:
                    self.observations.observe()
                    self.decide(Decision(time.time(), "interval"))
                except ChannelLost:  # serving ends
                    return
                except InputError as error:
                    if not self._ended.is_set():
                        self.journal.note(Decision(time.time(), "interval", why=str(error)))

    @property
    def cluster(self) -> Cluster:
        """The cluster with the memory that there is to be."""
        return limited(self.loaded.cluster, self.limits)

    def record(self, reason: str | None = None) -> None:
        """Record what is in force; reason: why, None is that of the last time."""
        self.journal.record(self.worker.placement, self.worker.epoch, self.limits, reason)

    def undisturbed(self, act: Callable[[], T], seconds: float = -1) -> T:
        """Do something while no placement is revised; waits for a migration that is under way, at most so long.

        Raises:
            InputError: it is under way still.
        """
        if not self._busy.acquire(timeout=seconds):
            raise InputError(f"a migration is under way ({self.worker.stage_name}); wait for it, or --abort it")
        try:
            return act()
        finally:
            self._busy.release()

    def wait_for_end(self) -> None:
        self._ended.wait()

    # ---- decisions; `undisturbed` ----

    def decide(self, decision: Decision, target: Placement | None = None, *, dry: bool = False) -> Decision:
        """Weigh a plan from the window, or a given target, against what is in force; migrate unless dry.

        Raises:
            InputError: there is no plan, or the target cannot be.
        """
        present, requested = self.worker.placement, target is not None
        decision.epoch = self.worker.epoch
        decision.tokens = self.observations.assignments / (present.model["top_k"] * present.resident.shape[1])
        if self.journal.problem and not dry:
            self.record()  # there may be room again
        unfit = self._unfit(present)
        seen = self.observations.window()
        if not seen.counts.any():
            if not requested and not unfit:
                decision.why = "no tokens in the window"
                return decision if dry else self.journal.note(decision)
            seen = self.loaded.profile
        proven = not requested and not unfit and not dry and self._proven(present)
        target, figures = self._weigh(seen, present, self._waiting.plan if proven else target, unfit=bool(unfit))
        decision.take(figures)
        why = figures.objection(self.policy)
        if not figures.rounds:
            decision.why = "nothing to move"
        elif self.journal.problem:
            decision.why = f"migrations have stopped: {self.journal.problem}"
        elif unfit or requested:
            decision.verdict, decision.why = "adopted", unfit or "asked for"
        elif why := why or self._waiting.objection(self.policy, target, proven, keep=not dry):
            decision.why = why
        else:
            decision.verdict, decision.why = "adopted", "pays"
        if proven and decision.verdict != "adopted":
            self.forget_plan()
        if decision.verdict == "adopted" and not dry:
            self._migrate(decision, target, seen)
        return decision if dry else self.journal.note(decision)

    def forget_plan(self) -> None:
        """No plan waits to be proven any more."""
        self._waiting.plan = None

    def _unfit(self, present: Placement) -> str:
        """Why what is in force does not fit the memory that there is to be, or ""."""
        try:
            present.validate(self.cluster)
        except InputError as error:
            # The first part says which device and by how much; what follows is for those who wrote a file.
            return f"there is less memory now ({str(error).partition(': experts')[0].removeprefix('placement: ')})"
        return ""

    def _weigh(
        self, seen: Profile, present: Placement, target: Placement | None, *, unfit: bool = False
    ) -> tuple[Placement, Figures]:
        own, cluster = self.observations, self.loaded.cluster
        return self._planning.weigh(
            Revision(seen, cluster, self.cluster, present, self.policy, unfit, target, own.workload, own.chunks)
        )

    def _proven(self, present: Placement) -> bool:
        """Whether the plan that waits has paid in as many intervals after it was made as the policy asks for.

        An interval in which no request began says nothing: the plan may be made from those who were served in it.
        """
        plan = self._waiting.plan
        if plan is None or self.observations.latest is None:
            return False
        latest, self.observations.latest = self.observations.latest, None
        return self._waiting.proven(self.policy, self._weigh(latest, present, plan)[1].objection(self.policy))

    def _migrate(self, decision: Decision, target: Placement, seen: Profile) -> None:
        self.forget_plan()
        likely = self.loaded.likely(target.resident, seen)
        self.moving = number = self.worker.send(target, likely, decision.reason)
        result: MigrationResult | None = None
        while result is None and not self._ended.is_set():
            result = self.worker.wait(number, 0.5)
        self.moving = None
        if result is None:
            return
        decision.outcome = _summary(result)
        if result.failed:
            decision.verdict, decision.why = "failed", result.failed
        decision.epoch = self.worker.epoch
        self.record(decision.reason)

    # ---- other servers ----

    def grown(self, cluster: Cluster, names: str) -> tuple[Decision, Placement]:
        """A plan for a cluster with more servers, and the figures of it; users there are taken to be like all others.

        Raises:
            InputError: no plan fits.
        """
        self.observations.peek()
        decision = Decision(time.time(), "migrate add", "adopted", f"{names} added", self.worker.epoch)
        seen = self.observations.window()
        seen = seen if seen.counts.any() else self.loaded.profile
        more = len(cluster.names) - len(seen.servers)
        counts = np.concatenate([seen.counts, np.tile(seen.counts.mean(0).round().astype(np.int64), (more, 1, 1))])
        seen = dataclasses.replace(seen, counts=counts, servers=cluster.names)
        usable = limited(cluster, self.limits)
        present, own = adapt(self.worker.placement, usable), self.observations
        revision = Revision(seen, cluster, usable, present, self.policy, workload=own.workload, chunks=own.chunks)
        target, figures = self._planning.weigh(revision)
        # New servers stage all theirs, and then all change at once.
        decision.take(dataclasses.replace(figures, rounds=1))
        return decision, target


def _summary(result: MigrationResult) -> dict[str, Any]:
    """What a decision says of its migration, as the first server saw it."""
    return {
        "failed": result.failed,
        "rounds": result.rounds,
        "stage_s": result.stage_s,
        "seconds": result.seconds,
        "copies_here": result.moved,
        "bytes_here": result.bytes,
        "longest_stall_s": max(result.stalls_s, default=0.0),
    }
