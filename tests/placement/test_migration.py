"""Migrations: what moves is the difference, and no instant of the order uncovers an expert or overfills a device."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, InputError, Placement, Profile, diff, plan, should_migrate
from placement.__main__ import main

quick = settings(max_examples=120, deadline=None, derandomize=True)


def place(resident, cluster, expert_bytes, **model):
    """A placement of bool [D, L, E]."""
    resident = np.asarray(resident, bool)
    layers, experts = resident.shape[1:]
    meta = {"name": "m", "layers": layers, "experts": experts, "top_k": 1, "expert_bytes": expert_bytes} | model
    return Placement(resident, cluster.device_names, "test", meta)


@st.composite
def instances(draw):
    """A cluster, and two random complete placements that just fit it or leave a little room."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    servers, layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    devices = rng.integers(1, 3, servers)
    size = np.full(layers, 5) if draw(st.booleans()) else rng.integers(3, 9, layers)
    number, reserved = int(devices.sum()), draw(st.sampled_from([0, 11]))
    both = rng.random((2, number, layers, experts)) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    owner = rng.integers(0, number, (2, layers, experts))
    both |= np.arange(number)[:, None, None] == owner[:, None]
    memory = (both.sum(-1) @ size).max(0) + draw(st.sampled_from([0, 0, 6])) + reserved
    loads = [f"{rng.integers(1, 99)}KB/s" for _ in range(number)]
    tables = [{"memory": max(1, int(m)), "load_bandwidth": load} for m, load in zip(memory, loads, strict=True)]
    cut = np.cumsum(devices)[:-1]
    named = [{"name": f"s{n}", "devices": list(part)} for n, part in enumerate(np.split(np.array(tables), cut))]
    network = {"bandwidth": f"{rng.integers(1, 99)}KB/s", "latency": f"{rng.integers(0, 9)}ms"}
    cluster = Cluster.from_dict({"server": named, "network": network})
    sizes = tuple(size.tolist())
    return cluster, *(place(resident, cluster, list(sizes), reserved_bytes=reserved) for resident in both)


@given(instances())
@quick
def test_order_keeps_coverage_and_memory(instance):
    cluster, old, new = instance
    found = diff(old, new, cluster)
    size, server = old.expert_bytes, cluster.device_server
    budget = cluster.memory - old.model["reserved_bytes"]
    now = old.resident.copy()

    def used(resident):
        return resident.sum(2) @ size

    for step in found.rounds:
        assert step.drops or step.moves
        if not step.staged:
            for layer, expert, device in step.drops:
                assert now[device, layer, expert]
                now[device, layer, expert] = False
                assert now[:, layer, expert].any()
        arriving = now.copy()
        for move in step.moves:
            assert not now[move.device, move.layer, move.expert]
            assert move.source is None or now[move.source, move.layer, move.expert]
            arriving[move.device, move.layer, move.expert] = True
        if step.staged:
            assert (used(arriving) > budget).any()  # there was no way without host memory
            for layer, expert, device in step.drops:
                arriving[device, layer, expert] = False
        now = arriving
        assert now.any(0).all()
        assert (used(now) <= budget).all()
    assert (now == new.resident).all()
    # Totals are those of the set difference.
    gained = new.resident & ~old.resident
    assert sorted((m.device, m.layer, m.expert) for m in found.moves) == [tuple(row) for row in np.argwhere(gained)]
    assert len(found.drops) == (old.resident & ~new.resident).sum()
    assert found.bytes == int(gained.sum((0, 2)) @ size)
    between = [m for m in found.moves if m.source is not None and server[m.source] != server[m.device]]
    assert found.link_bytes.sum() == sum(m.bytes for m in between)
    assert found.disk_bytes.sum() == sum(m.bytes for m in found.moves if m.source is None)
    assert np.isclose(found.load_seconds, sum(m.bytes / cluster.load_bandwidth[m.device] for m in found.moves))
    assert found.seconds <= sum(m.seconds for m in found.moves) + 1e-9
    assert (found.host_bytes > 0) == any(step.staged for step in found.rounds)


@given(instances())
@quick
def test_each_move_takes_the_quickest_source(instance):
    cluster, old, new = instance
    server, now = cluster.device_server, old.resident.copy()
    for step in diff(old, new, cluster).rounds:
        for layer, expert, device in step.drops:
            now[device, layer, expert] &= step.staged
        for move in step.moves:
            ways = [move.bytes / cluster.load_bandwidth[move.device]]
            for source in np.flatnonzero(now[:, move.layer, move.expert]):
                pair = server[source], server[move.device]
                ways.append(cluster.latency[pair] + move.bytes / cluster.bandwidth[pair])
            assert np.isclose(move.seconds, min(ways))
        for move in step.moves:
            now[move.device, move.layer, move.expert] = True
        for layer, expert, device in step.drops:
            now[device, layer, expert] = False


