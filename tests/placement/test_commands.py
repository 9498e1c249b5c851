"""python -m placement: what it prints, what it writes, and exit codes 0 and 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from placement import STRATEGIES, Cluster, Placement, Profile, evaluate, optimum, plan
from placement.__main__ import main
from tests.helpers.paths import ROOT

CLUSTER = """
[[server]]
name = "a"
devices = [{ memory = 120 }]
[[server]]
name = "b"
devices = [{ memory = 80 }, { memory = 60 }]
[network]
bandwidth = "500Mbps"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """cluster.toml, profile.npz and a second profile in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text(CLUSTER)
    for seed, name in enumerate(["profile.npz", "later.npz"]):
        counts = np.random.default_rng(seed).integers(1, 99, (2, 3, 6))
        Profile(counts, ("a", "b"), "tiny", 2, 16, 10, reserved_bytes=5).save(name)
    return tmp_path


def run(*args):
    return main([*args, "--cluster", "cluster.toml"])


def refused(capsys, status):
    """Checks exit 2 with one line on stderr and nothing on stdout; returns the line."""
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_plan_then_validate(folder, capsys):
    assert run("plan", "--profile", "profile.npz", "--out", "new.json") == 0
    text = capsys.readouterr().out
    assert "new.json: dance, tiny" in text
    placement = Placement.load("new.json")
    assert placement.strategy == "dance"
    assert placement.resident.any(0).all()
    placement.validate(Cluster.from_toml("cluster.toml"), 5)
    shape = {"layers": 3, "experts": 6, "top_k": 2}
    assert placement.model == {"name": "tiny", "expert_bytes": 10, "reserved_bytes": 5, **shape}
    assert run("validate", "--placement", "new.json") == 0
    assert "new.json: valid on cluster.toml" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["cluster.toml", "later.npz", "new.json", "profile.npz"]


def test_a_large_cluster_is_planned_without_the_optimum(folder, capsys, monkeypatch):
    monkeypatch.setattr("placement.commands.plan._OPTIMUM", 2 * 3 * 6 - 1)
    assert run("plan", "--profile", "profile.npz", "--out", "new.json") == 0
    assert "gap: not counted" in capsys.readouterr().out
    assert run("plan", "--profile", "profile.npz", "--out", "new.json", "--json") == 0
    assert "gap" not in json.loads(capsys.readouterr().out)
    monkeypatch.setattr("placement.commands.plan._OPTIMUM", 2 * 3 * 6)
    assert run("plan", "--profile", "profile.npz", "--out", "new.json") == 0
    assert "gap: not counted" not in capsys.readouterr().out


def test_same_input_same_file(folder, capsys):
    for name in ("one.json", "two.json"):
        assert run("plan", "--profile", "profile.npz", "--strategy", "dance", "--out", name) == 0
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()


def test_plan_from_previous(folder, capsys):
    assert run("plan", "--profile", "profile.npz", "--out", "one.json") == 0
    assert run("plan", "--profile", "profile.npz", "--previous", "one.json", "--out", "two.json") == 0
    assert (Placement.load("one.json").resident == Placement.load("two.json").resident).all()


def test_json(folder, capsys):
    assert run("plan", "--profile", "profile.npz", "--out", "new.json", "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["strategy"] == "dance"
    assert 0 <= parsed["remote_share"] <= 1
    assert run("validate", "--placement", "new.json", "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["valid"] is True
    assert parsed["budget_bytes"] == [115, 75, 55]


def test_compare(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run("compare", "--profile", "profile.npz", "--eval", "later.npz", "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    assert list(parsed["strategies"]) == list(STRATEGIES)
    assert parsed["strategies"]["exact"]["gap"] == 0 < parsed["strategies"]["uniform"]["gap"]
    assert parsed["eval"] == "later.npz"
    for cost in parsed["strategies"].values():
        assert {"remote_share", "network_probability", "bytes_per_token", "balance", "planning_seconds"} <= set(cost)
    assert run("compare", "--profile", "profile.npz", "--strategies", "dance") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"strategy", "remote", "P(network)", "servers", "balance", "gap", "planned"} <= set(lines[0].split())
    assert "bytes a token" in lines[0]
    assert lines[1].startswith("dance")
    assert not any("uniform" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "remote: share of calls, mean over servers" in text
    assert "gap: remote calls of all servers together beyond the fewest possible" in text
    assert "there each server counts by its traffic" in text
    served = {}
    for rule in ("ours", "sglang"):
        assert run("compare", "--profile", "profile.npz", "--strategies", "dance", "--dispatch", rule, "--json") == 0
        served[rule] = json.loads(capsys.readouterr().out)["strategies"]["dance"]
    assert served["ours"]["remote_share"] == served["sglang"]["remote_share"]


def test_remote_counts_servers_alike_and_gap_by_traffic():
    """`exact` has the fewest calls of all; where a busy server decides them, another plan may have the lower mean."""
    counts = np.array([[[900, 200, 100, 0]], [[0, 18, 1, 1]]])
    meta = {"model": "m", "top_k": 1, "hidden_size": 64, "expert_bytes": 1}
    profile = Profile(counts, ("busy", "quiet"), **meta)
    devices = [{"name": n, "devices": [{"memory": m}]} for n, m in (("busy", 2), ("quiet", 2))]
    cluster = Cluster.from_dict({"server": devices})
    model = {"name": "m", "layers": 1, "experts": 4, "top_k": 1, "expert_bytes": 1, "reserved_bytes": 0}
    other = np.array([[[True, False, True, False]], [[False, True, False, True]]])
    best = optimum(profile, cluster)
    fewest = evaluate(profile, cluster, plan(profile, cluster, "exact"), best)
    fairer = evaluate(profile, cluster, Placement(other, cluster.device_names, "by hand", model), best)
    assert fewest["gap"] == pytest.approx(0)
    assert fewest["remote_share"] == pytest.approx((100 / 1200 + 18 / 20) / 2)
    assert fairer["remote_share"] == pytest.approx((200 / 1200 + 1 / 20) / 2)
    assert fairer["gap"] == pytest.approx(201 / 118 - 1)


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit_the_terminal(folder, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert run("compare", "--profile", "profile.npz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    shown = " ".join(lines).split()
    assert {"strategy", "remote", "P(network)", "servers", "balance", "gap", "planned", *STRATEGIES} <= set(shown)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--profile", "absent.npz"], "absent.npz: cannot be read: No such file"),
        (["--profile", "cluster.toml"], "cluster.toml: not a .npz file"),
        (["--profile", "profile.npz", "--strategy", "best"], "strategy: 'best' is unknown; choose from"),
        (["--profile", "profile.npz", "--previous", "cluster.toml"], "cluster.toml: not valid JSON"),
        (["--profile", "profile.npz", "--out", "absent/new.json"], "absent/new.json: cannot be written"),
        (["--profile", "profile.npz", "--out", "."], ".: cannot be written: not a regular file"),
    ],
)
def test_plan_refuses(folder, capsys, args, message):
    Path("new.json").write_text("old")
    assert message in refused(capsys, run("plan", "--out", "new.json", *args))
    assert Path("new.json").read_text() == "old"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("120", "49", "cluster.toml: 20 bytes are missing for one copy of every expert"),
        ("60", "4", "cluster.toml: b device 1: memory of 4 bytes is 1 bytes less than profile.npz reserves"),
        ('name = "b"', 'name = "c"', "profile.npz: servers = a, b, but cluster.toml has a, c"),
        ('name = "b"', 'nam = "b"', "cluster.toml: server[1]: unknown key 'nam'"),
        ("500Mbps", "500Mbit", "unknown unit 'Mbit'"),
    ],
)
def test_cluster_that_cannot_serve(folder, capsys, old, new, message):
    Path("cluster.toml").write_text(CLUSTER.replace(old, new))
    assert message in refused(capsys, run("plan", "--profile", "profile.npz", "--out", "new.json"))
    assert message in refused(capsys, run("compare", "--profile", "profile.npz"))
    assert not Path("new.json").exists()


def test_validate_refuses(folder, capsys):
    assert run("plan", "--profile", "profile.npz", "--out", "new.json") == 0
    capsys.readouterr()
    Path("cluster.toml").write_text(CLUSTER.replace("120", "100"))
    assert "new.json: a device 0 is over its memory by 15 bytes" in refused(
        capsys, run("validate", "--placement", "new.json")
    )
    Path("cluster.toml").write_text(CLUSTER.replace("{ memory = 80 }, ", ""))
    assert "plan again for this cluster" in refused(capsys, run("validate", "--placement", "new.json"))


def test_compare_refuses(folder, capsys):
    assert "'x' is unknown" in refused(capsys, run("compare", "--profile", "profile.npz", "--strategies", "dance,x"))
    Profile(np.ones((2, 3, 5)), ("a", "b"), "tiny", 2, 16, 10).save("other.npz")
    text = refused(capsys, run("compare", "--profile", "profile.npz", "--eval", "other.npz"))
    assert "model.experts = 6, but other.npz has 5" in text


@pytest.mark.parametrize("args", [[], ["paln"], ["plan"], ["plan", "--seed", "x"], ["validate", "--cluster"]])
def test_bad_arguments_are_one_line(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    refused(capsys, stop.value.code)


def python(*args):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, check=False)


def test_as_a_program(folder):
    done = python("-m", "placement", "compare", "--cluster", "cluster.toml", "--profile", "profile.npz")
    assert (done.returncode, done.stderr) == (0, "")
    bad = python("-m", "placement", "plan", "--cluster", "none", "--profile", "profile.npz", "--out", "new.json")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "placement plan: none: cannot be read: No such file or directory\n"
    assert not Path("new.json").exists()


def test_numpy_alone_is_enough(folder):
    code = "import sys, placement; print(sorted({'jax', 'scipy', 'rich', 'matplotlib'} & set(sys.modules)))"
    assert python("-c", code).stdout == "[]\n"
