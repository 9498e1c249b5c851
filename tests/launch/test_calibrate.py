"""`python -m launch calibrate`: measured links and devices come back as a cluster file that the planner reads."""

import sys

import numpy as np
import pytest

from launch.__main__ import main
from launch.bench.harness.namespaces import Testbed, missing
from launch.cluster.addresses import DEFAULT_PORT
from launch.cluster.measure import Measured, link_rate
from launch.cluster.processes import start
from launch.commands.calibrate import cluster_text
from placement import Cluster

CLUSTER = """
[[server]]
name = "a"
devices = [{ memory = "1GB" }]
[[server]]
name = "b"
devices = [{ memory = "1GB" }, { memory = "2GB" }]
"""


def test_the_file_says_what_was_measured(tmp_path):
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text(CLUSTER)
    cluster = Cluster.from_toml(old)
    latency = np.array([[0, 0.25e-3], [0.25e-3, 0]])
    measured = Measured(latency, np.full((2, 2), 6e7), np.array([1.0, 0.5, 0.25]), np.array([1e9, 2e9]))
    new.write_text(cluster_text(cluster, measured))
    found = Cluster.from_toml(new)
    assert found.names == cluster.names
    assert found.memory.tolist() == cluster.memory.tolist()
    assert found.speed.tolist() == [1.0, 0.5, 0.25]
    assert found.latency[0, 1] == pytest.approx(0.25e-3)
    assert found.bandwidth[1, 0] == pytest.approx(6e7)


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    (tmp_path / "c.toml").write_text(CLUSTER)
    out = str(tmp_path / "absent" / "new.toml")
    assert main(["calibrate", "--cluster", str(tmp_path / "c.toml"), "--out", out]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_shaped_link_is_measured_as_what_it_is(tmp_path):
    (tmp_path / "c.toml").write_text(CLUSTER)
    out = tmp_path / "new.toml"
    with Testbed(("a", "b"), 100e6) as bed:
        given = ["--cluster", str(tmp_path / "c.toml"), "--out", str(out)]
        given += ["--coordinator", f"{bed.addresses['a']}:{DEFAULT_PORT}"]
        commands = {n: [sys.executable, "-m", "launch", "calibrate", *given, "--server", n] for n in ("a", "b")}
        with start(commands, prefix=bed.prefix) as processes:
            assert processes.wait(200)
    found = Cluster.from_toml(out)
    assert 0.85 < found.bandwidth[0, 1] * 8 / 100e6 < 1.05
    assert 0 < found.latency[0, 1] < 5e-3


@pytest.mark.parametrize(("latency", "rate"), [(1e-4, 6e7), (0.1, 1.25e8), (0.02, 1.25e9), (2e-5, 4e9), (0.2, 1e5)])
def test_the_rate_of_a_link_is_found_whatever_its_latency(latency, rate):
    assert link_rate(lambda size: latency + size / rate) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_a_rate_that_chance_hides_is_a_bound_and_no_number_from_nowhere(seed):
    """A loopback's messages of 64 KB and 1 MB may take equally long on a busy machine, or the longer one less."""
    rng, sizes = np.random.default_rng(seed), []

    def one_way(size):
        sizes.append(size)
        return float(rng.uniform(0.9e-3, 1.1e-3))

    assert 0 < link_rate(one_way) <= max(sizes) / 0.25 / 0.9e-3
