"""Lock-step simulation: against cases worked out by hand, and against the runtime's own scheduler and tables."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dancemoe_jax.expert_parallel import point_to_point
from dancemoe_jax.expert_parallel.links import make_links
from dancemoe_jax.expert_parallel.pool import pool_layout
from dancemoe_jax.expert_parallel.tables import assign_slots, routing_tables
from launch.bench.harness.replay import Replay, Spent
from launch.bench.harness.trace import ReplayRequest
from placement import Cluster, InputError, Profile
from placement.__main__ import main
from placement.costs.network_use import likely_links
from placement.costs.routing import serving_server
from placement.data.arrivals import Arrivals
from placement.data.problem import Problem
from placement.data.workload import Workload
from placement.simulation.lockstep.exchange import COUNT_BYTES, RADIX, Exchange, digits, rounds
from placement.simulation.lockstep.predict import StepCosts, lock_step
from placement.simulation.lockstep.scheduler import Member
from placement.simulation.lockstep.serve import serve

LAYERS, EXPERTS, K, HIDDEN = 3, 4, 2, 100
COSTS = StepCosts(prefill=(0.1, 0.0, 0.01), decode=(0.02, 0.005, 0.001), message_seconds=1e-4)
ROW = 2 * HIDDEN + 6 * K


def arrivals(*rows):
    seconds, server, prompt, output = zip(*rows, strict=True)
    return Arrivals(np.array(seconds, float), *(np.array(c, np.int64) for c in (server, prompt, output)))


def make_problem(devices=(1, 1), tokens=None, latency="1ms", bandwidth="8Mbps"):
    names = [f"s{i}" for i in range(len(devices))]
    servers = [{"name": n, "devices": [{"memory": 100000}] * d} for n, d in zip(names, devices, strict=True)]
    network = {"latency": latency, "bandwidth": bandwidth}
    cluster = Cluster.from_dict({"server": servers, "network": network}, source="c")
    meta = {"model": "m", "hidden_size": HIDDEN, "expert_bytes": 10}
    if tokens is None:
        counts = np.ones((len(devices), LAYERS, EXPERTS), np.int64)
        return Problem.build(Profile(counts, tuple(names), top_k=K, **meta), cluster)
    ids, server, sequence = tokens
    return Problem.build(Profile.from_tokens(ids, server, sequence, servers=names, experts=EXPERTS, **meta), cluster)


def everywhere(devices):
    return np.ones((devices, LAYERS, EXPERTS), bool)


def test_one_request_alone_takes_its_chunks_and_its_decode_steps():
    served = lock_step(make_problem(), everywhere(2), arrivals((5.0, 0, 100, 3)), COSTS, chunks=(64,))
    prefill = (0.1 + 0.64) + (0.1 + 0.36)
    assert served.first_token == pytest.approx([prefill])
    assert served.latency == pytest.approx([prefill + 2 * 0.026])
    assert served.steps == {"prefill": 2, "decode": 2}
    assert served.network == pytest.approx([0.0])
    assert served.waiting == pytest.approx([0.0])


def test_two_servers_joined_share_every_step():
    served = lock_step(make_problem(), everywhere(2), arrivals((0.0, 0, 10, 3), (0.0, 1, 20, 2)), COSTS)
    prefill = 0.1 + 0.3
    both, one = 0.02 + 0.01 + 0.002, 0.026
    assert served.latency == pytest.approx([prefill + both + one, prefill + both])
    assert served.steps == {"prefill": 1, "decode": 2}


def test_prefill_and_decode_take_turns():
    kinds = []

    def step(prefill, members):
        kinds.append((prefill, members))
        return 1.0, 0.5

    served = serve(arrivals((0.0, 0, 4, 4), (0.5, 0, 12, 2)), [0], step, sequences=2, chunks=(4,))
    assert [prefill for prefill, _ in kinds] == [True, False, True, False, True, False, True, False]
    assert kinds[1] == (False, [Member(0, 0, 0, 4, 1)])
    assert kinds[4] == (True, [Member(0, 1, 1, 4, 4)])
    assert served.latency == pytest.approx([6 * 1.5, 8 * 1.5 - 0.5])
    assert served.first_token == pytest.approx([1.5, 7 * 1.5 - 0.5])
    assert served.waiting == pytest.approx([2 * 1.5, 12 - 0.5 - 4 * 1.5])


def test_a_request_without_a_place_waits_for_one():
    served = serve(arrivals((0.0, 0, 1, 2), (0.0, 0, 1, 1)), [0], lambda *_: (1.0, 0.0), sequences=1)
    assert served.latency.tolist() == [2.0, 3.0]
    assert served.waiting.tolist() == [0.0, 2.0]


def test_messages_of_a_row_by_hand():
    """Server 0 holds experts 0 and 1, server 1 the others; a row of server 0 needs server 1 in the last layer alone."""
    ids = np.array([[[0, 1], [0, 1], [0, 3]]])
    problem = make_problem(tokens=(ids, [0], [0]))
    resident = np.zeros((2, LAYERS, EXPERTS), bool)
    resident[0, :, :2] = resident[1, :, 2:] = True
    none, out, back = np.zeros((2, LAYERS, 2), bool), 1e-3 + (4 + ROW) / 1e6, 1e-3 + 4 * HIDDEN / 1e6
    for likely in (none, ~none):
        # Nobody waits for the questions of the other layers, nor for that of the last before its row goes.
        exchange = Exchange.build(problem, resident, likely=likely)
        assert exchange.seconds([ids, ids[:0]], 0.3) == pytest.approx(0.3 + out + back)
    dear = Exchange.build(problem, resident, message_seconds=0.01, row_seconds=0.5, likely=none)
    # Server 0 sends four messages, server 1 one; the row is packed and added up at both ends, both ways.
    assert dear.seconds([ids, ids[:0]], 0.3) == pytest.approx(0.3 + out - 4e-6 + back + 5 * 0.01 + 2 * 0.5)
    assert exchange.seconds([ids, ids[:0]], 0.3, overhead=0.1) == pytest.approx(0.3 + out + back + LAYERS * 0.1)
    home = Exchange.build(problem, everywhere(2))
    assert home.seconds([ids, ids], 0.3) == 0.3


def test_messages_through_one_port_follow_each_other():
    """Two devices of server 0 send a row each in the last layer, to servers of their own: one's sum waits for the other's."""
    ids = np.zeros((2, 1, LAYERS, K), np.int64) + np.array([[0, 1], [2, 3]])[:, None, None]
    problem = make_problem((2, 1, 1), latency="0ms")
    resident = np.zeros((4, LAYERS, EXPERTS), bool)
    resident[:2, :-1] = resident[2, -1, :2] = resident[3, -1, 2:] = True
    exchange = Exchange.build(problem, resident, likely=np.zeros((3, LAYERS, 3), bool))
    none = ids[0, :0]
    one = exchange.seconds([ids[0], none, none, none], 0.0)
    assert one == pytest.approx((ROW + 4 * HIDDEN) / 1e6, abs=2e-5)  # give or take the counts
    assert exchange.seconds([ids[0], ids[1], none, none], 0.0) == pytest.approx(one + 4 * HIDDEN / 1e6, abs=2e-5)


@pytest.mark.parametrize(
    ("needing", "bandwidth", "unasked"),
    [(3, "1Gbps", True), (2, "1Gbps", False), (3, "8kbps", False), (4, "8kbps", True), (3, "500kbps", True)],
)
def test_rows_go_unasked_where_that_saves_time_and_few_bytes(needing, bandwidth, unasked):
    """Of 4 tokens so many need the other server. 200 bytes take 0.2 s at 1 kB/s, 3.2 ms at 62.5 kB/s, asking 1.5 ms."""
    ids = np.array([[[0, 1 + 2 * (token < needing)]] * LAYERS for token in range(4)])
    problem = make_problem(tokens=(ids, [0] * 4, [0] * 4), bandwidth=bandwidth)
    problem = replace(problem, workload=Workload(exchange_seconds=3e-3))
    resident = np.zeros((2, LAYERS, EXPERTS), bool)
    resident[0, :, :2] = resident[1, :, 2:] = True
    likely = likely_links(problem, serving_server(problem, problem.held(resident)))
    assert likely[0, :, 1].tolist() == [unasked] * LAYERS
    assert not likely[:, :, 0].any()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 63, 64, 74, 511])
def test_digits_sum_to_the_count(count):
    parts = digits(count)
    assert sum(parts) == count
    assert len(parts) == sum(d != "0" for d in f"{count:o}")


@pytest.mark.parametrize("devices", [(1, 1, 2), (2, 1), (3, 2, 1, 2)])
def test_tables_are_the_runtimes(devices, rng):
    problem, total = make_problem(devices), sum(devices)
    resident = rng.random((total, LAYERS, EXPERTS)) < 0.4
    resident[rng.integers(total, size=(LAYERS, EXPERTS)), np.arange(LAYERS)[:, None], np.arange(EXPERTS)] = True
    serving = serving_server(problem, problem.held(resident))
    likely = rng.random((len(devices), LAYERS, len(devices))) < 0.5
    layout = pool_layout([LAYERS * EXPERTS] * total, problem.device_server)
    theirs = routing_tables(layout, assign_slots(layout, resident), serving=serving, likely=likely)
    ours = Exchange.build(problem, resident, likely=likely)
    links = make_links(tuple(problem.device_server.tolist()), LAYERS * EXPERTS)
    assert rounds(problem.device_server.tolist()) == (links.across, links.within)
    assert (point_to_point.RADIX, np.dtype(np.int32).itemsize) == (RADIX, COUNT_BYTES)
    for name in ("device", "needs", "eager"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("seed", range(4))
def test_schedule_is_the_runtimes(seed):
    rng = np.random.default_rng(seed)
    servers, count = [0, 1, 1, 2], 40
    given = Arrivals(
        np.sort(rng.uniform(0, 30, count)),
        rng.integers(0, 3, count),
        rng.integers(1, 40, count),
        rng.integers(1, 12, count),
    )
    requests = [
        ReplayRequest(int(s), float(t), np.zeros((p + o, 1, 1), np.int32), np.zeros((p + o, 1, 1), np.float32), int(p))
        for t, s, p, o in zip(*vars(given).values(), strict=True)
    ]
    theirs, ours = [], []

    def cost(prefill, per_device):
        return (0.05 if prefill else 0.01) + 0.003 * sum(per_device), 0.002 * max(per_device)

    def replayed(rows):
        theirs.append((rows.prefill, rows.active.sum(1).tolist()))
        return Spent(*cost(*theirs[-1]))

    def stepped(prefill, members):
        ours.append((prefill, [sum(m.count for m in members if m.device == d) for d in range(len(servers))]))
        return cost(*ours[-1])

    Replay(requests, servers, sequences=3, chunk=8).run(replayed)
    served = serve(given, servers, stepped, sequences=3, chunks=(8,))
    assert ours == theirs
    np.testing.assert_allclose(served.latency, [r.latency_s for r in requests])
    np.testing.assert_allclose(served.network, [r.network_s for r in requests])
    np.testing.assert_allclose(served.first_token + given.seconds, [r.first_token_s for r in requests])


def test_counts_alone_are_drawn_as_if_independent():
    resident = np.zeros((2, LAYERS, EXPERTS), bool)
    resident[0, :, :2] = resident[1, :, 2:] = True
    given = arrivals((0.0, 0, 30, 8), (1.0, 1, 30, 8))
    one, again = (lock_step(make_problem(), resident, given, COSTS) for _ in range(2))
    np.testing.assert_array_equal(one.latency, again.latency)
    assert (one.network > 0).all()


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ([], "must have"),
        ({"prefill": [1, 1, 1]}, "must have"),
        ({"prefill": [1, 1], "decode": [1, 1, 1]}, "prefill"),
        ({"prefill": [1, 1, 1], "decode": [1, 1, -1]}, "decode"),
        ({"prefill": [1, 1, 1], "decode": 1, "x": 2}, "must have"),
    ],
)
def test_costs_that_are_none_are_one_line(costs, said):
    with pytest.raises(InputError, match=said):
        StepCosts.from_dict(costs)


def test_simulate_offers_it(tmp_path, capsys):
    counts = np.ones((2, LAYERS, EXPERTS), np.int64)
    Profile(counts, ("a", "b"), model="m", top_k=K, hidden_size=HIDDEN, expert_bytes=10).save(tmp_path / "p.npz")
    server = '[[server]]\nname = "{}"\ndevices = [{{ memory = {} }}]\n'
    (tmp_path / "c.toml").write_text(server.format("a", 100) + server.format("b", 100))
    (tmp_path / "costs.json").write_text(json.dumps(vars(COSTS)))
    command = ["simulate", "--profile", str(tmp_path / "p.npz"), "--cluster", str(tmp_path / "c.toml"), "--lock-step"]
    command += ["--strategies", "uniform", "--duration", "60", "--json"]
    assert main([*command, "--costs", str(tmp_path / "costs.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    figures = found["strategies"]["uniform"]
    assert figures["latency"]["mean"] == pytest.approx(sum(figures[k] for k in ("compute", "network", "waiting")))
    assert found["costs"]["decode"] == list(COSTS.decode)
    assert main([*command, "--shift", "5"]) == 2
    assert "--shift" in capsys.readouterr().err
