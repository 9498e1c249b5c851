"""How long a token's experts keep the busiest device: of a token alone the longest of a few, not the mean. Decides nothing."""

import numpy as np

from placement.costs.token_sets import token_sets
from placement.data.problem import Problem

_ROWS = 2**12  # tokens handled at once
_DRAWS = 2**11  # of how experts fall on a server's devices


def longest_alone(problem: Problem, resident: np.ndarray, serving: np.ndarray) -> np.ndarray:
    """E[most experts of one token on one device, over its speed] of every source and layer: float64 [N, L].

    Counted on token-level sets, drawn where only counts are known. Of several copies within a server the first one's device
    serves.

    Args:
        resident: bool [D, L, E].
        serving: int [N, L, E], seen from the hosts of the layers.
    """
    servers, layers, _ = problem.shape
    first = np.zeros(problem.shape, np.int16)  # device of each server's copy
    for device in range(len(resident))[::-1]:
        here = resident[device]
        first[problem.device_server[device]][here] = device
    sets, layer = token_sets(problem), np.arange(layers)
    total = np.zeros((servers, layers))
    for start in range(0, len(sets.ids), _ROWS):
        rows = slice(start, start + _ROWS)
        ids, source = sets.ids[rows].astype(np.int64), sets.source[rows]
        expert = layer[:, None], ids
        device = first[serving[source[:, None, None], *expert], *expert]  # [T, L, k]
        longest = np.zeros(device.shape[:2])
        for i in range(device.shape[2]):
            same = (device == device[..., i : i + 1]).sum(-1)
            longest = np.maximum(longest, same / problem.speed[device[..., i]])
        np.add.at(total, source, longest)
    tokens = np.bincount(sets.source, minlength=servers)
    return total / np.maximum(tokens, 1)[:, None]


def longest_in_server(problem: Problem) -> np.ndarray:
    """E[most of c experts of a token on one device of server n, over its speed]: float64 [N, k + 1], by c.

    Experts fall on a server's devices by speed, as `device_assignment.spread` balances their load.
    """
    width = np.bincount(problem.device_server)
    found: dict[tuple[float, ...], np.ndarray] = {}
    result = np.empty((len(width), problem.top_k + 1))
    for server, start in enumerate(problem.first_device):
        speed = problem.speed[start : start + width[server]]
        key = tuple(speed.tolist())
        if key not in found:
            rng = np.random.default_rng(0)
            drawn = (rng.multinomial(c, speed / speed.sum(), _DRAWS) / speed for c in range(problem.top_k + 1))
            found[key] = np.array([own.max(-1).mean() for own in drawn])
        result[server] = found[key]
    return result
