"""Layers hosted away from home: whole ranges of the rivals, paths, hops, their costs, and plans that say who hosts what."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import STRATEGIES, Cluster, InputError, Placement, Problem, Profile, Workload, evaluate, plan
from placement.__main__ import main
from placement.costs.hosting import Hops, at_home, hop_seconds, layer_hosts, moved_seconds
from placement.costs.step_time import predict
from placement.costs.summary import summary
from placement.data.arrivals import Arrivals
from placement.migration.adapt import fitted
from placement.registry import HOSTED
from placement.simulation.independent.events import simulate
from placement.simulation.independent.unit_costs import Compute, Steps
from placement.simulation.lockstep.predict import StepCosts, lock_step
from placement.strategies.layer_ranges import parallax, pipeline, ranges
from tests.placement.test_latency import instances

quick = settings(max_examples=30, deadline=None, derandomize=True)
EXPERTS = 4


def problem_of(memory, layers=6, speeds=None, links=(), latency="1ms", bandwidth="8MB/s", workload=None, size=1):
    """Servers of one device each with room for so many layers, all users alike."""
    names = [f"s{n}" for n in range(len(memory))]
    speeds = speeds or [1.0] * len(memory)
    servers = [
        {"name": n, "devices": [{"memory": int(m * EXPERTS * size), "speed": s}]}
        for n, m, s in zip(names, memory, speeds, strict=True)
    ]
    cluster = Cluster.from_dict(
        {"server": servers, "network": {"latency": latency, "bandwidth": bandwidth}, "link": list(links)}
    )
    counts = np.ones((len(names), layers, EXPERTS), np.int64)
    profile = Profile(counts, tuple(names), "m", top_k=2, hidden_size=500, expert_bytes=size)
    return Problem.build(profile, cluster, workload or Workload(exchange_seconds=2e-3, assignment_seconds=0.0))


def layers_of(problem, resident):
    """How many whole layers every server has, and that they follow each other."""
    held = problem.held(resident).all(-1)
    assert ((np.diff(held.astype(int), axis=1, prepend=0) == 1).sum(1) <= 1).all()
    return held.sum(1).tolist()


def test_pipeline_divides_layers_by_memory():
    problem = problem_of([3, 3, 6])
    resident = pipeline(problem)
    assert layers_of(problem, resident) == [1, 2, 3]  # the first border is between two layers
    assert (resident.sum(0) == 1).all()
    assert layers_of(problem_of([9, 1, 2]), pipeline(problem_of([9, 1, 2]))) == [4, 1, 1]
    assert layers_of(problem_of([2, 2, 2]), pipeline(problem_of([2, 2, 2]))) == [2, 2, 2]


def test_pipeline_cuts_layers_only_where_whole_ones_do_not_fit():
    problem = problem_of([1.5, 1.5, 3])
    resident = pipeline(problem)
    assert (resident.sum(0) == 1).all()
    held = problem.held(resident)
    assert [int(own.sum()) for own in held] == [6, 6, 12]
    assert not held.all(-1)[:, 1].any()  # the second layer is on both sides of a border
    found = summary(problem, resident, layer_hosts(problem, resident))
    assert found["hops"] > 0
    assert 0 < found["remote_share"] < 0.2


def test_ranges_leave_room_for_the_servers_that_follow():
    problem = problem_of([4, 1, 1], speeds=[1.0, 9.0, 9.0])
    room = np.add.reduceat(problem.usable_bytes, problem.first_device)
    assert ranges(problem, np.arange(3), problem.speed, room) == {0: (0, 4), 1: (4, 5), 2: (5, 6)}
    assert ranges(problem, np.array([0, 1]), problem.speed, room) is None


def test_parallax_divides_by_speed_within_memory():
    problem = problem_of([5, 5], speeds=[1.0, 2.0])
    resident = parallax(problem)
    first = sorted(layers_of(problem, resident))
    assert first == [5, 5]  # 2 and 4 by speed, and both grow into the memory that is left
    alone = problem_of([3, 4], speeds=[1.0, 3.0])
    assert layers_of(alone, parallax(alone)) == [3, 4]
    small = problem_of([4, 2], speeds=[1.0, 9.0])
    assert layers_of(small, parallax(small)) == [4, 2]


def test_parallax_makes_as_many_pipelines_as_there_is_room_for():
    problem = problem_of([6, 3, 3, 6])
    resident = parallax(problem)
    assert problem.held(resident).sum((0, 2)).tolist() == [3 * EXPERTS] * 6
    host = layer_hosts(problem, resident)
    assert (host[0] == 0).all()  # who has all layers hosts them
    assert (host[3] == 3).all()


def test_servers_left_over_copy_what_is_hosted_least():
    problem = problem_of([5, 4, 2], speeds=[5.0, 1.0, 1.0])
    copies = problem.held(parallax(problem)).all(-1).sum(0)
    assert copies.sum() == 11
    assert copies.max() == 2


@given(st.integers(0, 10**6))
@quick
def test_hosts_are_the_best_path_of_all(seed):
    rng = np.random.default_rng(seed)
    servers, layers = 3, 4
    links = [
        {
            "from": f"s{a}",
            "to": f"s{b}",
            "latency": f"{rng.integers(1, 40)}ms",
            "bandwidth": f"{rng.integers(1, 9)}MB/s",
        }
        for a, b in itertools.permutations(range(servers), 2)
    ]
    work = Workload(exchange_seconds=float(rng.choice([0.0, 5e-3])), assignment_seconds=1e-3)
    problem = problem_of([4] * servers, layers, list(rng.choice([0.5, 1.0, 4.0], servers)), links, workload=work)
    held = rng.random((servers, layers, 1)) < 0.6
    held |= np.arange(servers)[:, None, None] == rng.integers(0, servers, (layers, 1))
    resident = np.broadcast_to(held, problem.shape)
    host = layer_hosts(problem, resident)
    assert np.take_along_axis(held[..., 0], host, 0).all()
    hop = hop_seconds(problem) + moved_seconds(problem)

    def seconds(source, path):
        moves = zip([source, *path], [*path, source], strict=True)
        return sum(hop[a, b] for a, b in moves) + sum(2e-3 / problem.speed[h] for h in path)

    for source in range(servers):
        choices = itertools.product(*(np.flatnonzero(held[:, layer, 0]) for layer in range(layers)))
        best = min(seconds(source, path) for path in choices)
        assert seconds(source, host[source].tolist()) == pytest.approx(best, rel=1e-6)


def test_equally_good_hosts_are_shared():
    problem = problem_of([0.25, 6, 0.25, 6, 0.25, 6])
    resident = np.zeros((6, 6, EXPERTS), bool)
    resident[1::2] = True
    assert layer_hosts(problem, resident)[::2, 0].tolist() == [1, 3, 5]


def test_a_hop_is_half_an_exchange_and_its_rows_go_one_way():
    problem = problem_of([3, 3])
    resident = pipeline(problem)
    host = layer_hosts(problem, resident)
    assert host.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    found = predict(problem, resident, host)
    one = 1e-3 + 1e-3 + 1000 / 8e6  # latency, half an exchange, a row of 500 values
    # From s0: there and home again. From s1: to s0, and back for the other layers; then it is at home.
    assert found["decode_network_seconds"] == pytest.approx(2 * one)
    assert list(found["decode_network_seconds_by_server"].values()) == pytest.approx([2 * one, 2 * one])
    rows = (256 + 1, 2 * 256)  # what comes home of a chunk is the one row that gives the next token
    assert found["prefill_bytes"] == pytest.approx(1000 * np.mean(rows))
    assert found["prefill_network_seconds"] == pytest.approx(2 * 2e-3 + np.mean(rows) * 1000 / 8e6)
    costs = summary(problem, resident, host)
    assert (costs["remote_share"], costs["network_probability"], costs["hops"]) == (0, 0, 2)
    assert costs["bytes_per_token"] == 2000


def test_sequences_of_a_step_wait_for_the_longest_path():
    far = [{"from": "s0", "to": "s1", "latency": "11ms", "both": True}]
    work = Workload(active=2, exchange_seconds=0.0, assignment_seconds=0.0)
    problem = problem_of([0.25, 6, 6], links=far, workload=work, bandwidth="8GB/s")
    resident = np.zeros((3, 6, EXPERTS), bool)
    resident[1] = True
    host = layer_hosts(problem, resident)
    assert (host == 1).all()
    # 22 ms from s0, 0 from s1, 2 ms from s2; two draws of three.
    found = predict(problem, resident, host)["decode_network_seconds"]
    assert found == pytest.approx(22e-3 * 5 / 9 + 2e-3 * 3 / 9, rel=1e-3)


@given(instances())
@quick
def test_hosts_at_home_cost_what_no_hosts_cost(problem):
    resident = STRATEGIES["dance"](problem)
    home = at_home(problem)
    assert not Hops.of(problem, home).number.any()
    assert predict(problem, resident, home) == predict(problem, resident)
    assert summary(problem, resident, home) == summary(problem, resident)


@pytest.mark.parametrize("strategy", HOSTED)
@given(instances())
@quick
def test_invariants_of_hosted_plans(strategy, problem):
    resident = STRATEGIES[strategy](problem)
    assert resident.any(0).all()
    assert (problem.used_bytes(resident) <= problem.budget).all()
    host = layer_hosts(problem, resident)
    part = problem.held(resident).sum(-1)
    assert (part[host, np.arange(part.shape[1])] == part.max(0)).all()
    assert (STRATEGIES[strategy](problem, previous=resident) == resident).all()


# --- simulation


def requests(*rows):
    seconds, server, prompt, output = zip(*rows, strict=True)
    return Arrivals(np.array(seconds, float), *(np.array(values, np.int64) for values in (server, prompt, output)))


def test_a_request_alone_takes_what_is_predicted():
    work = Workload(prefill_tokens=100, decode_steps=9, exchange_seconds=2e-3, assignment_seconds=0.0)
    problem = problem_of([3, 3], workload=work)
    resident = pipeline(problem)
    host = layer_hosts(problem, resident)
    done = simulate(problem, resident, requests((0, 0, 100, 10)), Compute(0.0, 0.5, 0.0, 0.0), host=host)
    only = replace(problem, frequency=problem.frequency * np.array([1, 0])[:, None, None])
    predicted = predict(only, resident, host)
    row = 1000 / 8e6  # the row that a chunk sends home is not simulated
    assert done.first_token[0] == pytest.approx(predicted["prefill_network_seconds"] - row)
    assert done.latency[0] == pytest.approx(predicted["step_seconds"] - row)
    assert done.link_bytes.tolist() == [[0, 109 * 1000], [9 * 1000, 0]]


def test_dense_work_is_its_hosts():
    problem = problem_of([3, 3], speeds=[1.0, 2.0])
    resident = pipeline(problem)
    steps = Steps.build(problem, resident, Compute(0.01, 0.5, 0.06, 0.02), layer_hosts(problem, resident))
    dense = np.array([0.005 / 2, 0.005 / 2 / 2])  # three of six layers on each server, one twice as fast
    assert np.allclose(steps.device_seconds[0], dense * 2)  # experts take as long as the rest
    assert np.allclose(steps.device_seconds[2], [0.03, 0.015])


def test_stages_of_a_pipeline_work_at_the_same_time():
    problem = problem_of([3, 3], latency="0ms", bandwidth="8GB/s", workload=Workload(exchange_seconds=0.0))
    resident = pipeline(problem)
    host = layer_hosts(problem, resident)
    compute = Compute(0.01, 0.5, 0.0, 0.0)
    one = simulate(problem, resident, requests((0, 0, 100, 1)), compute, host=host).latency
    both = simulate(problem, resident, requests((0, 0, 100, 1), (0, 1, 100, 1)), compute, host=host).latency
    assert one[0] == pytest.approx(1.0, rel=1e-3)
    assert (both < 2.0).all()  # less than one after the other
    assert (both > 1.0).all()


def test_lock_step_sends_rows_from_host_to_host():
    problem = problem_of([3, 3])
    resident = pipeline(problem)
    host = layer_hosts(problem, resident)
    costs = StepCosts((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), message_seconds=1e-4)
    done = lock_step(problem, resident, requests((0, 0, 8, 3)), costs, host=host, chunks=(8,))
    out, back = (1e-4 + 1e-3 + rows * 1000 / 8e6 for rows in (8, 1))
    assert done.first_token[0] == pytest.approx(out + back)
    assert done.latency[0] == pytest.approx(out + back + 2 * 2 * (1e-4 + 1e-3 + 1000 / 8e6))
    home = lock_step(problem, np.ones_like(resident), requests((0, 0, 8, 3)), costs, host=at_home(problem), chunks=(8,))
    assert home.network.tolist() == [0.0]


# --- plans and commands


CLUSTER = """
[[server]]
name = "a"
devices = [{ memory = 31 }]
[[server]]
name = "b"
devices = [{ memory = 41 }]
[network]
bandwidth = "8MB/s"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    counts = np.random.default_rng(0).integers(1, 99, (2, 6, 4))
    Profile(counts, ("a", "b"), "tiny", 2, 16, 2).save("profile.npz")
    return tmp_path


