"""Whether a migration pays: one rule for the runtime and for the simulator."""

import dataclasses
from dataclasses import dataclass

from placement.files import InputError, show
from placement.migration.diff import Diff


@dataclass(frozen=True)
class Verdict:
    """Whether a migration pays; true in a condition if it does."""

    saving_seconds: float
    cost_seconds: float

    @property
    def migrate(self) -> bool:
        """Whether it saves more than it costs."""
        return bool(self.saving_seconds > self.cost_seconds)

    def __bool__(self) -> bool:
        return self.migrate


def should_migrate(
    diff: Diff,
    saving_seconds: float,
    *,
    horizon: float = 300.0,
    interference: float = 0.1,
    stall_seconds: float = 0.05,
    transfer_seconds: float | None = None,
) -> Verdict:
    """Weigh what a placement saves over a horizon against moving to it (paper section 3, migration).

    migrate  <=>  saving (1 - transfer / horizon) > interference x transfer + stall

    Transfers run beside serving, and the new placement saves time only once they are done. The paper's rule
    C(P') + T_mig < C(P) is the case of an endless horizon, interference 1, no stall, and transfer = `diff.load_seconds`.

    Args:
        diff: the migration.
        saving_seconds: C(P) - C(P'), what the new placement would save if it were in force during the whole horizon.
        horizon: seconds until the next revision.
        interference: seconds that serving loses for each second of transfer.
        stall_seconds: for which serving stands still while the new placement takes over; nothing without a change.
        transfer_seconds: how long transfers take; None is `diff.seconds`, on links and disks used at the same time.

    Raises:
        InputError: a horizon that is not above 0, or negative interference, stall or transfer.
    """
    transfer = diff.seconds if transfer_seconds is None else transfer_seconds
    if not horizon > 0:
        raise InputError(f"horizon = {show(horizon)}: must be more than 0 seconds")
    for key, value in (("interference", interference), ("stall", stall_seconds), ("transfer", transfer)):
        if not value >= 0:
            raise InputError(f"{key} = {show(value)}: must be at least 0")
    if not diff.rounds:
        return Verdict(0.0, 0.0)
    return Verdict(saving_seconds * max(0.0, 1 - transfer / horizon), interference * transfer + stall_seconds)


@dataclasses.dataclass(frozen=True)
class Policy:
    """When and how the placement is revised.

    Attributes:
        strategy: of `placement.STRATEGIES`.
        interval: seconds between revisions, 0 for none; half_life: seconds after which an activation counts half.
        horizon: seconds over which a migration has to pay.
        margin: by how much more than its cost it has to save at least; least: which share of the expected step time.
        confirm: intervals that a plan has to pay in: that of which it was made, and those after it.
        interference: seconds that serving loses for each second of staging; stall: for each round.
        bandwidth: bytes a second that each server stages at most.
    """

    strategy: str = "latency"
    interval: float = 60.0
    half_life: float = 60.0
    horizon: float = 300.0
    margin: float = 0.05
    least: float = 0.03
    confirm: int = 2
    interference: float = 0.1
    stall: float = 0.01
    bandwidth: float | None = None
    staging_bytes: int = 2**30


@dataclasses.dataclass(frozen=True)
class Figures:
    """What speaks for a plan. Seconds; `saving_s` and `cost_s` over the horizon."""

    step_s: float
    planned_step_s: float
    remote_share: float
    planned_remote_share: float
    saving_s: float
    cost_s: float
    transfer_s: float
    bytes: int
    copies: int
    rounds: int

    def objection(self, policy: Policy) -> str:
        """Why not to migrate, or ""."""
        if not self.saving_s > (1 + policy.margin) * self.cost_s:
            return "does not pay"
        if self.planned_step_s > (1 - policy.least) * self.step_s:
            return f"saves less than {100 * policy.least:g} % of a step"
        return ""
