"""Baselines: budgets, coverage, EPLB's published vector, what each strategy promises, on random and real instances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import STRATEGIES, Cluster, InputError, Problem, evaluate, plan
from placement.strategies.baselines import memory_slots
from placement.strategies.eplb import pack_items, rebalance, replicate
from tests.helpers.paths import DEEPSEEK
from tests.placement.test_dance import build, deepseek_halves, instances

quick = settings(max_examples=40, deadline=None, derandomize=True)
BASELINES = ["redundance", "smartmoe", "eplb", "eplb-nodup", "swift"]
LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


@pytest.mark.parametrize("strategy", BASELINES)
@given(instances())
@quick
def test_invariants(strategy, instance):
    profile, cluster = instance
    problem = Problem.build(profile, cluster)
    placement = plan(profile, cluster, strategy, seed=3)
    assert placement.resident.any(0).all()
    assert (problem.used_bytes(placement.resident) <= problem.budget).all()
    assert (plan(profile, cluster, strategy, seed=3).resident == placement.resident).all()
    from_dance = STRATEGIES[strategy](problem, previous=STRATEGIES["dance"](problem), seed=3)
    assert from_dance.any(0).all()
    assert (problem.used_bytes(from_dance) <= problem.budget).all()


@given(instances())
@quick
def test_redundance_adds_copies_to_uniform_until_nothing_fits(instance):
    problem = Problem.build(*instance)
    resident, start = STRATEGIES["redundance"](problem, seed=1), STRATEGIES["uniform"](problem)
    assert (resident >= start).all()
    assert (np.add.reduceat(resident.astype(int), problem.first_device) <= 1).all()
    room = problem.budget - problem.used_bytes(resident)
    lacking = ~problem.held(resident)[problem.device_server]
    assert not (lacking & (room[:, None] >= problem.expert_bytes)[:, :, None]).any()


def test_redundance_draws_by_seed():
    problem = Problem.build(*build(np.ones((2, 4, 8)), [[30], [20]], 1))
    one, two = (STRATEGIES["redundance"](problem, seed=seed) for seed in (0, 1))
    assert (one != two).any()


@given(instances())
@quick
def test_smartmoe_makes_no_copies_and_no_layer_worse(instance):
    problem = Problem.build(*instance)
    resident, before = STRATEGIES["smartmoe"](problem), STRATEGIES["uniform"](problem)
    assert (resident.sum(0) == 1).all()
    assert (resident.sum(2) == before.sum(2)).all()
    load = problem.frequency.sum(0)
    busiest = [(held * load).sum(2).max(0) for held in (resident, before)]
    assert (busiest[0] <= busiest[1] + 1e-12).all()
    changed = (resident != before).any((0, 2))
    assert (busiest[0][changed] < busiest[1][changed]).all()


def test_smartmoe_starts_from_what_is_there():
    problem = Problem.build(*build([[[8, 4, 2, 1]], [[0, 0, 0, 0]]], [[2], [2]], 1))
    previous = np.array([[[1, 0, 0, 1]], [[0, 1, 1, 0]]], bool)  # 9 against 6, which is the best there is
    assert (STRATEGIES["smartmoe"](problem, previous=previous) == previous).all()
    worse = previous[:, :, [0, 3, 2, 1]]  # 12 against 3
    assert (STRATEGIES["smartmoe"](problem, previous=worse) == previous).all()


def test_eplb_published_vector():
    found = rebalance(LOAD, slots=16, groups=4, nodes=2, devices=8)
    assert found.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_eplb_global():
    # Replicas by hand for row 0: 10 (183), 5 (165), 1 (132), 4 (104). Halves weigh 91.5, 82.5, 66, 52.
    found = rebalance(LOAD[:1], slots=16, groups=4, nodes=3, devices=8)
    assert sorted(found[0].tolist()) == sorted([*range(12), 10, 5, 1, 4])
    # Heaviest first onto the lightest device, ties to the lowest: 10 10 0 11 5 5 8 1 | then 1 3 9 4 4 2 6 7 fill up.
    assert found.tolist() == [[10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1]]
    assert rebalance(LOAD, 16, 1, 1, 8).tolist()[0] == found.tolist()[0]


@pytest.mark.parametrize("numbers", [(15, 4, 2, 8), (16, 5, 5, 10), (8, 4, 2, 8)])
def test_eplb_refuses_numbers_that_do_not_divide(numbers):
    with pytest.raises(InputError, match=r"must be (a multiple of|at least)"):
        rebalance(LOAD, *numbers)


@given(st.integers(0, 2**32))
@quick
def test_replicate_is_greedy_and_pack_fills_every_pack(seed):
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 5, rng.integers(1, 9)).astype(float)
    room = rng.integers(0, 5, rng.integers(1, 6))
    slots = max(len(load), room.sum())
    room[0] += slots - room.sum()
    logical, copies = replicate(load, slots)
    slow = np.ones(len(load), int)
    for slot in range(len(load), slots):
        best = int((load / slow).argmax())
        assert logical[slot] == best
        slow[best] += 1
    assert (copies == slow).all()
    assert (np.bincount(logical, minlength=len(load)) == copies).all()
    pack, rank = pack_items((load / copies)[logical], room)
    assert (np.bincount(pack, minlength=len(room)) == room).all()
    assert len(set(zip(pack.tolist(), rank.tolist(), strict=True))) == slots


def test_strategy_eplb_is_eplb_where_slots_are_equal():
    counts = np.array([LOAD, LOAD * 0])
    problem = Problem.build(*build(counts, [[4] * 4, [4] * 4], 1))
    assert (memory_slots(problem) == 2).all()
    resident = STRATEGIES["eplb"](problem)
    expected = rebalance(LOAD, 16, 1, 1, 8).reshape(2, 8, 2)
    for layer, device in np.ndindex(2, 8):
        assert set(np.flatnonzero(resident[device, layer])) == set(expected[layer, device])


def test_eplb_wastes_slots_and_nodup_does_not():
    # One expert takes nearly all load: both devices get two copies of it.
    problem = Problem.build(*build([[[97, 1, 1, 1]]], [[3, 3]], 1))
    assert STRATEGIES["eplb"](problem).sum() < 6
    resident = STRATEGIES["eplb-nodup"](problem)
    assert resident.sum(2).tolist() == [[3], [3]]
    assert resident.any(0).all()


@given(instances())
@quick
def test_eplb_nodup_uses_every_slot_eplb_at_most_these(instance):
    problem = Problem.build(*instance)
    slots = memory_slots(problem)
    wasteful, full = STRATEGIES["eplb"](problem), STRATEGIES["eplb-nodup"](problem)
    assert (full.sum(2) == slots).all()
    assert (wasteful <= full).all()


@given(instances(equal=True))
@quick
def test_slots_are_proportional_to_memory(instance):
    problem = Problem.build(*instance)
    _, layers, experts = problem.shape
    fit = problem.budget // problem.expert_bytes[0]
    slots = memory_slots(problem)
    if (fit <= layers * experts).all():
        assert (slots.sum(1) == fit).all()
    assert (slots.sum(0) >= experts).all()
    assert slots.max() <= experts


@given(instances())
@quick
def test_swift_changes_a_layer_only_to_lighten_it(instance):
    problem = Problem.build(*instance)
    before = STRATEGIES["eplb-nodup"](problem)
    after = STRATEGIES["swift"](problem, previous=before)
    assert (STRATEGIES["swift"](problem) == after).all()  # without a previous placement it starts there
    assert (after.sum(2) <= before.sum(2)).all()
    load = problem.frequency.sum(0)
    busiest = [(held * (load / held.sum(0))).sum(2).max(0) for held in (after, before)]
    assert (busiest[0] <= busiest[1] + 1e-12).all()
    if (after != before).any():
        assert busiest[0].sum() < 0.95 * busiest[1].sum()


def test_swift_leaves_an_even_placement_alone_and_swaps_an_uneven_one():
    problem = Problem.build(*build([[[4, 4, 1, 1]]], [[2, 2]], 1))
    even = np.array([[[1, 0, 1, 0]], [[0, 1, 0, 1]]], bool)
    assert (STRATEGIES["swift"](problem, previous=even) == even).all()
    uneven = np.array([[[1, 1, 0, 0]], [[0, 0, 1, 1]]], bool)
    swapped = STRATEGIES["swift"](problem, previous=uneven)
    assert (swapped[:, 0] @ np.array([4, 4, 1, 1])).tolist() == [5, 5]


def test_swift_moves_redundant_copies_to_the_busy_experts():
    problem = Problem.build(*build([[[12, 2, 1, 1]]], [[3, 3]], 1))
    before = np.array([[[1, 1, 1, 0]], [[0, 1, 1, 1]]], bool)  # copies of 1 and 2, none of 0
    after = STRATEGIES["swift"](problem, previous=before)
    assert after[:, 0, 0].all()


@pytest.mark.parametrize("strategy", [*BASELINES, "exact"])
def test_too_little_memory_is_refused(strategy):
    with pytest.raises(InputError, match=r"cluster: 20 bytes are missing for one copy of every expert"):
        plan(*build(np.ones((2, 3, 4)), [[50, 25], [39]], 10), strategy)
    with pytest.raises(InputError, match=r"cluster: \d+ bytes are missing"):
        plan(*build(np.ones((2, 2, 2)), [[9], [14]], (6, 5)), strategy)


@pytest.mark.skipif(not DEEPSEEK.exists(), reason="real traces are not in ../shared/data")
def test_real_routing_of_deepseek_v2_lite():
    planning, evaluation = deepseek_halves()
    servers = [
        {"name": n, "devices": [{"memory": 543 * 17301504}] * (1 + (n == "translation"))} for n in planning.servers
    ]
    cluster = Cluster.from_dict({"server": servers, "network": {"bandwidth": "500Mbps", "latency": "0.2ms"}})
    remote = {s: evaluate(evaluation, cluster, plan(planning, cluster, s))["remote_share"] for s in BASELINES}
    assert remote["redundance"] == pytest.approx(0.567, abs=0.01)
    assert remote["eplb"] == pytest.approx(0.531, abs=0.01)  # 0.558 with 20 slots a layer, as whole slots would have it
    assert 0.6 < remote["smartmoe"] < 0.7
    assert remote["eplb-nodup"] <= remote["eplb"] + 1e-9
    assert min(remote.values()) > 0.5  # none of them knows where calls enter
