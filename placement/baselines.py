"""Baselines to compare with, within the same memory budgets."""

import numpy as np

from placement.files import InputError
from placement.problem import Problem


def uniform(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Experts of each layer dealt to devices in contiguous blocks in proportion to their memory; no copies.

    What rounding leaves a device short of in one layer is carried to the next, so that budgets hold over all layers.

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
    share = problem.usable_bytes / problem.usable_bytes.sum()
    resident = np.zeros((len(share), layers, experts), bool)
    room, due = problem.usable_bytes.copy(), np.zeros(len(share))
    for layer in np.argsort(-problem.expert_bytes, kind="stable"):  # large ones first: small ones fill the gaps
        size = problem.expert_bytes[layer]
        if (room // size).sum() < experts:
            missing = int((experts - (room // size).sum()) * size)
            raise InputError(
                f"{problem.source}: {missing} bytes are missing: {experts} experts of layer {layer} take {size} bytes "
                "each, and what is left does not hold them in contiguous blocks without copies; add memory"
            )
        due += share * experts
        counts = np.minimum(np.floor(due + 1e-9).clip(0), room // size).astype(np.int64)
        while counts.sum() != experts:
            step = 1 if counts.sum() < experts else -1
            possible = room // size > counts if step > 0 else counts > 0
            counts[np.where(possible, (due - counts) * step, -np.inf).argmax()] += step
        due -= counts
        room -= counts * size
        resident[np.repeat(np.arange(len(share)), counts), layer, np.arange(experts)] = True
    return resident
