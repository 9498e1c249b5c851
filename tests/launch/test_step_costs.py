"""Calibration of step costs: from steps of known costs it finds these costs again."""

import dataclasses
import json

import numpy as np
import pytest

from launch.bench.harness import job as testbed_run
from launch.bench.harness.job import DEVICES, plan_arrays
from launch.bench.harness.step_costs import _tokens, calibrated, calibration_plans, calibration_runs
from launch.bench.harness.trace import Trace
from placement.data.problem import Problem
from placement.simulation.lockstep.exchange import Exchange
from placement.simulation.lockstep.predict import StepCosts

LAYERS, EXPERTS, K = 4, 12, 3
SIZES = {"hidden_size": 500, "expert_bytes": 10}
TRUE = StepCosts(
    (0.1, 0.02, 0.001),
    (0.01, 0.002, 0.0005),
    message_seconds=3e-4,
    row_seconds=5e-5,
    contention=0.4,
    prefill_overhead=3e-3,
    decode_overhead=2e-4,
)


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
    problem, plans, exchanges = Problem.build(trace.profile(**SIZES), true), {}, {}
    for name, resident in calibration_plans(sum(DEVICES), LAYERS, EXPERTS).items():
        assert (resident.sum(0) == 1).all()
        assert resident.sum((1, 2)).tolist() == [LAYERS * EXPERTS // 4] * 4
        plans |= plan_arrays(name, resident, trace.profile(**SIZES), cluster)
        tables = {key: plans[f"{key}_{name}"] for key in ("serving", "likely")}
        exchanges[name] = Exchange.build(problem, resident, **TRUE.messages, **tables)
    runs, results = calibration_runs(4, 4, 32), []
    for number, run in enumerate(runs):
        if "ping" in run:
            # All but the fastest came in somebody's way.
            latency, rate = (1 + number) * true.latency, np.where(np.eye(3, dtype=bool), 0.0, true.bandwidth)
            results.append({"x": {"latency": latency.tolist(), "bandwidth": rate.tolist()}})
            continue
        compute = TRUE.seconds(run["prefill"], [run["rows"]] * len(run["active"]))
        network = 0.0
        if not run.get("home"):
            exchange, overhead = exchanges[run["plan"]], TRUE.overhead(run["prefill"])
            drawn = _tokens(run, trace, problem.device_server)
            network = float(np.median([exchange.seconds(ids, compute, overhead) for ids in drawn])) - compute
        results.append({"x": {"compute_s": compute, "network_s": network}})
    measured, costs = calibrated(cluster, trace, plans, runs, results, SIZES)
    np.testing.assert_allclose(measured.latency, true.latency)
    np.testing.assert_array_equal(measured.bandwidth, true.bandwidth)
    assert costs.prefill == pytest.approx(TRUE.prefill, rel=1e-6)
    assert costs.decode == pytest.approx(TRUE.decode, rel=1e-6)
    for name in ("message_seconds", "row_seconds", "contention", "prefill_overhead", "decode_overhead"):
        assert getattr(costs, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name
