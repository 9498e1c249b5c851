"""Step time against counting by hand, the strategy that minimises it, and what it gains on real routing."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import STRATEGIES, Cluster, InputError, Problem, Profile, Workload, evaluate, plan
from placement.costs.computing import longest_in_server
from placement.costs.network_use import network_use
from placement.costs.routing import serving_server
from placement.costs.step_time import predict
from placement.costs.token_sets import chains, token_sets
from placement.data.workload import EXCHANGE_SECONDS
from placement.strategies.latency.local_search import local_search
from placement.strategies.latency.plan import latency
from tests.helpers.paths import DEEPSEEK
from tests.placement.test_dance import deepseek_halves

quick = settings(max_examples=30, deadline=None, derandomize=True)
TOKENS, COUNTS = "tokens", "counts"


@st.composite
def instances(draw, equal=None, kinds=(TOKENS, COUNTS)):
    """A problem with sets that recur, links and speeds that differ, and 1 to 3 times the memory of all experts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    servers, layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 8))
    k, devices = int(rng.integers(1, min(4, experts + 1))), rng.integers(1, 3, servers)
    equal = draw(st.booleans()) if equal is None else equal
    size = np.full(layers, 7) if equal else rng.integers(3, 12, layers)
    total = int(size.sum()) * experts
    extra = int(total * draw(st.sampled_from([1.0, 1.3, 3.0])))
    memory = rng.multinomial(extra, rng.dirichlet(np.ones(devices.sum()))) + size.max()
    names = [f"s{n}" for n in range(servers)]
    tables = [{"memory": int(m), "speed": float(rng.integers(1, 4))} for m in memory]
    parts = np.split(np.array(tables), np.cumsum(devices)[:-1])
    links = [
        {"from": a, "to": b, "latency": f"{rng.integers(0, 9)}ms", "bandwidth": f"{rng.integers(1, 99)}MB/s"}
        for a, b in itertools.permutations(names, 2)
        if rng.random() < 0.5
    ]
    tables = [{"name": name, "devices": list(part)} for name, part in zip(names, parts, strict=True)]
    cluster = Cluster.from_dict({"server": tables, "link": links})
    meta = {"model": "m", "hidden_size": 1024, "expert_bytes": tuple(size.tolist())}
    if draw(st.sampled_from(kinds)) == TOKENS:
        patterns = rng.random((servers, 5, layers, experts)).argsort(-1)[..., :k]
        server = np.sort(rng.integers(0, servers, int(rng.integers(1, 40))))
        ids = patterns[server, rng.integers(0, 5, len(server))]
        profile = Profile.from_tokens(ids, server, np.zeros(len(server), int), servers=names, experts=experts, **meta)
    else:
        counts = rng.poisson(rng.gamma(0.5, 20, (servers, layers, experts)))
        profile = Profile(counts, tuple(names), top_k=k, **meta)
    workload = Workload(
        active=draw(st.sampled_from([1, 3])),
        prefill_tokens=draw(st.sampled_from([0, 64])),
        decode_steps=draw(st.sampled_from([1, 100])),
    )
    return Problem.build(profile, cluster, workload)


def anywhere(problem, seed=0):
    """A random complete placement, memory aside: bool [D, L, E]."""
    rng = np.random.default_rng(seed)
    number, (_, layers, experts) = len(problem.budget), problem.shape
    owner = rng.integers(0, number, (layers, experts))
    return (rng.random((number, layers, experts)) < 0.3) | (np.arange(number)[:, None, None] == owner)


@given(instances(kinds=(TOKENS,)))
@quick
def test_predict_by_counting_tokens(problem):
    resident = anywhere(problem)
    problem = replace(problem, workload=replace(problem.workload, active=1, prefill_tokens=1))
    serving = serving_server(problem, problem.held(resident))
    row_bytes, sum_bytes = 1024 * 2 + 6 * problem.top_k, 1024 * 4
    row, back = row_bytes / problem.bandwidth, sum_bytes / problem.bandwidth
    alone, crossings = {}, []
    for n, name in enumerate(problem.names):
        seconds, met = 0.0, 0
        mine = problem.tokens.ids[problem.tokens.server == n]
        for token, layer in itertools.product(mine, range(problem.shape[1])):
            away = {int(serving[n, layer, e]) for e in token[layer]} - {n}
            exchange = [EXCHANGE_SECONDS + problem.latency[n, m] + problem.latency[m, n] for m in away]
            seconds += max(exchange, default=0.0) + sum(row[n, m] + back[m, n] for m in away)
            met += len(away)
        if len(mine):
            alone[name] = seconds / len(mine)
            crossings.append(met / len(mine))
    found = predict(problem, resident)
    for name, seconds in alone.items():
        assert np.isclose(found["decode_network_seconds_by_server"][name], seconds)
    assert np.isclose(found["decode_network_seconds"], np.mean(list(alone.values())))
    assert np.isclose(found["prefill_network_seconds"], found["decode_network_seconds"])  # one token of either kind
    assert np.isclose(found["prefill_bytes"], np.mean(crossings) * (row_bytes + sum_bytes))
    both = found["prefill_seconds"] + problem.workload.decode_steps * found["decode_seconds"]
    assert np.isclose(found["step_seconds"], both)


