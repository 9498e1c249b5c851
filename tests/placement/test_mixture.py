"""Profiles of tasks mixed into profiles of servers: shares, how much they are worth, what is refused, the commands."""

import json
from pathlib import Path

import numpy as np
import pytest

from placement import Cluster, InputError, Profile, evaluate, plan
from placement.__main__ import main
from placement.data.mixture import mixed

LAYERS, EXPERTS, K = 3, 12, 2
META = {"model": "m", "hidden_size": 64, "expert_bytes": 1000}


def tasks(tokens=(600, 300, 90), length=(30, 10, 5), seed=0):
    """Token-level profile of tasks that use experts of their own mostly; `length` tokens a request."""
    rng = np.random.default_rng(seed)
    ids, row, sequence = [], [], []
    for task, (number, each) in enumerate(zip(tokens, length, strict=True)):
        taste = np.full((LAYERS, EXPERTS), 0.05)
        taste[:, 4 * task : 4 * task + 4] = 1.0
        ids.append(np.argsort(rng.standard_exponential((number, LAYERS, EXPERTS)) / taste, axis=-1)[..., :K])
        row.append(np.full(number, task))
        sequence.append(np.arange(number) // each + 1000 * task)
    columns = (np.concatenate(column) for column in (ids, row, sequence))
    return Profile.from_tokens(*columns, servers=("law", "code", "chat"), experts=EXPERTS, **META)


def tokens_of(profile):
    return profile.counts.sum((1, 2)) / (profile.counts.shape[1] * profile.top_k)


def test_one_task_for_each_server_is_the_profile_itself():
    given = tasks()
    # Rates at which each server brings as many tokens as were recorded.
    rates = {"a": {"law": 20}, "b": {"code": 30}, "c": {"chat": 18}}
    found = mixed(given, rates, ["a", "b", "c"])
    assert found.servers == ("a", "b", "c")
    assert found.counts == pytest.approx(given.counts)
    assert np.array_equal(found.ids, given.ids)
    assert np.array_equal(found.server, given.server)


def test_shares_follow_rates_and_lengths():
    found = mixed(tasks(), {"a": {"law": 1, "code": 3}, "quiet": {}}, ["a", "quiet"])
    # 30 tokens of law to 3 times 10 of code: half each, which rests on 1 / (1/4 / 600 + 1/4 / 300) = 800 tokens.
    law, code, _ = tasks().counts / tasks().counts.sum(-1, keepdims=True)
    assert tokens_of(found) == pytest.approx([800, 0])
    assert found.counts[0] == pytest.approx(800 * K * (law + code) / 2)
    assert found.ids is not None
    assert len(found.ids) == 800
    assert found.sequence is not None
    of_law = (found.sequence < 1000).sum()
    assert of_law == 400
    counted = np.stack([np.bincount(found.ids[:, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)])
    assert abs(counted / counted.sum(-1, keepdims=True) - (law + code) / 2).max() < 0.01


def test_a_busy_server_counts_for_more_and_a_thin_task_for_little():
    found = mixed(tasks(), {"a": {"law": 9}, "b": {"law": 1}}, ["a", "b"])
    assert tokens_of(found) == pytest.approx([1080, 120])
    thin = mixed(tasks((600, 300, 5), (30, 10, 5)), {"a": {"law": 1, "chat": 6}}, ["a"])
    assert tokens_of(thin) == pytest.approx([1 / (0.25 / 600 + 0.25 / 5)])


def test_counts_alone_are_mixed_by_tokens():
    counts = np.zeros((2, 1, 4), np.int64)
    counts[0, 0, 0], counts[1, 0, 3] = 10, 40
    given = Profile(counts, ("law", "code"), top_k=1, **META)
    found = mixed(given, {"a": {"law": 1, "code": 3}}, ["a"])
    assert found.ids is None
    assert found.counts[0, 0] / found.counts.sum() == pytest.approx([0.25, 0, 0, 0.75])


def test_a_server_with_a_task_without_tokens_has_counts_alone():
    given = tasks((600, 300, 0), (30, 10, 5))
    counts = given.counts.copy()
    counts[2, :, :K] = 50
    given = Profile(**{**vars(given), "counts": counts})
    found = mixed(given, {"a": {"law": 1}, "b": {"law": 1, "chat": 1}}, ["a", "b"])
    assert found.server is not None
    assert set(found.server.tolist()) == {0}
    assert found.counts[1].sum() > 0


def test_a_plan_for_the_mixture_is_better_than_one_for_other_users():
    names = ("a", "b", "c")
    devices = [{"memory": 18 * 1000}]
    cluster = Cluster.from_dict({"server": [{"name": name, "devices": devices} for name in names]})
    rates = {"a": {"law": 5, "chat": 1}, "b": {"code": 9, "chat": 1}, "c": {"chat": 9, "law": 1}}
    then = mixed(tasks(seed=1), rates, names)
    share = {
        key: evaluate(then, cluster, plan(mixed(tasks(), given, names), cluster, "exact"))["remote_share"]
        for key, given in (("right", rates), ("alike", {key: {"law": 1, "code": 1, "chat": 1} for key in names}))
    }
    assert share["right"] < 0.8 * share["alike"]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"d": {"law": 1}}, "'d': no such server; known are 'a, b'"),
        ({"a": {"tax": 1}}, "a.'tax': no such task"),
        ({"a": {"law": -1}}, "a.'law' = -1: must be a number of requests from 0"),
        ({"a": {"law": True}}, "must be a number"),
        ({"a": {"law": float("nan")}}, "must be a number"),
        ({"a": 3}, "a = 3: must be a table"),
        ({"a": {"law": 0}}, "no rate above 0"),
        ({"a": {"empty": 1}}, "empty: profile has no counts of this task"),
    ],
)
def test_refuses(rates, message):
    counts = np.ones((2, 1, 4), np.int64) * [[[1]], [[0]]]
    given = Profile(counts, ("law", "empty"), top_k=1, **META)
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        mixed(given, rates, ["a", "b"], "rates.toml" if "rates.toml" in message else "rates")


