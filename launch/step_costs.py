"""What steps cost in a running testbed, measured before it serves, for `placement.lockstep` to predict with.

Messages and bytes are timed alone, steps with all experts at home by busy devices and rows. What a message takes as part
of a step, where cores and buffers are shared, comes from a few steps under a placement of its own that no strategy makes:
every expert once, dealt out over the devices. How long requests take is never looked at.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize, nnls

from launch.trace import Trace
from placement import Cluster
from placement.exchange_time import Exchange
from placement.lockstep import StepCosts
from placement.problem import Problem

PLAN = "dealt"  # name of the placement to calibrate with
_DRAWS = 5  # steps whose tokens are drawn to tell what messages a step of a kind has


def dealt(devices: int, layers: int, experts: int) -> np.ndarray:
    """Every expert on one device, in turn: bool [devices, layers, experts]."""
    owner = (np.arange(layers)[:, None] + np.arange(experts)) % devices
    return owner == np.arange(devices)[:, None, None]


def calibration_runs(devices: int, sequences: int, chunk: int) -> list[dict[str, Any]]:
    """Runs of a job (`launch.replay_server`): messages, steps at home with few and many devices and rows, and with messages."""
    common = {"plan": PLAN, "transport": "pairs"}
    kinds = [
        {"prefill": prefill, "active": active, "rows": rows}
        for prefill, most in ((False, sequences), (True, chunk))
        for active in ([0], list(range(devices)))
        for rows in sorted({max(1, most // 4), most})
    ]
    home = [{**common, "home": True, **kind, "steps": 9, "warm": 2} for kind in kinds]
    away = [{**common, **kind, "steps": 3 if kind["prefill"] else 7, "warm": 1} for kind in kinds]
    return [{**common, "ping": True}, *home, *away]


def calibrated(
    cluster: Cluster,
    trace: Trace,
    plans: Mapping[str, np.ndarray],
    runs: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Mapping[str, Any]]],
    sizes: Mapping[str, Any],
) -> tuple[Cluster, StepCosts]:
    """The cluster with measured links, and what steps take, from the results of `calibration_runs`."""
    first = [next(iter(found.values())) for found in results]
    latency, bandwidth = (np.array(first[0][key], float) for key in ("latency", "bandwidth"))
    within = float(latency.diagonal().max())
    np.fill_diagonal(latency, 0.0)
    np.fill_diagonal(bandwidth, np.inf)
    costs = {}
    for prefill in (False, True):
        steps = [(r, f) for r, f in zip(runs, first, strict=True) if r.get("home") and r["prefill"] is prefill]
        terms = np.array([[1, len(run["active"]), len(run["active"]) * run["rows"]] for run, _ in steps], float)
        seconds = np.array([found["compute_s"] for _, found in steps])
        # Relative errors count: a small step that is 1 ms off is worse than a large one.
        step, device, row = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0].tolist()
        costs[prefill] = step, device, row
    measured = dataclasses.replace(cluster, latency=latency, bandwidth=bandwidth)
    problem, base = Problem.build(trace.profile(**sizes), measured), StepCosts(costs[True], costs[False], within)
    steps = [(r, f) for r, f in zip(runs, first, strict=True) if "active" in r and not r.get("home")]
    return measured, _with_messages(base, problem, trace, plans, steps)


def _with_messages(
    base: StepCosts,
    problem: Problem,
    trace: Trace,
    plans: Mapping[str, np.ndarray],
    steps: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> StepCosts:
    """What a message and a row take in a step, so that the steps measured with messages are told best."""
    resident, serving, likely = (plans[f"{key}_{PLAN}"] for key in ("resident", "serving", "likely"))
    exchange = Exchange.build(problem, resident, **base.messages, serving=serving, likely=likely)
    drawn = [_tokens(run, trace, problem.device_server) for run, _ in steps]
    network = np.array([found["network_s"] for _, found in steps])
    compute = [found["compute_s"] for _, found in steps]

    def told(extra: float, row: float) -> np.ndarray:
        tried = dataclasses.replace(exchange, latency=exchange.latency + extra, row_seconds=row)
        each = zip(drawn, compute, strict=True)
        return np.array([np.median([tried.seconds(ids, s) - s for ids in draws]) for draws, s in each])

    def error(logs: np.ndarray) -> float:
        return float((np.log(told(*np.exp(logs)) / np.maximum(network, 1e-6)) ** 2).sum())

    found = minimize(error, np.log([2e-4, 2e-5]), method="Nelder-Mead", options={"maxiter": 50, "xatol": 0.02})
    extra, row = np.exp(found.x).tolist()
    return dataclasses.replace(base, message_extra=extra, row_seconds=row)


def _tokens(run: Mapping[str, Any], trace: Trace, server: np.ndarray) -> list[list[np.ndarray]]:
    """Routing of some steps of a kind, as `launch.replay_server` draws it: int [draws][devices][rows, layers, k]."""
    rng, draws = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        ids = [trace.ids[0][:0] for _ in server]
        for device in run["active"]:
            own = trace.ids[server[device] % len(trace.domains)]
            start = rng.integers(0, len(own) - run["rows"])
            ids[device] = own[start : start + run["rows"]]
        draws.append(ids)
    return draws