def three_servers(counts, tokens=None, slots=(9, 9, 9), latency="0ms", workload=None, **meta):
    """Servers a, b, c of one device each, links without latency and of 1 MB/s."""
    tables = [{"name": n, "devices": [{"memory": s}]} for n, s in zip("abc", slots, strict=True)]
    cluster = Cluster.from_dict({"server": tables, "network": {"bandwidth": "1MB/s", "latency": latency}})
    profile = Profile(np.asarray(counts), ("a", "b", "c"), "m", 2, 500, 1, **meta)
    return Problem.build(profile, cluster, workload)


def test_active_sequences_wait_for_each_other():
    # Tokens of a and b always need c, those of c nobody: a layer waits if any of the active ones is not at c.
    counts = np.array([[[1, 1]], [[1, 1]], [[1, 1]]])
    held = np.array([[[0, 0]], [[0, 0]], [[1, 1]]], bool)
    for active in (1, 2, 5):
        work = Workload(active, 0, 1, assignment_seconds=0.0)
        found = predict(three_servers(counts, workload=work), held)
        waits = 1 - (1 / 3) ** active
        rows = (1.012e-3 + 2e-3) * max(2 / 3, active * 2 / 3)  # all meet at c's interface, there and back
        assert np.isclose(found["decode_network_seconds"], EXCHANGE_SECONDS * waits + rows)


def test_busiest_device_computes():
    counts = np.array([[[4, 4]], [[0, 0]], [[0, 0]]])
    work = Workload(1, 0, 1, assignment_seconds=1.0)
    found = predict(three_servers(counts, workload=work), np.array([[[1, 0]], [[0, 1]], [[0, 0]]], bool))
    assert np.isclose(found["decode_seconds"] - found["decode_network_seconds"], 1.0)  # one of two each
    found = predict(three_servers(counts, workload=work), np.array([[[1, 1]], [[0, 0]], [[0, 0]]], bool))
    assert (found["decode_network_seconds"], found["decode_seconds"]) == (0.0, 2.0)


def test_a_decoded_token_waits_for_most_of_its_experts_on_one_device():
    # Every token has both its experts on one device; a prompt's tokens spread over both devices.
    ids = np.array([[[0, 1]], [[2, 3]]] * 2)
    counts = np.array([[[2, 2, 2, 2]], [[0] * 4], [[0] * 4]])
    tokens = {"ids": ids, "server": np.zeros(4, int), "sequence": np.zeros(4, int)}
    held = np.array([[[1, 1, 0, 0]], [[0, 0, 1, 1]], [[0, 0, 0, 0]]], bool)
    for active, seconds in ((1, 2.0), (2, 2.0), (3, 3.0)):  # of three, more than the mean waits for one of them alone
        work = Workload(active, 10, 1, assignment_seconds=1.0)
        found = predict(three_servers(counts, workload=work, **tokens), held)
        assert np.isclose(found["decode_seconds"] - found["decode_network_seconds"], seconds)
        assert np.isclose(found["prefill_seconds"] - found["prefill_network_seconds"], 10.0)
    apart = np.array([[[1, 0, 1, 0]], [[0, 1, 0, 1]], [[0, 0, 0, 0]]], bool)
    found = predict(three_servers(counts, workload=Workload(1, 10, 1, assignment_seconds=1.0), **tokens), apart)
    assert np.isclose(found["decode_seconds"] - found["decode_network_seconds"], 1.0)


