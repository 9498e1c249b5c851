"""What is written down about placements: the record of the one in force, and a line for every decision."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from launch.migration.decision import Decision, describe
from launch.migration.record import write_record
from placement import InputError, Placement

log = logging.getLogger(__name__)

DECISIONS = "decisions.jsonl"


class Journal:
    """Records in a folder. A full disk stops migrations, not serving, and no longer than it is full.

    Attributes:
        problem: why the placement in force is not recorded, or ""; decisions: how many have been noted; last: of them.
    """

    def __init__(self, state: Path) -> None:
        self.state, self.problem, self.decisions = state, "", 0
        self.last: Decision | None = None
        self._reason = "start"

    def record(self, placement: Placement, epoch: int, limits: Mapping[str, int], reason: str | None = None) -> None:
        """Record what is in force and why; reason: None is that of the last time."""
        self._reason = self._reason if reason is None else reason
        try:
            write_record(self.state, placement, epoch, self._reason, dict(limits))
        except InputError as error:
            if not self.problem:
                log.error("placement: no more migrations, the placement cannot be recorded: %s", error)
            self.problem = str(error)
            return
        if self.problem:
            log.info("placement: it can be recorded again; migrations go on")
        self.problem = ""

    def note(self, decision: Decision) -> Decision:
        """Log a decision, and append it to the folder's list."""
        self.last, self.decisions = decision, self.decisions + 1
        log.info("%s", describe(decision))
        try:
            with open(self.state / DECISIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(decision)) + "\n")
        except OSError as error:
            log.warning("placement: %s: cannot be written: %s", self.state / DECISIONS, error.strerror)
        return decision
