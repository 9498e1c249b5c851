"""The simulator against hand-computed sequences, and what must hold whatever is simulated."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import STRATEGIES, Cluster, InputError, Problem, Profile, plan
from placement.__main__ import main
from placement.commands.grid import Grid, grid_cluster, run_grid, spread_profile, trends
from placement.data.arrivals import Arrivals
from placement.data.workload import Workload
from placement.migration.decide import Policy
from placement.simulation.independent.events import simulate
from placement.simulation.independent.replan import Replan, loads, observe, trade_places
from placement.simulation.independent.unit_costs import Compute, Steps

quick = settings(max_examples=25, deadline=None, derandomize=True)
SLOW = Compute(prefill_token=0.01, expert_share=0.5, decode_step=0.08, decode_token=0.02)
NO_TIME = Compute(0.0, 0.5, 0.0, 0.0)
ROW, SUM = 1006, 2000  # bytes there and back, for one expert and 500 values


def cluster_of(devices, bandwidth="8Mbps", latency="10ms", memory=10**6, **network):
    servers = [{"name": f"s{n}", "devices": [{"memory": memory}] * d} for n, d in enumerate(devices)]
    return Cluster.from_dict({"server": servers, "network": {"bandwidth": bandwidth, "latency": latency}, **network})


def problem_of(counts, cluster, exchange=0.0, **fields):
    meta = {"model": "m", "top_k": 1, "hidden_size": 500, "expert_bytes": 1} | fields
    profile = Profile(np.asarray(counts), cluster.names, **meta)
    return Problem.build(profile, cluster, Workload(exchange_seconds=exchange))


def requests(*rows):
    seconds, server, prompt, output = zip(*rows, strict=True)
    return Arrivals(np.array(seconds, float), *(np.array(values) for values in (server, prompt, output)))


def one_server():
    problem = problem_of([[[1, 1]]], cluster_of([1]))
    return problem, np.ones((1, 1, 2), bool)


def two_servers(local=False, **options):
    """Server 0 uses expert 0 alone, server 1 expert 1; each holds what the other uses, or both hold all."""
    problem = problem_of([[[9, 0]], [[0, 9]]], cluster_of([1, 1], **options))
    resident = np.ones((2, 1, 2), bool) if local else np.array([[[0, 1]], [[1, 0]]], bool)
    return problem, resident


def test_requests_one_after_the_other():
    done = simulate(*one_server(), requests((0, 0, 100, 11), (50, 0, 200, 1)), SLOW)
    # A prompt of 100 tokens takes 1 s and gives the first token; ten more take 0.1 s each.
    assert np.allclose(done.first_token, [1, 2])
    assert np.allclose(done.latency, [2, 2])
    assert not done.link_bytes.any()
    assert np.isclose(done.device_utilisation[0] * done.seconds, 4)


def test_prefill_goes_before_decoding_and_sequences_share_steps():
    done = simulate(*one_server(), requests((0, 0, 100, 11), (1.5, 0, 100, 21)), SLOW)
    # Five steps until 1.5; prefill until 2.5; five shared steps of 0.12 s until 3.1; fifteen alone until 4.6.
    assert np.allclose(done.first_token, [1, 1])
    assert np.allclose(done.latency, [3.1, 4.6 - 1.5])
    assert done.events == 7  # two arrivals, the end of the step then, two prefills, two last tokens


def test_chunks_of_a_prompt_and_decode_steps_take_turns():
    given = requests((0, 0, 100, 11), (1.55, 0, 100, 21))
    done = simulate(*one_server(), given, SLOW, chunk=50)
    # The step that runs at 1.55 ends at 1.6; half a prompt until 2.1, a decode step, the other half until 2.7. Of the first
    # request's ten steps three are left, shared until 3.06; seventeen of the second one's twenty follow alone.
    assert np.allclose(done.first_token, [1, 2.7 - 1.55])
    assert np.allclose(done.latency, [3.06, 4.76 - 1.55])


def test_full_batch_waits():
    done = simulate(*one_server(), requests((0, 0, 100, 11), (0.5, 0, 100, 1)), SLOW, batch=1)
    assert np.allclose(done.latency, [2, 2.5])


def test_deterministic_service_queues_as_theory_says():
    """Poisson arrivals, one token out: an M/D/1 queue; its mean wait is rho s / (2 (1 - rho))."""
    problem, resident = one_server()
    arrivals = Arrivals.poisson(1, 2.0, 24_000, [[100, 1]], seed=3)
    done = simulate(problem, resident, arrivals, SLOW)
    rho = len(arrivals) / 24_000
    assert np.isclose(done.latency.mean(), 1 + rho / (2 * (1 - rho)), rtol=0.05)


def test_exchange_by_hand():
    done = simulate(*two_servers(), requests((0, 0, 100, 3)), NO_TIME)
    # 1 MB/s: of 100 tokens 0.1006 s there and 0.2 s back, and a round trip of 0.02 s; 0.023 s per decoded token.
    assert np.allclose(done.first_token, 0.3206)
    assert np.allclose(done.latency, 0.3206 + 2 * 0.023006)
    assert np.allclose(done.link_bytes, [[0, 102 * ROW], [102 * SUM, 0]])
    assert np.allclose(done.port_utilisation, np.array([[ROW, SUM], [SUM, ROW]]) * 102e-6 / done.seconds)


def test_all_local_needs_no_network():
    done = simulate(*two_servers(local=True), requests((0, 0, 100, 3), (0, 1, 50, 9)), SLOW)
    assert not done.link_bytes.any()
    assert np.allclose(done.latency, [1.2, 0.5 + 8 * 0.1])


def test_a_shared_link_is_shared():
    """Two servers that always send to a third halve the rate of its port; one server alone has it all."""
    cluster = cluster_of([1, 1, 1], latency="0ms")
    problem = problem_of([[[9, 0]], [[9, 0]], [[9, 0]]], cluster)
    resident = np.array([[[0, 1]], [[0, 1]], [[1, 1]]], bool)
    alone = simulate(problem, resident, requests((0, 0, 1000, 1)), NO_TIME)
    both = simulate(problem, resident, requests((0, 0, 1000, 1), (0, 1, 1000, 1)), NO_TIME)
    assert np.allclose(alone.latency, 1.006 + 2.0)
    # Each is on the port in for a third of its time and out for two thirds, and finds the other there as often.
    assert np.allclose(both.latency, 1.006 * (4 / 3) + 2.0 * (5 / 3), rtol=0.02)
    assert np.isclose(both.port_utilisation[1, 2], 1000 * ROW * 2 / 1e6 / both.seconds)


def test_a_slow_link_counts_where_it_is_used():
    slow = {"from": "s0", "to": "s1", "bandwidth": "0.8Mbps"}
    problem = problem_of([[[9, 0]], [[0, 9]], [[9, 9]]], cluster_of([1, 1, 1], latency="0ms", link=[slow]))
    resident = np.array([[[0, 1]], [[1, 0]], [[0, 0]]], bool)
    done = simulate(problem, resident, requests((0, 0, 100, 1)), NO_TIME)
    assert np.allclose(done.latency, 1.006 + 0.2)  # 0.1 MB/s there, 1 MB/s back


def random_instance(seed, bandwidth="40Mbps"):
    rng = np.random.default_rng(seed)
    servers, layers, experts, top_k = int(rng.integers(1, 5)), 3, 6, 2
    cluster = cluster_of(rng.integers(1, 3, servers), bandwidth, "1ms")
    tokens = 40
    ids = rng.random((tokens, layers, experts)).argsort(-1)[..., :top_k]
    server = rng.integers(0, servers, tokens)
    meta = {"model": "m", "hidden_size": 2000, "expert_bytes": 10, "experts": experts}
    sequence = np.zeros(tokens, int)
    profile = Profile.from_tokens(ids, server, sequence, servers=cluster.names, **meta)
    if rng.random() < 0.3:
        profile = replace(profile, ids=None, server=None, sequence=None)
    problem = Problem.build(profile, cluster)
    resident = rng.random((len(cluster.devices), layers, experts)) < 0.4
    resident |= np.arange(len(cluster.devices))[:, None, None] == rng.integers(0, len(resident), (layers, experts))
    lengths = np.stack([rng.integers(1, 200, 9), rng.integers(1, 50, 9)], 1)
    return problem, resident, Arrivals.poisson(servers, 4.0, 100.0, lengths, seed)


@given(st.integers(0, 10**6))
@quick
def test_bytes_and_work_are_conserved(seed):
    problem, resident, arrivals = random_instance(seed)
    done = simulate(problem, resident, arrivals, SLOW)
    steps = Steps.build(problem, resident, SLOW)
    tokens = [np.bincount(arrivals.server, part, len(problem.names)) for part in (arrivals.prompt, arrivals.output - 1)]
    assert np.allclose(done.link_bytes, steps.link_bytes(np.stack(tokens, 1)))
    assert (done.first_token > 0).all()
    assert (done.latency >= done.first_token - 1e-9).all()
    assert (done.device_utilisation <= 1 + 1e-9).all()
    assert (done.port_utilisation <= 1.01).all()
    alone = [steps.alone(n, np.array([p, 0.0, 0.0])) for n, p in zip(arrivals.server, arrivals.prompt, strict=True)]
    assert (done.first_token >= np.array(alone) * (1 - 1e-3)).all()


@given(st.integers(0, 10**6))
@quick
def test_same_input_same_result(seed):
    first, second = (simulate(*random_instance(seed), SLOW) for _ in range(2))
    assert (first.latency == second.latency).all()
    assert first.summary(("x",)) == second.summary(("x",))


@given(st.integers(0, 10**6))
@quick
def test_bandwidth_never_slows(seed):
    means = [simulate(*random_instance(seed, rate), SLOW).latency.mean() for rate in ("20Mbps", "40Mbps", "400Mbps")]
    assert means[0] >= means[1] * (1 - 1e-3)
    assert means[1] >= means[2] * (1 - 1e-3)


@given(st.integers(0, 10**6))
@quick
def test_unit_costs_by_counting(seed):
    """Bytes and latency of tokens against walking through the recorded ones."""
    problem, resident, _ = random_instance(seed)
    if problem.tokens is None:
        return
    from placement.costs.routing import serving_server

    serving = serving_server(problem, problem.held(resident))
    steps = Steps.build(problem, resident, SLOW)
    for n in range(len(problem.names)):
        mine = problem.tokens.ids[problem.tokens.server == n]
        if not len(mine):
            continue
        met = [[set(serving[n, layer, token[layer]]) - {n} for layer in range(3)] for token in mine]
        per_token = np.mean(
            [[sum(m in layer for layer in token) for m in range(len(problem.names))] for token in met], 0
        )
        rows = np.add.outer(np.eye(len(problem.names))[n], 0 * per_token) * per_token
        one = np.zeros((len(problem.names), 2))
        one[n] = 1, 3  # a prompt token and three decoded ones
        assert np.allclose(steps.link_bytes(one), 4 * (rows * 4012 + rows.T * 8000))
        waits = [
            sum(max((problem.exchange_seconds[n, m] for m in layer), default=0) for layer in token) for token in met
        ]
        assert np.isclose(steps.waiting(n, 1), np.mean(waits))


def test_slowest_partner_decides():
    far = [{"from": "s0", "to": "s2", "latency": "50ms", "both": True}]
    problem = problem_of([[[1, 1]], [[1, 1]], [[1, 1]]], cluster_of([1, 1, 1], link=far))
    resident = np.array([[[0, 0]], [[1, 0]], [[0, 1]]], bool)
    steps = Steps.build(problem, resident, SLOW)
    assert np.isclose(steps.waiting(0, 1), 0.5 * 0.1 + (0.75 - 0.5) * 0.02)  # counts take experts as independent
    assert np.isclose(steps.waiting(0, 1000), 0.1)


def swap_planner(problem, previous):
    """Everybody holds the expert that it uses most."""
    resident = np.zeros_like(previous)
    best = problem.frequency.argmax(-1)
    for device in range(len(resident)):
        resident[device, 0, best[device, 0]] = True
    return resident


def test_a_migration_that_pays():
    problem, resident = two_servers()
    arrivals = Arrivals.poisson(2, 3.0, 300.0, [[200, 20]], seed=1)
    stay = simulate(problem, resident, arrivals, SLOW)
    replan = Replan(swap_planner, np.full(2, 0.1), Policy(interval=60.0, stall=0.5, confirm=1))
    move = simulate(problem, resident, arrivals, SLOW, replan=replan)
    taken = [m for m in move.migrations if m["adopted"]]
    assert len(taken) == 1
    assert taken[0]["seconds"] == 60
    assert taken[0]["bytes"] == 2
    assert taken[0]["gain_seconds"] > 0
    assert move.latency.mean() < stay.latency.mean()
    late = arrivals.seconds > 80
    assert move.latency[late].mean() < stay.latency[late].mean()
    assert move.link_bytes.sum() < 0.4 * stay.link_bytes.sum()


def test_a_migration_that_does_not_pay():
    problem, resident = two_servers()
    arrivals = Arrivals.poisson(2, 30.0, 300.0, [[20, 2]], seed=1)
    replan = Replan(swap_planner, np.full(2, 0.1), Policy(interval=60.0, stall=50.0))
    done = simulate(problem, resident, arrivals, SLOW, replan=replan)
    assert done.migrations
    assert not any(m["adopted"] for m in done.migrations)
    assert all(m["gain_seconds"] < 0 for m in done.migrations)
    assert (done.latency == simulate(problem, resident, arrivals, SLOW).latency).all()
    forced = simulate(problem, resident, arrivals, SLOW, replan=replace(replan, always=True))
    assert forced.migrations[0]["adopted"]
    assert forced.latency.mean() > done.latency.mean()


def test_a_shift_and_the_way_back():
    problem, resident = two_servers()
    good = resident[::-1]
    arrivals = Arrivals.poisson(2, 3.0, 400.0, [[200, 20]], seed=1)
    stay = simulate(problem, good, arrivals, SLOW, shift=100.0)
    before, after = arrivals.seconds < 90, arrivals.seconds > 110
    assert stay.latency[after].mean() > 1.1 * stay.latency[before].mean()
    replan = Replan(swap_planner, np.full(2, 1.0), Policy(interval=60.0))
    follow = simulate(problem, good, arrivals, SLOW, shift=100.0, replan=replan)
    assert any(m["adopted"] for m in follow.migrations)
    assert follow.latency[after].mean() < stay.latency[after].mean()


def test_weights_come_the_faster_way():
    problem, resident = two_servers()
    new = np.ones_like(resident)
    disk = loads(problem, resident, new, np.array([2e6, 2e6]))
    assert [load.disk_seconds for load in disk] == [5e-7, 5e-7]
    link = loads(problem, resident, new, np.array([5e5, 2e6]))
    assert link[0].disk_seconds == 0
    assert link[0].link_bytes.tolist() == [0, 1]
    assert link[0].link_seconds == 1e-6
    assert link[1].total_bytes == 1


def test_migrated_weights_are_on_the_links():
    problem, resident = two_servers()
    problem = replace(problem, expert_bytes=np.array([10**6]))
    arrivals = Arrivals.poisson(2, 3.0, 200.0, [[200, 20]], seed=1)
    replan = Replan(swap_planner, np.full(2, 1.0), Policy(interval=60.0), always=True)
    done = simulate(problem, resident, arrivals, SLOW, replan=replan)
    moves = [m for m in done.migrations if m["adopted"]]
    assert [m["bytes"] for m in moves] == [2 * 10**6]
    assert np.isclose(moves[0]["transfer_seconds"], 1.0)  # 1 MB at 1 MB/s each way
    assert done.link_bytes[0, 1] > 10**6


def test_what_is_seen_mixes_workloads():
    problem = problem_of([[[9, 0]], [[0, 9]]], cluster_of([1, 1]))
    seen = observe([problem, trade_places(problem)], np.array([[30.0, 10.0], [10.0, 10.0]]))
    assert np.allclose(seen.frequency * 60, [[[30, 10]], [[10, 10]]])
    ids = np.tile([[[0]], [[1]]], (4, 1, 1))
    server = np.tile([0, 1], 4)
    profile = Profile.from_tokens(
        ids, server, np.arange(8), servers=("s0", "s1"), experts=2, model="m", hidden_size=4, expert_bytes=1
    )
    problem = Problem.build(profile, cluster_of([1, 1]))
    tokens = observe([problem, trade_places(problem)], np.array([[30.0, 0.0], [15.0, 10.0]])).tokens
    pairs = list(zip(tokens.server.tolist(), tokens.ids[:, 0, 0].tolist(), strict=True))
    assert sorted(pairs) == [(0, 0)] * 4 + [(0, 1)] * 2 + [(1, 0)] * 4


def test_poisson_arrivals():
    arrivals = Arrivals.poisson(3, 5.0, 10_000, [[7, 3], [9, 1]], seed=4)
    assert abs(len(arrivals) - 6000) < 300
    assert (np.diff(arrivals.seconds) >= 0).all()
    assert set(zip(arrivals.prompt.tolist(), arrivals.output.tolist(), strict=True)) == {(7, 3), (9, 1)}
    same, other = (Arrivals.poisson(3, 5.0, 10_000, [[7, 3], [9, 1]], seed=s) for s in (4, 5))
    assert (same.seconds == arrivals.seconds).all()
    assert len(other) != len(arrivals) or (other.seconds != arrivals.seconds).any()


CLUSTER = """
[[server]]
name = "a"
devices = [{ memory = 120 }]
[[server]]
name = "b"
devices = [{ memory = 80 }, { memory = 60 }]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text(CLUSTER)
    counts = np.random.default_rng(0).integers(1, 99, (2, 3, 6))
    Profile(counts, ("a", "b"), "tiny", 2, 16, 10, reserved_bytes=5).save("profile.npz")
    Path("a.csv").write_text("t_s,prompt_tokens,output_tokens,server\n0,10,3,a\n4.5,20,1,b\n9,5,2,a\n")
    return tmp_path


