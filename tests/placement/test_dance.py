"""Strategies: memory, coverage, no duplicate in a server, the same output for the same input, on random instances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import STRATEGIES, Cluster, InputError, Problem, Profile, evaluate, plan
from placement.strategies.dance import cover_experts, cover_layers, dance, entropy, layer_counts, most_used
from tests.helpers.paths import DEEPSEEK

quick = settings(max_examples=80, deadline=None, derandomize=True)


def build(counts, memory, expert_bytes, reserved=0):
    """Profile and cluster of counts [N, L, E] and a list of device memories per server."""
    names = tuple(f"s{n}" for n in range(len(memory)))
    servers = [
        {"name": name, "devices": [{"memory": int(size) + reserved} for size in sizes]}
        for name, sizes in zip(names, memory, strict=True)
    ]
    profile = Profile(np.asarray(counts), names, "m", 1, 8, expert_bytes, reserved)
    return profile, Cluster.from_dict({"server": servers})


@st.composite
def instances(draw, equal=None):
    """A profile and a cluster with between 1 and 4 times the memory of all experts, cut into uneven devices."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    servers, layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    devices = rng.integers(1, 4, servers)
    equal = draw(st.booleans()) if equal is None else equal
    size = np.full(layers, 7) if equal else rng.integers(3, 12, layers)
    total = int(size.sum()) * experts
    # With one expert of slack on each device, every instance can be solved, whatever the sizes.
    memory = rng.multinomial(int(total * draw(st.sampled_from([1.0, 1.3, 4.0]))), rng.dirichlet(np.ones(devices.sum())))
    memory = np.split(memory + size.max(), np.cumsum(devices)[:-1])
    counts = rng.poisson(rng.gamma(0.3, 20, (servers, layers, experts)))
    counts[rng.random(counts.shape[:2]) < 0.1] = 0  # layers without statistics
    return build(counts, memory, tuple(size.tolist()), reserved=draw(st.sampled_from([0, 13])))


@pytest.mark.parametrize("strategy", ["uniform", "dance"])
@given(instances())
@quick
def test_invariants(strategy, instance):
    profile, cluster = instance
    problem = Problem.build(profile, cluster)
    resident = STRATEGIES[strategy](problem)
    assert resident.any(0).all()
    assert (problem.used_bytes(resident) <= problem.budget).all()
    assert (problem.budget == cluster.memory - profile.reserved_bytes).all()
    assert (np.add.reduceat(resident.astype(int), problem.first_device) <= 1).all()
    again = plan(profile, cluster, strategy)
    assert (again.resident == resident).all()
    assert again.predicted["used_bytes"] == problem.used_bytes(resident).tolist()


@given(instances())
@quick
def test_uniform_makes_no_copies_and_contiguous_blocks(instance):
    resident = STRATEGIES["uniform"](Problem.build(*instance))
    assert (resident.sum(0) == 1).all()
    starts = np.diff(resident.astype(int), axis=2, prepend=0) == 1
    assert (starts.sum(2) <= 1).all()


@given(instances(equal=True))
@quick
def test_uniform_is_proportional_to_memory(instance):
    profile, cluster = instance
    problem = Problem.build(profile, cluster)
    resident = STRATEGIES["uniform"](problem)
    _, layers, experts = problem.shape
    fair = problem.usable_bytes / problem.usable_bytes.sum() * layers * experts
    assert (abs(resident.sum((1, 2)) - fair) < 1 + 1e-6).all()


@given(instances())
@quick
def test_dance_leaves_no_memory_that_would_help(instance):
    profile, cluster = instance
    problem = Problem.build(profile, cluster)
    resident = dance(problem)
    room = problem.budget - problem.used_bytes(resident)
    lacking = ~problem.held(resident)[problem.device_server]  # [D, L, E]
    fits = room[:, None] >= problem.expert_bytes
    assert not (lacking & fits[:, :, None]).any()