def hosted_plan(folder):
    profile, cluster = Profile.load("profile.npz"), Cluster.from_toml("cluster.toml")
    return plan(profile, cluster, "pipeline"), profile, cluster


def test_a_plan_keeps_its_hosts(folder):
    placement, profile, cluster = hosted_plan(folder)
    placement.save("hosted.json")
    again = Placement.load("hosted.json")
    assert json.loads((folder / "hosted.json").read_text())["format"] == "dancemoe.placement/2"
    assert (again.host == placement.host).all()
    assert evaluate(profile, cluster, again)["hops"] == placement.predicted["hops"] == 2
    assert Placement.from_dict(again.to_dict()).to_dict() == placement.to_dict()


def test_format_1_is_at_home_and_so_is_what_home_strategies_write(folder):
    _, profile, cluster = hosted_plan(folder)
    placement = plan(profile, cluster, "dance")
    placement.save("home.json")
    assert json.loads((folder / "home.json").read_text())["format"] == "dancemoe.placement/1"
    assert Placement.load("home.json").host is None
    placement.require_home()
    written = placement.to_dict() | {"format": "dancemoe.placement/2", "host": {n: [n] * 6 for n in "ab"}}
    assert Placement.from_dict(written).host is None


def test_serving_refuses_hosts_elsewhere(folder):
    placement, profile, cluster = hosted_plan(folder)
    with pytest.raises(InputError, match=r"host: b hosts layer 3 of a's sequences, but serving .* at home; plan with"):
        fitted(placement, profile, cluster)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": None}, "host = None: must have an entry for each of 'a, b'"),
        ({"host": {"a": ["a"] * 6}}, "must have an entry for each of 'a, b'"),
        ({"host": {"a": ["a"] * 6, "b": ["a"] * 5}}, "5 servers; must be 6 servers, one per layer"),
        ({"host": {"a": ["a"] * 6, "b": ["a", "c", *["a"] * 4]}}, "[1] = 'c': no such server"),
        ({"host": {"a": ["a"] * 6, "b": 3}}, "host.'b': 3; must be 6 servers"),
        ({"format": "dancemoe.placement/3"}, 'must be "dancemoe.placement/1" or "dancemoe.placement/2"'),
    ],
)
def test_damaged_hosts_are_one_line(folder, change, said):
    placement, *_ = hosted_plan(folder)
    with pytest.raises(InputError) as error:
        Placement.from_dict(placement.to_dict() | change, "p.json")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_compare_says_where_hosted_plans_are_better(folder, capsys):
    inputs = ["--cluster", "cluster.toml", "--profile", "profile.npz"]
    assert main(["compare", *inputs, "--strategies", "pipeline,parallax,exact"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "hops" in text
    assert "python -m launch serve cannot follow such a plan (pipeline, parallax) yet." in text
    assert "of network, less than exact's" in text
    assert main(["compare", *inputs, "--strategies", "exact"]) == 0
    assert "hops" not in capsys.readouterr().out


def test_simulate_serves_hosted_plans(folder, capsys):
    inputs = ["--cluster", "cluster.toml", "--profile", "profile.npz", "--duration", "60", "--json"]
    for more, key in (([], "bytes"), (["--lock-step"], "network")):
        assert main(["simulate", *inputs, "--strategies", "pipeline,uniform", *more]) == 0
        figures = json.loads(capsys.readouterr().out)["strategies"]
        assert 0 < figures["pipeline"][key] < figures["uniform"][key]


def test_whole_layers_are_no_equal_slots(folder):
    _, profile, cluster = hosted_plan(folder)
    with pytest.raises(InputError, match="places whole layers; it cannot plan equal slots: leave out --equal-slots"):
        plan(profile, cluster, "parallax", equal_slots=True)
