"""From servers to devices: spread each server's experts over its devices, and repair what byte budgets break."""

import numpy as np

from placement.costs.routing import server_load
from placement.data.problem import Problem
from placement.files import InputError


def spread(problem: Problem, held: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
    """Put each server's experts on its devices within their memory, balancing expected load (paper section 3).

    Largest first, then busiest first, each expert goes to the device with room that is least loaded in its layer, since
    a layer waits for its busiest device. An expert stays on the device where it was as long as that device is at most
    this one expert ahead. All servers advance together, so the cost is that of the longest list.

    Args:
        held: bool [N, L, E]; of equal-sized experts at most what `usable_bytes` takes.
        previous: bool [D, L, E], where experts are now.

    Returns:
        bool [D, L, E]; with experts of unequal sizes some may have found no room.
    """
    _, layers, experts = problem.shape
    load = np.where(held, _expected_load(problem, held), -1.0).reshape(len(held), -1)
    size = np.repeat(problem.expert_bytes, experts)
    resident = np.zeros((len(problem.budget), layers * experts), bool)
    width = np.bincount(problem.device_server, minlength=len(held))
    for server, start in enumerate(problem.first_device.tolist()):
        mine = slice(start, start + int(width[server]))
        flat = held[server].reshape(-1)
        order = np.lexsort((-load[server], -size, ~flat))[: flat.sum()]
        if width[server] == 1:
            fits = size[order].cumsum() <= problem.budget[start]
            if fits.all():
                resident[start, order] = True
                continue
        before = None if previous is None else previous[mine].reshape(width[server], -1)
        chosen = _on_devices(problem, mine, order, load[server], before)
        for device, expert in chosen:
            resident[start + device, expert] = True
    return resident.reshape(-1, layers, experts)


def _on_devices(
    problem: Problem, mine: slice, order: np.ndarray, load: np.ndarray, before: np.ndarray | None
) -> list[tuple[int, int]]:
    """(device of the server, expert), one after the other; plain numbers, since each choice depends on those before it.

    Args:
        mine: the server's devices.
        order: experts, numbered through all layers; load: of every expert, [L E].
        before: where experts are now, bool [devices, L E].
    """
    experts = problem.shape[2]
    room, speed = problem.budget[mine].tolist(), problem.speed[mine].tolist()
    size, devices = problem.expert_bytes.tolist(), range(len(room))
    layer_load = [[0.0] * problem.shape[1] for _ in devices]
    total, chosen = [0.0 for _ in devices], []
    was = None if before is None else before.T.tolist()
    for expert, weight in zip(order.tolist(), load[order].tolist(), strict=True):
        layer = expert // experts
        fitting = [d for d in devices if room[d] >= size[layer]]
        if not fitting:
            continue
        here = {d: layer_load[d][layer] / speed[d] for d in fitting}
        choice = min(fitting, key=lambda d: (here[d], total[d] / speed[d]))
        if was is not None:
            bound = here[choice] + weight / speed[choice]
            choice = next((d for d in fitting if was[expert][d] and here[d] <= bound), choice)
        chosen.append((choice, expert))
        room[choice] -= size[layer]
        layer_load[choice][layer] += weight
        total[choice] += weight
    return chosen


def _expected_load(problem: Problem, held: np.ndarray) -> np.ndarray:
    """`server_load`, with an expert that is on no server yet counted as nobody's: float64 [N, L, E]."""
    nowhere = ~held.any(0)
    return np.where(nowhere, 0.0, server_load(problem, held | nowhere))


def repair(problem: Problem, resident: np.ndarray) -> np.ndarray:
    """Cover what has no copy, then use the memory that is left; changes nothing where neither is needed.

    Experts of unequal sizes need not fill devices exactly. After `cover` each device takes the experts its server uses
    most and lacks, as long as they fit.

    Args:
        resident: bool [D, L, E], within the budgets.

    Returns:
        bool [D, L, E], complete.

    Raises:
        InputError: an expert fits no device, saying how many bytes are missing there.
    """
    resident = cover(problem, resident)
    _fill(problem, resident, problem.budget - problem.used_bytes(resident))
    return resident


def cover(problem: Problem, resident: np.ndarray) -> np.ndarray:
    """Give every expert without a copy a device; changes nothing else.

    It takes free room on the server that uses it most, else it displaces the least used duplicates of one device.

    Args:
        resident: bool [D, L, E], within the budgets.

    Returns:
        bool [D, L, E], every expert covered.

    Raises:
        InputError: an expert fits no device, saying how many bytes are missing there.
    """
    resident = resident.copy()
    room = problem.budget - problem.used_bytes(resident)
    missing = np.argwhere(~resident.any(0))
    for layer, expert in missing[np.argsort(-problem.expert_bytes[missing[:, 0]], kind="stable")]:
        size, wish = problem.expert_bytes[layer], problem.demand[problem.device_server, layer, expert]
        if (room >= size).any():
            device = int(np.where(room >= size, wish, -1.0).argmax())
        else:
            device = _displace(problem, resident, room, layer, expert)
        resident[device, layer, expert] = True
        room[device] -= size
    return resident


def _displace(problem: Problem, resident: np.ndarray, room: np.ndarray, layer: int, expert: int) -> int:
    """Drop duplicates from the device where that costs least, until the expert fits; returns the device."""
    size = problem.expert_bytes[layer]
    duplicate = resident & (resident.sum(0) > 1)
    best, victims = (np.inf, -1), np.empty((0, 2), np.int64)
    reach = room + problem.used_bytes(duplicate)
    for device in np.flatnonzero(reach >= size):
        candidates = np.argwhere(duplicate[device])
        use = problem.demand[problem.device_server[device]][tuple(candidates.T)]
        order = np.argsort(use, kind="stable")
        freed = np.cumsum(problem.expert_bytes[candidates[order, 0]])
        number = int(np.searchsorted(freed, size - room[device])) + 1
        loss = use[order[:number]].sum() - problem.demand[problem.device_server[device], layer, expert]
        if loss < best[0]:
            best, victims = (loss, int(device)), candidates[order[:number]]
    if best[1] < 0:
        device = int(reach.argmax())
        name = problem.names[problem.device_server[device]]
        raise InputError(
            f"{problem.source}: {size - reach[device]} bytes are missing on {name} device "
            f"{device - problem.first_device[problem.device_server[device]]}: an expert of layer {layer} takes "
            f"{size} bytes, and beside experts without another copy no device has as much room; add memory"
        )
    resident[best[1], victims[:, 0], victims[:, 1]] = False
    room[best[1]] += problem.expert_bytes[victims[:, 0]].sum()
    return best[1]


def _fill(problem: Problem, resident: np.ndarray, room: np.ndarray) -> None:
    """Give free room to the experts each server uses most and lacks, in place."""
    smallest = problem.expert_bytes.min()
    for device in np.flatnonzero(room >= smallest):
        server = problem.device_server[device]
        mine = problem.device_server == server
        lacking = np.argwhere(~resident[mine].any(0))
        use = problem.demand[server][tuple(lacking.T)]
        for layer, expert in lacking[np.argsort(-use, kind="stable")]:
            if room[device] < smallest:
                break
            if room[device] >= problem.expert_bytes[layer]:
                resident[device, layer, expert] = True
                room[device] -= problem.expert_bytes[layer]