def test_experts_of_a_token_meet_on_a_servers_devices():
    counts = np.ones((1, 1, 4))
    devices = [{"memory": 9, "speed": 2.0}, {"memory": 9, "speed": 2.0}]
    cluster = Cluster.from_dict({"server": [{"name": "a", "devices": devices}]})
    problem = Problem.build(Profile(counts, ("a",), "m", 2, 500, 1), cluster)
    # One expert takes half a second at twice the speed; two are on one device half of the time.
    assert longest_in_server(problem)[0] == pytest.approx([0.0, 0.5, 0.75], abs=0.02)


@given(instances(kinds=(COUNTS,)))
@quick
def test_network_use_from_counts_is_consistent(problem):
    serving = serving_server(problem, problem.held(anywhere(problem)))
    found = network_use(problem, serving)
    assert (np.diff(found.within, axis=-1) >= -1e-12).all()
    assert np.allclose(found.within[..., -1], 1)
    # Nothing within level 0 means that some partner is needed; a partner that is needed is needed by some call.
    assert (1 - found.within[..., 0] <= found.pairs.sum(-1) + 1e-12).all()
    assert (1 - found.within[..., 0] >= found.pairs.max(-1) - 1e-12).all()


@given(instances())
@quick
def test_plans_are_complete_within_memory_and_reproducible(problem):
    resident = latency(problem)
    assert resident.any(0).all()
    assert (problem.used_bytes(resident) <= problem.budget).all()
    assert (np.add.reduceat(resident.astype(int), problem.first_device) <= 1).all()
    assert (latency(problem) == resident).all()


@given(instances(equal=True))
@quick
def test_never_slower_than_the_fewest_remote_calls(problem):
    seconds = predict(problem, latency(problem))["step_seconds"]
    for rival in ("dance", "exact"):
        assert seconds <= predict(problem, STRATEGIES[rival](problem))["step_seconds"] * (1 + 1e-9)


@given(instances(equal=True))
@quick
def test_previous_stays_unless_something_is_faster(problem):
    first = latency(problem)
    again = latency(problem, previous=first)
    if (again != first).any():
        assert predict(problem, again)["step_seconds"] < predict(problem, first)["step_seconds"]
    silent = replace(problem, frequency=np.zeros_like(problem.frequency), tokens=None)
    assert (latency(silent, previous=first) == first).all()


@given(instances(equal=True, kinds=(TOKENS,)))
@quick
def test_local_search_keeps_memory_and_never_lengthens_decode(problem):
    problem = replace(problem, workload=Workload(1, 0, 1, assignment_seconds=0.0), speed=np.ones(len(problem.speed)))
    start = problem.held(STRATEGIES["dance"](problem))
    end = local_search(problem, token_sets(problem), start)
    assert end.any(0).all()
    assert (end.sum((1, 2)) >= start.sum((1, 2))).all()
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device)
    assert (end.sum(2) @ problem.expert_bytes <= capacity).all()
    before, after = (
        np.mean([*predict(problem, held[problem.device_server])["decode_network_seconds_by_server"].values()])
        for held in (start, end)
    )
    if (np.bincount(problem.tokens.server, minlength=len(problem.names)) > 0).all():
        assert after <= before + 1e-9


@given(instances(kinds=(TOKENS,)))
@quick
def test_chains_serve_what_they_say(problem):
    sets = token_sets(problem)
    assert np.isclose(sets.weight.sum(), 1)
    chain = chains(problem, sets)
    for server in np.flatnonzero(sets.recorded):
        ids = problem.tokens.ids[problem.tokens.server == server]
        for layer, s in itertools.product(range(problem.shape[1]), range(problem.shape[2] + 1)):
            inside = np.isin(ids[:, layer], chain.order[server, layer, :s]).all(-1)
            assert np.isclose(chain.served[server, layer, s], inside.mean())


def test_chains_start_with_what_is_held():
    problem = three_servers(np.arange(24).reshape(3, 2, 4))
    base = np.zeros(problem.shape, bool)
    base[1, 0, [0, 2]] = True
    order = chains(problem, token_sets(problem), base).order
    assert set(order[1, 0, :2].tolist()) == {0, 2}
    assert order[0, 0].tolist() == [3, 2, 1, 0]


def test_drawn_sets_follow_the_counts():
    counts = np.tile([8, 4, 2, 1, 0], (3, 1, 1))
    sets = token_sets(three_servers(counts))
    assert not sets.recorded.any()
    ordered = np.sort(sets.ids, -1)
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    share = np.bincount(sets.ids.ravel(), minlength=5) / len(sets.ids)
    assert (np.diff(share) < 0).all()
    assert share[4] == 0


