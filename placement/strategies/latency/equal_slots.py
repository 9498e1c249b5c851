"""`latency` where every device has equally many slots of each layer: experts are swapped inside their layers."""

import numpy as np

from placement.costs.step_time import predict
from placement.costs.token_sets import token_sets
from placement.data.problem import Problem
from placement.strategies.dance import dance
from placement.strategies.equal_slots import equal_held, restricted, to_equal_devices
from placement.strategies.exact.optimum import exact
from placement.strategies.latency.local_search import local_search

_WORK = 2 * 10**9  # a swap inside a layer takes as long to find as one of all layers together


def equal_latency(problem: Problem, slots: int, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Least predicted `step_seconds` with equal slots that swaps lead to from the fewest remote calls.

    A plan of whole layers has no equal-slot plan near it. So the search starts from the fastest of those of the paper's
    objective and the placement in force, each made equal, and swaps experts of one layer while the expected time of token
    sets falls.

    Args:
        problem: with the devices' real memory.
        slots: of each layer on each device, from `equal_slots.slots_per_device`.
        previous: bool [D, L, E], the placement in force.
        seed: for sets drawn where only counts are known.

    Returns:
        bool [D, L, E] with exactly `slots` experts per device and layer, every expert covered.
    """
    inside = restricted(problem, slots)
    starts = [exact(inside, previous=previous), dance(inside, previous=previous)]
    starts += [] if previous is None else [previous]
    held = [equal_held(inside, start, slots) for start in starts]
    plans = [to_equal_devices(inside, *pair, slots) for pair in zip(held, starts, strict=True)]
    best = int(np.argmin([predict(problem, plan)["step_seconds"] for plan in plans]))
    sets = token_sets(inside, seed)
    improved = local_search(inside, sets, held[best], previous, within_layers=True, work=_WORK)
    return to_equal_devices(inside, improved, starts[best], slots)
