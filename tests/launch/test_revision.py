"""What a revision of the placement weighs, and the process that it is weighed in."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch.migration.decision import pace
from launch.migration.revision import Revision, weigh
from placement import Cluster, Placement, Problem, Profile, Workload
from placement.data.arrivals import Arrivals
from placement.migration.decide import Confirmation, Figures, Policy
from placement.simulation.independent.events import simulate
from placement.simulation.independent.replan import Replan, weigh_plan
from placement.simulation.independent.unit_costs import Compute
from tests.helpers.cluster_of_devices import CAPACITY, EXPERT, placement_of, random_resident

CHUNK = Workload(active=1, prefill_tokens=8, decode_steps=4)


@pytest.mark.parametrize(
    ("seen", "workload", "chunks"),
    [
        ([10, 40, 640, 80, 5], Workload(active=2, prefill_tokens=64, decode_steps=4), 2.0),
        ([5, 20, 320, 40, 2.5], Workload(active=2, prefill_tokens=64, decode_steps=4), 2.0),  # decayed by half
        ([0, 40, 0, 120, 8], Workload(active=3, prefill_tokens=0, decode_steps=40), 0.125),
        ([3, 0, 90, 0, 6], Workload(active=1, prefill_tokens=30, decode_steps=0), 0.5),
        ([0, 0, 0, 0, 60], Workload(), 0.0),
    ],
)
def test_the_pace_of_a_workload(seen, workload, chunks):
    assert pace(np.array(seen)) == (workload, chunks)


@pytest.mark.parametrize(
    ("saving", "cost", "step", "planned", "says"),
    [
        (1.06, 1.0, 1.0, 0.9, ""),
        (1.04, 1.0, 1.0, 0.9, "does not pay"),
        (0.0, 0.0, 1.0, 1.0, "does not pay"),
        (9.0, 1.0, 1.0, 0.98, "saves less than 3 % of a step"),
        (9.0, 1.0, 1.0, 0.96, ""),
    ],
)
def test_what_speaks_against_a_plan(saving, cost, step, planned, says):
    figures = Figures(step, planned, 0.5, 0.1, saving, cost, 1.0, 100, 1, 1)
    assert figures.objection(Policy(margin=0.05, least=0.03)) == says


def two_servers(counts):
    """A cluster of two, room for one of two experts on each, and what its users activate."""
    devices = [{"memory": 1000, "load_bandwidth": "10MB/s"}]
    tables = [{"name": name, "devices": devices} for name in ("a", "b")]
    cluster = Cluster.from_dict({"server": tables, "network": {"bandwidth": "10Mbps", "latency": "5ms"}})
    seen = Profile(np.array(counts)[:, None], cluster.names, model="m", top_k=1, hidden_size=512, expert_bytes=1000)
    return cluster, seen


@pytest.mark.parametrize(
    ("counts", "every", "policy", "says"),
    [
        ([[90, 10], [10, 90]], 2.0, Policy(), ""),
        ([[90, 10], [10, 90]], 1e5, Policy(), "does not pay"),  # hardly any request
        ([[90, 10], [10, 90]], 2.0, Policy(stall=1e5), "does not pay"),
        ([[90, 10], [10, 90]], 2.0, Policy(margin=1e6), "does not pay"),
        ([[90, 10], [10, 90]], 2.0, Policy(horizon=5e-5), "does not pay"),  # over before the weights are there
        ([[90, 10], [10, 90]], 2.0, Policy(interference=1e6), "does not pay"),
        ([[10, 90], [90, 10]], 2.0, Policy(), "does not pay"),
        ([[505, 495], [495, 505]], 0.1, Policy(), "saves less than 3 % of a step"),
        ([[505, 495], [495, 505]], 0.1, Policy(least=1e-6), ""),
        ([[90, 10], [10, 90]], 2.0, Policy(least=0.99), "saves less than 99 % of a step"),
    ],
)
def test_the_simulator_decides_as_the_runtime_does(counts, every, policy, says):
    """One prompt chunk of 8 tokens and 4 decode steps come at each server every so many seconds."""
    cluster, seen = two_servers(counts)
    problem = Problem.build(seen, cluster)
    before = np.array([[[0, 1]], [[1, 0]]], bool)
    after = before[::-1]
    model = {"name": "m", "layers": 1, "experts": 2, "top_k": 1, "expert_bytes": 1000}
    old, new = (Placement(resident, cluster.device_names, "test", model) for resident in (before, after))
    _, figures = weigh(Revision(seen, cluster, cluster, old, policy, target=new, workload=CHUNK, chunks=2 / every))
    compute = Compute(prefill_token=1e-5, expert_share=0.5, decode_step=1e-5, decode_token=1e-5)
    replan = Replan(lambda *_: after, cluster.load_bandwidth, policy)
    simulated = weigh_plan(problem, before, after, np.array([8, 5]), np.full(2, 1 / every), compute, replan)
    assert figures.objection(policy) == simulated.objection == says


def test_the_simulator_confirms_as_the_runtime_does():
    """Of the first interval's plan, proven in the second; where servers trade places all the time, never."""
    cluster, seen = two_servers([[90, 10], [10, 90]])
    problem, before = Problem.build(seen, cluster), np.array([[[0, 1]], [[1, 0]]], bool)
    arrivals = Arrivals.poisson(2, 2.0, 300.0, [[8, 5]], seed=1)
    compute = Compute(prefill_token=1e-5, expert_share=0.5, decode_step=1e-5, decode_token=1e-5)
    for confirm, reasons in (
        (1, [""]),
        (2, ["has yet to pay in an interval that it was not planned from", ""]),
        (3, ["has yet to pay in an interval that it was not planned from"] * 2 + [""]),
    ):
        replan = Replan(lambda *_: before[::-1], cluster.load_bandwidth, Policy(interval=50.0, confirm=confirm))
        done = simulate(problem, before, arrivals, compute, replan=replan).migrations
        assert [one["why"] for one in done[:confirm]] == reasons
        assert [one["adopted"] for one in done[:confirm]] == [reason == "" for reason in reasons]
        waiting, decided = Confirmation(), []
        for _ in range(confirm):
            proven = waiting.plan is not None and waiting.proven(replan.policy, "")
            decided.append(waiting.objection(replan.policy, "plan", proven))
        assert decided == reasons