def test_few_counts_take_few_drawn_sets():
    counts = np.tile([8, 4, 2, 1, 0], (3, 1, 1))  # of 2 experts a token
    sizes = [len(token_sets(three_servers(counts * times)).ids) for times in (1, 10**3, 10**6)]
    assert sizes[0] == 3 * 1024
    assert sizes[1] == 3 * 7500
    assert sizes[2] == 3 * (2**15 // 3)


def test_whole_layers_stay_at_home():
    # Two layers of four equally used experts; each server has room for one layer, and half a layer would serve no token.
    counts = np.ones((3, 2, 4), int)
    problem = three_servers(counts, slots=(4, 4, 4))
    held = problem.held(latency(problem))
    assert sorted(held.all(-1).sum(-1).tolist()) == [1, 1, 1]


def test_what_fires_together_is_kept_together():
    # Experts {0, 1} and {2, 3} fire together at a, {0, 2} and {1, 3} at b; counts alone are the same everywhere.
    patterns = {0: [[0, 1]] * 6 + [[2, 3]] * 5, 1: [[0, 2]] * 6 + [[1, 3]] * 5, 2: [[0, 1]]}
    ids = np.array([[p] for rows in patterns.values() for p in rows])
    server = np.repeat([0, 1, 2], [len(rows) for rows in patterns.values()])
    problem = three_servers(np.ones((3, 1, 4), int), slots=(2, 2, 4), ids=ids, server=server, sequence=server)
    held = problem.held(latency(problem))[:, 0].astype(int).tolist()
    assert held == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]


def test_slow_links_are_avoided():
    # Room for one layer at a and b, for two at c, and a reaches b only slowly: c holds what a lacks.
    tables = [{"name": n, "devices": [{"memory": size}]} for n, size in (("a", 4), ("b", 4), ("c", 8))]
    links = [{"from": "a", "to": "b", "latency": "50ms", "both": True}]
    cluster = Cluster.from_dict({"server": tables, "link": links})
    counts = np.full((3, 3, 4), 10)
    placement = plan(Profile(counts, ("a", "b", "c"), "m", 2, 8, 1), cluster, "latency")
    assert placement.predicted["decode_network_seconds_by_server"]["a"] < 0.01


@pytest.mark.parametrize(
    ("field", "value"),
    [("active", 0), ("active", 1.5), ("prefill_tokens", -1), ("decode_steps", True), ("exchange_seconds", -1e-3)],
)
def test_workload_refuses(field, value):
    with pytest.raises(InputError, match=rf"workload\.{field} = .*: must be a"):
        Workload(**{field: value})


def test_workload_needs_work():
    with pytest.raises(InputError, match="give one of them work"):
        Workload(prefill_tokens=0, decode_steps=0)


@pytest.mark.skipif(not DEEPSEEK.exists(), reason="real traces are not in ../shared/data")
def test_real_routing_of_deepseek_v2_lite():
    planning, evaluation = deepseek_halves()
    slots = 543 * 17301504
    servers = [{"name": n, "devices": [{"memory": slots}] * (1 + (n == "translation"))} for n in planning.servers]
    # 3 ms of its own and 0.2 ms of latency each way: 3.4 ms an exchange.
    cluster = Cluster.from_dict({"server": servers, "network": {"bandwidth": "500Mbps", "latency": "0.2ms"}})
    mixes = {"mixed": Workload(), "decode": Workload(prefill_tokens=0), "prefill": Workload(decode_steps=0)}
    plans = {name: plan(planning, cluster, "latency", workload=mix) for name, mix in mixes.items()}
    plans |= {name: plan(planning, cluster, name) for name in ("eplb", "dance")}
    costs = {name: evaluate(evaluation, cluster, found) for name, found in plans.items()}
    for name in mixes:
        assert costs[name]["used_bytes"] == [slots] * 4
        for rival, decode, prefill in (("eplb", 0.44, 0.63), ("dance", 0.32, 0.49)):
            step, rivals = (costs[key]["decode_network_seconds"] for key in (name, rival))
            assert step <= (1 - decode) * rivals
            sent, rivals = (costs[key]["prefill_bytes"] for key in (name, rival))
            assert sent <= (1 - prefill) * rivals
    assert (plans["decode"].resident != plans["prefill"].resident).any()
    for name, key in (("decode", "decode_network_seconds"), ("prefill", "prefill_bytes")):
        other = "prefill" if name == "decode" else "decode"
        on_its_own = [evaluate(planning, cluster, plans[plan_name])[key] for plan_name in (name, other)]
        assert on_its_own[0] <= on_its_own[1]
