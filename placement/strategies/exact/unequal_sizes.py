"""Experts of unequal sizes: a plan from prices, and where the problem is small one from a mixed-integer solver."""

from typing import Any

import numpy as np

from placement.data.problem import Problem
from placement.files import InputError
from placement.strategies.device_assignment import repair, spread
from placement.strategies.exact.transportation import LARGEST, best_response, transport

_SMALL = 3_000  # servers x layers x experts up to which the mixed-integer solver is asked
_SECONDS = 20
_NODES = 2_000


def relaxation_prices(value: np.ndarray, size: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Optimal server prices per byte of the linear relaxation, through HiGHS: float64 [N].

    Args:
        value: float64 [N, I].
        size: int64 [I].
        capacity: int64 [N], bytes.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    servers, items = value.shape
    scale = float(size.max())
    memory = sparse.kron(sparse.eye_array(servers), sparse.coo_array(size[None] / scale))
    cover = sparse.kron(np.ones((1, servers)), sparse.eye_array(items))
    found = linprog(
        -value.ravel(),
        A_ub=sparse.vstack([memory, -cover]).tocsr(),
        b_ub=np.concatenate([capacity / scale, -np.ones(items)]),
        bounds=(0, 1),
        method="highs",
    )
    return np.maximum(0.0, -found.ineqlin.marginals[:servers]) / scale if found.status == 0 else np.zeros(servers)


def solve_unequal(problem: Problem, price: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """The better of a plan from prices and, on small problems, one from the mixed-integer solver: bool [D, L, E].

    Args:
        price: float64 [N], per byte.
        previous: bool [D, L, E] or None; breaks ties in the solver, and counts as a candidate itself.

    Raises:
        InputError: no way to pack the experts into the devices was found.
    """
    found, refusal = [], None
    try:
        found.append(repair(problem, spread(problem, _from_prices(problem, price), previous)))
    except InputError as error:
        refusal = error
    if problem.frequency.size <= _SMALL:
        counts = _slot_counts(problem, previous)
        if counts is not None:
            found.append(_fill_counts(problem, counts, previous))
    if not found and refusal is not None:
        raise refusal
    if previous is not None and previous.any(0).all() and (problem.used_bytes(previous) <= problem.budget).all():
        found.insert(0, previous.copy())
    local = [problem.frequency[problem.held(resident)].sum() for resident in found]
    return found[int(np.argmax(np.array(local) >= max(local) * (1 - 1e-12)))]


def _from_prices(problem: Problem, price: np.ndarray) -> np.ndarray:
    """What prices suggest, trimmed to each server's bytes: what gains least per byte goes first, bool [N, L, E]."""
    servers = len(problem.names)
    size = np.repeat(problem.expert_bytes, problem.shape[2])
    flat = problem.frequency.reshape(servers, -1)
    cost = price[:, None] * size
    held = best_response(flat, cost)
    density = (flat - cost) / size
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device)
    for n in range(servers):
        items = np.flatnonzero(held[n])
        # Only copies go at first; an expert's last one goes where even that is not enough, for `repair` to place.
        last = held[:, items].sum(0) == 1
        order = items[np.lexsort((density[n, items], last))]
        freed = np.cumsum(size[order])
        excess = size[items].sum() - capacity[n]
        if excess > 0:
            held[n, order[: int(np.searchsorted(freed, excess)) + 1]] = False
    return held.reshape(problem.shape)


def _slot_counts(problem: Problem, previous: np.ndarray | None) -> np.ndarray | None:
    """How many experts of each layer each device holds in the best plan found, int64 [D, L]; None if none was found.

    Only the counts are integers: given them, which experts a server holds is a transportation problem, whose vertices
    are integral. Variables: share x[n, l, e] in [0, 1], then counts z[d, l].
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    servers, layers, experts = problem.shape
    devices = len(problem.budget)
    value = problem.frequency.copy()
    if previous is not None:  # in sum less than what the solver's tolerance can tell apart from nothing
        value += problem.held(previous) * (1e-9 * max(float(value.max()), 1e-300))
    scale = float(problem.expert_bytes.max())
    per_layer = sparse.kron(sparse.eye_array(servers * layers), np.ones((1, experts)))
    belongs = problem.device_server == np.arange(servers)[:, None]
    gather = sparse.kron(sparse.coo_array(belongs.astype(float)), sparse.eye_array(layers))
    cover = sparse.kron(np.ones((1, servers)), sparse.eye_array(layers * experts))
    memory = sparse.kron(sparse.eye_array(devices), sparse.coo_array(problem.expert_bytes[None] / scale))
    empty = sparse.coo_array((layers * experts, devices * layers)), sparse.coo_array((devices, value.size))
    needed: Any = np.ones(layers * experts)
    room: Any = problem.budget / scale
    constraints = [
        LinearConstraint(sparse.hstack([per_layer, -gather]).tocsr(), 0, 0),
        LinearConstraint(sparse.hstack([cover, empty[0]]).tocsr(), needed),
        LinearConstraint(sparse.hstack([empty[1], memory]).tocsr(), ub=room),
    ]
    none: Any = np.zeros(value.size + devices * layers)
    most: Any = np.concatenate([np.ones(value.size), np.full(devices * layers, float(experts))])
    found = milp(
        np.concatenate([-value.ravel(), np.zeros(devices * layers)]),
        constraints=constraints,
        bounds=Bounds(none, most),
        integrality=np.repeat([0, 1], [value.size, devices * layers]),
        options={"time_limit": _SECONDS, "node_limit": _NODES, "mip_rel_gap": 1e-5},
    )
    if found.x is None:
        return None
    counts = np.rint(found.x[value.size :]).astype(np.int64).reshape(devices, layers)
    # The solver keeps constraints within a tolerance; bytes have none.
    fits = (counts @ problem.expert_bytes <= problem.budget).all() and (counts.sum(0) >= experts).all()
    return counts if fits else None


def _fill_counts(problem: Problem, counts: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """The best experts for given counts per device and layer, spread within each server by load: bool [D, L, E]."""
    servers, layers, experts = problem.shape
    capacity = np.minimum(np.add.reduceat(counts, problem.first_device), experts)
    top = max(float(problem.frequency.max()), 1e-300)
    unit = experts * servers + 1
    weight = np.rint(problem.frequency / top * min(LARGEST // unit - 1, 2**40)).astype(np.int64) * unit
    if previous is not None:
        weight += problem.held(previous)
    resident = np.zeros((len(counts), layers, experts), bool)
    for layer in range(layers):
        held = transport(weight[:, layer], capacity[:, layer])
        for n in range(servers):
            devices = np.flatnonzero(problem.device_server == n)
            room, load = counts[devices, layer].copy(), np.zeros(len(devices))
            for expert in sorted(np.flatnonzero(held[n]), key=lambda e: -problem.demand[n, layer, e]):
                free = room > 0
                if previous is not None and (free & previous[devices, layer, expert]).any():
                    free &= previous[devices, layer, expert]
                choice = int(np.where(free, load / problem.speed[devices], np.inf).argmin())
                resident[devices[choice], layer, expert] = True
                room[choice] -= 1
                load[choice] += problem.demand[n, layer, expert]
    return resident
