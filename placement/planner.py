"""The registry of strategies, and the two calls most users need: plan and evaluate."""

from collections.abc import Callable
from typing import Any

import numpy as np

from placement import cost
from placement.baselines import uniform
from placement.dance import dance
from placement.files import InputError, show
from placement.placement import Placement
from placement.problem import Problem
from placement.profile import Profile
from placement.types import Cluster

# strategy(problem, *, previous: bool [D, L, E] | None, seed: int) -> bool [D, L, E]; pure.
STRATEGIES: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform,
    "dance": dance,
}


def plan(
    profile: Profile, cluster: Cluster, strategy: str = "dance", previous: Placement | None = None, seed: int = 0
) -> Placement:
    """Choose which device holds which experts.

    Args:
        profile: what the users of each server activate.
        cluster: the servers it is planned for, the same and in the same order as the profile's.
        strategy: a key of `STRATEGIES`.
        previous: the placement in force; among equally good plans the one that moves least wins.
        seed: for strategies that draw at random.

    Returns:
        A placement that covers every expert within every device's memory, its costs on `profile` in `predicted`.

    Raises:
        InputError: unknown strategy, inputs that disagree, or too little memory: how much is missing, and on what.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy = {show(strategy)}: unknown; choose from {', '.join(STRATEGIES)}")
    problem = Problem.build(profile, cluster)
    problem.require_capacity()
    if previous is not None:
        _check_model(previous, profile)
        if previous.devices != cluster.device_names:
            raise InputError(f"{previous.source}: its devices are not those of {cluster.source}; leave out --previous")
    resident = STRATEGIES[strategy](problem, previous=None if previous is None else previous.resident, seed=seed)
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
    return Placement(resident, cluster.device_names, strategy, model, cost.summary(problem, resident))


def evaluate(profile: Profile, cluster: Cluster, placement: Placement) -> dict[str, Any]:
    """Costs of a placement under a profile, which need not be the one it was planned on; see `cost.summary`.

    Raises:
        InputError: placement, profile and cluster do not belong together, or the placement is not valid.
    """
    _check_model(placement, profile)
    problem = Problem.build(profile, cluster)
    placement.validate(cluster, profile.reserved_bytes)
    return cost.summary(problem, placement.resident)


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
