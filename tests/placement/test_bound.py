"""The bound on P(network) against every plan there is, and what is certified on sets and on counts."""

import itertools
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, Profile
from placement.__main__ import main
from placement.costs.bound import network_bound
from placement.costs.network_use import network_use
from placement.costs.routing import serving_server


def tiny(seed, tokens):
    """Two servers, two layers of three experts, room for three to five of six on each."""
    rng = np.random.default_rng(seed)
    tables = [{"name": name, "devices": [{"memory": int(rng.integers(3, 6))}]} for name in "ab"]
    meta = {"model": "m", "hidden_size": 4, "expert_bytes": 1}
    if tokens:
        ids = rng.random((12, 2, 3)).argsort(-1)[..., :2]
        server = np.arange(12) % 2
        profile = Profile.from_tokens(ids, server, server, servers=("a", "b"), experts=3, **meta)
    else:
        profile = Profile(rng.integers(1, 9, (2, 2, 3)), ("a", "b"), top_k=2, **meta)
    return Problem.build(profile, Cluster.from_dict({"server": tables}))


def least_of_all(problem):
    """Need of the network of the best of all plans."""
    room = problem.budget.tolist()
    options = [
        [held for held in itertools.product((False, True), repeat=6) if sum(held) == min(6, size)] for size in room
    ]
    needs = []
    for pair in itertools.product(*options):
        held = np.array(pair).reshape(2, 2, 3)
        if held.any(0).all():
            needs.append(network_use(problem, serving_server(problem, held)).need.mean())
    return min(needs)


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_no_plan_is_below_the_bound(seed, tokens):
    problem = tiny(seed, tokens)
    best = least_of_all(problem)
    for rounds in (1, 40):
        assert network_bound(problem, best, rounds) <= best + 1e-9
    assert network_bound(problem, 0.0, 5) <= best + 1e-9  # a target that is wrong does no harm


def test_the_bound_is_near():
    """A bound of 0 would be one too. What no plan can reach and no price can tell is largest in problems as small as these."""
    problems = [tiny(seed, tokens=True) for seed in range(12)]
    best = np.array([least_of_all(problem) for problem in problems])
    bounds = np.array([network_bound(problem, least, 40) for problem, least in zip(problems, best, strict=True)])
    assert bounds.mean() >= 0.75 * best.mean()


def test_room_for_everything_needs_nothing():
    problem = tiny(0, tokens=True)
    problem.budget[:] = 6
    assert network_bound(problem, 0.0) == 0


def test_compare_prints_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text("".join(f'[[server]]\nname = "{n}"\ndevices = [{{ memory = 4 }}]\n' for n in "ab"))
    meta = {"model": "m", "hidden_size": 4, "expert_bytes": 1}
    Profile(np.array([[[5, 3, 1]] * 2, [[1, 3, 5]] * 2]), ("a", "b"), top_k=1, **meta).save("p.npz")
    compare = ["compare", "--cluster", "c.toml", "--profile", "p.npz", "--bound", "--strategies"]
    bounds = []
    for names in (
        "dance,latency",
        "dance,latency,parallax",
    ):  # a plan that hosts layers elsewhere needs no network by this
        assert main([*compare, names]) == 0
        out = capsys.readouterr().out
        assert "bound: no plan with attention at home has P(network) below 0." in out
        last = " ".join(out[out.index("Above it") :].split())
        assert "latency" in last
        assert "parallax" not in last
        assert main([*compare, names, "--json"]) == 0
        bounds.append(json.loads(capsys.readouterr().out)["bound"])
    assert bounds[0] == bounds[1] > 0
    assert main([*compare, "pipeline"]) == 2
    assert "--bound: of plans that leave attention at home" in capsys.readouterr().err
