"""Simple baselines to compare with, within the same memory budgets: uniform, redundance, smartmoe."""

import numpy as np

from placement.data.problem import Problem
from placement.files import InputError


def uniform(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Experts of each layer dealt to devices in contiguous blocks in proportion to their memory; no copies.

    Args:
        problem: has room for one copy of every expert.
        previous: unused, there is nothing to choose.
        seed: unused, the result is deterministic.

    Returns:
        bool [D, L, E], every expert on exactly one device.

    Raises:
        InputError: experts of unequal sizes do not pack into the devices; never with room for one more on each device.
    """
    _, layers, experts = problem.shape
    counts = share_slots(problem, problem.usable_bytes / problem.usable_bytes.sum() * experts)
    resident = np.zeros((len(counts), layers, experts), bool)
    for layer in range(layers):
        resident[np.repeat(np.arange(len(counts)), counts[:, layer]), layer, np.arange(experts)] = True
    return resident


def share_slots(problem: Problem, per_layer: np.ndarray) -> np.ndarray:
    """How many experts of each layer each device holds, close to the same share of every layer.

    What rounding leaves a device short of in one layer is carried to the next, so that budgets hold over all layers.

    Args:
        per_layer: float64 [D], slots due to each device in each layer, from 0 to E; their sum is at least E.

    Returns:
        int64 [D, L], at most E each, at least E over the devices in each layer, within the budgets.

    Raises:
        InputError: experts of unequal sizes do not pack into the devices; never with room for one more on each device.
    """
    _, layers, experts = problem.shape
    counts = np.zeros((len(per_layer), layers), np.int64)
    room, due, wanted = problem.usable_bytes.copy(), np.zeros(len(per_layer)), 0.0
    for layer in np.argsort(-problem.expert_bytes, kind="stable"):  # large ones first: small ones fill the gaps
        size = problem.expert_bytes[layer]
        fits = np.minimum(room // size, experts)
        if fits.sum() < experts:
            missing = int((experts - fits.sum()) * size)
            raise InputError(
                f"{problem.source}: {missing} bytes are missing: {experts} experts of layer {layer} take {size} bytes "
                "each, and what is left does not hold them with an equal share of every layer; add memory"
            )
        due += per_layer
        wanted += per_layer.sum()
        total = int(np.clip(np.floor(wanted + 1e-6), experts, fits.sum()))
        wanted -= total
        number = np.minimum(np.floor(due + 1e-9).clip(0), fits).astype(np.int64)
        while number.sum() != total:
            step = 1 if number.sum() < total else -1
            possible = fits > number if step > 0 else number > 0
            number[np.where(possible, (due - number) * step, -np.inf).argmax()] += step
        due -= number
        room -= number * size
        counts[:, layer] = number
    return counts


def memory_slots(problem: Problem) -> np.ndarray:
    """`share_slots` of all memory there is: for strategies that treat every layer alike, int64 [D, L]."""
    share = problem.usable_bytes / problem.expert_bytes.sum()
    return share_slots(problem, np.minimum(share, problem.shape[2]))


def redundance(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """`uniform`, then the memory left filled with copies drawn at random from what each server lacks.

    Args:
        problem: has room for one copy of every expert.
        previous: unused, the draw depends on the seed alone.
        seed: of the draw.

    Returns:
        bool [D, L, E], every expert covered, no duplicate within a server.

    Raises:
        InputError: as `uniform`.
    """
    resident = uniform(problem)
    rng = np.random.default_rng(seed)
    room = problem.budget - problem.used_bytes(resident)
    for device, server in enumerate(problem.device_server):
        lacking = rng.permutation(np.argwhere(~resident[problem.device_server == server].any(0)))
        while True:  # each pass takes what fits in the order drawn
            lacking = lacking[problem.expert_bytes[lacking[:, 0]] <= room[device]]
            if not len(lacking):
                break
            used = np.cumsum(problem.expert_bytes[lacking[:, 0]])
            taken = int(np.searchsorted(used, room[device], side="right"))
            resident[device, lacking[:taken, 0], lacking[:taken, 1]] = True
            room[device] -= used[taken - 1]
            lacking = lacking[taken:]
    return resident


def smartmoe(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """No copies; in each layer the busiest experts go to the least loaded devices, as SmartMoE's artifact does.

    Experts by load descending, each to the least loaded device that has a place left in the layer; adopted only where
    the busiest device of the layer then has less than it has now.

    Args:
        problem: has room for one copy of every expert.
        previous: bool [D, L, E], what there is now; `uniform` where it is absent, has copies or does not fit.
        seed: unused, the result is deterministic.

    Returns:
        bool [D, L, E], every expert on exactly one device; as many per device and layer as there are now.

    Raises:
        InputError: as `uniform`.
    """
    now = previous
    if now is None or (now.sum(0) != 1).any() or (problem.used_bytes(now) > problem.budget).any():
        now = uniform(problem)
    resident = now.copy()
    load = problem.frequency.sum(0)
    for layer, weights in enumerate(load):
        room, busy = now[:, layer].sum(1), np.zeros(len(now))
        moved = np.zeros_like(now[:, layer])
        for expert in np.argsort(-weights, kind="stable"):
            device = int(np.where(room > 0, busy, np.inf).argmin())
            moved[device, expert] = True
            room[device] -= 1
            busy[device] += weights[expert]
        if busy.max() < (now[:, layer] @ weights).max():
            resident[:, layer] = moved
    return resident
