"""SwiftBalance, the online balancer of vllm-ascend: from the placement in force, a few cheap moves per layer."""

import numpy as np

from placement.data.problem import Problem
from placement.strategies.eplb import eplb_nodup

_EVEN = 1.01  # busiest device over mean below which a layer is left alone
_SWAPS = 100
_GAIN = 0.01  # of the mean load, that a swap has to gain
_WORTH = 0.95  # of the summed maxima before, that a plan has to come below


def swift(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Re-choose redundant copies and swap experts where that evens the load, layer by layer.

    The first copy of every expert stays. Copies beyond the first are chosen anew by load per copy, each for the least
    loaded device that has a redundant slot left and lacks the expert, with at most one transfer per pair of devices.
    Then experts of the busiest device are swapped with those of lighter ones. A layer changes only if its busiest
    device gets lighter, and anything changes only if the maxima summed over layers fall below 0.95 of what they were.

    Args:
        problem: has room for one copy of every expert.
        previous: bool [D, L, E], the placement in force; `eplb_nodup` where it is absent, incomplete or does not fit.
        seed: unused, the result is deterministic.

    Returns:
        bool [D, L, E], every expert covered, as many slots per device and layer as before, or fewer.

    Raises:
        InputError: without a usable `previous`, as `eplb_nodup`.
    """
    before = previous
    if before is None or not before.any(0).all() or (problem.used_bytes(before) > problem.budget).any():
        before = eplb_nodup(problem)
    resident, load = before.copy(), problem.frequency.sum(0)
    maxima = []
    for layer, weights in enumerate(load):
        now = _busy(before[:, layer], weights)
        maxima.append([now.max(), now.max()])
        if now.max() < _EVEN * now.mean() or not now.any():
            continue
        chosen = _swap(_replicate(before[:, layer], weights), weights)
        after = _busy(chosen, weights).max()
        if after < now.max():
            resident[:, layer] = chosen
            maxima[-1][1] = after
    total = np.sum(maxima, axis=0)
    return resident if total[1] < _WORTH * total[0] else before.copy()


def _busy(held: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Load of every device with copies sharing evenly, [D], from bool [D, E] and [E]."""
    return held @ (weights / held.sum(0))


def _replicate(held: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """First copies where they are, the other slots of each device filled anew: bool [D, E]."""
    devices, experts = held.shape
    first = held.argmax(0)
    chosen = first == np.arange(devices)[:, None]
    free = held.sum(1) - chosen.sum(1)
    copies = np.ones(experts, np.int64)
    for _ in range(free.sum()):
        each = np.where(copies < devices, weights / copies, -1.0)
        copies[each.argmax()] += 1
    extra = np.repeat(np.arange(experts), copies - 1)
    each = weights / copies
    busy = chosen @ each
    sent = np.zeros((devices, devices), bool)
    for expert in extra[np.argsort(-each[extra], kind="stable")]:
        source = first[expert]
        possible = (free > 0) & ~chosen[:, expert] & (held[:, expert] | ~sent[source])
        if not possible.any():
            continue
        device = int(np.where(possible, busy, np.inf).argmin())
        chosen[device, expert] = True
        free[device] -= 1
        busy[device] += each[expert]
        sent[source, device] |= not held[device, expert]
    return chosen


def _swap(held: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The best swaps between the busiest device and lighter ones, as long as each gains enough: bool [D, E]."""
    held = held.copy()
    each = weights / held.sum(0)
    busy = held @ each
    for _ in range(_SWAPS):
        hottest = int(busy.argmax())
        best, choice = _GAIN * busy.mean(), None
        for device in np.flatnonzero(busy < busy[hottest]):
            give = np.flatnonzero(held[hottest] & ~held[device])
            take = np.flatnonzero(held[device] & ~held[hottest])
            if not len(give) or not len(take):
                continue
            moved = each[give][:, None] - each[take]
            gain = busy[hottest] - np.maximum(busy[hottest] - moved, busy[device] + moved)
            at = np.unravel_index(gain.argmax(), gain.shape)
            if gain[at] >= best and (choice is None or gain[at] > best):
                best, choice = float(gain[at]), (device, give[at[0]], take[at[1]])
        if choice is None:
            break
        device, given, taken = choice
        held[hottest, given] = held[device, taken] = False
        held[hottest, taken] = held[device, given] = True
        moved = each[given] - each[taken]
        busy[hottest] -= moved
        busy[device] += moved
    return held
