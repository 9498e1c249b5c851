"""Decides when experts move: replans from what users activate, and migrates where that pays. Runs on the first server.

Every interval a plan is made from a decaying window of counts, with the placement in force as its start. It is adopted
where it saves more over the horizon than transfer and stall cost, by a margin, and where it would have saved in each of
the last intervals too: a workload that changes faster than that moves nothing. Every decision is a line and a record.
"""

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from launch.cluster.channel import Channel
from launch.engine.loading import Loaded
from launch.engine.token_sample import Sample, sampled_shape
from launch.migration.command import MigrationResult
from launch.migration.decision import Decision, describe, limited, pace, with_limits
from launch.migration.planner_process import Planning
from launch.migration.record import NAME, placement_hash, write_record
from launch.migration.revision import Revision
from launch.migration.telemetry import Counted, gather, gather_sample
from launch.migration.worker import MigrationWorker
from placement import Cluster, DecayingCounts, InputError, Placement, Profile, Workload
from placement.migration.adapt import adapt
from placement.migration.decide import Confirmation, Figures, Policy

log = logging.getLogger(__name__)

DECISIONS = "decisions.jsonl"
_END_S = 5.0  # for a revision to end, when serving does
T = TypeVar("T")


class Controller:
    """The planning side of live migration.

    Args:
        state: folder for the record of the placement in force and of decisions.
        limits: memory of devices ("edge-a/0") in bytes, where it is to be less than the cluster file says.

    Attributes:
        disabled: why nothing migrates any more, or "".
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
        self.loaded, self.worker, self.policy, self.state = loaded, worker, policy, state
        self.limits, self.disabled, self.decisions = dict(limits), "", 0
        self.last: Decision | None = None
        shape = loaded.profile.counts.shape
        self._empty = Counted(np.zeros(shape, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64))
        self._before, self._began = self._empty, time.monotonic()
        self._window = DecayingCounts(policy.half_life, self._empty.counts, self._began)
        # Steps and tokens of both kinds, and the seconds in which they were.
        self._pace = DecayingCounts(policy.half_life, np.zeros(5), self._began)
        self._channel = channel
        self._sample = self._gather_sample()
        self._latest: Profile | None = None  # what the last interval counted, if a request began in it
        self._observed_at = time.time()
        self._waiting: Confirmation[Placement] = Confirmation()
        self._workload, self._chunks = Workload(), 0.0
        self._busy, self._ended = threading.Lock(), threading.Event()
        self._moving: int | None = None
        self._planning = Planning()
        self._thread = threading.Thread(target=self._revise, name="controller", daemon=True)

    def start(self, reason: str = "start") -> None:
        """Record what is in force and why, and revise it from now on."""
        self._record(reason)
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
                    self.observe()
                    self._decide(Decision(time.time(), "interval"))
                except InputError as error:
                    if not self._ended.is_set():
                        self.note(Decision(time.time(), "interval", why=str(error)))

    # ---- what has been seen ----

    def observe(self) -> None:
        """Take what the servers have counted since the last time into the window."""
        now, counted = time.monotonic(), self._peek()
        new = counted.counts - self._before.counts
        began = counted.fed[0] > self._before.fed[0] and new.any()
        self._before = counted
        self._latest = self.profile(new, since=self._observed_at) if began else None
        self._observed_at = time.time()
        self._pace = self._pace.observe(np.array([*counted.steps, *counted.fed, now - self._began]), now)
        self._workload, self._chunks = pace(self._pace.counts)

    def profile(self, counts: np.ndarray, since: float = 0.0) -> Profile:
        """Counts with the sizes of the model, and the tokens that have been sampled since then (seconds since 1970)."""
        sample = self._sample
        new = sample.at >= since
        tokens = {"ids": sample.ids[new], "server": sample.server[new], "sequence": np.arange(new.sum())}
        return dataclasses.replace(
            self.loaded.profile, counts=np.rint(counts).astype(np.int64), **(tokens if new.any() else {})
        )

    @property
    def cluster(self) -> Cluster:
        """The cluster with the memory that there is to be."""
        return limited(self.loaded.cluster, self.limits)

    # ---- decisions ----

    def _decide(self, decision: Decision, target: Placement | None = None, *, dry: bool = False) -> Decision:
        """Weigh a plan from the window, or a given target, against what is in force; migrate unless dry."""
        present, usable, policy = self.worker.placement, self.cluster, self.policy
        decision.epoch, asked = self.worker.epoch, target is not None
        decision.tokens = float(self._window.counts.sum()) / (present.model["top_k"] * present.resident.shape[1])
        unfit = ""
        try:
            present.validate(usable)
        except InputError as error:
            unfit = str(error)
        seen = self.profile(self._window.counts)
        if not seen.counts.any():
            if not asked and not unfit:
                decision.why = "no tokens in the window"
                return self.note(decision, dry)
            seen = self.loaded.profile
        proven = not asked and not unfit and not dry and self._proven(present)
        target, figures = self._weigh(seen, present, self._waiting.plan if proven else target, unfit=bool(unfit))
        decision.take(figures)
        why = figures.objection(policy)
        if not figures.rounds:
            decision.why = "nothing to move"
        elif self.disabled:
            decision.why = f"migrations have stopped: {self.disabled}"
        elif unfit or asked:
            decision.verdict, decision.why = "adopted", unfit or "asked for"
        elif why := why or self._waiting.objection(policy, target, proven, keep=not dry):
            decision.why = why
        else:
            decision.verdict, decision.why = "adopted", "pays"
        if proven and decision.verdict != "adopted":
            self._waiting.plan = None
        if decision.verdict == "adopted" and not dry:
            self._migrate(decision, target, seen)
        return self.note(decision, dry)

    def _weigh(
        self, seen: Profile, present: Placement, target: Placement | None, *, unfit: bool = False
    ) -> tuple[Placement, Figures]:
        cluster, policy = self.loaded.cluster, self.policy
        return self._planning.weigh(
            Revision(seen, cluster, self.cluster, present, policy, unfit, target, self._workload, self._chunks)
        )

    def _proven(self, present: Placement) -> bool:
        """Whether the plan that waits has paid in as many intervals after it was made as the policy asks for.

        An interval in which no request began says nothing: the plan may be made from those who were served in it.
        """
        plan = self._waiting.plan
        if plan is None or self._latest is None:
            return False
        latest, self._latest = self._latest, None
        return self._waiting.proven(self.policy, self._weigh(latest, present, plan)[1].objection(self.policy))

    def _migrate(self, decision: Decision, target: Placement, seen: Profile) -> None:
        self._waiting.plan = None
        likely = self.loaded.likely(target.resident, seen)
        self._moving = number = self.worker.send(target, likely, decision.reason)
        outcome: MigrationResult | None = None
        while outcome is None and not self._ended.is_set():
            outcome = self.worker.wait(number, 0.5)
        self._moving = None
        if outcome is None:
            return
        decision.outcome = {
            "failed": outcome.failed,
            "rounds": outcome.rounds,
            "stage_s": outcome.stage_s,
            "seconds": outcome.seconds,
            "copies_here": outcome.moved,
            "bytes_here": outcome.bytes,
            "longest_stall_s": max(outcome.stalls_s, default=0.0),
        }
        if outcome.failed:
            decision.verdict, decision.why = "failed", outcome.failed
        decision.epoch = self.worker.epoch
        self._record(decision.reason)

    def _record(self, reason: str) -> None:
        try:
            write_record(self.state, self.worker.placement, self.worker.epoch, reason, self.limits)
        except InputError as error:
            self.disabled = str(error)
            log.error("placement: no more migrations, the placement cannot be recorded: %s", error)

    def note(self, decision: Decision, dry: bool = False) -> Decision:
        if dry:
            return decision
        self.last, self.decisions = decision, self.decisions + 1
        log.info("%s", describe(decision))
        try:
            with open(self.state / DECISIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(decision)) + "\n")
        except OSError as error:
            log.warning("placement: %s: cannot be written: %s", self.state / DECISIONS, error.strerror)
        return decision

    # ---- other servers ----

    def grown(self, cluster: Cluster, names: str) -> tuple[Decision, Placement]:
        """A plan for a cluster with more servers, and the figures of it; users there are taken to be like all others.

        Raises:
            InputError: no plan fits.
        """
        self._peek()
        decision = Decision(time.time(), "migrate add", "adopted", f"{names} added", self.worker.epoch)
        seen = self.profile(self._window.counts)
        seen = seen if seen.counts.any() else self.loaded.profile
        more = len(cluster.names) - len(seen.servers)
        counts = np.concatenate([seen.counts, np.tile(seen.counts.mean(0).round().astype(np.int64), (more, 1, 1))])
        seen = dataclasses.replace(seen, counts=counts, servers=cluster.names)
        usable = limited(cluster, self.limits)
        present = adapt(self.worker.placement, usable)
        target, figures = self._planning.weigh(
            Revision(seen, cluster, usable, present, self.policy, workload=self._workload, chunks=self._chunks)
        )
        decision.take(
            dataclasses.replace(figures, rounds=1)
        )  # new servers stage all theirs, and then all change at once
        return decision, target

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

    # ---- what the command `migrate` asks for ----

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked for, done; from any thread.

        Raises:
            InputError: it cannot be.
        """
        what = asked.get("what")
        if what == "status":
            return self.status()
        if what == "abort":
            number = self._moving
            if number is None:
                raise InputError("--abort: no migration is under way")
            self.worker.give_up(number)
            return {"aborted": number}
        return self.undisturbed(lambda: self._change(str(what), asked), 1.0)

    def _change(self, what: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        dry, target = bool(asked.get("dry")), None
        before = dict(self.limits)
        if what == "to":
            target = Placement.from_dict(asked["placement"], str(asked.get("source", "the request")))
        elif what == "memory":
            self._waiting.plan = None
            self.limits = with_limits(self.loaded.profile, self.loaded.cluster, self.limits, asked["memory"])
        elif what != "plan":
            raise InputError(f"{what!r} is unknown; known are status, plan, to, memory, abort")
        try:
            self._peek()
            decision = self._decide(Decision(time.time(), f"migrate {what}"), target, dry=dry)
            if what == "memory" and not dry and decision.verdict == "failed":
                self.limits = before
            elif what == "memory" and not dry:
                self._record("migrate memory")
        except InputError:
            self.limits = before
            raise
        if dry:
            self.limits = before
        return dataclasses.asdict(decision)

    def _peek(self) -> Counted:
        """Have the window hold the newest counts, and the sample the newest tokens, without ending an interval."""
        counted = gather(self._channel, self._empty)
        self._window = self._window.observe(counted.counts, time.monotonic())
        self._sample = self._gather_sample()
        return counted

    def _gather_sample(self) -> Sample:
        return gather_sample(self._channel, jax.process_count(), sampled_shape(self.loaded.profile))

    def status(self) -> dict[str, Any]:
        """How things stand."""
        worker = self.worker
        return {
            "epoch": worker.epoch,
            "hash": placement_hash(worker.placement),
            "strategy": worker.placement.strategy,
            "moving": self._moving,
            "stage": worker.stage_name,
            "staged_bytes": worker.staged_bytes,
            "peak_staged_bytes": worker.peak_bytes,
            "disabled": self.disabled,
            "limits": self.limits,
            "record": str(self.state / NAME),
            "decisions": self.decisions,
            "last": dataclasses.asdict(self.last) if self.last else None,
            "pid": os.getpid(),
        }
