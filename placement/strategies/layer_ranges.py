"""Rivals that place whole layers: contiguous ranges of them on each server, as pipelines serve dense models.

Which server hosts a layer for whose sequences is `costs.hosting.layer_hosts`; here experts go where the ranges are.
A server counts as one node: its devices share the experts of its layers.
"""

import numpy as np

from placement.data.problem import Problem
from placement.strategies.device_assignment import cover, spread


def pipeline(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Contiguous layers in proportion to memory, in the order of the servers, one copy of everything.

    As llama.cpp's RPC, exo and prima.cpp split a model. Where no whole layers fit, those at the borders are cut: their
    experts are on both sides.

    Args:
        problem: has room for one copy of every expert.
        previous: bool [D, L, E], where experts are now; they keep their device where that costs nothing.
        seed: not used.

    Returns:
        bool [D, L, E], every expert covered once, every device within its budget.
    """
    del seed
    room = np.add.reduceat(problem.usable_bytes, problem.first_device).astype(np.float64)
    order = np.arange(len(room))
    held = _held(problem, ranges(problem, order, room, room)) if (room > 0).any() else None
    return _to_devices(problem, _cut(problem, room) if held is None else held, previous)


def parallax(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Several pipelines of contiguous ranges, layers by speed within memory; the memory left copies what is hosted least.

    Parallax's first phase (arXiv 2509.26182, section 3; its greedy allocator): servers by memory, largest first, join a
    pipeline until it has room for all layers, the last one as small as leaves room for another pipeline. Its layers are
    divided by water-filling: in proportion to speed, at most what memory takes. Servers that are left over begin with the layer
    that is hosted least, and ranges grow into the memory left at the end where the next layer is hosted less.

    Args:
        problem: has room for one copy of every expert.
        previous: bool [D, L, E], where experts are now; they keep their device where that costs nothing.
        seed: not used.

    Returns:
        bool [D, L, E], every expert covered, every device within its budget.
    """
    del seed
    room = np.add.reduceat(problem.usable_bytes, problem.first_device).astype(np.float64)
    speed = np.add.reduceat(problem.speed, problem.first_device)
    spans: dict[int, tuple[int, int]] = {}
    waiting = [int(n) for n in np.argsort(-room, kind="stable")]
    while (found := _next_pipeline(problem, waiting, room, speed)) is not None:
        spans |= found
        waiting = [n for n in waiting if n not in found]
    if not spans:
        return _to_devices(problem, _cut(problem, speed * (room > 0)), previous)
    _copy_least_hosted(problem, spans, waiting, room)
    held = _held(problem, spans)
    assert held is not None
    return _to_devices(problem, held, previous)


def ranges(
    problem: Problem, order: np.ndarray, weight: np.ndarray, room: np.ndarray
) -> dict[int, tuple[int, int]] | None:
    """Contiguous whole layers for the servers of a pipeline, in this order: (first, end) by server, without empty ones.

    Water-filling: each server gets min(room, c x weight) bytes with one c for all, then whole layers as near to that as
    leaves room for the rest.

    Args:
        order: servers of the pipeline.
        weight: in proportion to what they shall get, [N].
        room: bytes, [N].

    Returns:
        None where whole layers do not fit these servers.
    """
    size = (problem.expert_bytes * problem.shape[2]).astype(np.float64)
    end, layers = np.concatenate([[0.0], size.cumsum()]), len(size)
    target = _water_filling(weight[order], room[order], end[-1]).cumsum()
    found, start = {}, 0
    for i, server in enumerate(order.tolist()):
        last = int(np.searchsorted(end, end[start] + room[server] + 0.5, side="right")) - 1
        nearest = np.argsort(abs(end[start : last + 1] - target[i]), kind="stable") + start
        rest = room[order[i + 1 :]]
        stop = next((int(stop) for stop in nearest if _reach(end, int(stop), rest) == layers), None)
        if stop is None:
            return None
        if stop > start:
            found[server] = (start, stop)
        start = stop
    return found if start == layers else None


def _reach(end: np.ndarray, start: int, room: np.ndarray) -> int:
    """How many layers have a place if the servers that are left take as many as fit, one after the other."""
    for size in room:
        if start == len(end) - 1:
            break
        start = int(np.searchsorted(end, end[start] + size + 0.5, side="right")) - 1
    return start


def _water_filling(weight: np.ndarray, room: np.ndarray, total: float) -> np.ndarray:
    """min(room, c x weight) with c such that the sum is `total`, or all the room: float64 [n]."""
    full = np.zeros(len(weight), bool)
    while True:
        left, free = total - room[full].sum(), np.where(full, 0.0, weight)
        share = np.where(full, room, free * (max(left, 0.0) / max(free.sum(), 1e-300)))
        over = ~full & (share > room)
        if not over.any():
            return share
        full |= over


def _next_pipeline(
    problem: Problem, waiting: list[int], room: np.ndarray, speed: np.ndarray
) -> dict[int, tuple[int, int]] | None:
    """Ranges of a pipeline of the servers that wait, largest first; None where they have no room for one."""
    total = float(problem.expert_bytes.sum()) * problem.shape[2]
    left, chosen = [n for n in waiting if room[n] > 0], []
    while left:
        missing = total - room[chosen].sum()
        spare = room[left].sum() - missing
        ends = [n for n in left if room[n] >= missing and spare - (room[n] - missing) >= total]
        chosen.append(ends[-1] if ends else left[0])
        left.remove(chosen[-1])
        if room[chosen].sum() >= total:
            found = ranges(problem, np.array(chosen), speed, room)
            if found is not None:
                return found
    return None


def _copy_least_hosted(
    problem: Problem, spans: dict[int, tuple[int, int]], waiting: list[int], room: np.ndarray
) -> None:
    """Give servers without a range one, and let ranges grow into the memory that is left; changes `spans`."""
    size, layers = problem.expert_bytes * problem.shape[2], problem.shape[1]
    copies = np.zeros(layers, np.int64)
    for start, stop in spans.values():
        copies[start:stop] += 1
    for server in [*waiting, *sorted(spans, key=lambda n: -room[n])]:
        start, stop = spans.get(server, (int(copies.argmin()),) * 2)
        left = room[server] - size[start:stop].sum()
        while True:
            ends = [(copies[i], i < start, i) for i in (stop, start - 1) if 0 <= i < layers and size[i] <= left]
            if not ends:
                break
            _, down, layer = min(ends)
            start, stop = (layer, stop) if down else (start, layer + 1)
            copies[layer] += 1
            left -= size[layer]
        if stop > start:
            spans[server] = (start, stop)


def _held(problem: Problem, spans: dict[int, tuple[int, int]] | None) -> np.ndarray | None:
    """Whole layers on servers: bool [N, L, E]."""
    if spans is None:
        return None
    held = np.zeros(problem.shape, bool)
    for server, (start, stop) in spans.items():
        held[server, start:stop] = True
    return held


def _cut(problem: Problem, weight: np.ndarray) -> np.ndarray:
    """Contiguous ranges of experts, layer after layer, that end within layers: bool [N, L, E], one copy where they fit."""
    servers, layers, experts = problem.shape
    room = np.add.reduceat(problem.usable_bytes, problem.first_device)
    size = np.repeat(problem.expert_bytes, experts)
    end = np.concatenate([[0], size.cumsum()])
    target = _water_filling(weight.astype(np.float64), room.astype(np.float64), float(end[-1])).cumsum()
    owner, start = np.full(layers * experts, -1), 0
    for n in range(servers):
        most = int(np.searchsorted(end, end[start] + room[n], side="right")) - 1
        least = int(np.searchsorted(end, end[-1] - room[n + 1 :].sum()))  # what is after it fits into the others
        stop = int(np.clip(abs(end - target[n]).argmin(), min(max(least, start), most), most))
        owner[start:stop] = n
        start = stop
    return (owner == np.arange(servers)[:, None]).reshape(problem.shape)


def _to_devices(problem: Problem, held: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """One device for each expert of a server; what unequal sizes leave without a place goes where there is room."""
    return cover(problem, spread(problem, held, previous))