def test_from_requests_to_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = tasks()
    assert given.ids is not None
    lines = []
    for sequence in np.unique(given.sequence):
        rows = given.sequence == sequence
        task = given.servers[given.server[rows][0]]
        lines.append({"task": task, "server": "x", "routed_experts": given.ids[rows].tolist()})
    Path("requests.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    facts = ("--name", "m", "--hidden-size", "64", "--expert-bytes", "1000", "--experts", "12")
    assert main(["convert", "requests.jsonl", "--by", "task", "--out", "tasks.npz", *facts]) == 0
    found = Profile.load("tasks.npz")
    assert found.servers == ("law", "code", "chat")
    assert (found.counts == given.counts).all()
    Path("cluster.toml").write_text(
        "".join(f'[[server]]\nname = "{name}"\ndevices = [{{ memory = 20000 }}]\n' for name in "ab")
    )
    Path("rates.toml").write_text("[a]\nlaw = 0.2\nchat = 0.1\n[b]\ncode = 0.5\n")
    capsys.readouterr()
    mix = ["mix", "--cluster", "cluster.toml", "--tasks", "tasks.npz", "--rates", "rates.toml", "--out", "profile.npz"]
    assert main(mix) == 0
    assert "3 tasks mixed for 2 servers; worth tokens: a " in capsys.readouterr().out
    assert main([*mix, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["tokens"]
    assert list(said.values()) == pytest.approx(tokens_of(Profile.load("profile.npz")).tolist())
    planned = ["plan", "--cluster", "cluster.toml", "--profile", "profile.npz", "--out", "placement.json"]
    assert main([*planned, "--strategy", "latency"]) == 0
    for wrong, message in (
        (["convert", "requests.jsonl", "--by", "subject", "--out", "t.npz", *facts], "subject = None: must be a name"),
        (
            ["convert", "requests.jsonl", "--by", "task", "--cluster", "cluster.toml", "--out", "t.npz"],
            "--cluster: names",
        ),
        (["convert", "one.npy", "--from", "sglang", "--by", "task", "--out", "t.npz"], "--by needs requests"),
        (
            ["convert", "one.npy", "--from", "routed-experts", "--by", "task", "--out", "t.npz"],
            "an array names no task",
        ),
    ):
        capsys.readouterr()
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
