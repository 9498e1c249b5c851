"""EPLB, DeepSeek's load balancer: copies for the busiest experts, packed evenly; it does not know where calls enter."""

import heapq

import numpy as np

from placement.data.problem import Problem
from placement.files import InputError
from placement.strategies.baselines import memory_slots


def eplb(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """EPLB's global policy, devices having slots in proportion to their memory.

    Two copies of an expert may meet on a device. The second one serves nobody: its slot stays empty.

    Args:
        problem: has room for one copy of every expert.
        previous: unused, EPLB starts afresh.
        seed: unused, the result is deterministic.

    Returns:
        bool [D, L, E], every expert covered.

    Raises:
        InputError: experts of unequal sizes do not pack into the devices; never with room for one more on each device.
    """
    return _pack_layers(problem, memory_slots(problem))


def eplb_nodup(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """`eplb`, with every slot that a second copy on the same device wastes given to the next best expert.

    That is the expert with the largest load per copy among those the device lacks, copies counted as they are.

    Args:
        problem: has room for one copy of every expert.
        previous: unused, EPLB starts afresh.
        seed: unused, the result is deterministic.

    Returns:
        bool [D, L, E], every expert covered, every slot used.

    Raises:
        InputError: as `eplb`.
    """
    slots = memory_slots(problem)
    resident, load = _pack_layers(problem, slots), problem.frequency.sum(0)
    for device, layer in np.argwhere(resident.sum(2) < slots):
        here, copies = resident[device, layer], resident[:, layer].sum(0)
        for _ in range(slots[device, layer] - here.sum()):
            best = int(np.where(here, -1.0, load[layer] / copies).argmax())
            here[best] = True
            copies[best] += 1
    return resident


def _pack_layers(problem: Problem, slots: np.ndarray) -> np.ndarray:
    """Replicate and pack every layer by itself: bool [D, L, E] from slots int64 [D, L]."""
    load = problem.frequency.sum(0)
    resident = np.zeros((len(slots), *load.shape), bool)
    for layer, weights in enumerate(load):
        logical, copies = replicate(weights, int(slots[:, layer].sum()))
        pack = pack_items(weights[logical] / copies[logical], slots[:, layer])[0]
        resident[pack, layer, logical] = True
    return resident


def replicate(load: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Give each slot beyond one per expert to the expert with the largest load per copy; ties to the lowest index.

    Args:
        load: float64 [E].
        slots: R, at least E.

    Returns:
        Expert of every slot, int64 [R], and copies of every expert, int64 [E].
    """
    copies = np.ones(len(load), np.int64)
    logical = np.empty(slots, np.int64)
    logical[: len(load)] = np.arange(len(load))
    each = [(-float(weight), expert) for expert, weight in enumerate(load)]
    heapq.heapify(each)
    for slot in range(len(load), slots):
        expert = each[0][1]
        logical[slot] = expert
        copies[expert] += 1
        heapq.heapreplace(each, (-float(load[expert] / copies[expert]), expert))
    return logical, copies


def pack_items(weight: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items by weight descending, each onto the lightest pack with room; ties to the lowest index.

    Args:
        weight: float64 [I].
        room: items that each pack takes, int64 [P], summing to I.

    Returns:
        Pack of every item and its rank within it, both int64 [I].
    """
    if len(room) == len(weight) and (room == 1).all():  # EPLB then leaves the order as it is
        return np.arange(len(weight)), np.zeros(len(weight), np.int64)
    pack, rank = np.empty(len(weight), np.int64), np.empty(len(weight), np.int64)
    used = [0] * len(room)
    lightest = [(0.0, p) for p in range(len(room)) if room[p]]  # a heap as it stands
    for item in np.argsort(-weight, kind="stable"):
        total, p = lightest[0]
        pack[item], rank[item] = p, used[p]
        used[p] += 1
        if used[p] < room[p]:
            heapq.heapreplace(lightest, (total + float(weight[item]), p))
        else:
            heapq.heappop(lightest)
    return pack, rank


def rebalance(load: np.ndarray, slots: int, groups: int, nodes: int, devices: int) -> np.ndarray:
    """EPLB itself, for devices with equally many slots.

    Hierarchical where the expert groups divide by the nodes: groups are packed onto nodes, experts replicated within
    each node, the node's slots packed onto its devices. Otherwise global: the same with one group and one node.

    Args:
        load: [L, E].
        slots: R per layer, over all devices.
        groups: groups of experts with consecutive ids.
        nodes: nodes the devices are divided into.
        devices: D in all.

    Returns:
        Expert of every slot, int64 [L, R], slots ordered by device.

    Raises:
        InputError: numbers that do not divide.
    """
    load = np.asarray(load, np.float64)
    layers, experts = load.shape
    if groups % nodes:
        groups = nodes = 1
    for what, number, by, into in (
        ("slots", slots, devices, "devices"),
        ("experts", experts, groups, "groups"),
        ("devices", devices, nodes, "nodes"),
    ):
        if by < 1 or number % by:
            raise InputError(f"{what} = {number}: must be a multiple of {into} = {by}; choose other numbers")
    if slots < experts:
        raise InputError(f"slots = {slots}: must be at least the {experts} experts of a layer; add slots")
    physical = np.empty((layers, slots), np.int64)
    per_group, per_node = experts // groups, slots // nodes
    for layer, weights in enumerate(load):
        group_load = weights.reshape(groups, per_group).sum(1)
        node_of_group, order = pack_items(group_load, np.full(nodes, groups // nodes))
        for node in range(nodes):
            mine = np.flatnonzero(node_of_group == node)
            mine = mine[np.argsort(order[mine], kind="stable")]
            ids = (mine[:, None] * per_group + np.arange(per_group)).ravel()
            logical, copies = replicate(weights[ids], per_node)
            room = np.full(devices // nodes, slots // devices)
            device, rank = pack_items((weights[ids] / copies)[logical], room)
            physical[layer, node * per_node + device * (slots // devices) + rank] = ids[logical]
    return physical
