"""The registry of strategies, and the two calls most users need: plan and evaluate."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from placement.costs import summary as cost
from placement.costs.step_time import predict
from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.data.problem import Problem
from placement.data.profile import Profile
from placement.data.statistics import shrink
from placement.data.workload import Workload
from placement.files import InputError, show
from placement.strategies.baselines import redundance, smartmoe, uniform
from placement.strategies.dance import dance
from placement.strategies.eplb import eplb, eplb_nodup
from placement.strategies.equal_slots import project, restricted, slots_per_device
from placement.strategies.exact.optimum import exact, gap, least_remote
from placement.strategies.latency.plan import latency
from placement.strategies.swift import swift

# strategy(problem, *, previous: bool [D, L, E] | None, seed: int) -> bool [D, L, E]; pure.
STRATEGIES: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform,
    "redundance": redundance,
    "smartmoe": smartmoe,
    "eplb": eplb,
    "eplb-nodup": eplb_nodup,
    "swift": swift,
    "dance": dance,
    "latency": latency,
    "exact": exact,
}


def plan(
    profile: Profile,
    cluster: Cluster,
    strategy: str = "dance",
    previous: Placement | None = None,
    seed: int = 0,
    *,
    equal_slots: bool = False,
    prior: float = 0.0,
    optimum: float | None = None,
    workload: Workload | None = None,
) -> Placement:
    """Choose which device holds which experts.

    Args:
        profile: what the users of each server activate.
        cluster: the servers it is planned for, the same and in the same order as the profile's.
        strategy: a key of `STRATEGIES`.
        previous: the placement in force; among equally good plans the one that moves least wins.
        seed: for strategies that draw at random.
        equal_slots: the same number of slots per layer on every device (strategies/equal_slots.py), for engines that need
            it; `predicted["equal_slots"]` says what that costs.
        prior: pseudo-assignments with which thin statistics are drawn towards the other servers' (`statistics.shrink`).
        optimum: what `placement.optimum` found for these inputs and prior; `predicted["gap"]` is then the plan's.
        workload: what the servers do at once, for `latency` and for predicted seconds; None is the usual one.

    Returns:
        A placement that covers every expert within every device's memory, its costs on `profile` in `predicted`.

    Raises:
        InputError: unknown strategy, inputs that disagree, or too little memory: how much is missing, and on what.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy = {show(strategy)}: unknown; choose from {', '.join(STRATEGIES)}")
    problem = Problem.build(profile, cluster, workload)
    problem.require_capacity()
    if previous is not None:
        _check_model(previous, profile)
        if previous.devices != cluster.device_names:
            raise InputError(f"{previous.source}: its devices are not those of {cluster.source}; leave out --previous")
    planning, in_force = _shrunk(problem, profile, prior), None if previous is None else previous.resident
    slots = slots_per_device(problem) if equal_slots else 0
    resident = STRATEGIES[strategy](restricted(planning, slots) if slots else planning, previous=in_force, seed=seed)
    if slots:
        resident = project(planning, resident, slots)
    resident.setflags(write=False)
    sizes = set(problem.expert_bytes.tolist())
    model = {
        "name": profile.model,
        "layers": problem.shape[1],
        "experts": problem.shape[2],
        "top_k": profile.top_k,
        "expert_bytes": sizes.pop() if len(sizes) == 1 else problem.expert_bytes.tolist(),
        "reserved_bytes": np.asarray(profile.reserved_bytes).tolist(),
    }
    placement = Placement(resident, cluster.device_names, strategy, model, source=f"plan by {strategy}")
    placement.validate(cluster)
    predicted = _costs(problem, resident)
    if optimum is not None:
        predicted["gap"] = gap(planning, resident, optimum)
    if slots:
        try:
            free = cost.summary(problem, STRATEGIES[strategy](planning, previous=in_force, seed=seed))["remote_share"]
        except InputError:  # experts of unequal sizes that pack into equal slots, but not into the strategy's own
            free = None
        predicted["equal_slots"] = {"slots_per_layer": slots, "remote_share_without": free}
    return Placement(resident, cluster.device_names, strategy, model, predicted)


def _shrunk(problem: Problem, profile: Profile, prior: float) -> Problem:
    """The problem with its frequencies drawn towards the others' by `prior` assignments per server and layer."""
    total = profile.counts.sum(dtype=np.float64)
    if not prior or not total:
        return problem
    layers = problem.shape[1]
    frequency = shrink(problem.frequency, prior * layers / total)
    return replace(problem, frequency=frequency * (layers / frequency.sum()))


def evaluate(
    profile: Profile,
    cluster: Cluster,
    placement: Placement,
    optimum: float | None = None,
    workload: Workload | None = None,
) -> dict[str, Any]:
    """Costs of a placement under a profile, which need not be the one it was planned on.

    They are those of `cost.summary` and, in seconds and bytes, of `step_time.predict`.

    Args:
        profile: what is activated.
        cluster: the servers the placement is for.
        placement: which device holds which experts.
        optimum: what `placement.optimum` found for this profile and cluster; the result then has the `gap` to it.
        workload: what the servers do at once, for predicted seconds; None is the usual one.

    Raises:
        InputError: placement, profile and cluster do not belong together, or the placement is not valid.
    """
    _check_model(placement, profile)
    problem = Problem.build(profile, cluster, workload)
    placement.validate(cluster, profile.reserved_bytes)
    costs = _costs(problem, placement.resident)
    return costs if optimum is None else {**costs, "gap": gap(problem, placement.resident, optimum)}


def _costs(problem: Problem, resident: np.ndarray) -> dict[str, Any]:
    return {**cost.summary(problem, resident), **predict(problem, resident)}


def optimum(profile: Profile, cluster: Cluster, *, prior: float = 0.0) -> float:
    """Expected remote calls of the best plan there is, in the units of `Problem.frequency`, for `plan` and `evaluate`.

    With experts of unequal sizes a bound that no plan goes below. It costs as much as planning with `exact`. With a
    `prior` it is the optimum on statistics drawn together as `plan` does.

    Raises:
        InputError: inputs that disagree, or too little memory for one copy of every expert.
    """
    problem = Problem.build(profile, cluster)
    problem.require_capacity()
    return least_remote(_shrunk(problem, profile, prior))


def _check_model(placement: Placement, profile: Profile) -> None:
    mine = {key: placement.model[key] for key in ("name", "top_k")}
    mine |= {"layers": placement.resident.shape[1], "experts": placement.resident.shape[2]}
    mine["expert_bytes"] = placement.expert_bytes.tolist()
    theirs = {
        "name": profile.model,
        "top_k": profile.top_k,
        "layers": profile.counts.shape[1],
        "experts": profile.counts.shape[2],
        "expert_bytes": list(np.atleast_1d(profile.expert_bytes)),
    }
    for key, value in mine.items():
        if value != theirs[key]:
            raise InputError(
                f"{placement.source}: model.{key} = {show(value)}, but {profile.source} has {show(theirs[key])}; "
                "use a placement and a profile of the same model"
            )
