"""Decides when experts move: replans from what users activate, and migrates where that pays. Runs on the first server.

Every interval a plan is made from a decaying window of counts, with the placement in force as its start. It is adopted
where it saves more over the horizon than transfer and stall cost, by a margin, and where it would have saved in each of
the last intervals too: a workload that changes faster than that moves nothing. Every decision is a line and a record.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import placement
from launch.channel import Channel
from launch.hosting import Loaded, fitted
from launch.mover import Mover, Outcome
from launch.priority import give_way
from launch.record import NAME, placement_hash, write_record
from launch.reports import Counted, gather
from launch.sampled import gather_sample, sampled_shape
from placement import Cluster, DecayingCounts, Diff, InputError, Placement, Profile, Workload, should_migrate
from placement.units import format_bytes

DECISIONS = "decisions.jsonl"


@dataclasses.dataclass(frozen=True)
class Policy:
    """When and how the placement is revised.

    Attributes:
        strategy: of `placement.STRATEGIES`.
        interval: seconds between revisions, 0 for none; half_life: seconds after which an activation counts half.
        horizon: seconds over which a migration has to pay.
        margin: by how much more than its cost, and which share of the expected step time it has to save at least.
        confirm: intervals that a plan has to pay in: that of which it was made, and those after it.
        interference: seconds that serving loses for each second of staging; stall: for each round.
        bandwidth: bytes a second that each server stages at most.
    """

    strategy: str = "latency"
    interval: float = 60.0
    half_life: float = 60.0
    horizon: float = 300.0
    margin: float = 0.05
    confirm: int = 2
    interference: float = 0.1
    stall: float = 0.01
    bandwidth: float | None = None
    staging_bytes: int = 2**30


@dataclasses.dataclass
class Decision:
    """A revision and what came of it. Seconds; `saving_s` and `cost_s` over the horizon."""

    at: float
    reason: str
    verdict: str = "kept"
    why: str = ""
    epoch: int = 0
    tokens: float = 0.0
    step_s: float | None = None
    planned_step_s: float | None = None
    remote_share: float | None = None
    planned_remote_share: float | None = None
    saving_s: float | None = None
    cost_s: float | None = None
    transfer_s: float | None = None
    bytes: int = 0
    copies: int = 0
    rounds: int = 0
    outcome: dict[str, Any] | None = None


class Controller:
    """The planning side of live migration.

    Args:
        state: folder for the record of the placement in force and of decisions.
        limits: memory of devices ("edge-a/0") in bytes, where it is to be less than the cluster file says.

    Attributes:
        disabled: why nothing migrates any more, or "".
    """

    def __init__(
        self, loaded: Loaded, mover: Mover, channel: Channel, state: Path, policy: Policy, limits: Mapping[str, int]
    ) -> None:
        self.loaded, self.mover, self.policy, self.state = loaded, mover, policy, state
        self.limits, self.disabled, self.decisions = dict(limits), "", 0
        self.last: Decision | None = None
        shape = loaded.profile.counts.shape
        self._empty = Counted(np.zeros(shape, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64))
        self._before, self._observed_at = self._empty, time.monotonic()
        self._window = DecayingCounts(policy.half_life, self._empty.counts, time.monotonic())
        self._channel = channel
        self._latest: Profile | None = None  # what the last interval counted
        self._observed_wall = time.time()
        self._candidate: Placement | None = None  # a plan that would pay by the counts that it was made from
        self._candidate_cost, self._paid = 0.0, 0  # its seconds; in how many intervals since it has paid
        self._workload, self._chunks = Workload(), 0.0
        self._busy, self._ended = threading.Lock(), threading.Event()
        self._moving: int | None = None
        self._thread = threading.Thread(target=self._revise, name="controller", daemon=True)

    def start(self) -> None:
        """Record what is in force, and revise it from now on."""
        self._record("start")
        if self.policy.interval:
            self._thread.start()

    def end(self) -> None:
        self._ended.set()

    def _revise(self) -> None:
        give_way()
        while not self._ended.wait(self.policy.interval):
            with self._busy:
                try:
                    self.observe()
                    self._decide(Decision(time.time(), "interval"))
                except InputError as error:
                    self._note(Decision(time.time(), "interval", why=str(error)))

    # ---- what has been seen ----

    def observe(self) -> None:
        """Take what the servers have counted since the last time into the window."""
        now, before = time.monotonic(), self._observed_at
        counted = gather(self._channel, self._empty)
        if (counted.counts < self._before.counts).any():
            return
        new = counted.counts - self._before.counts
        steps, fed = counted.steps - self._before.steps, counted.fed - self._before.fed
        self._window, self._before = self._window.observe(counted.counts, now), counted
        self._latest = self.profile(new, since=self._observed_wall)
        self._observed_at, self._observed_wall = now, time.time()
        if steps.any() and now > before:
            chunk = max(1, round(float(fed[0] / max(steps[0], 1)))) if steps[0] else 0
            decodes = round(float(steps[1] / max(steps[0], 1)))
            active = max(1, round(float(fed[1] / max(steps[1], 1))))
            self._workload = Workload(active, chunk, decodes if chunk else max(1, decodes))
            self._chunks = max(int(steps[0]), 1) / (now - before)
        else:
            self._chunks = 0.0

    def profile(self, counts: np.ndarray, since: float = 0.0) -> Profile:
        """Counts with the sizes of the model, and the tokens that have been sampled since then (seconds since 1970)."""
        sample = gather_sample(self._channel, jax.process_count(), sampled_shape(self.loaded.profile))
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
        present, cluster, policy = self.mover.placement, self.cluster, self.policy
        decision.epoch, asked = self.mover.epoch, target is not None
        decision.tokens = float(self._window.counts.sum()) / (present.model["top_k"] * present.resident.shape[1])
        unfit = ""
        try:
            present.validate(cluster)
        except InputError as error:
            unfit = str(error)
        seen = self.profile(self._window.counts)
        if not seen.counts.any():
            if not asked and not unfit:
                decision.why = "no tokens in the window"
                return self._note(decision, dry)
            seen = self.loaded.profile
        proven = False
        if target is None:
            proven = not unfit and not dry and self._proven(present)
            target = self._candidate if proven else None
        if target is None:
            target = placement.plan(
                seen, cluster, policy.strategy, previous=None if unfit else present, workload=self._workload
            )
        target = fitted(target, self.loaded.profile, cluster)
        moves = placement.diff(present, target, self.loaded.cluster, staging_bytes=policy.staging_bytes)
        old, new = (self._costs(seen, plan) for plan in (present, target))
        decision.step_s, decision.planned_step_s = old["step_seconds"], new["step_seconds"]
        decision.remote_share, decision.planned_remote_share = old["remote_share"], new["remote_share"]
        decision.transfer_s, decision.bytes = self._transfer(moves), moves.bytes
        decision.copies, decision.rounds = len(moves.moves), len(moves.rounds)
        verdict = should_migrate(
            moves, self._saving(old, new), horizon=policy.horizon, interference=policy.interference,
            stall_seconds=policy.stall * len(moves.rounds), transfer_seconds=decision.transfer_s,
        )  # fmt: skip
        decision.saving_s, decision.cost_s = verdict.saving_seconds, verdict.cost_seconds
        if not moves.rounds:
            decision.why = "nothing to move"
        elif self.disabled:
            decision.why = f"migrations have stopped: {self.disabled}"
        elif unfit or asked:
            decision.verdict, decision.why = "adopted", unfit or "asked for"
        elif not verdict or verdict.saving_seconds < (1 + policy.margin) * verdict.cost_seconds:
            decision.why = "does not pay"
        elif new["step_seconds"] > (1 - policy.margin) * old["step_seconds"]:
            decision.why = f"saves less than {100 * policy.margin:g} % of a step"
        elif not proven and policy.confirm > 1:
            decision.why = "has yet to pay in an interval that it was not planned from"
            if not dry and self._candidate is None:
                self._candidate, self._candidate_cost, self._paid = target, verdict.cost_seconds, 0
        else:
            decision.verdict, decision.why = "adopted", "pays"
        if proven and decision.verdict != "adopted":
            self._candidate = None
        if decision.verdict == "adopted" and not dry:
            self._migrate(decision, target, seen)
        return self._note(decision, dry)

    def _costs(self, seen: Profile, plan: Placement) -> dict[str, Any]:
        return placement.evaluate(seen, self.loaded.cluster, plan, workload=self._workload)

    def _saving(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
        """Seconds of stepping that a placement would save over the horizon."""
        return self.policy.horizon * self._chunks * (old["step_seconds"] - new["step_seconds"])

    def _transfer(self, moves: Diff) -> float:
        """Seconds of staging: each device reads from its server's storage, no server faster than it may."""
        cluster = self.loaded.cluster
        by_device = np.zeros(len(cluster.devices))
        for move in moves.moves:
            by_device[move.device] += move.bytes
        by_server = np.bincount(cluster.device_server, by_device, len(cluster.names))
        capped = by_server.max() / self.policy.bandwidth if self.policy.bandwidth else 0.0
        return float(max((by_device / cluster.load_bandwidth).max(), capped))

    def _proven(self, present: Placement) -> bool:
        """Whether the candidate has paid in as many intervals after it was planned as the policy asks for.

        A plan looks best on the counts that it was made from, the more so the fewer they are; what it saves shows in others.
        """
        candidate, margin = self._candidate, self.policy.margin
        if candidate is None or self._latest is None:
            return False
        latest, self._latest = self._latest, None
        paid = False
        if latest.counts.any():
            old, new = (self._costs(latest, plan) for plan in (present, candidate))
            paid = self._saving(old, new) > (1 + margin) * self._candidate_cost
            paid &= new["step_seconds"] <= (1 - margin) * old["step_seconds"]
        if not paid:
            self._candidate = None
            return False
        self._paid += 1
        return self._paid >= self.policy.confirm - 1

    def _migrate(self, decision: Decision, target: Placement, seen: Profile) -> None:
        self._candidate = None
        likely = self.loaded.likely(target.resident, seen)
        self._moving = number = self.mover.send(target, likely, decision.reason)
        outcome: Outcome | None = None
        while outcome is None and not self._ended.is_set():
            outcome = self.mover.wait(number, 0.5)
        self._moving = None
        if outcome is None:
            return
        decision.outcome = {
            "failed": outcome.failed, "rounds": outcome.rounds, "stage_s": outcome.stage_s, "seconds": outcome.seconds,
            "copies_here": outcome.moved, "bytes_here": outcome.bytes, "longest_stall_s": max(outcome.stalls_s, default=0.0),
        }  # fmt: skip
        if outcome.failed:
            decision.verdict, decision.why = "failed", outcome.failed
        decision.epoch = self.mover.epoch
        self._record(decision.reason)

    def _record(self, reason: str) -> None:
        try:
            write_record(self.state, self.mover.placement, self.mover.epoch, reason, self.limits)
        except InputError as error:
            self.disabled = str(error)
            print(
                f"placement: no more migrations, the placement cannot be recorded: {error}", file=sys.stderr, flush=True
            )

    def _note(self, decision: Decision, dry: bool = False) -> Decision:
        if dry:
            return decision
        self.last, self.decisions = decision, self.decisions + 1
        print(describe(decision), file=sys.stderr, flush=True)
        try:
            with open(self.state / DECISIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(decision)) + "\n")
        except OSError as error:
            print(
                f"placement: {self.state / DECISIONS}: cannot be written: {error.strerror}", file=sys.stderr, flush=True
            )
        return decision

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
            self.mover.give_up(number)
            return {"aborted": number}
        if not self._busy.acquire(timeout=1.0):
            raise InputError(f"a migration is under way ({self.mover.stage_name}); wait for it, or --abort it")
        try:
            return self._change(str(what), asked)
        finally:
            self._busy.release()

    def _change(self, what: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        dry, target = bool(asked.get("dry")), None
        before = dict(self.limits)
        if what == "to":
            target = Placement.from_dict(asked["placement"], str(asked["source"]))
        elif what == "memory":
            self._candidate = None
            self.limits = _with_limits(self.loaded, self.limits, asked["memory"])
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

    def _peek(self) -> None:
        """Have the window hold the newest counts, without ending an interval."""
        counted = gather(self._channel, self._empty)
        if (counted.counts >= self._window.total).all():
            self._window = self._window.observe(counted.counts, time.monotonic())

    def status(self) -> dict[str, Any]:
        """How things stand."""
        mover = self.mover
        return {
            "epoch": mover.epoch, "hash": placement_hash(mover.placement), "strategy": mover.placement.strategy,
            "moving": self._moving, "stage": mover.stage_name, "staged_bytes": mover.staged_bytes,
            "peak_staged_bytes": mover.peak_bytes, "disabled": self.disabled, "limits": self.limits,
            "record": str(self.state / NAME), "decisions": self.decisions,
            "last": dataclasses.asdict(self.last) if self.last else None, "pid": os.getpid(),
        }  # fmt: skip


def describe(decision: Decision) -> str:
    """A decision as a line."""
    words = [f"placement: epoch {decision.epoch}: {decision.verdict}, {decision.why}"]
    if decision.step_s is not None and decision.planned_step_s is not None:
        words.append(
            f"a chunk and its steps {1e3 * decision.step_s:.1f} ms, planned {1e3 * decision.planned_step_s:.1f} ms"
        )
        words.append(
            f"remote {100 * (decision.remote_share or 0):.1f} %, planned {100 * (decision.planned_remote_share or 0):.1f} %"
        )
        words.append(f"{decision.copies} copies, {format_bytes(decision.bytes)}, {decision.rounds} rounds")
        words.append(f"saves {decision.saving_s or 0:.2f} s for {decision.cost_s or 0:.2f} s")
    if decision.outcome:
        words.append(
            f"moved in {decision.outcome['seconds']:.2f} s, longest stall {1e3 * decision.outcome['longest_stall_s']:.1f} ms"
        )
    return "; ".join(words)


def limited(cluster: Cluster, limits: Mapping[str, int]) -> Cluster:
    """A cluster whose devices have at most so much memory."""
    servers = tuple(
        dataclasses.replace(
            server,
            devices=tuple(
                dataclasses.replace(
                    device, memory=min(device.memory, limits.get(f"{server.name}/{index}", device.memory))
                )
                for index, device in enumerate(server.devices)
            ),
        )
        for server in cluster.servers
    )
    return dataclasses.replace(cluster, servers=servers)


def _with_limits(loaded: Loaded, limits: Mapping[str, int], asked: Mapping[str, int | None]) -> dict[str, int]:
    """Limits after a change: bytes for a device or all of a server, or None for as much as the cluster file says."""
    cluster, result = loaded.cluster, dict(limits)
    least = int(np.max(np.asarray(loaded.profile.reserved_bytes)))
    for name, size in asked.items():
        devices = [
            f"{server}/{index}" for server, index in cluster.device_names if name in (server, f"{server}/{index}")
        ]
        if not devices:
            raise InputError(f"{name}: no such server or device; known are {', '.join(cluster.names)}")
        for device in devices:
            if size is None:
                result.pop(device, None)
            elif size == 0 or size >= least:
                result[device] = max(size, least)
            else:
                raise InputError(f"{name}: {size} bytes are less than the {least} that a device needs beside experts")
    return result
