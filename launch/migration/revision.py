"""What a revision of the placement weighs: a plan against the placement in force. Pure, and needs no JAX."""

import dataclasses
from typing import Any

import numpy as np

import placement
from placement import Cluster, Diff, Placement, Profile, Workload
from placement.data.prior import DEFAULT_PRIOR
from placement.migration import decide
from placement.migration.adapt import fitted
from placement.migration.decide import Figures, Policy


@dataclasses.dataclass(frozen=True)
class Revision:
    """What is to be weighed.

    Attributes:
        seen: what users activate.
        cluster: as its file says; usable: with the memory that there is to be.
        present: what is in force; unfit: it does not fit what is usable.
        target: what to weigh it against; None for a plan that is made here.
        workload: a chunk and its steps; chunks: of them in a second.
    """

    seen: Profile
    cluster: Cluster
    usable: Cluster
    present: Placement
    policy: Policy
    unfit: bool = False
    target: Placement | None = None
    workload: Workload = dataclasses.field(default_factory=Workload)
    chunks: float = 0.0


def weigh(revision: Revision) -> tuple[Placement, Figures]:
    """The plan, or the given target, with the sizes of the model that is served, and the figures that speak for it.

    Raises:
        InputError: there is no plan, or the target is for another model or other devices, leaves out an expert, or needs
            more memory than is usable.
    """
    seen, policy, target = revision.seen, revision.policy, revision.target
    if target is None:
        previous = None if revision.unfit else revision.present
        target = placement.plan(
            seen, revision.usable, policy.strategy, previous=previous, prior=DEFAULT_PRIOR, workload=revision.workload
        )
    target = fitted(target, seen, revision.usable)
    moves = placement.diff(revision.present, target, revision.cluster, staging_bytes=policy.staging_bytes)
    old, new = (_costs(revision, plan) for plan in (revision.present, target))
    transfer = _transfer(moves, revision.cluster, policy)
    steps = (old["step_seconds"], new["step_seconds"])
    verdict = decide.weigh(policy, *steps, revision.chunks, transfer, len(moves.rounds))
    return target, Figures(
        step_s=old["step_seconds"],
        planned_step_s=new["step_seconds"],
        remote_share=old["remote_share"],
        planned_remote_share=new["remote_share"],
        saving_s=verdict.saving_seconds,
        cost_s=verdict.cost_seconds,
        transfer_s=transfer,
        bytes=moves.bytes,
        copies=len(moves.moves),
        rounds=len(moves.rounds),
    )


def _costs(revision: Revision, plan: Placement) -> dict[str, Any]:
    return placement.evaluate(revision.seen, revision.cluster, plan, workload=revision.workload)


def _transfer(moves: Diff, cluster: Cluster, policy: Policy) -> float:
    """Seconds of staging: each device reads from its server's storage, no server faster than it may."""
    by_device = np.zeros(len(cluster.devices))
    for move in moves.moves:
        by_device[move.device] += move.bytes
    by_server = np.bincount(cluster.device_server, by_device, len(cluster.names))
    capped = by_server.max() / policy.bandwidth if policy.bandwidth else 0.0
    return float(max((by_device / cluster.load_bandwidth).max(), capped))
