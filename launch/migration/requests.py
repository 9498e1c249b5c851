"""What the command `migrate` asks a serving cluster for, done by the controller. New servers are not known here."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from launch.migration.controller import Controller
from launch.migration.decision import Decision, with_limits
from launch.migration.record import NAME, placement_hash
from placement import InputError, Placement

_BUSY_S = 1.0  # for a revision to end


class Requests:
    """Answers requests about migrations, from any thread."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked for, done.

        Raises:
            InputError: it cannot be.
        """
        what, controller = request.get("what"), self._controller
        if what == "status":
            return self.status()
        if what == "abort":
            number = controller.moving
            if number is None:
                raise InputError("--abort: no migration is under way")
            controller.worker.give_up(number)
            return {"aborted": number}
        return controller.undisturbed(lambda: self._change(str(what), request), _BUSY_S)

    def _change(self, what: str, request: Mapping[str, Any]) -> dict[str, Any]:
        controller, target = self._controller, None
        dry, before = bool(request.get("dry")), dict(controller.limits)
        if what == "to":
            target = Placement.from_dict(request["placement"], str(request.get("source", "the request")))
        elif what == "memory":
            controller.forget_plan()
            loaded = controller.loaded
            controller.limits = with_limits(loaded.profile, loaded.cluster, controller.limits, request["memory"])
        elif what != "plan":
            raise InputError(f"{what!r} is unknown; known are status, plan, to, memory, abort")
        try:
            controller.observations.peek()
            decision = controller.decide(Decision(time.time(), f"migrate {what}"), target, dry=dry)
        except InputError:
            controller.limits = before
            raise
        if dry or decision.verdict == "failed":
            controller.limits = before
        elif what == "memory":
            controller.record("migrate memory")
        return dataclasses.asdict(decision)

    def status(self) -> dict[str, Any]:
        """How things stand."""
        controller = self._controller
        worker, journal = controller.worker, controller.journal
        return {
            "epoch": worker.epoch,
            "hash": placement_hash(worker.placement),
            "strategy": worker.placement.strategy,
            "moving": controller.moving,
            "stage": worker.stage_name,
            "staged_bytes": worker.staged_bytes,
            "peak_staged_bytes": worker.peak_bytes,
            "disabled": journal.problem,
            "limits": controller.limits,
            "record": str(journal.state / NAME),
            "decisions": journal.decisions,
            "last": dataclasses.asdict(journal.last) if journal.last else None,
            "pid": os.getpid(),
        }
