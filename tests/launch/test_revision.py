"""What a revision of the placement weighs, and the process that it is weighed in."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch.migration.decision import pace
from launch.migration.revision import Revision, weigh
from placement import Cluster, Profile, Workload
from placement.migration.decide import Figures, Policy
from tests.helpers.cluster_of_devices import CAPACITY, EXPERT, placement_of, random_resident


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
def test_the_planning_process_ends_with_whoever_started_it():
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
