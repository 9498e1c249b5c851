"""Calibration of step costs: from steps of known costs it finds these costs again."""

import dataclasses
import json

import numpy as np
import pytest

from launch import testbed_run
from launch.step_costs import PLAN, _tokens, calibrated, calibration_runs, dealt
from launch.testbed_run import DEVICES, plan_arrays
from launch.trace import Trace
from placement.exchange_time import Exchange
from placement.lockstep import StepCosts
from placement.problem import Problem

LAYERS, EXPERTS, K = 4, 12, 3
SIZES = {"hidden_size": 500, "expert_bytes": 10}
TRUE = StepCosts((0.1, 0.02, 0.001), (0.01, 0.002, 0.0005), message_within=1e-4, message_extra=3e-4, row_seconds=5e-5)


@pytest.fixture
def trace(tmp_path, rng):
    arrays = {"meta": json.dumps({"model": "made-up", "domains": ["x", "y", "z"]})}
    for domain in "xyz":
        arrays[f"ids_{domain}"] = rng.random((400, LAYERS, EXPERTS)).argsort(-1)[..., :K].astype(np.uint8)
        arrays[f"gate_{domain}"] = np.full((400, LAYERS, K), 0.5, np.float16)
        arrays[f"seq_lens_{domain}"] = np.full(4, 100, np.int32)
    np.savez(tmp_path / "trace.npz", **arrays)
    return Trace.load(tmp_path / "trace.npz")


def test_known_costs_are_found_again(trace):
    cluster = testbed_run.testbed_cluster(trace, LAYERS * EXPERTS, 10, 1e8, None)
    true = dataclasses.replace(
        cluster, latency=np.where(np.eye(3, dtype=bool), 0.0, 4e-4), bandwidth=cluster.bandwidth / 2
    )
    resident = dealt(sum(DEVICES), LAYERS, EXPERTS)
    assert (resident.sum(0) == 1).all()
    assert resident.sum((1, 2)).tolist() == [LAYERS * EXPERTS // 4] * 4
    plans = plan_arrays(PLAN, resident, trace.profile(**SIZES), cluster)
    problem = Problem.build(trace.profile(**SIZES), true)
    tables = {key: plans[f"{key}_{PLAN}"] for key in ("serving", "likely")}
    exchange = Exchange.build(problem, resident, **TRUE.messages, **tables)
    runs, results = calibration_runs(4, 4, 32), []
    for run in runs:
        if "ping" in run:
            latency, rate = true.latency + np.diag([0, 0, 1e-4]), np.where(np.eye(3, dtype=bool), 0.0, true.bandwidth)
            results.append({"x": {"latency": latency.tolist(), "bandwidth": rate.tolist()}})
            continue
        compute = TRUE.seconds(run["prefill"], [run["rows"]] * len(run["active"]))
        steps = [exchange.seconds(ids, compute) - compute for ids in _tokens(run, trace, problem.device_server)]
        results.append({"x": {"compute_s": compute, "network_s": 0.0 if run.get("home") else float(np.median(steps))}})
    measured, costs = calibrated(cluster, trace, plans, runs, results, SIZES)
    np.testing.assert_allclose(measured.latency, true.latency)
    np.testing.assert_array_equal(measured.bandwidth, true.bandwidth)
    assert costs.prefill == pytest.approx(TRUE.prefill, rel=1e-6)
    assert costs.decode == pytest.approx(TRUE.decode, rel=1e-6)
    assert costs.message_within == TRUE.message_within
    assert costs.message_extra == pytest.approx(TRUE.message_extra, rel=0.05)
    assert costs.row_seconds == pytest.approx(TRUE.row_seconds, rel=0.05)