@given(instances(equal=True))
@quick
def test_dance_stages(instance):
    problem = Problem.build(*instance)
    _, layers, experts = problem.shape
    capacity = np.add.reduceat(problem.budget // problem.expert_bytes[0], problem.first_device)
    counts = layer_counts(problem)
    assert (counts.sum(1) == np.minimum(capacity, layers * experts)).all()
    assert (counts <= experts).all()
    covered = cover_layers(problem, counts)
    assert (covered.sum(1) == counts.sum(1)).all()
    assert (covered.sum(0) >= experts).all()
    assert ((covered >= 0) & (covered <= experts)).all()
    held = most_used(problem, covered)
    assert (held.sum(2) == covered).all()
    kept, left = np.where(held, problem.demand, np.inf).min(2), np.where(held, -np.inf, problem.demand).max(2)
    assert (kept >= left).all()
    complete = cover_experts(problem, held)
    assert (complete.sum(2) == covered).all()
    assert complete.any(0).all()


def test_entropy():
    assert entropy(np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])).tolist() == [2, 0, 1]


def test_layer_counts_follow_entropy():
    counts = np.zeros((1, 2, 16))
    counts[0, 0, :16] = 1  # 4 bits
    counts[0, 1, :2] = 1  # 1 bit
    problem = Problem.build(*build(counts, [[15]], 1))
    assert layer_counts(problem).tolist() == [[12, 3]]
    problem = Problem.build(*build(counts, [[25]], 1))  # the share of layer 0 would be 20 of 16
    assert layer_counts(problem).tolist() == [[16, 9]]


def test_cover_layers_takes_from_the_largest_server_and_surplus():
    problem = Problem.build(*build(np.ones((2, 3, 4)), [[6], [8]], 1))
    counts = np.array([[4, 2, 0], [4, 4, 0]])  # layer 2 has none, layer 0 has most to spare
    assert cover_layers(problem, counts).tolist() == [[4, 2, 0], [1, 3, 4]]


def test_cover_experts_trades_the_least_used_duplicate_for_the_most_used_expert():
    counts = np.array([[[9, 8, 7, 2, 1]], [[9, 3, 4, 1, 2]]])
    problem = Problem.build(*build(counts, [[3], [2]], 1))
    held = np.array([[[1, 1, 1, 0, 0]], [[1, 0, 1, 0, 0]]], bool)
    # Both servers hold duplicates 0 and 2. The first one gives 2 for 3, which it uses more than 4; then 0 for 4.
    assert cover_experts(problem, held)[:, 0].astype(int).tolist() == [[0, 1, 0, 1, 1], [1, 0, 1, 0, 0]]


def test_devices_of_a_server_share_the_load():
    counts = np.random.default_rng(0).integers(50, 100, (1, 6, 16))
    placement = plan(*build(counts, [[48, 48]], 1))
    assert placement.predicted["balance"] < 1.02
    per_layer = (placement.resident * counts[0]).sum(2)
    assert (per_layer.max(0) / per_layer.mean(0)).max() < 1.15


def test_previous_placement_stays_where_it_is_as_good():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 1000, (3, 4, 16))
    profile, cluster = build(counts, [[15, 20], [25], [30]], 1)
    first = plan(profile, cluster)
    assert (plan(profile, cluster, previous=first).resident == first.resident).all()
    # Where nobody has used anything yet, every placement is as good as the one in force.
    silent, _ = build(np.zeros_like(counts), [[15, 20], [25], [30]], 1)
    moved = plan(silent, cluster, previous=first).resident & ~first.resident
    assert moved.sum() < (plan(silent, cluster).resident & ~first.resident).sum()


def test_unequal_experts_displace_duplicates_to_fit():
    # Large experts of layer 0 take 5, small ones of layer 1 take 3; nothing fits without giving up a copy.
    counts = np.array([[[9, 1], [9, 9]], [[9, 1], [9, 9]]])
    placement = plan(*build(counts, [[8], [8]], (5, 3)))
    assert placement.resident.any(0).all()
    assert placement.used_bytes.tolist() == [8, 8]


