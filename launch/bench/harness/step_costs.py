"""What steps cost in a running testbed, measured before it serves, for `placement.simulation.lockstep.predict` to predict with.

Links are timed alone, steps with all experts at home by busy devices and rows. What messages and rows take as part of a
step, where cores and buffers are shared, comes from a few steps under two placements that no strategy makes: every expert
once, sharded over the devices, so that every layer exchanges with all; and every layer whole on one device, so that
each exchanges with one. How long requests take is never looked at.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from launch.bench.harness.trace import Trace
from placement import Cluster
from placement.data.problem import Problem
from placement.simulation.lockstep.exchange import Exchange
from placement.simulation.lockstep.predict import StepCosts

_PINGS = 3  # of which the fastest counts: what slows a message down in a step comes from steps
_DRAWS = 3  # steps whose tokens are drawn to tell what messages a step of a kind has
_FITTED = ("message_seconds", "row_seconds", "contention", "prefill_overhead", "decode_overhead")
_BEGIN = (1e-4, 1e-5, 0.3, 1e-3, 1e-5)


def calibration_plans(devices: int, layers: int, experts: int) -> dict[str, np.ndarray]:
    """Placements to calibrate with, by name: bool [devices, layers, experts], every expert on one device."""
    layer, expert = np.arange(layers)[:, None], np.arange(experts)
    owners = {"sharded": (layer + expert) % devices, "whole": np.broadcast_to(layer % devices, (layers, experts))}
    return {name: owner == np.arange(devices)[:, None, None] for name, owner in owners.items()}


def calibration_runs(devices: int, sequences: int, chunk: int) -> list[dict[str, Any]]:
    """Runs of a job (replay_server.py): messages, steps at home with few and many devices and rows, and with messages."""
    common = {"plan": "sharded", "transport": "pairs"}
    kinds = [
        {"prefill": prefill, "active": active, "rows": rows}
        for prefill, most in ((False, sequences), (True, chunk))
        for active in ([0], [devices - 1], [0, 1], list(range(devices)))
        for rows in sorted({max(1, most // 4), most})
    ]
    home = [{**common, "home": True, **kind, "steps": 7, "warm": 1} for kind in kinds]
    away = [
        {**common, "plan": plan, **kind, "steps": 3 if kind["prefill"] else 9, "warm": 1}
        for plan in ("sharded", "whole")
        for kind in kinds
    ]
    return [*[{**common, "ping": True}] * _PINGS, *home, *away]


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
    pings = [found for run, found in zip(runs, first, strict=True) if "ping" in run]
    latency = np.min([found["latency"] for found in pings], axis=0)
    bandwidth = np.median([found["bandwidth"] for found in pings], axis=0)
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
    problem, base = Problem.build(trace.profile(**sizes), measured), StepCosts(costs[True], costs[False])
    steps = [(r, f) for r, f in zip(runs, first, strict=True) if "active" in r and not r.get("home")]
    return measured, _with_messages(base, problem, trace, plans, steps)


def _with_messages(
    base: StepCosts,
    problem: Problem,
    trace: Trace,
    plans: Mapping[str, np.ndarray],
    steps: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> StepCosts:
    """What messages, rows and taking part in an exchange cost, fitted to the steps that were measured with messages."""
    drawn = [_tokens(run, trace, problem.device_server) for run, _ in steps]
    compute = np.array([found["compute_s"] for _, found in steps])
    whole = compute + [found["network_s"] for _, found in steps]

    def errors(logs: np.ndarray) -> np.ndarray:
        tried = dataclasses.replace(base, **dict(zip(_FITTED, np.exp(logs).tolist(), strict=True)))
        exchanges = {}
        for name in dict.fromkeys(run["plan"] for run, _ in steps):
            resident, serving, likely = (plans[f"{key}_{name}"] for key in ("resident", "serving", "likely"))
            how: dict[str, Any] = {**tried.messages, "serving": serving, "likely": likely}
            exchanges[name] = Exchange.build(problem, resident, **how)
        predicted = [
            np.median([exchanges[run["plan"]].seconds(ids, seconds, tried.overhead(run["prefill"])) for ids in draws])
            for (run, _), draws, seconds in zip(steps, drawn, compute, strict=True)
        ]
        return np.log(predicted / whole)

    found = least_squares(errors, np.log(_BEGIN), diff_step=0.02, max_nfev=30)
    return dataclasses.replace(base, **dict(zip(_FITTED, np.exp(found.x).tolist(), strict=True)))


def _tokens(run: Mapping[str, Any], trace: Trace, server: np.ndarray) -> list[list[np.ndarray]]:
    """Routing of some steps of a kind, as replay_server.py draws it: int [draws][devices][rows, layers, k]."""
    rng, draws = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        ids = [trace.ids[0][:0] for _ in server]
        for device in run["active"]:
            own = trace.ids[server[device] % len(trace.domains)]
            start = rng.integers(0, len(own) - run["rows"])
            ids[device] = own[start : start + run["rows"]]
        draws.append(ids)
    return draws
