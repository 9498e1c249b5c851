"""Costs against brute force on small instances."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, InputError, Placement, Problem, Profile, evaluate, plan
from placement.costs.network_use import network_use
from placement.costs.routing import copy_preference, device_load, fair_copies, pair_price, server_load, serving_server
from placement.costs.summary import balance, remote_share, summary

quick = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def instances(draw):
    """A problem with token-level sets, and a random complete placement: resident bool [D, L, E]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    servers, layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
    devices = rng.integers(1, 3, servers)
    count = int(rng.integers(1, 30))
    ids = rng.random((count, layers, experts)).argsort(-1)[..., : int(rng.integers(1, min(4, experts + 1)))]
    names = [f"s{n}" for n in range(servers)]
    pairs = [p for p in itertools.permutations(names, 2) if rng.random() < 0.6]
    links = [{"from": a, "to": b, "latency": f"{rng.integers(1, 4)}ms"} for a, b in pairs]
    tables = [{"name": n, "devices": [{"memory": 10**4}] * int(d)} for n, d in zip(names, devices, strict=True)]
    cluster = Cluster.from_dict({"server": tables, "link": links})
    server = rng.integers(0, servers, count)
    meta = {"model": "m", "hidden_size": 8, "expert_bytes": 10}
    profile = Profile.from_tokens(ids, server, np.zeros(count, int), servers=names, experts=experts, **meta)
    resident = rng.random((devices.sum(), layers, experts)) < 0.3
    owner = rng.integers(0, devices.sum(), (layers, experts))
    resident |= np.arange(devices.sum())[:, None, None] == owner
    return Problem.build(profile, cluster), resident


@given(instances())
@quick
def test_remote_share_and_network_need_by_counting(instance):
    problem, resident = instance
    assert problem.tokens is not None
    held = problem.held(resident)
    serving = serving_server(problem, held)
    use = network_use(problem, serving)
    need, distinct = use.need.mean(-1), use.distinct.mean(-1)
    assert summary(problem, resident)["basis"] == "tokens"
    share = remote_share(problem.frequency, held)
    for n in range(len(problem.names)):
        calls = remote = needs = partners = 0
        mine = problem.tokens.ids[problem.tokens.server == n]
        for token in mine:
            for layer, chosen in enumerate(token):
                away = [e for e in chosen if not resident[problem.device_server == n, layer, e].any()]
                calls, remote, needs = calls + len(chosen), remote + len(away), needs + bool(away)
                partners += len({serving[n, layer, e] for e in away})
        steps = max(1, len(mine) * problem.shape[1])
        assert np.isclose(share[n], remote / max(1, calls))
        if len(mine):
            assert np.isclose(need[n], needs / steps)
            assert np.isclose(distinct[n], partners / steps)


@given(instances())
@quick
def test_calls_go_to_the_partner_that_holds_most_per_price(instance):
    problem, resident = instance
    held = problem.held(resident)
    serving = serving_server(problem, held)
    price = pair_price(problem)
    for (n, layer, expert), target in np.ndenumerate(serving):
        holders = np.flatnonzero(held[:, layer, expert])
        assert target in holders
        assert (target == n) == (n in holders)
        if target != n:
            worth = [(held[m, layer] & ~held[n, layer]).sum() / price[n, m] for m in (target, *holders)]
            assert worth[0] >= max(worth) * (1 - 1e-6)


@given(instances())
@quick
def test_load_is_conserved(instance):
    problem, resident = instance
    load = server_load(problem, problem.held(resident))
    assert np.allclose(load.sum(0), problem.frequency.sum(0))
    assert (load[~problem.held(resident)] == 0).all()
    assert np.allclose(device_load(problem, resident).sum(0), problem.frequency.sum((0, 2)))
    assert balance(problem, resident) >= 1 - 1e-9


def two_servers(counts, devices=(1, 1), **meta):
    names = ("a", "b")
    tables = [{"name": n, "devices": [{"memory": 99}] * d} for n, d in zip(names, devices, strict=True)]
    fields = {"model": "m", "top_k": 1, "hidden_size": 100, "expert_bytes": 1} | meta
    profile, cluster = Profile(np.asarray(counts), names, **fields), Cluster.from_dict({"server": tables})
    return profile, cluster, Problem.build(profile, cluster)


