"""Whether a migration pays: one rule, with its margin and its confirmation, for the runtime and for the simulator."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from placement.files import InputError, show
from placement.migration.diff import Diff

Plan = TypeVar("Plan")


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

    >>> from placement import Cluster, Profile, diff, plan
    >>> import numpy as np
    >>> cluster = Cluster.from_dict({"server": [{"name": n, "devices": [{"memory": 1000}]} for n in "ab"]})
    >>> profile = Profile(np.array([[[9, 1]], [[1, 9]]]), ("a", "b"), "toy", top_k=1, hidden_size=8, expert_bytes=1000)
    >>> swapped = Profile(profile.counts[::-1], ("a", "b"), "toy", top_k=1, hidden_size=8, expert_bytes=1000)
    >>> old, new = (plan(seen, cluster, "exact") for seen in (profile, swapped))
    >>> bool(should_migrate(diff(old, new, cluster), saving_seconds=5.0))
    True
    """
    transfer = diff.seconds if transfer_seconds is None else transfer_seconds
    if not diff.rounds:
        transfer = stall_seconds = 0.0
    verdict = _verdict(saving_seconds, transfer, stall_seconds, horizon, interference)
    return verdict if diff.rounds else Verdict(0.0, 0.0)


def _verdict(saving: float, transfer: float, stall: float, horizon: float, interference: float) -> Verdict:
    if not horizon > 0:
        raise InputError(f"horizon = {show(horizon)}: must be more than 0 seconds")
    for key, value in (("interference", interference), ("stall", stall), ("transfer", transfer)):
        if not value >= 0:
            raise InputError(f"{key} = {show(value)}: must be at least 0")
    return Verdict(saving * max(0.0, 1 - transfer / horizon), interference * transfer + stall)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
        return objection(policy, Verdict(self.saving_s, self.cost_s), self.step_s, self.planned_step_s)


def weigh(
    policy: Policy, step_s: float, planned_step_s: float, steps_per_second: float, transfer_s: float, rounds: int
) -> Verdict:
    """What a migration saves over the policy's horizon, and what it costs.

    saving = horizon x steps per second x (step - planned step), as far as the transfer leaves of the horizon;
    cost = interference x transfer + stall x rounds

    Args:
        step_s: seconds of a unit of serving under the placement in force; planned_step_s: under the plan. The runtime's
            unit is a prompt chunk and its decode steps, the simulator's is a request.
        steps_per_second: how many of them the servers serve, on average.
        transfer_s: how long weights travel.
        rounds: times for which serving stands still; 0 if nothing moves.
    """
    if not rounds:
        return Verdict(0.0, 0.0)
    saving = policy.horizon * steps_per_second * (step_s - planned_step_s)
    return _verdict(saving, transfer_s, policy.stall * rounds, policy.horizon, policy.interference)


def objection(policy: Policy, verdict: Verdict, step_s: float, planned_step_s: float) -> str:
    """Why not to migrate, or "": it has to save more than it costs by a margin, and a share of every step."""
    if not verdict.saving_seconds > (1 + policy.margin) * verdict.cost_seconds:
        return "does not pay"
    if planned_step_s > (1 - policy.least) * step_s:
        return f"saves less than {100 * policy.least:g} % of a step"
    return ""


@dataclass
class Confirmation(Generic[Plan]):
    """A plan that waits until it has paid in intervals that it was not made from.

    A plan looks best on the counts that it was made from, the more so the fewer they are; what it saves shows in others.

    Attributes:
        plan: the one that waits, or None.
        paid: in how many intervals since it was made it would have paid.
    """

    plan: Plan | None = None
    paid: int = 0

    def proven(self, policy: Policy, objection: str) -> bool:
        """Whether the plan that waits has paid often enough, now that one more interval is over.

        Args:
            objection: what speaks against it in that interval alone; it then waits no more.
        """
        if objection:
            self.plan = None
            return False
        self.paid += 1
        return self.paid >= policy.confirm - 1

    def objection(self, policy: Policy, plan: Plan, proven: bool, keep: bool = True) -> str:
        """Why not to migrate yet to a plan against which nothing else speaks, or "".

        Args:
            plan: the one just made, or the one that waited.
            proven: that it is the latter and has paid often enough.
            keep: let the plan wait, if none does.
        """
        if proven or policy.confirm <= 1:
            return ""
        if keep and self.plan is None:
            self.plan, self.paid = plan, 0
        return "has yet to pay in an interval that it was not planned from"