def run(*args):
    return main(["simulate", "--profile", "profile.npz", *args])


def test_arrivals_file(folder):
    arrivals = Arrivals.load("a.csv", ("a", "b"), stretch=2.0, duration=10.0)
    assert arrivals.seconds.tolist() == [0, 9]
    assert arrivals.server.tolist() == [0, 1]
    assert (arrivals.prompt.tolist(), arrivals.output.tolist()) == ([10, 20], [3, 1])
    Path("b.csv").write_text("t_s,prompt_tokens,output_tokens\n" + "1,2,3\n" * 200)
    dealt = Arrivals.load("b.csv", ("a", "b"), seed=1).server
    assert 60 < dealt.sum() < 140
    assert (dealt == Arrivals.load("b.csv", ("a", "b"), seed=1).server).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t_s,prompt_tokens\n0,1\n", "a.csv: column output_tokens is missing"),
        ("", "a.csv: column t_s is missing"),
        ("t_s,prompt_tokens,output_tokens\n", "a.csv: no request"),
        ("t_s,prompt_tokens,output_tokens\nnan,1,1\n", "a.csv: line 2: t_s = 'nan': must be a finite number"),
        ("t_s,prompt_tokens,output_tokens\n0,1,1\n-1,1,1\n", "a.csv: line 3: t_s = '-1': must be a finite number"),
        ("t_s,prompt_tokens,output_tokens\n0,x,1\n", "a.csv: line 2: prompt_tokens = 'x': must be a number"),
        ("t_s,prompt_tokens,output_tokens\n0,1\n", "a.csv: line 2: output_tokens = None: must be a number"),
        ("t_s,prompt_tokens,output_tokens\n0,1.5,1\n", "prompt_tokens = '1.5': must be a whole number from 1"),
        ("t_s,prompt_tokens,output_tokens\n0,1,0\n", "output_tokens = '0': must be a whole number from 1"),
        ("t_s,prompt_tokens,output_tokens\n0,1,1\n5,1,1\n4,1,1\n", "request 3: t_s = 4 is earlier than the one before"),
        ("t_s,prompt_tokens,output_tokens,server\n0,1,1,c\n", "server = 'c': no such server; known are a, b"),
        ("t_s,prompt_tokens,output_tokens\n99,1,1\n", "the first request comes at 99 s, after --duration 50"),
        (b"\xff\xfe\x00", "a.csv: not text"),
    ],
)
def test_bad_arrivals_are_one_line(folder, capsys, text, message):
    Path("a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run("--cluster", "cluster.toml", "--arrivals", "a.csv", "--duration", "50") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--cluster: missing"),
        (["--cluster", "cluster.toml", "--arrivals", "none.csv"], "none.csv: cannot be read"),
        (["--cluster", "cluster.toml", "--strategies", "best"], "'best' is unknown; choose from"),
        (["--cluster", "cluster.toml", "--duration", "1e-9"], "no request comes in this time"),
        (["--cluster", "cluster.toml", "--duration", "1e12"], "over 10 million requests"),
        (["--grid", "--cluster", "cluster.toml"], "--cluster: --grid has its own; leave it out"),
        (["--grid", "--duration", "3"], "--duration: --grid has its own"),
        (["--cluster", "cluster.toml", "--gpus", "4"], "--gpus: only --grid builds clusters"),
        (["--grid", "--dispatch", "sglang"], "--dispatch: --grid has its own"),
        (["--cluster", "cluster.toml", "--lock-step", "--dispatch", "sglang"], "--dispatch: not with --lock-step"),
        (["--cluster", "cluster.toml", "--one-group"], "--one-group: only --grid builds clusters"),
        (["--cluster", "cluster.toml", "--plot", "x.bmp"], "--plot x.bmp: unsupported suffix '.bmp'"),
    ],
)
def test_bad_arguments_are_one_line(folder, capsys, args, message):
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("args", [["--gap", "0"], ["--gap", "nan"], ["--batch", "0"], ["--stretch", "-1"]])
def test_bad_numbers_are_one_line(folder, capsys, args):
    with pytest.raises(SystemExit) as stop:
        run("--cluster", "cluster.toml", *args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    args = ("--cluster", "cluster.toml", "--strategies", "uniform,dance")
    assert run(*args, "--arrivals", "a.csv", "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    assert list(parsed["strategies"]) == ["uniform", "dance"]
    for figures in parsed["strategies"].values():
        assert figures["requests"] == 3
        assert figures["latency"]["p50"] <= figures["latency"]["p99"]
        assert sum(figures["link_bytes"].values()) == pytest.approx(figures["bytes"])
    assert run(*args, "--gap", "5", "--duration", "100", "--replan", "20", "--shift", "40", "--plot", "l.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["strategy", "mean", "p50"]
    assert any(line.startswith("a -> b") for line in lines)
    assert Path("l.png").read_bytes().startswith(b"\x89PNG")
    assert run(*args, "--arrivals", "a.csv", "--gap", "5", "--decode-step", "0.1", "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["compute"]["decode_step"] + parsed["compute"]["decode_token"] == pytest.approx(0.1)


def tiny_profile():
    rng = np.random.default_rng(0)
    ids = rng.random((60, 2, 8)).argsort(-1)[..., :2]
    meta = {"model": "tiny", "hidden_size": 2048, "expert_bytes": 100}
    return Profile.from_tokens(ids, np.arange(60) % 3, np.arange(60), servers=("x", "y", "z"), experts=8, **meta)


def test_grid_clusters():
    profile = tiny_profile()
    cluster = grid_cluster(profile, 16, 250.0)
    assert [len(server.devices) for server in cluster.servers] == [1, 1, 2] * 4
    assert cluster.bandwidth[0, 1] == 250e6 / 8
    assert abs(grid_cluster(profile, 4, 100.0).memory.sum() / (2 * 8 * 100) - 1.3) < 0.01
    assert grid_cluster(profile, 4, 100.0).memory[0] == cluster.memory[0]
    spread = spread_profile(profile, cluster.names)
    assert (spread.counts == profile.counts[np.arange(12) % 3]).all()
    # Every recorded token is dealt to one server of its domain.
    assert np.bincount(spread.server).tolist() == [5] * 12
    assert sorted(spread.sequence.tolist()) == list(range(60))
    with pytest.raises(InputError, match="--grid needs one number for all"):
        grid_cluster(replace(profile, reserved_bytes=(1, 2, 3, 4)), 4, 100.0)


def test_grid_is_the_same_in_any_order():
    grid = Grid((4, 8), (100.0, 1000.0), (2.0, 8.0), ("uniform", "dance"), requests=60, duration=20.0)
    cells = dict(run_grid(grid, tiny_profile(), jobs=1))
    assert len(cells) == 16
    assert cells == dict(run_grid(grid, tiny_profile(), jobs=2))
    for strategy, found in trends(cells, grid).items():
        small = [1 - cells[strategy, 4, 1000.0, g]["mean"] / cells[strategy, 4, 100.0, g]["mean"] for g in grid.gaps]
        assert found["bandwidth_small"] is None or found["bandwidth_small"][1] in small


def test_grid_command(folder, capsys, monkeypatch):
    monkeypatch.setattr(
        "placement.commands.simulate.Grid", lambda **kw: Grid((4, 8), (100.0, 500.0), (8.0,), requests=30, **kw)
    )
    tiny_profile().save("profile.npz")
    assert run("--grid", "--strategies", "uniform,dance", "--jobs", "1", "--plot", "g.png") == 0
    out, err = capsys.readouterr()
    assert "4 -> 8 GPUs" in out
    assert "9-19 %" in out
    assert err.splitlines()[-1] == "simulated 8 of 8"
    assert Path("g.png").read_bytes().startswith(b"\x89PNG")
    assert run("--grid", "--strategies", "dance", "--jobs", "1", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 4


def test_a_part_of_the_grid_and_one_group(folder, capsys):
    tiny_profile().save("profile.npz")
    part = ("--grid", "--strategies", "latency,dance", "--jobs", "1", "--json", "--gpus", "12", "--gap", "9")
    part += ("--requests", "200")
    found = {}
    for more in ((), ("--one-group",), ("--prior", "0")):
        assert run(*part, "--bandwidths", "100,200", *more) == 0
        cells = json.loads(capsys.readouterr().out)["cells"]
        assert [(c["strategy"], c["gpus"], c["mbps"], c["gap_s"]) for c in cells] == [
            (name, 12, mbps, 9.0) for name in ("latency", "dance") for mbps in (100.0, 200.0)
        ]
        assert all(abs(c["requests"] - 200) < 60 for c in cells)
        found[more] = {(c["strategy"], c["mbps"]): c["mean"] for c in cells}
    assert found["--one-group",]["latency", 100.0] != found[()]["latency", 100.0]
    assert found["--one-group",]["dance", 100.0] == found[()]["dance", 100.0]
    assert found["--prior", "0"]["dance", 100.0] != found[()]["dance", 100.0]


def test_every_strategy_can_be_simulated():
    profile = tiny_profile()
    cluster = grid_cluster(profile, 4, 100.0)
    profile = spread_profile(profile, cluster.names)
    arrivals = Arrivals.poisson(3, 5.0, 100.0, [[50, 10]])
    for name in STRATEGIES:
        done = simulate(Problem.build(profile, cluster), plan(profile, cluster, name).resident, arrivals)
        assert np.isfinite(done.latency).all()
