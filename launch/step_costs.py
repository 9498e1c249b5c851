"""What steps cost in a running testbed, measured before it serves, for `placement.lockstep` to predict with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from placement import Cluster
from placement.lockstep import StepCosts


def calibration_runs(plan: str, devices: int, sequences: int, chunk: int) -> list[dict[str, Any]]:
    """Runs of a job (`launch.replay_server`): messages, then steps at home with few and many busy devices and rows."""
    common = {"plan": plan, "transport": "pairs"}
    steps = [
        {**common, "home": True, "prefill": prefill, "active": active, "rows": rows, "steps": 9, "warm": 2}
        for prefill, most in ((False, sequences), (True, chunk))
        for active in ([0], list(range(devices)))
        for rows in sorted({max(1, most // 4), most})
    ]
    return [{**common, "ping": True}, *steps]


def calibrated(
    cluster: Cluster, runs: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Mapping[str, Any]]]
) -> tuple[Cluster, StepCosts]:
    """The cluster with measured links, and what steps take at home, from the results of `calibration_runs`."""
    first = [next(iter(found.values())) for found in results]
    latency, bandwidth = (np.array(first[0][key], float) for key in ("latency", "bandwidth"))
    within = float(latency.diagonal().max())
    np.fill_diagonal(latency, 0.0)
    np.fill_diagonal(bandwidth, np.inf)
    costs = {}
    for prefill in (False, True):
        steps = [(run, f) for run, f in zip(runs, first, strict=True) if run.get("prefill") is prefill]
        terms = np.array([[1, len(run["active"]), len(run["active"]) * run["rows"]] for run, _ in steps], float)
        seconds = np.array([found["compute_s"] for _, found in steps])
        # Relative errors count: a small step that is 1 ms off is worse than a large one.
        step, device, row = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0].tolist()
        costs[prefill] = step, device, row
    return dataclasses.replace(cluster, latency=latency, bandwidth=bandwidth), StepCosts(
        costs[True], costs[False], within
    )
