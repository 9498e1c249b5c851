"""Arrivals: the right rate, the right domain, the same again for the same seed."""

import dataclasses

import numpy as np
import pytest

from launch.demo.arrivals import PoissonWorkload

PROMPTS = {"code": [[1, 2], [3]], "prose": [[4, 5, 6]]}


def workload(seed=0, rate=5.0):
    return PoissonWorkload(PROMPTS, ["code", "prose"], rate, (2, 4), seed)


def test_arrivals_are_poisson_at_every_server():
    requests = workload().due(2000.0)
    for server in range(2):
        times = np.array([r.arrival_s for r in requests if r.server == server])
        gaps = np.diff(times)
        assert gaps.mean() == pytest.approx(0.2, rel=0.05)
        assert gaps.std() == pytest.approx(0.2, rel=0.07)
    assert [r.arrival_s for r in requests] == sorted(r.arrival_s for r in requests)
    assert {len(r.output) for r in requests} == {0}
    assert {r.max_tokens for r in requests} == {2, 3, 4}


def test_domain_follows_the_server_and_can_change():
    load = workload()
    assert {(r.server, r.label) for r in load.due(20)} == {(0, "code"), (1, "prose")}
    load.domains = ["prose", "code"]
    later = load.due(40)
    assert {(r.server, r.label) for r in later} == {(0, "prose"), (1, "code")}
    assert all(r.prompt in PROMPTS[r.label] for r in later)


def test_same_seed_same_requests_and_nothing_is_due_twice():
    a, b, other = workload(), workload(), workload(seed=1)
    first = [(r.server, r.arrival_s, r.max_tokens) for r in [*a.due(5), *a.due(10)]]
    assert first == [(r.server, r.arrival_s, r.max_tokens) for r in b.due(10)]
    assert first != [(r.server, r.arrival_s, r.max_tokens) for r in other.due(10)]
    assert a.next_s > 10


def test_no_request_comes_until_there_is_a_rate():
    quiet = workload(rate=0.0)
    assert quiet.due(1e6) == []
    later = dataclasses.replace(quiet, rate=5.0)
    assert [r.arrival_s for r in later.due(10)] == [r.arrival_s for r in workload(rate=5.0).due(10)]
