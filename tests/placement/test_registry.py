"""Strategies of one's own: registered, or in a file; and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest

import placement
from placement import STRATEGIES, Cluster, InputError, Profile, plan, register
from placement.__main__ import main

FILE = """
import numpy as np

def everywhere(problem, *, previous=None, seed=0):
    return np.ones((len(problem.budget), *problem.shape[1:]), bool)

def flat(problem, *, previous=None, seed=0):
    return np.ones(3)

def positional(problem, previous, seed, extra):
    return None

number = 3
"""
CLUSTER = """
[[server]]
name = "a"
devices = [{ memory = 40 }]
[[server]]
name = "b"
devices = [{ memory = 40 }]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """cluster.toml, profile.npz and mine.py in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text(CLUSTER)
    Path("mine.py").write_text(FILE)
    Path("broken.py").write_text("raise RuntimeError('half\\na file')")
    counts = np.arange(12).reshape(2, 2, 3)
    Profile(counts, ("a", "b"), "m", top_k=1, hidden_size=8, expert_bytes=5).save("profile.npz")
    return tmp_path


def test_a_registered_strategy_plans_by_its_name(folder):
    def mine(problem, *, previous=None, seed=0):
        return np.ones((2, 2, 3), bool)

    register("mine", mine)
    try:
        register("mine", mine)  # again is no harm
        placed = plan(Profile.load("profile.npz"), Cluster.from_toml("cluster.toml"), "mine")
        assert (placed.strategy, placed.resident.all()) == ("mine", True)
        assert "mine" in placement.STRATEGIES
        with pytest.raises(InputError, match="another strategy has it"):
            register("mine", lambda problem, *, previous, seed: mine(problem))
    finally:
        del STRATEGIES["mine"]


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("", None, "use letters"),
        ("a,b", None, "use letters"),
        ("a:b", None, "use letters"),
        ("dance", lambda problem, *, previous, seed: None, "another strategy has it"),
        ("new", 3, "must be a function"),
        ("new", lambda problem: None, "cannot be called as strategy"),
        ("new", lambda problem, other, *, previous, seed: None, "cannot be called as strategy"),
    ],
)
def test_what_cannot_be_registered(name, function, message):
    before = dict(STRATEGIES)
    with pytest.raises(InputError, match=message):
        register(name, function)
    assert before == STRATEGIES


def test_commands_take_a_strategy_from_a_file(folder, capsys):
    given = ["--cluster", "cluster.toml", "--profile", "profile.npz"]
    assert main(["plan", *given, "--strategy", "mine.py:everywhere", "--out", "new.json"]) == 0
    assert placement.Placement.load("new.json").resident.all()
    assert main(["compare", *given, "--strategies", "dance,mine.py:everywhere"]) == 0
    assert re.search(r"^mine.py:everywhere +0.000 ", capsys.readouterr().out, re.MULTILINE)
    simulated = ["--strategies", "mine.py:everywhere", "--gap", "50", "--duration", "200"]
    assert main(["simulate", *given, *simulated]) == 0
    assert main(["bench", "--strategies", "mine.py:everywhere", "--sizes", "2x4x2x1"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.py:f", "absent.py: no such file"),
        ("mine.py:absent", "mine.py: has no function 'absent'"),
        ("mine.py:number", "must be a function"),
        ("mine.py:positional", "cannot be called as strategy(problem, *, previous=None, seed=0)"),
        ("mine.py:flat", "returned float64 [3]; must be bool [devices, layers, experts], [2, 2, 3]"),
        ("broken.py:f", "broken.py: cannot be loaded: RuntimeError: half a file"),
        ("mine.txt:f", "'mine.txt:f' is unknown; choose from uniform"),
    ],
)
def test_files_that_are_refused(folder, capsys, name, message):
    given = ["--cluster", "cluster.toml", "--profile", "profile.npz", "--out", "new.json"]
    assert main(["plan", *given, "--strategy", name]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not Path("new.json").exists()
