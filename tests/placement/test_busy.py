"""`latency` on a busy cluster: what a plan takes then, and which of several plans is taken."""

import math
from dataclasses import replace

import numpy as np
import pytest

from placement import Cluster, Problem, Profile, Workload
from placement.costs.step_time import predict
from placement.registry import STRATEGIES, home_strategies
from placement.strategies.latency.busy import busy_seconds
from placement.strategies.latency.choice import Known

LAYERS, EXPERTS = 4, 8


def problem_of(expert_bytes, *, counts=None, slots=14, workload=None):
    """Three servers of one device each, 500 Mbit/s and 0.2 ms apart, whose users are alike unless `counts` says otherwise."""
    servers = [{"name": name, "devices": [{"memory": slots * expert_bytes}]} for name in "abc"]
    cluster = Cluster.from_dict({"server": servers, "network": {"bandwidth": "500Mbps", "latency": "0.2ms"}})
    counts = np.full((3, LAYERS, EXPERTS), 10**6) if counts is None else counts
    profile = Profile(counts, cluster.names, "m", top_k=2, hidden_size=4096, expert_bytes=expert_bytes)
    return Problem.build(profile, cluster, workload)


def on_one_device(problem):
    resident = np.zeros((3, LAYERS, EXPERTS), bool)
    resident[0] = True
    return resident


def everywhere(problem):
    return np.ones((3, LAYERS, EXPERTS), bool)


def test_devices_that_serve_everybody_are_slow_when_busy():
    """At home all compute apart; on one device four sequences of each of three servers wait for each other."""
    problem = problem_of(350 * 10**6)
    apart, together = busy_seconds(problem, everywhere(problem)), busy_seconds(problem, on_one_device(problem))
    experts = 128 * LAYERS * 2 * 4 * float(problem.assignment_seconds[1][0])  # decode steps, experts, sequences
    assert apart >= experts
    assert together >= apart + experts  # at least one other server's sequences as well
    small = problem_of(1000)
    extra = [busy_seconds(p, on_one_device(p)) - busy_seconds(p, everywhere(p)) for p in (small, problem)]
    assert extra[0] < extra[1] / 3  # what is left is the network's


def test_more_sequences_take_longer():
    problems = [problem_of(10**8, workload=Workload(crowd=crowd)) for crowd in (1, 4, 16)]
    seconds = [busy_seconds(problem, on_one_device(problem)) for problem in problems]
    assert seconds[0] < seconds[1] < seconds[2]
    active = problem_of(10**8, workload=Workload(active=16))  # more than `crowd`
    assert busy_seconds(active, on_one_device(active)) == seconds[2]


@pytest.mark.parametrize("seed", range(3))
def test_large_experts_are_planned_for_both(seed):
    """Of few and large experts no other strategy's plan is faster on an idle cluster and on a busy one."""
    rng = np.random.default_rng(seed)
    counts = (3e3 * rng.dirichlet(np.full(EXPERTS, 4.0), (3, LAYERS))).astype(np.int64)
    problem = problem_of(200 * 10**6, counts=counts)
    seconds = {}
    for name in home_strategies():
        resident = STRATEGIES[name](problem)
        seconds[name] = predict(problem, resident)["step_seconds"], busy_seconds(problem, resident)
    mine = seconds.pop("latency")
    for i in range(2):
        assert mine[i] <= 1.02 * min(pair[i] for pair in seconds.values())


def test_a_small_gain_on_few_tokens_is_not_believed():
    problem = problem_of(10**6)
    given, other = everywhere(problem), everywhere(problem)
    other[0, 0, 0] = False
    for counted, gain, taken in (
        (100, 0.04, given),
        (100, 0.06, other),
        (10**6, 0.04, other),
        (math.inf, 1e-6, other),
        (0, 1e-6, other),
    ):
        known = Known(replace(problem, counted=counted), None, [given])
        known.plans.append(other)
        known.seconds.append((known.seconds[0][0] * (1 - gain), known.seconds[0][1] * (1 - gain)))
        assert known.best() is (known.plans[0] if taken is given else other)
