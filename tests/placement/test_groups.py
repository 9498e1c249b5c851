"""Large clusters planned as groups: who is in one, what a group holds, what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, InputError, Problem, Profile, plan
from placement.strategies.latency.groups import COPIES, choose_groups, named_groups, part
from placement.strategies.latency.plan import latency


def problem_of(servers, copies=1.3, seed=0, far=()):
    """Servers of one and two devices in turn with so many copies of 3 layers of 12 experts for each four devices."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 20, (servers, 3, 12)))
    memory = int(np.ceil(copies * 36 / 3))
    names = [f"s{n}" for n in range(servers)]
    tables = [{"name": name, "devices": [{"memory": memory}] * (1 + n % 2)} for n, name in enumerate(names)]
    links = [{"from": a, "to": b, "latency": "80ms", "both": True} for a, b in far]
    profile = Profile(counts, tuple(names), "m", top_k=2, hidden_size=64, expert_bytes=1)
    cluster = Cluster.from_dict({"server": tables, "link": links})
    return Problem.build(profile, cluster), profile, cluster


@given(st.integers(1, 24), st.sampled_from([1.0, 1.3, 2.5]), st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_groups_hold_everything_and_share_no_server(servers, copies, seed):
    if servers == 1 and copies < 3:
        return
    problem, *_ = problem_of(servers, copies, seed)
    groups = choose_groups(problem)
    assert sorted(np.concatenate(groups).tolist()) == list(range(servers))
    room = np.add.reduceat(problem.usable_bytes, problem.first_device)
    if len(groups) > 1:
        assert all(room[group].sum() >= COPIES * 36 for group in groups)
    try:
        problem.require_capacity()
    except InputError:
        return
    resident = latency(problem)
    assert (problem.used_bytes(resident) <= problem.budget).all()
    for group in groups:
        assert resident[np.isin(problem.device_server, group)].any(0).all()
    assert (latency(problem) == resident).all()


def test_servers_that_are_near_plan_together():
    near = [set(range(6)), set(range(6, 12))]
    far = [(f"s{a}", f"s{b}") for a in near[0] for b in near[1]]
    problem, *_ = problem_of(12, copies=1.3, far=far)
    groups = choose_groups(problem)
    assert len(groups) > 2
    assert all(set(group.tolist()) <= near[0] or set(group.tolist()) <= near[1] for group in groups)


def test_a_part_is_a_problem_of_its_own():
    problem, profile, _ = problem_of(6)
    group = np.array([1, 4])
    own = part(problem, group)
    assert own.names == ("s1", "s4")
    assert np.isclose(own.frequency.sum(), 3)
    assert np.allclose(own.demand, problem.demand[group])
    assert own.device_server.tolist() == [0, 0, 1]
    assert np.isclose(own.counted, profile.counts[group].sum() / 6)


def test_groups_by_name():
    problem, profile, cluster = problem_of(4)
    names = [["s0", "s1"], ["s2", "s3"]]
    assert [group.tolist() for group in named_groups(problem, names)] == [[0, 1], [2, 3]]
    placed = plan(profile, cluster, "latency", groups=names)
    assert placed.resident[:3].any(0).all()
    assert placed.resident[3:].any(0).all()
    assert placed.predicted["groups"] == names
    for wrong, message in (
        ([["s0", "x"]], "'x': no such server"),
        ([["s0", "s1"], ["s1", "s2", "s3"]], "'s1' is in 2 of them"),
        ([["s0", "s1"], ["s2"]], "'s3' is in 0 of them"),
        ([["s0"], ["s1", "s2", "s3"]], "bytes are missing for one copy"),
    ):
        with pytest.raises(InputError, match=message):
            named_groups(problem, wrong)
    with pytest.raises(InputError, match="groups: only strategy latency"):
        plan(profile, cluster, "dance", groups=names)


def test_groups_planned_by_several_processes_give_the_same_plan():
    problem, profile, cluster = problem_of(49)
    assert len(choose_groups(problem)) >= 16  # two processes are worth starting
    placements = [plan(profile, cluster, "latency", jobs=jobs) for jobs in (1, 2)]
    assert (placements[0].resident == placements[1].resident).all()
    assert placements[0].predicted == placements[1].predicted