@pytest.mark.parametrize("strategy", ["uniform", "dance"])
def test_too_little_memory_is_refused_with_the_bytes(strategy):
    profile, cluster = build(np.ones((2, 3, 4)), [[50, 25], [39]], 10, reserved=100)
    message = (
        r"cluster: 20 bytes are missing for one copy of every expert: 3 x 4 experts take 120 bytes, .*room in 100 "
    )
    with pytest.raises(InputError, match=message):
        plan(profile, cluster, strategy)


@pytest.mark.parametrize("strategy", ["uniform", "dance"])
def test_memory_for_exactly_one_copy_is_enough(strategy):
    profile, cluster = build(np.ones((2, 3, 4)), [[59, 30], [49]], 10)
    assert plan(profile, cluster, strategy).resident.sum() == 12


@pytest.mark.parametrize("strategy", ["uniform", "dance"])
def test_sizes_that_do_not_pack_are_refused(strategy):
    profile, cluster = build(np.ones((2, 1, 2)), [[8], [8]], (6,))
    assert plan(profile, cluster, strategy).resident.sum() == 2
    profile, cluster = build(np.ones((2, 2, 2)), [[11], [12]], (6, 5))  # 22 bytes in 23, but 6 + 5 does not fit twice
    assert plan(profile, cluster, strategy).resident.sum() == 4
    profile, cluster = build(np.ones((2, 2, 2)), [[9], [14]], (6, 5))
    with pytest.raises(InputError, match=r"cluster: \d+ bytes are missing"):
        plan(profile, cluster, strategy)


def test_unknown_strategy():
    with pytest.raises(InputError, match=r"strategy: 'best' is unknown; choose from uniform, .*dance"):
        plan(*build(np.ones((1, 1, 1)), [[9]], 1), strategy="best")


def test_previous_of_another_model_or_cluster():
    small = build(np.ones((1, 1, 2)), [[9]], 1)
    first = plan(*small)
    with pytest.raises(InputError, match=r"model.experts = 2, but profile has 3"):
        plan(*build(np.ones((1, 1, 3)), [[9]], 1), previous=first)
    with pytest.raises(InputError, match="its devices are not those of cluster"):
        plan(*build(np.ones((1, 1, 2)), [[9, 9]], 1), previous=first)


def deepseek_halves():
    """DeepSeek-V2-Lite's routing on three domains, one per server: profiles of first and of second halves."""
    domains = ("intent", "law", "translation")
    halves = ([], [])
    with np.load(DEEPSEEK, allow_pickle=False) as trace:
        for server, domain in enumerate(domains):
            lengths = trace[f"seq_lens_{domain}"]
            sequence = np.repeat(np.arange(len(lengths)), lengths)
            later = sequence >= len(lengths) // 2
            for half in (0, 1):
                rows = later == half
                halves[half].append((trace[f"ids_{domain}"][rows], np.full(rows.sum(), server), sequence[rows]))
    meta = {
        "servers": domains,
        "experts": 64,
        "model": "DeepSeek-V2-Lite",
        "hidden_size": 2048,
        "expert_bytes": 17301504,
    }
    return [Profile.from_tokens(*(np.concatenate(part) for part in zip(*half, strict=True)), **meta) for half in halves]


@pytest.mark.skipif(not DEEPSEEK.exists(), reason="real traces are not in ../shared/data")
def test_real_routing_of_deepseek_v2_lite():
    planning, evaluation = deepseek_halves()
    slots = 543 * 17301504
    servers = [{"name": n, "devices": [{"memory": slots}] * (1 + (n == "translation"))} for n in planning.servers]
    cluster = Cluster.from_dict({"server": servers, "network": {"bandwidth": "500Mbps", "latency": "0.2ms"}})
    costs = {name: evaluate(evaluation, cluster, plan(planning, cluster, name)) for name in ("uniform", "dance")}
    assert costs["dance"]["basis"] == "tokens"
    assert 0.65 <= costs["uniform"]["remote_share"] <= 0.69
    assert costs["dance"]["remote_share"] <= 0.347
    assert costs["dance"]["network_probability"] <= 0.8
    assert costs["uniform"]["network_probability"] >= 0.99
    assert costs["dance"]["used_bytes"] == [slots] * 4
