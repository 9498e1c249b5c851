"""Large clusters as groups of servers, each with room for the whole model: who plans with whom.

One copy that all servers of a large cluster turn to is a queue, whatever its expected cost. A group that holds everything
needs nobody else, and its hosts serve its own members alone.
"""

from dataclasses import replace

import numpy as np

from placement.costs.routing import pair_price
from placement.data.problem import Problem, Tokens
from placement.data.statistics import divergence
from placement.files import InputError, show

TOGETHER = 8  # up to so many servers plan as one: the search counts what all of them make of a copy
COPIES = 1.1  # of all experts that a group has room for at least: less leaves its members hardly a choice
# Of a link's price, by which servers with nothing in common are nearer: what a group holds is then of use to more of them.
# On the grid of `simulate` at 64 GPUs and 100 Mbit/s unlike users together take 9.37 s a request, alike ones 9.52 s.
_UNLIKE = 0.25
_COMPARED = 2**27  # pairs of servers times experts of layers for which users are compared
_FAR = 2.0  # times the distance to the nearest group that a server for a new one is away at most


def choose_groups(problem: Problem) -> list[np.ndarray]:
    """Servers that plan together: as many groups as the memory allows, near by links, then unlike in their users.

    A group begins with the server that is furthest from those already in groups, and takes the nearest until its members
    have room for `COPIES` of every expert. Servers that are left over join the group nearest to them.

    Returns:
        Indices of servers, ascending, one array a group; one group of all for few servers or little memory.
    """
    servers = len(problem.names)
    room = np.add.reduceat(problem.usable_bytes, problem.first_device)
    needed = COPIES * float(problem.expert_bytes.sum()) * problem.shape[2]
    if servers <= TOGETHER or room.sum() < 2 * needed:
        return [np.arange(servers)]
    distance = _distance(problem)
    groups: list[list[int]] = []
    free, left = np.ones(servers, bool), []
    while room[free].sum() >= needed:
        taken = np.flatnonzero(~free)
        far = distance[:, taken].min(1) if len(taken) else distance.mean(1)
        group = [int(np.where(free, far, -np.inf).argmax())]
        free[group] = False
        home = distance[group[0], taken].min(initial=np.inf)
        while room[group].sum() < needed:
            away = np.where(free, distance[:, group].mean(1), np.inf)
            nearest = int(away.argmin())
            if away[nearest] > _FAR * home:  # what is left is further than the groups there are: join those
                break
            group.append(nearest)
            free[nearest] = False
        else:
            groups.append(group)
            continue
        left += group
    for server in [*left, *np.flatnonzero(free)]:
        nearest = min(range(len(groups)), key=lambda g: (distance[server, groups[g]].mean(), len(groups[g])))
        groups[nearest].append(int(server))
    return sorted((np.sort(group) for group in groups), key=lambda group: int(group[0]))


def named_groups(problem: Problem, groups: list[list[str]]) -> list[np.ndarray]:
    """Groups given by the names of their servers.

    Raises:
        InputError: a server is unknown, in two groups or in none, or a group has no room for one copy of every expert.
    """
    index = {name: i for i, name in enumerate(problem.names)}
    listed = [name for group in groups for name in group]
    for name in listed:
        if name not in index:
            raise InputError(f"groups: {show(name)}: no such server; known are {show(', '.join(index), 200)}")
    if len(set(listed)) < len(listed) or len(listed) < len(index):
        wrong = next((name for name in index if listed.count(name) != 1), "")
        raise InputError(f"groups: {show(wrong)} is in {listed.count(wrong)} of them; every server belongs to one")
    found = [np.sort([index[name] for name in group]) for group in groups]
    for group in found:
        part(problem, group).require_capacity()
    return found


def part(problem: Problem, group: np.ndarray) -> Problem:
    """The problem of one group: its servers, their devices, links and users."""
    devices = np.isin(problem.device_server, group)
    tokens = problem.tokens
    if tokens is not None:
        rows = np.isin(tokens.server, group)
        tokens = Tokens(tokens.ids[rows], np.searchsorted(group, tokens.server[rows]), tokens.sequence[rows])
        tokens = tokens if len(tokens.ids) else None
    total, layers = problem.frequency[group].sum(), problem.shape[1]
    counted = problem.counted * (total / problem.frequency.sum()) if total > 0 else 0.0
    return replace(
        problem,
        names=tuple(problem.names[n] for n in group),
        frequency=problem.frequency[group] * (layers / total if total > 0 else 0.0),
        budget=problem.budget[devices],
        device_server=np.searchsorted(group, problem.device_server[devices]),
        speed=problem.speed[devices],
        bandwidth=problem.bandwidth[np.ix_(group, group)],
        latency=problem.latency[np.ix_(group, group)],
        tokens=tokens,
        counted=counted,
    )


def _distance(problem: Problem) -> np.ndarray:
    """Price of the links between servers, there and back, a little less where their users have less in common: [N, N]."""
    price = pair_price(problem)
    price = (price + price.T) / 2
    servers, layers, experts = problem.shape
    few = int(np.clip(_COMPARED // (servers**2 * experts), 1, layers))  # of the layers, evenly taken
    demand = problem.demand[:, np.linspace(0, layers - 1, few).astype(np.int64)]
    unlike = np.array([np.nan_to_num(divergence(own, demand), nan=0.0).mean(-1) for own in demand])
    distance = price * (1 - _UNLIKE * unlike)
    np.fill_diagonal(distance, 0.0)
    return distance
