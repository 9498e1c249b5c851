"""The optimum against the linear programme and against all assignments; certificates checked from their definition."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from placement import STRATEGIES, Cluster, Problem, evaluate, optimum, plan
from placement.commands.bench import synthetic
from placement.strategies.exact.optimum import certificate, exact, gap, least_remote, server_slots, solve_equal
from placement.strategies.exact.transportation import transport
from tests.helpers.paths import DEEPSEEK
from tests.placement.test_dance import build, deepseek_halves, instances

quick = settings(max_examples=60, deadline=None, derandomize=True)


def relaxation(problem):
    """Least remote calls of the linear relaxation with each server's usable bytes."""
    servers, layers, experts = problem.shape
    items = layers * experts
    size = np.repeat(problem.expert_bytes, experts)
    memory = np.kron(np.eye(servers), size)
    cover = np.kron(np.ones((1, servers)), -np.eye(items))
    room = np.add.reduceat(problem.usable_bytes, problem.first_device)
    limits = np.concatenate([room, -np.ones(items)])
    found = linprog(-problem.frequency.ravel(), np.concatenate([memory, cover]), limits, bounds=(0, 1))
    assert found.status == 0
    return problem.frequency.sum() + found.fun


def check(problem, proof):
    """Dual feasibility and value from the definition of the dual alone, server by server and expert by expert."""
    servers, layers, experts = problem.shape
    assert (proof.server_price >= 0).all()
    assert (proof.expert_price >= 0).all()
    room = np.add.reduceat(problem.usable_bytes, problem.first_device)
    value = sum(room[n] * proof.server_price[n] for n in range(servers)) - proof.expert_price.sum()
    for n, layer, expert in np.ndindex(servers, layers, experts):
        cost = proof.server_price[n] * problem.expert_bytes[layer]
        value += max(0.0, problem.frequency[n, layer, expert] + proof.expert_price[layer, expert] - cost)
    assert proof.dual == pytest.approx(value, rel=1e-9, abs=1e-12)


@given(instances())
@quick
def test_invariants(instance):
    profile, cluster = instance
    problem = Problem.build(profile, cluster)
    resident = exact(problem)
    assert resident.any(0).all()
    assert (problem.used_bytes(resident) <= problem.budget).all()
    assert (np.add.reduceat(resident.astype(int), problem.first_device) <= 1).all()
    assert (plan(profile, cluster, "exact").resident == resident).all()


@given(instances(equal=True))
@quick
def test_equal_sizes_reach_the_linear_programme_with_certificate(instance):
    problem = Problem.build(*instance)
    resident = exact(problem)
    proof = certificate(problem, resident)
    check(problem, proof)
    remote = problem.frequency[~problem.held(resident)].sum()
    total = problem.frequency.sum()
    assert remote == pytest.approx(relaxation(problem), abs=1e-9 * max(1, total))
    assert proof.primal == pytest.approx(total - remote)
    assert proof.primal == pytest.approx(proof.dual, rel=1e-10, abs=1e-12)
    assert proof.gap == 0
    assert gap(problem, resident, least_remote(problem)) == 0


@given(instances(equal=False))
@quick
def test_unequal_sizes_stay_within_a_valid_bound(instance):
    problem = Problem.build(*instance)
    resident = exact(problem)
    proof = certificate(problem, resident)
    check(problem, proof)
    assert proof.primal <= proof.dual + 1e-9
    remote, bound = problem.frequency[~problem.held(resident)].sum(), relaxation(problem)
    assert proof.least_remote == pytest.approx(bound, abs=1e-6)  # no bound from prices is better than the relaxation
    for strategy in ("uniform", "dance", "eplb-nodup"):
        other = problem.frequency[~problem.held(STRATEGIES[strategy](problem))].sum()
        assert remote <= other + 1e-9
        assert other >= proof.least_remote - 1e-9


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@given(instances(equal=True))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_no_strategy_beats_the_optimum(strategy, instance):
    problem = Problem.build(*instance)
    least = least_remote(problem)
    found = gap(problem, STRATEGIES[strategy](problem), least)
    assert found is None or found >= 0


def assignments(problem):
    """Every complete way to fill the devices, bool [D, L, E]; for tiny instances."""
    devices = len(problem.budget)
    shape = (devices, *problem.shape[1:])
    for bits in itertools.product([False, True], repeat=int(np.prod(shape))):
        resident = np.array(bits).reshape(shape)
        if resident.any(0).all() and (problem.used_bytes(resident) <= problem.budget).all():
            yield resident


@pytest.mark.parametrize("seed", range(12))
def test_brute_force(seed):
    rng = np.random.default_rng(seed)
    layers, experts = [(1, 3), (2, 2), (1, 4)][seed % 3]
    size = [2, 3] if layers == 2 and seed % 2 else [2] * layers
    memory = [[int(rng.integers(2, 6)), int(rng.integers(2, 6))], [int(rng.integers(5, 9))]]
    problem = Problem.build(*build(rng.integers(0, 6, (2, layers, experts)), memory, tuple(size)))
    everything = list(assignments(problem))
    if not everything:
        pytest.skip("nothing fits")
    least = min(problem.frequency[~problem.held(resident)].sum() for resident in everything)
    found = exact(problem)
    assert problem.frequency[~problem.held(found)].sum() == pytest.approx(least, abs=1e-12)
    assert least_remote(problem) <= least + 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_previous_wins_ties_and_nothing_else(seed):
    """Against all assignments: as few remote calls as possible, and among those as few new experts on a server."""
    rng = np.random.default_rng(seed)
    profile, cluster = build(rng.integers(0, 3, (3, 1, 4)), [[2], [2], [2]], 1)
    problem = Problem.build(profile, cluster)
    everything = list(assignments(problem))
    previous = everything[int(rng.integers(len(everything)))]
    cost = [problem.frequency[~problem.held(r)].sum() for r in everything]
    best = [r for r, c in zip(everything, cost, strict=True) if c <= min(cost) + 1e-12]
    fewest = min((problem.held(r) & ~problem.held(previous)).sum() for r in best)
    found = problem.held(exact(problem, previous=previous))
    assert problem.frequency[~found].sum() == pytest.approx(min(cost), abs=1e-12)
    assert (found & ~problem.held(previous)).sum() == fewest