def cluster_of(memory, **device):
    servers = [{"name": f"s{n}", "devices": [{"memory": m, **device}]} for n, m in enumerate(memory)]
    return Cluster.from_dict({"server": servers, "network": {"bandwidth": "1KB/s", "latency": "1s"}})


def test_nothing_to_do():
    cluster = cluster_of([10])
    one = place(np.ones((1, 1, 1)), cluster, 10)
    found = diff(one, one, cluster)
    assert (found.rounds, found.bytes, found.seconds, found.host_bytes) == ((), 0, 0, 0)
    assert not should_migrate(found, 100.0)


def test_full_devices_swap_through_host_memory():
    cluster = cluster_of([10, 10], load_bandwidth="1B/s")
    old, new = (place(np.eye(2)[order][:, None], cluster, 10) for order in ([0, 1], [1, 0]))
    found = diff(old, new, cluster)
    (step,) = found.rounds
    assert step.staged
    assert {(m.expert, m.source, m.device) for m in step.moves} == {(0, 0, 1), (1, 1, 0)}
    assert set(step.drops) == {(0, 0, 0), (0, 1, 1)}
    assert found.host_bytes == found.bytes == 20
    assert found.seconds == 1 + 10 / 1000  # both directions at once
    assert found.link_bytes.tolist() == [[0, 10], [10, 0]]
    # With room for one more on either device nothing has to wait in host memory, but one device waits for the other.
    roomy = cluster_of([20, 10], load_bandwidth="1B/s")
    found = diff(place(old.resident, roomy, 10), place(new.resident, roomy, 10), roomy)
    assert [step.staged for step in found.rounds] == [False] * len(found.rounds)
    assert found.host_bytes == 0


def test_links_and_disks_work_at_the_same_time():
    cluster = cluster_of([30, 30, 30], load_bandwidth="20B/s")
    old = place([[[1, 1, 1]], [[0, 0, 0]], [[0, 0, 0]]], cluster, 10)
    new = place([[[1, 1, 1]], [[1, 1, 0]], [[0, 0, 1]]], cluster, 10)
    found = diff(old, new, cluster)
    assert [m.source for m in found.moves] == [None] * 3  # 0.5 s from storage, 1.01 s over a link
    assert found.disk_bytes.tolist() == [0, 20, 10]
    assert found.seconds == 1.0
    assert found.load_seconds == 1.5
    slow = cluster_of([30, 30, 30], load_bandwidth="1B/s")
    found = diff(*(place(p.resident, slow, 10) for p in (old, new)), slow)
    assert found.link_bytes.tolist() == [[0, 20, 10], [0, 0, 0], [0, 0, 0]]
    assert np.isclose(found.seconds, 1.02)


def test_equally_quick_sources_share():
    cluster = cluster_of([40, 40, 40], load_bandwidth="1B/s")
    old = place([[[1] * 4], [[1] * 4], [[0] * 4]], cluster, 10)
    found = diff(old, place(np.ones((3, 1, 4)), cluster, 10), cluster)
    assert found.link_bytes[:, 2].tolist() == [20, 20, 0]


def test_what_makes_room_elsewhere_comes_first(rng):
    """Full devices that hold 1.3 copies: each round frees about as much as it fills, so a few rounds do."""
    devices, layers, experts = 4, 8, 64
    room = int(1.3 * layers * experts / devices)
    both = np.zeros((2, devices, layers * experts), bool)
    for resident in both:
        owner = rng.permutation(layers * experts) % devices
        resident[owner, np.arange(layers * experts)] = True
        for own in resident:
            own[rng.choice(np.flatnonzero(~own), room - own.sum(), replace=False)] = True
    cluster = cluster_of([10 * room] * devices, load_bandwidth="1B/s")
    old, new = (place(resident.reshape(devices, layers, experts), cluster, 10) for resident in both)
    found = diff(old, new, cluster)
    assert len(found.moves) > 300
    assert not any(step.staged for step in found.rounds)
    assert len(found.rounds) <= 5


@given(instances(), st.floats(0, 50), st.floats(0, 50))
@quick
def test_the_papers_rule_is_a_special_case(instance, now, after):
    cluster, old, new = instance
    found = diff(old, new, cluster)
    verdict = should_migrate(
        found,
        now - after,
        horizon=float("inf"),
        interference=1.0,
        stall_seconds=0.0,
        transfer_seconds=found.load_seconds,
    )
    gained = (new.resident & ~old.resident).sum(2) * old.expert_bytes
    seconds = (gained.sum(1) / cluster.load_bandwidth).sum()
    if found.rounds and not np.isclose(after + seconds, now):
        assert bool(verdict) == (after + seconds < now)


