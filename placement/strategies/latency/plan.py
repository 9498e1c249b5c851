"""Placement for the least expected step time: layers served wholly at home, and what is not from few partners.

Expected remote calls are the wrong measure: one remote call of a layer costs a whole exchange, and a token travels once
to a server however many experts it needs there. So first every layer gets one server that holds it entire, where that
costs least; then the memory left serves whole tokens of its own users; then single experts change places for as long as
the expected time falls.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from placement.costs.network_use import network_use
from placement.costs.routing import serving_server
from placement.costs.token_sets import TokenSets, chains, token_sets
from placement.data.problem import Problem
from placement.strategies.baselines import redundance
from placement.strategies.dance import dance
from placement.strategies.device_assignment import repair, spread
from placement.strategies.eplb import eplb_nodup
from placement.strategies.exact.optimum import exact
from placement.strategies.latency.choice import Known
from placement.strategies.latency.groups import choose_groups, part
from placement.strategies.latency.local_search import WORK, local_search
from placement.strategies.latency.whole_layers import Hull, host_layers, layer_worth, room_left

_GROUPS = 8  # groups that are searched as long as one alone; more share that time
_APART = 8  # groups for each process at least: it takes a second to start
_RARE = 1e-6  # chance that a layer outside the shared ones is worth keeping free of exchanges


def latency(
    problem: Problem,
    *,
    previous: np.ndarray | None = None,
    seed: int = 0,
    groups: list[np.ndarray] | None = None,
    jobs: int = 1,
) -> np.ndarray:
    """Least predicted `step_seconds` that whole layers, the fewest remote calls or the plan in force lead to.

    minimise over placements  prefill(workload) + decode_steps x decode(workload), see `step_time.predict`

    A cluster with room for the model several times over is planned as groups of servers (`groups.choose_groups`).

    Args:
        problem: has room for one copy of every expert; its `workload` weighs exchanges against bytes.
        previous: bool [D, L, E], the placement in force; among equally fast plans the one that moves fewest bytes wins.
        seed: for sets drawn where only counts are known.
        groups: indices of the servers of each group; None chooses them.
        jobs: processes that plan many groups; the plan is the same for any number.

    Returns:
        bool [D, L, E], every expert covered, every device within its budget, no duplicate within a server.

    Raises:
        InputError: experts of unequal sizes do not pack into the devices; never with room for one more on each device.
    """
    if previous is not None and not problem.frequency.any() and _fits(problem, previous):
        return previous.copy()  # nothing was seen that speaks for another
    groups = choose_groups(problem) if groups is None else groups
    if len(groups) == 1:
        return _plan(problem, previous, seed, WORK)
    resident = np.zeros((len(problem.budget), *problem.shape[1:]), bool)
    work = min(WORK, _GROUPS * WORK // len(groups))
    devices = [np.isin(problem.device_server, group) for group in groups]
    tasks = (
        (part(problem, group), None if previous is None else previous[mine], seed, work)
        for group, mine in zip(groups, devices, strict=True)
    )
    for mine, planned in zip(devices, _planned(tasks, len(groups), jobs), strict=True):
        resident[mine] = planned
    return resident


def _planned(tasks: Iterable[tuple[Any, ...]], number: int, jobs: int) -> Iterator[np.ndarray]:
    """The plan of each group in turn, made in processes of their own where there are many."""
    if min(jobs, number // _APART) < 2:
        yield from (_plan(*task) for task in tasks)
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(min(jobs, number // _APART)) as pool:
        yield from pool.imap(_group, tasks, chunksize=_APART)


def _group(task: tuple[Any, ...]) -> np.ndarray:
    return _plan(*task)


def _plan(problem: Problem, previous: np.ndarray | None, seed: int, work: int) -> np.ndarray:
    """The plan of one group."""
    sets = token_sets(problem, seed)
    plans = [dance(problem, previous=previous)]
    if (problem.expert_bytes == problem.expert_bytes[0]).all():  # with unequal sizes the optimum takes a solver
        plans.append(exact(problem, previous=previous))
        # These two may have an expert on several devices of a server.
        held = (problem.held(strategy(problem, seed=seed)) for strategy in (redundance, eplb_nodup))
        plans += [_to_devices(problem, own, previous) for own in held]
    if previous is not None and _fits(problem, previous):
        plans.append(previous)
    known = Known(problem, previous, plans)
    known.add([_to_devices(problem, held, previous) for held in _whole_layers(problem, sets)])
    starts = [known.fastest_when_idle()]
    for crowd in (problem.workload.active, problem.workload.most):
        held = problem.held(starts[-1])
        improved = local_search(problem, sets, held, previous, crowd=crowd, work=work)
        if (improved != held).any():
            starts.append(_to_devices(problem, improved, previous))
            known.add(starts[-1:])
        if any(known.best() is plan for plan in starts):
            break
        starts = [known.best()]  # good on an idle cluster alone: search again, from what is taken and for a busy one
    return known.best().copy()


def _to_devices(problem: Problem, held: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    return repair(problem, spread(problem, held, previous))


def _fits(problem: Problem, resident: np.ndarray) -> bool:
    once = np.add.reduceat(resident.astype(np.int64), problem.first_device).max() <= 1
    return bool(once and resident.any(0).all() and (problem.used_bytes(resident) <= problem.budget).all())


def _whole_layers(problem: Problem, sets: TokenSets) -> list[np.ndarray]:
    """Plans from hosted layers, bool [N, L, E] each; several where many sequences are active at once.

    Then a layer that one of them waits for is lost for the others, so layers that few tokens leave are worth more: a
    second plan weighs layers by what the first one leaves to wait for, a third one makes all servers hold the same
    layers, as many as the memory beyond one copy of everything takes.
    """
    chain, demand = chains(problem, sets), problem.active

    def plan(alone: np.ndarray) -> np.ndarray:
        held = host_layers(problem, chain, layer_worth(problem, alone))
        if not held.any(0).all():
            held = problem.held(_to_devices(problem, held, None))
        return _fill(problem, sets, held, layer_worth(problem, alone, held))

    plans = [plan(np.ones(problem.shape[1]))]
    if problem.workload.active == 1 or demand.sum() < 2:
        return plans
    need = network_use(problem, serving_server(problem, plans[0])).need[demand].mean(0)
    plans.append(plan((1 - need) ** (problem.workload.active - 1)))
    whole = problem.expert_bytes * problem.shape[2]
    bytes_for_all = whole[np.argsort(need, kind="stable")].cumsum() * (demand.sum() - 1)
    shared = np.argsort(need, kind="stable")[bytes_for_all <= problem.usable_bytes.sum() - whole.sum()]
    if len(shared):
        plans.append(plan(np.where(np.isin(np.arange(problem.shape[1]), shared), 1.0, _RARE)))
    return plans


def _fill(problem: Problem, sets: TokenSets, held: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """Spend each server's free memory where it serves most whole tokens of its own per byte: bool [N, L, E]."""
    held, room = held.copy(), room_left(problem, held)
    chain = chains(problem, sets, held)
    for server in np.flatnonzero((room >= problem.expert_bytes.min()) & ~held.all((1, 2))):
        for layer, start, stop in Hull(problem, chain, int(server), worth[server], held[server]).steps:
            size = problem.expert_bytes[layer]
            stop = min(stop, start + int(room[server] // size))
            held[server, layer, chain.order[server, layer, start:stop]] = True
            room[server] -= max(0, stop - start) * size
    return held