@given(instances())
@quick
def test_its_own_plan_stays(instance):
    problem = Problem.build(*instance)
    first = exact(problem)
    assert (exact(problem, previous=first) == first).all()


@given(st.integers(0, 2**32), st.sampled_from([1, 3, 1000]))
@quick
def test_transport_from_degenerate_weights(seed, top):
    """Many ties: the prices alone decide little, the exchange paths have to do the work."""
    rng = np.random.default_rng(seed)
    servers, items = int(rng.integers(1, 6)), int(rng.integers(1, 14))
    weight = rng.integers(0, top, (servers, items))
    capacity = np.minimum(rng.multinomial(items + int(rng.integers(0, 9)), rng.dirichlet(np.ones(servers))), items)
    capacity[0] = min(items, capacity[0] + max(0, items - capacity.sum()))
    while capacity.sum() < items:
        capacity[capacity.argmin()] += 1
    held = transport(weight, capacity)
    assert (held.sum(1) == capacity).all()
    assert held.any(0).all()
    a = np.concatenate([np.kron(np.eye(servers), np.ones(items)), np.kron(np.ones((1, servers)), -np.eye(items))])
    found = linprog(-weight.ravel(), a, np.concatenate([capacity, -np.ones(items)]), bounds=(0, 1))
    assert weight[held].sum() == pytest.approx(-found.fun)


def test_a_silent_server_takes_what_others_use():
    counts = np.array([[[9, 8, 7, 1, 1, 1]], [[0, 0, 0, 0, 0, 0]]])
    problem = Problem.build(*build(counts, [[3], [5]], 1))
    held = solve_equal(problem)
    assert held[0, 0].tolist() == [True, True, True, False, False, False]
    assert held[1, 0, 3:].all()
    assert held[1, 0, 0]


def test_gap_is_relative_to_the_optimum():
    profile, cluster = build([[[4, 3, 2, 1]], [[1, 2, 3, 4]]], [[2], [2]], 1)
    best = optimum(profile, cluster)
    assert best == pytest.approx(6 / 20)
    assert plan(profile, cluster, "exact", optimum=best).predicted["gap"] == 0
    worse = plan(profile, cluster, "smartmoe", optimum=best)
    remote = np.mean(list(worse.predicted["remote_share_by_server"].values()))
    assert worse.predicted["gap"] == pytest.approx(remote / best - 1)
    assert evaluate(profile, cluster, worse, best)["gap"] == worse.predicted["gap"]
    assert "gap" not in evaluate(profile, cluster, worse)


def test_no_gap_can_be_given_where_nothing_need_be_remote():
    profile, cluster = build([[[1, 1]], [[1, 1]]], [[2], [2]], 1)
    best = optimum(profile, cluster)
    assert best == 0
    assert plan(profile, cluster, "exact", optimum=best).predicted["gap"] == 0
    assert plan(profile, cluster, "uniform", optimum=best).predicted["gap"] is None


def test_many_servers_and_devices():
    problem = synthetic(6, 32, 16, 3, copies=1.2, seed=0)
    resident = exact(problem)
    assert (problem.used_bytes(resident) <= problem.budget).all()
    assert (problem.held(resident).sum((1, 2)) == np.minimum(server_slots(problem), 192)).all()
    proof = certificate(problem, resident)
    check(problem, proof)
    assert proof.gap == 0


@pytest.mark.parametrize("kind", ["silent", "alike", "fractions"])
def test_hard_profiles(kind):
    rng = np.random.default_rng(0)
    counts = np.zeros((8, 4, 16))
    if kind != "silent":
        counts = counts + rng.gamma(0.5, 100, (1 if kind == "alike" else 8, 4, 16)).round(
            8 if kind == "fractions" else 0
        )
    problem = Problem.build(*build(counts, [[12]] * 8, 1))
    resident = exact(problem)
    assert resident.any(0).all()
    proof = certificate(problem, resident)
    check(problem, proof)
    assert proof.gap == 0


@pytest.mark.skipif(not DEEPSEEK.exists(), reason="real traces are not in ../shared/data")
def test_real_routing_of_deepseek_v2_lite():
    planning, evaluation = deepseek_halves()
    servers = [
        {"name": n, "devices": [{"memory": 543 * 17301504}] * (1 + (n == "translation"))} for n in planning.servers
    ]
    cluster = Cluster.from_dict({"server": servers, "network": {"bandwidth": "500Mbps", "latency": "0.2ms"}})
    best = optimum(planning, cluster)
    placement = plan(planning, cluster, "exact", optimum=best)
    assert placement.predicted["gap"] == 0
    assert evaluate(evaluation, cluster, placement)["remote_share"] <= 0.3265
    problem = Problem.build(planning, cluster)
    proof = certificate(problem, placement.resident)
    check(problem, proof)
    assert proof.least_remote == pytest.approx(best, rel=1e-9)
    dance = plan(planning, cluster, "dance", optimum=best)
    assert 0.01 < dance.predicted["gap"] < 0.1
    again = plan(planning, cluster, "exact", previous=dance, optimum=best)
    assert again.predicted["gap"] == 0
    assert (again.resident & ~dance.resident).sum() < (placement.resident & ~dance.resident).sum()
