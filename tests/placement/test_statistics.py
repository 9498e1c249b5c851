"""Ageing and thin statistics, divergence and the drift command; plans with equal slots and with a prior."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, InputError, Placement, Problem, Profile, evaluate, plan
from placement.__main__ import main
from placement.data.prior import DEFAULT_PRIOR, kinds, with_prior
from placement.data.problem import Tokens
from placement.data.statistics import (
    DecayingCounts,
    decay,
    distribution,
    divergence,
    divergence_of_chance,
    drift,
    shrink,
    top_share,
)
from placement.registry import home_strategies
from placement.strategies.equal_slots import project, restricted, slots_per_device
from tests.helpers.paths import DEEPSEEK, TRACES
from tests.placement.test_dance import deepseek_halves

quick = settings(max_examples=60, deadline=None, derandomize=True)


def random_counts(seed, shape=(3, 4, 8)):
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.4, 20, shape))


def profile_of(counts, names=("a", "b", "c"), **changes):
    return Profile(np.asarray(counts), names, "m", 2, 16, 10, **changes)


def test_decay():
    counts = np.array([[8, 4], [2, 0]])
    assert decay(counts, 20, 10).tolist() == [[2, 1], [0.5, 0]]
    assert decay(counts, 0, 10).tolist() == counts.tolist()
    assert np.allclose(decay(decay(counts, 3, 7), 4, 7), decay(counts, 7, 7))
    with pytest.raises(ValueError, match="half_life = 0"):
        decay(counts, 1, 0)
    with pytest.raises(ValueError, match="age_seconds = -1"):
        decay(counts, -1, 5)


def test_decaying_counts():
    start = DecayingCounts(half_life=10, total=np.array([100, 0]), at_seconds=0)
    assert start.counts.tolist() == [0, 0]
    first = start.observe(np.array([108, 4]), 5)
    second = first.observe(np.array([108, 6]), 15)
    assert first.counts.tolist() == [8, 4]
    assert second.counts.tolist() == [4, 4]
    assert start.counts.tolist() == [0, 0]  # earlier states stay what they were
    assert (second.at_seconds, second.total.tolist()) == (15, [108, 6])
    with pytest.raises(ValueError, match="smaller than before"):
        second.observe(np.array([107, 6]), 16)
    with pytest.raises(ValueError, match="in order of time"):
        second.observe(np.array([108, 6]), 14)
    with pytest.raises(ValueError, match="has shape"):
        second.observe(np.zeros((2, 2)), 16)
    with pytest.raises(ValueError, match="half_life = -1"):
        DecayingCounts(-1, np.zeros(2), 0)


def test_decaying_counts_do_not_follow_their_caller():
    total = np.array([1, 2])
    state = DecayingCounts(1, total, 0)
    total += 5
    assert state.observe(total, 0).counts.tolist() == [5, 5]


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 16.0, 500.0]))
@quick
def test_shrink(seed, prior):
    counts = random_counts(seed)
    counts[0] = 0  # a server without history
    shrunk = shrink(counts, prior)
    others = distribution(counts[1:].sum(0))
    assert np.allclose(shrunk[0], prior * others)
    for server in (1, 2):
        p, m = distribution(counts[server]), distribution(counts[3 - server])
        n = counts[server].sum(-1, keepdims=True)
        known = (n > 0) & (m.sum(-1, keepdims=True) > 0)
        weight = n / np.maximum(n + prior, 1e-9)
        assert np.allclose(np.where(known, distribution(shrunk[server]) - weight * p - (1 - weight) * m, 0), 0)
    assert (shrink(counts, 0) == counts).all()


def test_shrink_alone_or_refused():
    alone = random_counts(0, (1, 2, 5))
    assert (shrink(alone, 9) == alone).all()
    with pytest.raises(ValueError, match="prior = -1"):
        shrink(alone, -1)


def test_divergence():
    p, q = np.array([1.0, 0, 0, 0]), np.array([0, 0.5, 0.5, 0])
    assert divergence(p, q) == 1
    assert divergence(p, 7 * p) == 0
    assert divergence(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.0487949)
    assert np.isnan(divergence(p, np.zeros(4)))
    counts = random_counts(3).astype(float)
    pairs = divergence(counts[:, None], counts[None])
    assert np.allclose(pairs, pairs.swapaxes(0, 1), equal_nan=True)


def test_divergence_of_chance_is_what_chance_gives():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(32, 5.0))
    first, second = rng.multinomial(2000, p, 400), rng.multinomial(700, p, 400)
    assert divergence(first, second).mean() == pytest.approx(divergence_of_chance(first, second).mean(), rel=0.05)


def test_top_share():
    counts = np.array([[[6, 2, 1, 1]], [[1, 1, 2, 6]]])
    assert np.allclose(top_share(counts), [[0.6, 0.1], [0.1, 0.6]])
    found = drift(counts, counts[::-1])
    assert found["own_top_quarter"] == pytest.approx(0.6)
    assert found["others_top_quarter"] == pytest.approx(0.1)
    assert np.allclose(found["between_windows"][:, 0], found["between_servers"][0, 1])
    assert np.isnan(drift(counts[:1])["others_top_quarter"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    unlike = 5000 * rng.dirichlet(np.full(16, 0.3), (3, 4))
    like = np.broadcast_to(unlike[:1], unlike.shape)
    for name, mean in (("unlike", unlike), ("like", like)):
        profile_of(rng.poisson(mean)).save(f"{name}.npz")
        profile_of(rng.poisson(mean)).save(f"{name}_later.npz")
    profile_of(rng.poisson(like / 2000)).save("thin.npz")
    lonely = rng.poisson(unlike)
    lonely[1:] = 0
    profile_of(lonely).save("lonely.npz")
    Path("cluster.toml").write_text(
        '[[server]]\nname = "a"\ndevices = [{ memory = 300 }]\n[[server]]\nname = "b"\ndevices = [{ memory = 350 }]\n'
        '[[server]]\nname = "c"\ndevices = [{ memory = 400 }, { memory = 310 }]\n'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("profile", "against", "says"),
    [
        ("unlike", "unlike_later", ["clearly unlike, so source-aware placement helps", "statistics are stable"]),
        ("like", None, ["differ by 0.0", "too few counts to tell them apart"]),
        ("thin", None, ["too few counts"]),
        ("lonely", "unlike", ["Fewer than two servers", "statistics are stable"]),
        ("unlike", "like", ["clearly unlike", "moved most", "plan again"]),
    ],
)
def test_drift_command(folder, capsys, profile, against, says):
    args = ["drift", "--profile", f"{profile}.npz", *(["--against", f"{against}.npz"] if against else [])]
    assert main(args) == 0
    text = " ".join(capsys.readouterr().out.split())  # sentences are wrapped at the terminal's width
    assert all(words in text for words in says)
    assert main([*args, "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["servers"] == ["a", "b", "c"]
    assert all(words in " ".join(parsed["says"]) for words in says)
    assert ("between_windows" in parsed) == bool(against)
    assert len(parsed["between_servers_by_layer"]) == 4


def test_drift_refuses(folder, capsys):
    profile_of(np.ones((3, 4, 8))).save("other.npz")
    profile_of(np.ones((2, 4, 16)), ("a", "b")).save("fewer.npz")
    for other, words in (("other", "layers and experts = (4, 16), but other.npz has (4, 8)"), ("fewer", "servers = ")):
        assert main(["drift", "--profile", "like.npz", "--against", f"{other}.npz"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err


@pytest.mark.skipif(not TRACES.exists(), reason="real traces are not in ../shared/data")
def test_real_models_are_told_apart():
    with np.load(TRACES / "mixtral_8x7b_mmlu_counts.npz", allow_pickle=False) as trace:
        mixtral = drift(trace["counts"][0])
    with np.load(TRACES / "gpt_oss_20b_mmlu_pro_counts.npz", allow_pickle=False) as trace:
        oss = drift(trace["counts"][:14])
    off = ~np.eye(7, dtype=bool)
    assert mixtral["between_servers"][off].mean() < 0.02
    assert oss["between_servers"][~np.eye(14, dtype=bool)].mean() > 0.1
    assert oss["own_top_quarter"] - oss["others_top_quarter"] > 0.15
    assert mixtral["own_top_quarter"] - mixtral["others_top_quarter"] < 0.05


def test_prior_draws_a_thin_server_to_the_others():
    counts = np.zeros((3, 1, 8), int)
    counts[1:, 0] = [90, 80, 70, 60, 1, 1, 1, 1]
    counts[0, 0, 7] = 1  # a single call says little
    servers = [{"name": name, "devices": [{"memory": size}]} for name, size in (("a", 10), ("b", 60), ("c", 60))]
    cluster = Cluster.from_dict({"server": servers})
    profile = profile_of(counts)
    assert plan(profile, cluster).resident[0, 0].nonzero()[0].tolist() == [7]
    shrunk = plan(profile, cluster, prior=16)
    assert shrunk.resident[0, 0].nonzero()[0].tolist() == [0]
    assert shrunk.predicted["remote_share_by_server"]["a"] == 1  # counted on what was counted
    assert (plan(profile, cluster, prior=0).resident == plan(profile, cluster).resident).all()


@st.composite
def instances(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    servers, layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 10))
    width = rng.integers(1, 4, servers)
    size = rng.integers(3, 12, layers) if draw(st.booleans()) else np.full(layers, 7)
    least = -(-experts // width.sum()) + draw(st.integers(0, 2))
    memory = [[int(least * size.sum() + rng.integers(0, 3 * size.sum())) for _ in range(n)] for n in width]
    names = tuple(f"s{n}" for n in range(servers))
    counts = rng.poisson(rng.gamma(0.3, 20, (servers, layers, experts)))
    tables = [{"name": n, "devices": [{"memory": m} for m in sizes]} for n, sizes in zip(names, memory, strict=True)]
    profile = Profile(counts, names, "m", 1, 8, tuple(size.tolist()))
    return profile, Cluster.from_dict({"server": tables})


@given(instances())
@quick
def test_equal_slots(instance):
    profile, cluster = instance
    problem = Problem.build(profile, cluster)
    slots = slots_per_device(problem)
    _, layers, experts = problem.shape
    rng = np.random.default_rng(0)
    resident = project(problem, rng.random((len(problem.budget), layers, experts)) < 0.5, slots)  # of any plan
    assert (resident.sum(2) == slots).all()
    assert resident.any(0).all()
    assert (problem.used_bytes(resident) <= problem.budget).all()
    placement = plan(profile, cluster, "dance", equal_slots=True)
    placement.validate(cluster)
    assert (placement.resident.sum(2) == slots).all()
    assert placement.predicted["equal_slots"]["slots_per_layer"] == slots
    again = plan(profile, cluster, "dance", equal_slots=True)
    assert (again.resident == placement.resident).all()


@pytest.mark.parametrize("strategy", home_strategies())
def test_equal_slots_of_every_strategy(strategy):
    counts = random_counts(5, (3, 4, 8)) + 1
    tables = [
        {"name": name, "devices": [{"memory": m} for m in sizes]}
        for name, sizes in (("a", [170]), ("b", [130]), ("c", [200, 190]))
    ]
    cluster = Cluster.from_dict({"server": tables})
    first = plan(profile_of(counts), cluster, "dance", equal_slots=True)
    placement = plan(profile_of(counts), cluster, strategy, first, equal_slots=True)
    assert (placement.resident.sum(2) == 3).all()
    assert placement.resident.any(0).all()
    assert evaluate(profile_of(counts), cluster, placement)["remote_share"] == placement.predicted["remote_share"]


def test_equal_slots_keep_the_most_used():
    counts = np.array([[[9, 8, 7, 1, 1, 1]], [[1, 1, 1, 7, 8, 9]]])
    servers = [{"name": n, "devices": [{"memory": 3}]} for n in "ab"]
    problem = Problem.build(profile_of(counts, ("a", "b"), reserved_bytes=0), Cluster.from_dict({"server": servers}))
    problem = replace(problem, expert_bytes=np.array([1]))
    resident = project(problem, np.ones((2, 1, 6), bool), slots_per_device(problem))
    assert resident[:, 0].astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert restricted(problem, 3).budget.tolist() == [3, 3]


def test_a_server_with_slots_to_spare_copies_its_busiest():
    counts = np.array([[[1, 9, 2]]])
    servers = [{"name": "a", "devices": [{"memory": 20}, {"memory": 20}]}]
    placement = plan(profile_of(counts, ("a",)), Cluster.from_dict({"server": servers}), equal_slots=True)
    assert placement.resident.sum((0, 1)).tolist() == [1, 2, 1]
    assert (placement.resident.sum(2) == 2).all()


def test_equal_slots_on_the_command_line(folder, capsys):
    args = ["plan", "--cluster", "cluster.toml", "--profile", "unlike.npz", "--equal-slots", "--out", "new.json"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "equal slots: 7 of each layer on every device" in text
    assert (Placement.load("new.json").resident.sum(2) == 7).all()
    assert main([*args, "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["equal_slots"]["remote_share_without"] <= parsed["remote_share"]
    assert main([*args, "--prior", "0"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*args, "--prior", "-1"])
    assert stop.value.code == 2


def test_too_little_memory_for_equal_slots(folder):
    sizes = zip("abc", (900, 900, 200), strict=True)
    small = Cluster.from_dict({"server": [{"name": name, "devices": [{"memory": size}]} for name, size in sizes]})
    with pytest.raises(InputError, match="40 bytes are missing on c device 0 for equal slots: 16 experts on 3 devices"):
        plan(Profile.load("unlike.npz"), small, equal_slots=True)


def thin(tokens, seed=0):
    """Profile and cluster of two servers, one with so many tokens: 4 patterns of 3 of 12 experts in each of 4 layers."""
    rng = np.random.default_rng(seed)
    patterns = rng.random((2, 4, 4, 12)).argsort(-1)[..., :3]
    server = np.array([0] * tokens + [1] * (40 if tokens else 0), int)
    ids = patterns[server, rng.integers(0, 4, len(server))]
    meta = {"model": "m", "hidden_size": 1024, "expert_bytes": 1}
    profile = Profile.from_tokens(ids, server, server, servers=("a", "b"), experts=12, **meta)
    return profile, Cluster.from_dict({"server": [{"name": n, "devices": [{"memory": 32}]} for n in "ab"]})


@given(st.integers(0, 30), st.sampled_from([0.0, 4.0, 32.0]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_prior_adds_the_same_to_counts_and_to_sets(tokens, prior):
    problem = Problem.build(*thin(tokens))
    found = with_prior(problem, prior)
    if not prior:
        assert found is problem
        return
    assert np.isclose(found.frequency.sum(), problem.shape[1])
    assert np.isclose(found.counted, problem.counted + prior * 2 + prior / 4 * (2 if tokens else 0))
    assert found.active.all()
    if not tokens:
        assert np.allclose(found.frequency, 1 / (2 * 12))  # nobody is known: all experts alike
        return
    added = np.bincount(found.tokens.server) - np.bincount(problem.tokens.server)
    assert added.tolist() == [prior + prior / 4, prior + min(tokens, prior / 4)]
    ordered = np.sort(found.tokens.ids, -1)
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    assert (found.tokens.ids[: len(problem.tokens.ids)] == problem.tokens.ids).all()


def test_a_prior_hardly_counts_beside_thousands_of_tokens():
    profile, cluster = thin(20)
    many = replace(profile, counts=profile.counts * 1000, ids=None, server=None, sequence=None)
    problem = Problem.build(many, cluster)
    assert np.abs(with_prior(problem, 32.0).demand - problem.demand).max() < 1e-3


@pytest.mark.parametrize("prior", [0, 32])
def test_cold_start_hosts_whole_layers(prior):
    """Without any token a part of a layer at home is worth nothing; a whole one needs no network."""
    profile, cluster = thin(0)
    placed = plan(profile, cluster, "latency", prior=prior)
    assert placed.resident.all(-1).any(0).all()
    assert evaluate(profile, cluster, placed)["network_probability"] <= 0.5 + 1e-9
    assert (plan(profile, cluster, "latency", previous=placed).resident == placed.resident).all()


def test_equal_slots_of_latency_swap_on_token_sets():
    profile, cluster = thin(40, seed=1)
    costs = {}
    for name in ("latency", "exact", "dance"):
        placed = plan(profile, cluster, name, equal_slots=True)
        assert (placed.resident.sum(-1) == placed.predicted["equal_slots"]["slots_per_layer"]).all()
        assert placed.resident.any(0).all()
        costs[name] = placed.predicted["step_seconds"]
    assert costs["latency"] < 0.98 * min(costs["exact"], costs["dance"])


@pytest.mark.skipif(not DEEPSEEK.exists(), reason="real traces are not in ../shared/data")
@pytest.mark.parametrize(("tokens", "most"), [(0, 27.5), (6, 29.0), (50, 27.2)])
def test_thin_statistics_of_a_real_model(tokens, most):
    """So many tokens of each server; thousands give 25.2 ms."""
    planning, evaluation = deepseek_halves()
    rows = np.concatenate([np.flatnonzero(planning.server == n)[:tokens] for n in range(3)])
    meta = {key: getattr(planning, key) for key in ("servers", "model", "hidden_size", "expert_bytes")}
    few = Profile.from_tokens(planning.ids[rows], planning.server[rows], planning.sequence[rows], experts=64, **meta)
    slots = 543 * planning.expert_bytes[0]
    servers = [{"name": n, "devices": [{"memory": slots}] * (1 + (n == "translation"))} for n in planning.servers]
    cluster = Cluster.from_dict({"server": servers, "network": {"bandwidth": "500Mbps", "latency": "0.2ms"}})
    placed = plan(few, cluster, "latency", prior=DEFAULT_PRIOR)
    assert evaluate(evaluation, cluster, placed)["decode_network_seconds"] <= most / 1e3


def test_windows_that_were_summed_are_compared_by_shares_and_not_by_amounts(rng):
    counts = rng.integers(1, 1000, (2, 3, 8))
    found = drift(counts, 50 * counts)
    np.testing.assert_allclose(found["between_windows"], 0, atol=1e-12)
    assert (found["between_windows_by_chance"] < drift(counts, counts)["between_windows_by_chance"]).all()


def alike(servers, tokens, seed=0):
    """Problem of servers whose users are of two kinds in turn, each with so many recorded tokens."""
    rng = np.random.default_rng(seed)
    taste = rng.gamma(0.5, 1.0, (2, 4, 16)) + 0.01
    server = np.repeat(np.arange(servers), tokens)
    ids = np.argsort(rng.standard_exponential((len(server), 4, 16)) / taste[server % 2], axis=-1)[..., :3]
    names = tuple(f"s{n}" for n in range(servers))
    profile = Profile.from_tokens(
        ids, server, server, servers=names, experts=16, model="m", hidden_size=64, expert_bytes=1
    )
    cluster = Cluster.from_dict({"server": [{"name": n, "devices": [{"memory": 40}]} for n in names]})
    return Problem.build(profile, cluster)


def test_sets_of_users_who_cannot_be_told_apart_help_where_few_were_recorded():
    problem = alike(8, 200)
    assert problem.tokens is not None
    counts = problem.frequency * (problem.counted * problem.top_k)
    assert kinds(counts).tolist() == [0, 1] * 4
    whole = with_prior(problem, 32.0)
    assert whole.tokens is not None
    assert (whole.tokens.server == 0).sum() == 200 + 32 + 8  # as many sets as counts: no others'
    rows = np.flatnonzero(np.arange(len(problem.tokens.ids)) % 10 == 0)
    few = Tokens(problem.tokens.ids[rows], problem.tokens.server[rows], problem.tokens.sequence[rows])
    found = with_prior(replace(problem, tokens=few), 32.0)
    assert found.tokens is not None
    assert (found.tokens.server == 0).sum() == 4 * 20 + 32 + 8
    mine = found.tokens.ids[found.tokens.server == 0]
    alike_sets = {ids.tobytes() for ids in few.ids[few.server % 2 == 0]}
    assert sum(ids.tobytes() in alike_sets for ids in mine) >= 4 * 20
    assert (found.frequency == whole.frequency).all()


def test_thin_counts_and_quiet_servers_are_of_no_kind():
    problem = alike(4, 5)  # chance would hide any difference
    counts = problem.frequency * (problem.counted * problem.top_k)
    assert kinds(counts).tolist() == [0, 1, 2, 3]
    assert kinds(np.zeros_like(counts)).tolist() == [0, 1, 2, 3]