def test_staging_takes_as_long_as_the_slowest_server(rng):
    before, after = placement_of(random_resident(rng)), placement_of(random_resident(rng))
    new = (after.resident & ~before.resident).sum((1, 2)) * EXPERT
    disk = Cluster.from_dict(
        {
            "server": [
                {"name": "a", "devices": [{"memory": CAPACITY[0] * EXPERT, "load_bandwidth": "1KB/s"}]},
                {"name": "b", "devices": [{"memory": CAPACITY[1] * EXPERT, "load_bandwidth": "4KB/s"}]},
                {
                    "name": "c",
                    "devices": [{"memory": size * EXPERT, "load_bandwidth": "2KB/s"} for size in CAPACITY[2:]],
                },
            ],
            "network": {"bandwidth": "500Mbps", "latency": "1ms"},
        }
    )
    seen = Profile(
        np.ones((3, 3, 8), np.int64), disk.names, model="small", top_k=3, hidden_size=32, expert_bytes=EXPERT
    )
    for bandwidth, expected in (
        (None, max(new / [1e3, 4e3, 2e3, 2e3])),
        (100.0, max(new[0], new[1], sum(new[2:])) / 100),
    ):
        _, figures = weigh(Revision(seen, disk, disk, before, Policy(bandwidth=bandwidth), target=after, chunks=1.0))
        assert figures.transfer_s == pytest.approx(expected)
        assert figures.copies == (after.resident & ~before.resident).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_planning_process_ends_with_its_parent():
    code = (
        "import os, signal, launch.migration.planner_process as p; child = p._start(); print(child.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    started = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert started.returncode == -9
    child, until = Path(f"/proc/{int(started.stdout)}/stat"), time.monotonic() + 30

    def runs():
        return child.exists() and child.read_text().rsplit(") ", 1)[1][0] != "Z"

    while runs() and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs()