def test_need_from_counts_takes_experts_as_independent():
    _, _, problem = two_servers([[[4, 3, 2, 1]], [[0, 0, 0, 0]]], top_k=2)
    held = np.array([[[1, 1, 0, 0]], [[0, 0, 1, 1]]], bool)
    use = network_use(problem, serving_server(problem, held))
    assert summary(problem, held)["basis"] == "counts"
    # The second server has no statistics: it wants what the first one wants, of which it lacks the first two.
    assert np.allclose(use.need[:, 0], [1 - (1 - 0.4) * (1 - 0.2), 1 - (1 - 0.8) * (1 - 0.6)])
    assert np.allclose(use.distinct, use.need)


def test_expert_that_every_token_takes_is_certain():
    _, _, problem = two_servers([[[5, 0]], [[0, 5]]])
    held = np.array([[[0, 1]], [[1, 0]]], bool)
    assert network_use(problem, serving_server(problem, held)).need.tolist() == [[1], [1]]


def test_need_without_tokens_of_every_server_is_mixed():
    ids, server = np.array([[[0]]]), np.array([0])
    _, _, problem = two_servers([[[1, 0]], [[1, 1]]], ids=ids, server=server, sequence=server)
    held = np.array([[[1, 0]], [[0, 1]]], bool)
    assert network_use(problem, serving_server(problem, held)).need.tolist() == [[0], [0.5]]
    assert summary(problem, held)["basis"] == "mixed"


def test_balance_counts_speed_and_copies():
    _, _, problem = two_servers([[[3, 3]], [[0, 0]]], devices=(2, 1))
    resident = np.array([[[1, 0]], [[0, 1]], [[0, 0]]], bool)
    assert np.isclose(balance(problem, resident), 1.5)
    resident[:2] = True  # two copies in one server share evenly
    assert np.isclose(balance(problem, resident), 1.5)
    resident[1] = False
    assert np.isclose(balance(problem, resident), 3)


def four_servers(held):
    """Each source's order of partners in a layer, servers a to d in a ring, a and d closer than others."""
    names = "abcd"
    tables = [{"name": n, "devices": [{"memory": 9}]} for n in names]
    near = {"from": "a", "to": "d", "latency": "0.1ms", "both": True}
    cluster = Cluster.from_dict({"server": tables, "link": [near]})
    held = np.asarray(held, bool)[:, None]
    problem = Problem.build(Profile(np.ones(held.shape), tuple(names), "m", 1, 8, 1), cluster)
    return copy_preference(problem, held)[:, 0].tolist()


def test_equally_good_partners_are_taken_in_ring_order():
    assert four_servers([[0, 0]] * 4) == [[0, 2, 3, 1], [3, 0, 1, 2], [2, 3, 0, 1], [1, 2, 3, 0]]


def test_who_holds_most_of_what_is_lacking_comes_first():
    held = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]]
    assert four_servers(held)[0] == [0, 3, 1, 2]  # c has both experts that a lacks, b and d one; d is nearer than b


def test_summary_of_a_known_case():
    profile, cluster, _ = two_servers([[[3, 1], [2, 2]], [[0, 4], [4, 0]]], reserved_bytes=97)
    placement = plan(profile, cluster)
    assert placement.resident.astype(int).tolist() == [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]
    cost = evaluate(profile, cluster, placement)
    assert cost == placement.predicted
    assert cost["remote_share_by_server"] == {"a": 3 / 8, "b": 0}
    assert cost["network_probability"] == cost["distinct_remote_servers"] == (1 / 4 + 1 / 2) / 2 / 2
    # Over two layers: 100 values of 2 bytes and one expert there, 100 values of 4 bytes back.
    assert cost["bytes_per_token"] == 3 / 16 * 2 * (206 + 400)
    assert cost["only_copies"] == 1
    assert cost["balance"] == 11 / 8  # 5 calls arrive at a, 11 at b
    assert cost["used_bytes"] == cost["budget_bytes"] == [2, 2]