def test_transfer_shortens_what_is_saved():
    cluster = cluster_of([30, 30], load_bandwidth="1B/s")
    old, new = (place([[[1, 1, 1]], row], cluster, 10) for row in ([[0, 0, 0]], [[1, 1, 1]]))
    found = diff(old, new, cluster)  # 1.03 s over the link
    verdict = should_migrate(found, 10.0, horizon=10.3, interference=0.5, stall_seconds=0.2)
    assert np.isclose(verdict.saving_seconds, 10 * 0.9)
    assert np.isclose(verdict.cost_seconds, 0.5 * 1.03 + 0.2)
    assert verdict
    assert not should_migrate(found, 10.0, horizon=1.0)  # over before it is there
    assert not should_migrate(found, -1.0)
    for wrong in ({"horizon": 0}, {"interference": -1}, {"stall_seconds": -1}, {"transfer_seconds": float("nan")}):
        with pytest.raises(InputError, match=f"{next(iter(wrong)).split('_')[0]} = .*: must be"):
            should_migrate(found, 1.0, **wrong)


def test_refuses_what_does_not_belong_together():
    cluster = cluster_of([10, 10])
    old = place(np.ones((2, 1, 1)), cluster, 10)
    with pytest.raises(InputError, match=r"model\.expert_bytes = 9, but placement has 10; use placements of the same"):
        diff(old, place(np.ones((2, 1, 1)), cluster, 9), cluster)
    with pytest.raises(InputError, match=r"model\.experts = 2, but placement has 1"):
        diff(old, place([[[1, 0]], [[0, 1]]], cluster, 10), cluster)
    with pytest.raises(InputError, match="expert 0 is on no device"):
        diff(old, place(np.zeros((2, 1, 1)), cluster, 10), cluster)
    with pytest.raises(InputError, match="is over its memory by 1 bytes"):
        diff(place(np.ones((2, 1, 1)), cluster, 11), old, cluster)
    with pytest.raises(InputError, match="plan again for this cluster"):
        diff(old, old, cluster_of([10]))


TOML = """
server = [
    { name = "a", devices = [{ memory = 120 }] },
    { name = "b", devices = [{ memory = 80, load_bandwidth = "10B/s" }, { memory = 60 }] },
]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """cluster.toml, profile.npz and two placements in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text(TOML)
    cluster = Cluster.from_toml("cluster.toml")
    profile = Profile(np.random.default_rng(0).integers(1, 99, (2, 3, 6)), ("a", "b"), "tiny", 2, 16, 10)
    profile.save("profile.npz")
    for name, strategy in (("old.json", "uniform"), ("new.json", "dance")):
        plan(profile, cluster, strategy).save(name)


def run(*args):
    return main(["diff", "--cluster", "cluster.toml", "old.json", "new.json", *args])


def test_diff_command(folder, capsys):
    assert run("--profile", "profile.npz", "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    old, new = (Placement.load(name) for name in ("old.json", "new.json"))
    found = diff(old, new, Cluster.from_toml("cluster.toml"))
    assert parsed["bytes"] == found.bytes == 10 * int((new.resident & ~old.resident).sum())
    assert sum(len(step["moves"]) for step in parsed["rounds"]) == len(found.moves)
    assert sum(link["bytes"] for link in parsed["links"]) == found.link_bytes.sum()
    assert parsed["verdict"] == ("migrate" if parsed["saving_seconds"] > parsed["cost_seconds"] else "stay")
    assert parsed["step_seconds_new"] < parsed["step_seconds_old"]
    assert run("--profile", "profile.npz", "--horizon", "100000s") == 0
    assert "verdict: migrate" in capsys.readouterr().out
    assert run() == 0
    out = capsys.readouterr().out
    assert f"{len(found.moves)} moves" in out
    assert "verdict: give --profile" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--horizon", "300"], "--horizon = '300': needs a unit"),
        (["--chunks", "-1"], "--chunks = -1.0: must be a number from 0"),
        (["--profile", "none.npz"], "none.npz: cannot be read"),
        (["--profile", "profile.npz", "--horizon", "0s"], "horizon = 0.0: must be more than 0 seconds"),
        (["--active", "0"], "workload.active = 0: must be a whole number from 1"),
    ],
)
def test_diff_refuses_bad_arguments(folder, capsys, args, message):
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
