"""The calls that most users need: plan and evaluate."""

from dataclasses import replace
from typing import Any

import numpy as np

from placement.costs import summary as cost
from placement.costs.bound import network_bound as least_network_need
from placement.costs.step_time import predict
from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.data.prior import with_prior
from placement.data.problem import DISPATCH, Problem
from placement.data.profile import Profile
from placement.data.workload import Workload
from placement.files import InputError, show
from placement.registry import HOSTED, Strategy, strategy_hosts, strategy_named
from placement.strategies.equal_slots import project, restricted, slots_per_device
from placement.strategies.exact.optimum import gap, least_remote
from placement.strategies.latency.equal_slots import equal_latency
from placement.strategies.latency.groups import choose_groups, named_groups
from placement.strategies.latency.plan import latency


def plan(
    profile: Profile,
    cluster: Cluster,
    strategy: str = "dance",
    previous: Placement | None = None,
    seed: int = 0,
    *,
    equal_slots: bool = False,
    prior: float = 0.0,
    groups: list[list[str]] | None = None,
    optimum: float | None = None,
    workload: Workload | None = None,
    jobs: int = 1,
) -> Placement:
    """Choose which device holds which experts.

    Args:
        profile: what the users of each server activate.
        cluster: the servers it is planned for, the same and in the same order as the profile's.
        strategy: a key of `STRATEGIES`, one that was registered (`register`), or `path/to/file.py:function`.
        previous: the placement in force; among equally good plans the one that moves least wins.
        seed: for strategies that draw at random.
        equal_slots: the same number of slots per layer on every device (strategies/equal_slots.py), for engines that need
            it; `predicted["equal_slots"]` says what that costs.
        prior: pseudo-tokens of each server that thin statistics are planned with (`data.prior.with_prior`).
        groups: names of the servers that `latency` plans together; None lets it choose (strategies/latency/groups.py).
        optimum: what `placement.optimum` found for these inputs and prior; `predicted["gap"]` is then the plan's.
        workload: what the servers do at once, for `latency` and for predicted seconds; None is the usual one.
        jobs: processes that plan `latency`'s groups, from a script with `if __name__ == "__main__":`; the plan is the same.

    Returns:
        A placement that covers every expert within every device's memory, its costs on `profile` in `predicted`.

    Raises:
        InputError: unknown strategy, inputs that disagree, or too little memory: how much is missing, and on what.

    >>> import numpy as np
    >>> from placement import Cluster, Profile
    >>> servers = [{"name": name, "devices": [{"memory": 3}]} for name in "ab"]
    >>> counts = np.array([[[9, 5, 1, 0]], [[0, 2, 5, 9]]])
    >>> profile = Profile(counts, ("a", "b"), "toy", top_k=1, hidden_size=64, expert_bytes=1)
    >>> plan(profile, Cluster.from_dict({"server": servers}), "exact").resident.astype(int)[:, 0].tolist()
    [[1, 1, 1, 0], [0, 1, 1, 1]]
    """
    chosen = strategy_named(strategy)
    problem = Problem.build(profile, cluster, workload)
    problem.require_capacity()
    planning, in_force = with_prior(problem, prior), _in_force(previous, profile, cluster)
    slots = slots_per_device(problem) if equal_slots else 0
    together = _groups(planning, chosen, groups)
    resident = _resident(planning, chosen, strategy, in_force, seed, slots, together, jobs)
    placement = _placement(problem, profile, cluster, strategy, resident)
    predicted = _costs(problem, resident, placement.host)
    if len(together) > 1:
        predicted["groups"] = [[problem.names[n] for n in group] for group in together]
    if optimum is not None:
        predicted["gap"] = gap(planning, resident, optimum) if placement.host is None else None
    if slots:
        predicted["equal_slots"] = _slots_cost(slots, problem, chosen, planning, in_force, seed, strategy)
    return replace(placement, predicted=predicted, source="placement")


def _placement(problem: Problem, profile: Profile, cluster: Cluster, strategy: str, resident: np.ndarray) -> Placement:
    """A strategy's plan, bool [D, L, E], as a placement, checked."""
    resident.setflags(write=False)
    host = strategy_hosts(strategy, problem, resident)
    placement = Placement(
        resident, cluster.device_names, strategy, _model(problem, profile), source=strategy, host=host
    )
    placement.validate(cluster)
    return placement


def _groups(problem: Problem, chosen: Strategy, names: list[list[str]] | None) -> list[np.ndarray]:
    """The servers that plan together: as named, or as `latency` chooses; none for a strategy without groups."""
    if chosen is latency:
        return choose_groups(problem) if names is None else named_groups(problem, names)
    if names is not None:
        raise InputError("groups: only strategy latency plans in groups; leave them out")
    return []


def _in_force(previous: Placement | None, profile: Profile, cluster: Cluster) -> np.ndarray | None:
    """The previous placement as a strategy takes it, if it is for this model and these devices."""
    if previous is None:
        return None
    _check_model(previous, profile)
    if previous.devices != cluster.device_names:
        raise InputError(f"{previous.source}: its devices are not those of {cluster.source}; leave out --previous")
    return previous.resident


def _slots_cost(slots: int, problem: Problem, chosen: Strategy, planning: Problem, *options: Any) -> dict[str, Any]:
    """Slots of each layer, and the remote share of a strategy's own plan, where it has one."""
    try:
        free = cost.summary(problem, _run(chosen, planning, *options))["remote_share"]
    except InputError:  # experts of unequal sizes that pack into equal slots, but not into the strategy's own
        free = None
    return {"slots_per_layer": slots, "remote_share_without": free}