def test_remote_calls_to_only_copies_are_told_from_others():
    counts = np.array([[[0, 3, 1, 0]], [[5, 0, 0, 0]], [[0, 0, 0, 5]]])
    profile = Profile(counts, ("a", "b", "c"), "m", top_k=1, hidden_size=64, expert_bytes=1)
    servers = [{"name": name, "devices": [{"memory": 3}]} for name in "abc"]
    problem = Problem.build(profile, Cluster.from_dict({"server": servers}))
    resident = np.array([[[1, 0, 0, 0]], [[1, 1, 1, 0]], [[0, 0, 1, 1]]], bool)
    assert summary(problem, resident)["only_copies"] == 3 / 4  # a lacks 1, which b alone has, and 2, which b and c have


def test_silent_server_does_not_count_in_means():
    profile, cluster, _ = two_servers([[[1, 1]], [[0, 0]]], reserved_bytes=98)
    cost = evaluate(profile, cluster, plan(profile, cluster))
    assert cost["remote_share"] == 0.5
    assert cost["remote_share_by_server"] == {"a": 0.5, "b": 0.0}


def test_evaluate_refuses_what_does_not_belong_together():
    profile, cluster, _ = two_servers([[[1, 1]], [[0, 0]]])
    placement = plan(profile, cluster)
    other = Profile(profile.counts, profile.servers, "other", 1, 100, 1)
    with pytest.raises(InputError, match=r"placement: model.name = 'm', but profile has 'other'"):
        evaluate(other, cluster, placement)
    fuller = Profile(profile.counts, profile.servers, "m", 1, 100, 1, reserved_bytes=98)
    with pytest.raises(InputError, match="over its memory by 1 bytes"):
        evaluate(fuller, cluster, placement)


def test_sglang_shares_sources_evenly_among_the_copies_of_other_nodes():
    rng = np.random.default_rng(0)
    held = rng.random((7, 3, 10)) < 0.35
    held[rng.integers(0, 7, (3, 10)), np.arange(3)[:, None], np.arange(10)] = True
    serving = fair_copies(held)
    assert np.take_along_axis(held, serving, axis=0).all()
    own = np.broadcast_to(np.arange(7)[:, None, None], held.shape)
    assert (serving[held] == own[held]).all()
    for layer in range(3):
        for expert in range(10):
            holders = np.flatnonzero(held[:, layer, expert])
            used = np.bincount(serving[~held[:, layer, expert], layer, expert], minlength=7)[holders]
            assert used.max() - used.min() <= 1
    assert (fair_copies(held) == serving).all()
    assert (fair_copies(held, seed=1) != serving).any()


def test_sglang_needs_more_partners_where_ours_keeps_to_one():
    """Two servers have all that two others lack; ours takes one of them for a token, SGLang's rule both."""
    counts = np.ones((4, 1, 12), np.int64)
    meta = {"model": "m", "top_k": 4, "hidden_size": 64, "expert_bytes": 1}
    profile = Profile(counts, ("a", "b", "c", "d"), **meta)
    servers = [{"name": name, "devices": [{"memory": size}]} for name, size in zip("abcd", (12, 12, 2, 2), strict=True)]
    cluster = Cluster.from_dict({"server": servers})
    resident = np.zeros((4, 1, 12), bool)
    resident[:2] = True
    resident[2:, :, :2] = True
    model = {"name": "m", "layers": 1, "experts": 12, "top_k": 4, "expert_bytes": 1, "reserved_bytes": 0}
    placed = Placement(resident, cluster.device_names, "by hand", model)
    ours, theirs = (evaluate(profile, cluster, placed, dispatch=rule) for rule in ("ours", "sglang"))
    assert ours["network_probability"] == theirs["network_probability"]
    assert ours["distinct_remote_servers"] < 0.6
    assert theirs["distinct_remote_servers"] > 1.5 * ours["distinct_remote_servers"]
    with pytest.raises(InputError, match="dispatch = 'vllm': must be one of ours, sglang"):
        evaluate(profile, cluster, placed, dispatch="vllm")
