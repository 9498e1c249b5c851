"""The first plan of `latency`: who holds which layers entire, and which parts of others the memory left is worth."""

import numpy as np

from placement.costs.routing import pair_price
from placement.costs.token_sets import Chains
from placement.data.problem import Problem

_SWEEPS = 8  # over all layers, at most, when hosts are exchanged


class Hull:
    """Knapsack of one server over layers: steps along the concave hulls of what prefixes of its chains serve.

    Attributes:
        steps: (layer, start, stop) of each step in the order of their worth.
    """

    def __init__(self, problem: Problem, chain: Chains, server: int, worth: np.ndarray, held: np.ndarray):
        """Hulls above what is held already.

        Args:
            worth: seconds saved where a layer's tokens are all served at home, float64 [L].
            held: bool [L, E], the first experts of each chain.
        """
        steps = []
        for layer in range(problem.shape[1]):
            served, s = chain.served[server, layer], int(held[layer].sum())
            while s < len(served) - 1:
                slope = (served[s + 1 :] - served[s]) / np.arange(1, len(served) - s)
                length = len(slope) - int(slope[::-1].argmax())  # the longest of the steepest
                value = float(slope.max() * worth[layer] / problem.expert_bytes[layer])
                steps.append((-value, layer, s, s + length))
                s += length
        steps.sort()
        self.steps = [step[1:] for step in steps]
        table = np.array(steps, np.float64).reshape(-1, 4)
        self._slope, self._layer = -table[:, 0], table[:, 1].astype(np.int64)
        self._bytes = ((table[:, 3] - table[:, 2]) * problem.expert_bytes[self._layer]).astype(np.int64)

    def value(self, hosted: np.ndarray, room: int) -> float:
        """Seconds that the best use of `room` bytes saves in the layers that are not hosted, bool [L]."""
        size = np.where(hosted[self._layer], 0, self._bytes)
        used = size - (size.cumsum() - room).clip(0, size)  # the last step in part
        return float(used @ self._slope)


def room_left(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Bytes left on each server, int64 [N], beside experts held, bool [N, L, E]."""
    return np.add.reduceat(problem.usable_bytes, problem.first_device) - held.sum(2) @ problem.expert_bytes


def host_layers(problem: Problem, chain: Chains, worth: np.ndarray) -> np.ndarray:
    """One copy of every expert, each layer on as few servers as possible: bool [N, L, E].

    A server hosts the layers in which a part of the experts would serve its own tokens least per byte: there all or
    nothing is best for it, while memory that it keeps free goes far in the other layers. Layers that no server has room
    for are cut into few pieces. With unequal sizes some experts may find no room.

    Args:
        chain: orders of experts that start from nothing held.
        worth: seconds saved where a layer's tokens are all served at home, float64 [N, L].
    """
    _, layers, experts = problem.shape
    held = np.zeros(problem.shape, bool)
    room = room_left(problem, held)
    whole = problem.expert_bytes * experts
    gain = (chain.served[..., 1:] / np.arange(1, experts + 1)).max(-1)
    host = np.full(layers, -1)
    for pair in np.argsort(gain, axis=None, kind="stable"):
        server, layer = divmod(int(pair), layers)
        if host[layer] < 0 and room[server] >= whole[layer]:
            host[layer] = server
            room[server] -= whole[layer]
    host = _exchange(problem, chain, worth, host)
    hosted = np.flatnonzero(host >= 0)
    held[host[hosted], hosted] = True
    room = room_left(problem, held)
    for layer in np.flatnonzero(host < 0):
        size, left = problem.expert_bytes[layer], np.ones(experts, bool)
        while left.any() and (slots := room // size).max() > 0:
            # The tightest server that takes all that is left, else the one that takes most of it.
            fits = slots >= left.sum()
            server = int(np.where(fits, slots, slots.max() + 1).argmin() if fits.any() else slots.argmax())
            wanted = chain.order[server, layer]
            taken = wanted[left[wanted]][: slots[server]]
            held[server, layer, taken], left[taken] = True, False
            room[server] -= len(taken) * size
    return held


def _exchange(problem: Problem, chain: Chains, worth: np.ndarray, host: np.ndarray) -> np.ndarray:
    """Exchange the hosts of two layers, or give one to another server, while that saves time.

    A server's saving is its knapsack's value and its hosted layers' worth, less what the others pay for reaching it.

    Args:
        host: server that holds each layer entire, or -1: int64 [L].
    """
    servers, layers, experts = problem.shape
    whole, room = problem.expert_bytes * experts, room_left(problem, np.zeros(problem.shape, bool))
    nothing = np.zeros((layers, experts), bool)
    hulls = [Hull(problem, chain, server, worth[server], nothing) for server in range(servers)]
    penalty = _penalty(problem, worth.mean(-1), room / max(1, whole.sum()))

    def saving(server: int, mine: np.ndarray) -> float:
        left = room[server] - int(whole[mine].sum())
        if left < 0:
            return -np.inf
        return hulls[server].value(mine, left) + float(worth[server, mine].sum() - mine.sum() * penalty[server])

    mine = host == np.arange(servers)[:, None]  # [N, L]
    value = np.array([saving(server, mine[server]) for server in range(servers)])
    least = 1e-9 * max(1e-30, abs(value).sum())
    for _ in range(_SWEEPS):
        improved = False
        for layer in np.flatnonzero(host >= 0):
            a, best, choice = int(host[layer]), least, None
            for b, other in [(b, -1) for b in range(servers)] + [(int(b), j) for j, b in enumerate(host) if b >= 0]:
                if b == a:
                    continue
                one, two = mine[a].copy(), mine[b].copy()
                one[layer], two[layer] = False, True
                if other >= 0:
                    one[other], two[other] = True, False
                now = saving(b, two)
                if now == -np.inf:
                    continue
                now = (saving(a, one), now)
                if sum(now) - value[a] - value[b] > best:
                    best, choice = sum(now) - value[a] - value[b], (b, other, one, two, now)
            if choice is not None:
                b, other, mine[a], mine[b], value[[a, b]] = choice
                host[layer] = b
                if other >= 0:
                    host[other] = a
                improved = True
        if not improved:
            break
    return host


def _penalty(problem: Problem, worth: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Seconds that the other servers pay for a layer hosted at m rather than at their usual partner, float64 [N].

    Args:
        worth: seconds a server pays for its usual partner, [N].
        share: part of the model that a server has room for, [N]; so much it does not ask others for.
    """
    price = pair_price(problem)
    away = ~np.eye(len(worth), dtype=bool)
    extra = np.where(away, price - worth[:, None], 0.0)
    return ((1 - np.minimum(share, 1.0))[:, None] * extra * (worth > 0)[:, None]).sum(0)


def layer_worth(problem: Problem, alone: np.ndarray, held: np.ndarray | None = None) -> np.ndarray:
    """Seconds saved where a layer's tokens are all served at home rather than by a partner, float64 [N, L].

    Args:
        alone: as for `pair_price`, [L].
        held: bool [N, L, E], who holds the one copy of each expert that there is: the partners of a layer, each counting
            by what it holds of it. None takes all servers alike.
    """
    price, servers = pair_price(problem, alone), len(problem.names)  # [L, N, N]
    if held is None:
        worth = price.sum(-1).T / max(1, servers - 1)
    else:
        part = held.sum(-1) / np.maximum(held.sum((0, 2)), 1)
        worth = np.einsum("lnm,ml->nl", price, part)
    return worth * problem.active[:, None]
