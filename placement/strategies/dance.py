"""DanceMoE's two-stage placement (paper section 3): how many experts of each layer a server holds, then which."""

import numpy as np

from placement.data.problem import Problem
from placement.strategies.device_assignment import repair, spread


def dance(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Entropy decides how many experts of each layer a server holds, frequency decides which.

    Args:
        problem: has room for one copy of every expert.
        previous: bool [D, L, E], the placement in force; among equally used experts those that are there stay.
        seed: unused, the result is deterministic.

    Returns:
        bool [D, L, E], every expert covered, every device within its budget, no duplicate within a server.

    Raises:
        InputError: experts of unequal sizes do not pack into the devices; never with room for one more on each device.
    """
    counts = cover_layers(problem, layer_counts(problem))
    held = cover_experts(problem, most_used(problem, counts, previous))
    return repair(problem, spread(problem, held, previous))


def entropy(p: np.ndarray) -> np.ndarray:
    """H = - sum_e p log2 p over the last axis, in bits."""
    return -(p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(-1)


def layer_counts(problem: Problem) -> np.ndarray:
    """Stage 1: experts per server and layer, in proportion to the entropy of the layer's demand.

    c_{n,l} = min(E, t_n H_{n,l}) with t_n such that the server's memory is used, rounded down; then the largest
    remainders get one more for as long as an expert of their layer fits.

    Returns:
        int64 [N, L].
    """
    servers, layers, experts = problem.shape
    size = problem.expert_bytes
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device)
    weight = np.maximum(entropy(problem.demand), 1e-9)  # a layer of one expert comes last, not never
    capped = np.zeros((servers, layers), bool)
    while True:  # each round caps at least one layer more, or ends
        left = capacity - (capped * size).sum(-1) * experts
        scale = left / np.maximum((np.where(capped, 0.0, weight) * size).sum(-1), 1e-9)
        share = np.where(capped, experts, weight * scale[:, None])
        if not (share > experts).any():
            break
        capped |= share > experts
    counts = np.floor(share * (1 + 1e-12)).astype(np.int64).clip(0, experts)
    free = capacity - counts @ size
    order = np.argsort(counts - share, axis=-1, kind="stable")
    rows, grew = np.arange(servers), True
    while grew:
        grew = False
        for layer in order.T:
            add = (free >= size[layer]) & (counts[rows, layer] < experts)
            counts[rows[add], layer[add]] += 1
            free[add] -= size[layer[add]]
            grew |= bool(add.any())
    return counts


def cover_layers(problem: Problem, counts: np.ndarray) -> np.ndarray:
    """Move slots to layers whose counts sum to less than E, largest servers first, from the layers with most to spare.

    Args:
        counts: int64 [N, L].

    Returns:
        int64 [N, L], each server within the same bytes. With equal sizes every layer then sums to at least E.
    """
    _, _, experts = problem.shape
    size, counts = problem.expert_bytes, counts.copy()
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device)
    free = capacity - counts @ size
    surplus = counts.sum(0) - experts
    for layer in np.flatnonzero(surplus < 0):
        for server in np.argsort(-capacity, kind="stable"):
            while surplus[layer] < 0 and counts[server, layer] < experts:
                if free[server] >= size[layer]:
                    counts[server, layer] += 1
                    surplus[layer] += 1
                    free[server] -= size[layer]
                    continue
                spare = np.where(counts[server] > 0, surplus, 0)
                donor = int(spare.argmax())
                if spare[donor] <= 0:
                    break
                counts[server, donor] -= 1
                surplus[donor] -= 1
                free[server] += size[donor]
    return counts


def most_used(problem: Problem, counts: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
    """Stage 2: each server's most used experts of each layer, up to the count.

    Ties go to experts that the server holds already, then to those that all servers together use more.

    Args:
        counts: int64 [N, L].

    Returns:
        bool [N, L, E].
    """
    everyone = np.broadcast_to(-problem.demand.sum(0), problem.shape)
    keys = [everyone, -problem.demand]
    if previous is not None:
        keys.insert(1, ~problem.held(previous))
    order = np.lexsort(keys, axis=-1)
    held = np.zeros(problem.shape, bool)
    np.put_along_axis(held, order, np.arange(problem.shape[2]) < counts[..., None], axis=-1)
    return held


def cover_experts(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Give every expert a server: the one with most duplicates in the layer trades its least used duplicate for it.

    All layers that lack an expert advance together, one trade each per round.

    Args:
        held: bool [N, L, E].

    Returns:
        bool [N, L, E] with the same number of experts per server and layer; complete where a layer has enough slots.
    """
    held, demand = held.copy(), problem.demand
    copies = held.sum(0)
    duplicates = (held & (copies > 1)).sum(-1)
    while True:
        layer = np.flatnonzero((copies == 0).any(-1) & (duplicates > 0).any(0))
        if not len(layer):
            return held
        server = duplicates[:, layer].argmax(0)
        use = demand[server, layer]
        out = np.where(held[server, layer] & (copies[layer] > 1), use, np.inf).argmin(-1)
        into = np.where(copies[layer] == 0, use, -1.0).argmax(-1)
        held[server, layer, out] = False
        held[server, layer, into] = True
        copies[layer, out] -= 1
        copies[layer, into] += 1
        duplicates[server, layer] -= 1
        # The last other copy of what was dropped is no duplicate any more.
        single = copies[layer, out] == 1
        duplicates[:, layer] -= held[:, layer, out] & single