def _resident(
    problem: Problem,
    chosen: Strategy,
    name: str,
    previous: np.ndarray | None,
    seed: int,
    slots: int,
    groups: list[np.ndarray],
    jobs: int,
) -> np.ndarray:
    """The plan, bool [D, L, E], with equal slots of each layer on every device where `slots` is not 0."""
    if chosen is latency:
        if slots:
            return equal_latency(problem, slots, previous, seed)
        return latency(problem, previous=previous, seed=seed, groups=groups, jobs=jobs)
    if slots and name in HOSTED:
        raise InputError(f"strategy {name} places whole layers; it cannot plan equal slots: leave out --equal-slots")
    if slots:
        return project(problem, _run(chosen, restricted(problem, slots), previous, seed, name), slots)
    return _run(chosen, problem, previous, seed, name)


def _run(chosen: Strategy, problem: Problem, previous: np.ndarray | None, seed: int, name: str) -> np.ndarray:
    """What a strategy returns, if it has the form of a plan."""
    resident = np.asarray(chosen(problem, previous=previous, seed=seed))
    shape = (len(problem.budget), *problem.shape[1:])
    if resident.shape != shape or resident.dtype != bool:
        found = f"{resident.dtype} {list(resident.shape)}"
        raise InputError(f"strategy {name} returned {found}; must be bool [devices, layers, experts], {list(shape)}")
    return resident


def _model(problem: Problem, profile: Profile) -> dict[str, Any]:
    """What a placement says of its model."""
    sizes = set(problem.expert_bytes.tolist())
    return {
        "name": profile.model,
        "layers": problem.shape[1],
        "experts": problem.shape[2],
        "top_k": profile.top_k,
        "expert_bytes": sizes.pop() if len(sizes) == 1 else problem.expert_bytes.tolist(),
        "reserved_bytes": np.asarray(profile.reserved_bytes).tolist(),
    }


def evaluate(
    profile: Profile,
    cluster: Cluster,
    placement: Placement,
    optimum: float | None = None,
    workload: Workload | None = None,
    dispatch: str = "ours",
) -> dict[str, Any]:
    """Costs of a placement under a profile, which need not be the one it was planned on.

    They are those of `cost.summary` and, in seconds and bytes, of `step_time.predict`.

    Args:
        profile: what is activated.
        cluster: the servers the placement is for.
        placement: which device holds which experts.
        optimum: what `placement.optimum` found for this profile and cluster; the result then has the `gap` to it, None where
            layers are hosted elsewhere.
        workload: what the servers do at once, for predicted seconds; None is the usual one.
        dispatch: "ours", or "sglang": whose rule chooses among copies on other servers (`costs.routing.serving_server`).

    Raises:
        InputError: placement, profile and cluster do not belong together, or the placement is not valid; an unknown rule.

    >>> import numpy as np
    >>> from placement import Cluster, Profile
    >>> servers = [{"name": name, "devices": [{"memory": 2}]} for name in "ab"]
    >>> cluster = Cluster.from_dict({"server": servers})
    >>> profile = Profile(np.array([[[6, 4]], [[4, 6]]]), ("a", "b"), "toy", top_k=1, hidden_size=64, expert_bytes=2)
    >>> costs = evaluate(profile, cluster, plan(profile, cluster, "exact"))
    >>> costs["remote_share"], costs["remote_share_by_server"]
    (0.4, {'a': 0.4, 'b': 0.4})
    """
    _check_model(placement, profile)
    if dispatch not in DISPATCH:
        raise InputError(f"dispatch = {show(dispatch)}: must be one of {', '.join(DISPATCH)}")
    problem = replace(Problem.build(profile, cluster, workload), dispatch=dispatch)
    placement.validate(cluster, profile.reserved_bytes)
    costs = _costs(problem, placement.resident, placement.host)
    if optimum is None:
        return costs
    return {**costs, "gap": gap(problem, placement.resident, optimum) if placement.host is None else None}


def _costs(problem: Problem, resident: np.ndarray, host: np.ndarray | None) -> dict[str, Any]:
    return {**cost.summary(problem, resident, host), **predict(problem, resident, host)}


def optimum(profile: Profile, cluster: Cluster, *, prior: float = 0.0) -> float:
    """Expected remote calls of the best plan there is, in the units of `Problem.frequency`, for `plan` and `evaluate`.

    With experts of unequal sizes a bound that no plan goes below. It costs as much as planning with `exact`. With a
    `prior` it is the optimum on statistics drawn together as `plan` does.

    Raises:
        InputError: inputs that disagree, or too little memory for one copy of every expert.
    """
    problem = Problem.build(profile, cluster)
    problem.require_capacity()
    return least_remote(with_prior(problem, prior))


def network_bound(profile: Profile, cluster: Cluster, known: float) -> float:
    """Least P(a token's layer needs the network) that any plan has on a profile, certified: `costs.bound.network_bound`.

    Args:
        profile: what is activated; cluster: the servers, with experts of any sizes.
        known: what the best plan known reaches, `evaluate(...)["network_probability"]`: it makes the bound tight.

    Returns:
        Mean over the servers that have users, and over layers.

    Raises:
        InputError: inputs that disagree, or too little memory for one copy of every expert.

    >>> import numpy as np
    >>> from placement import Cluster, Profile
    >>> cluster = Cluster.from_dict({"server": [{"name": name, "devices": [{"memory": 1}]} for name in "ab"]})
    >>> profile = Profile(np.array([[[8, 2]], [[2, 8]]]), ("a", "b"), "toy", top_k=1, hidden_size=64, expert_bytes=1)
    >>> round(network_bound(profile, cluster, known=0.2), 3)  # each server has room for one expert of two
    0.2
    """
    problem = Problem.build(profile, cluster)
    problem.require_capacity()
    return least_network_need(problem, known)


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
