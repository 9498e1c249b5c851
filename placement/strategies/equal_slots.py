"""Plans for engines that give every device the same number of slots in every layer.

Most expert-parallel engines number the slots of a layer through all ranks and find a slot's rank by division, so every
rank must hold equally many experts of every layer, and no expert twice. Any strategy's plan can be brought to that shape.
"""

from dataclasses import replace

import numpy as np

from placement.costs.routing import server_load
from placement.data.problem import Problem
from placement.files import InputError
from placement.strategies.dance import cover_experts


def slots_per_device(problem: Problem) -> int:
    """Slots of each layer on each device, as many as the smallest device has memory for, at most E.

    Raises:
        InputError: all devices together have fewer slots than a layer has experts.
    """
    _, _, experts = problem.shape
    smallest = int(problem.budget.argmin())
    per_slot = int(problem.expert_bytes.sum())
    slots = min(experts, int(problem.budget[smallest]) // per_slot)
    devices = len(problem.budget)
    if slots * devices < experts:
        needed = -(-experts // devices)
        server = problem.device_server[smallest]
        name = f"{problem.names[server]} device {smallest - problem.first_device[server]}"
        raise InputError(
            f"{problem.source}: {needed * per_slot - problem.budget[smallest]} bytes are missing on {name} for equal "
            f"slots: {experts} experts on {devices} devices need {needed} slots of every layer on each, {per_slot} bytes "
            f"a slot; it has {problem.budget[smallest]}; add memory there or plan without --equal-slots"
        )
    return slots


def restricted(problem: Problem, slots: int) -> Problem:
    """The problem with just the room that equal slots can use, counted in slots, for a strategy to plan on.

    Experts of unequal sizes become equal: a slot is a slot of its layer.
    """
    layers = problem.shape[1]
    budget = np.full_like(problem.budget, slots * layers)
    return replace(problem, budget=budget, expert_bytes=np.ones(layers, np.int64))


def project(problem: Problem, resident: np.ndarray, slots: int) -> np.ndarray:
    """The equal-slot plan nearest to a strategy's: `equal_held` of it, on devices as `to_equal_devices` puts it.

    Args:
        problem: as the strategy saw it.
        resident: bool [D, L, E], any plan.
        slots: from `slots_per_device`.

    Returns:
        bool [D, L, E] with exactly `slots` experts per device and layer, every expert covered.
    """
    return to_equal_devices(problem, equal_held(problem, resident, slots), resident, slots)


def equal_held(problem: Problem, resident: np.ndarray, slots: int) -> np.ndarray:
    """As many experts of each layer as each server has slots, every expert covered: bool [N, L, E].

    In each layer a server keeps its planned experts, most used first, up to its slots; free slots take the experts it uses
    most and lacks. Experts left without a copy displace the least used duplicates (`dance.cover_experts`).
    """
    width = np.bincount(problem.device_server, minlength=len(problem.names))
    planned, experts = problem.held(resident), problem.shape[2]
    everyone = np.broadcast_to(-problem.demand.sum(0), planned.shape)
    order = np.lexsort([everyone, -problem.demand, ~planned], axis=-1)
    held = np.zeros(planned.shape, bool)
    room = np.minimum(width * slots, experts)
    first = np.broadcast_to(np.arange(experts) < room[:, None, None], held.shape)
    np.put_along_axis(held, order, first, axis=-1)
    return cover_experts(problem, held)


def to_equal_devices(problem: Problem, held: np.ndarray, planned: np.ndarray, slots: int) -> np.ndarray:
    """Experts of a server on its devices, `slots` of each layer on each: bool [D, L, E].

    Experts stay on their device while that is no further ahead in load than the expert itself; the others go to the least
    loaded device. Where a server has more slots than there are experts, its busiest get further copies, never two on one
    device.

    Args:
        held: bool [N, L, E], from `equal_held`.
        planned: bool [D, L, E], where experts are to stay.
    """
    width = np.bincount(problem.device_server, minlength=len(problem.names))
    load = server_load(problem, held)
    equal = np.zeros(planned.shape, bool)
    for server, start in enumerate(problem.first_device):
        mine = slice(start, start + width[server])
        for layer in range(problem.shape[1]):
            here, speed = load[server, layer], problem.speed[mine]
            equal[mine, layer] = _spread(held[server, layer], here, planned[mine, layer], speed, slots)
    return equal


def _spread(held: np.ndarray, load: np.ndarray, planned: np.ndarray, speed: np.ndarray, slots: int) -> np.ndarray:
    """One layer of one server: bool [G, E] with `slots` on each of its G devices."""
    devices = len(planned)
    if devices == 1:
        return held[None]
    copies = held.astype(np.int64)
    for _ in range(devices * slots - int(copies.sum())):
        copies[np.where(copies < devices, load / np.maximum(copies, 1), -1.0).argmax()] += 1
    weight = load / np.maximum(copies, 1)
    result = np.zeros(planned.shape, bool)
    room, work = np.full(devices, slots), np.zeros(devices)
    # A first copy always finds room; a further one may meet only devices that have the expert, and is left out.
    for expert in np.repeat(np.arange(len(held)), copies)[np.argsort(-np.repeat(weight, copies), kind="stable")]:
        open_work = np.where((room > 0) & ~result[:, expert], work, np.inf)
        choice = int(open_work.argmin())
        if np.isinf(open_work[choice]):
            continue
        stays = np.flatnonzero(planned[:, expert] & (open_work <= open_work[choice] + weight[expert] / speed[choice]))
        choice = int(stays[0]) if len(stays) else choice
        result[choice, expert] = True
        room[choice] -= 1
        work[choice] += weight[expert] / speed[choice]
    for device in np.flatnonzero(room):
        value = np.where(result[device], -1.0, load / np.maximum(result.sum(0), 1))
        result[device, np.argsort(-value, kind="stable")[: room[device]]] = True
    return result
