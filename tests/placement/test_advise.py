"""`advise`: expected speed from a config.json and a cluster file, its parts, what would change it."""

import json
from pathlib import Path

import numpy as np
import pytest

from placement import Cluster, ModelShape, Problem, Profile, Workload, plan
from placement.__main__ import main
from placement.commands.advice import GIGABIT, PARTS, cases, figures, one_more_box
from placement.data.arrivals import Arrivals
from placement.simulation.independent.alone import alone_seconds, measured_compute
from placement.simulation.independent.events import simulate
from placement.simulation.independent.unit_costs import Compute, Steps

CONFIG = {
    "model_type": "mixtral",
    "_name_or_path": "small",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
CLUSTER = """
[[server]]
name = "a"
devices = [{ memory = "1.6MB" }]
[[server]]
name = "b"
devices = [{ memory = "1.6MB" }, { memory = "1.6MB" }]
[network]
bandwidth = "8MB/s"
latency = "2ms"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(CONFIG))
    Path("cluster.toml").write_text(CLUSTER)
    return tmp_path


def advise(*more):
    return main(["advise", "--model", "config.json", "--cluster", "cluster.toml", "--cache", "10KB", *more])


def test_text_fits_80_columns_and_names_what_is_in_the_way(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert advise() == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    assert "Bottleneck of a decoded token" in text
    for name in ("one more box", "one more gigabit", "int4 experts", "latency", "exact", "parallax"):
        assert name in text
    assert "not yet" in text
    assert "Without --profile all experts are equally likely" in text


def test_json_and_its_sums(folder, capsys):
    assert advise("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["strategy"] in ("latency", "exact")
    for case in (*found["strategies"].values(), *found["what_if"].values()):
        assert set(case["seconds"]) == set(PARTS)
        assert sum(case["seconds"].values()) == pytest.approx(1 / case["tokens_per_second"])
        assert sum(case["prompt_seconds"].values()) == pytest.approx(case["first_token"])
    assert found["bottleneck"] == max(PARTS, key=found["strategies"][found["strategy"]]["seconds"].get)
    best = found["strategies"][found["strategy"]]
    assert found["what_if"]["one more gigabit"]["first_token"] < best["first_token"]
    assert found["what_if"]["int4 experts"]["copies"] > 3 * best["copies"]
    assert found["what_if"]["one more box"]["copies"] > best["copies"]


def test_one_server_needs_no_network(folder):
    cluster = Cluster.from_dict({"server": [{"name": "a", "devices": [{"memory": "9MB"}]}]})
    first, *others = cases("config.json", cluster, None, 10_000)
    assert [case.name for case in others] == ["one more box", "int4 experts"]
    found = figures(first, "exact", Workload(), 0.0)
    shape = ModelShape.from_config("config.json")
    experts = 4 * 2 * shape.expert_bytes / 500e9
    assert found["seconds"] == pytest.approx(
        {"dense": shape.other_bytes / 500e9 + 4 * 0.5e-3, "experts": experts, "rounds": 0.0, "bytes": 0.0}
    )
    assert found["link"] == ""
    assert found["device"] == "a/0"


def test_a_hosted_plan_has_the_same_dense_and_expert_seconds(folder):
    case = next(cases("config.json", Cluster.from_toml("cluster.toml"), None, 10_000))
    home, away = (figures(case, name, Workload(), 0.0) for name in ("latency", "parallax"))
    assert away["seconds"]["dense"] == pytest.approx(home["seconds"]["dense"], rel=0.1)
    assert away["seconds"]["experts"] > 0
    assert (home["served"], away["served"]) == (True, False)


def test_measured_costs_stand_in_for_the_roofline(folder, capsys):
    Path("costs.json").write_text('{"prefill": [0.1, 0.02, 0.001], "decode": [0.004, 0.002, 0.003]}')
    assert advise("--json", "--strategies", "exact", "--costs", "costs.json", "--prefill-tokens", "100") == 0
    found = json.loads(capsys.readouterr().out)["strategies"]["exact"]
    assert found["seconds"]["dense"] == pytest.approx(0.006)
    assert found["seconds"]["experts"] == pytest.approx(0.003, rel=0.5)  # some are on a server of two devices
    parts = found["prompt_seconds"]
    assert 0.1 < parts["dense"] + parts["experts"] < 0.12 + 100 * 0.001
    assert advise("--costs", "config.json") == 2
    assert "config.json: must have prefill and decode" in capsys.readouterr().err


def test_a_request_alone_takes_its_steps(folder):
    case = next(cases("config.json", Cluster.from_toml("cluster.toml"), None, 10_000))
    problem = Problem.build(case.profile, case.cluster)
    resident = plan(case.profile, case.cluster, "exact").resident
    compute = measured_compute(Compute.roofline(problem), (0.1, 0.02, 0.001), (0.004, 0.002, 0.003), 64)
    assert compute.prefill_token == pytest.approx(0.12 / 64 + 0.001)
    assert (compute.decode_step, compute.decode_token) == pytest.approx((0.006, 0.003))
    steps = Steps.build(problem, resident, compute)
    given = Arrivals(np.array([0.0, 50.0]), np.array([0, 1]), np.array([128, 70]), np.array([1, 9]))
    first, whole = alone_seconds(steps, given, 64)
    apart = simulate(problem, resident, given, compute, chunk=64)
    assert first == pytest.approx(apart.first_token)
    assert whole == pytest.approx(apart.latency)


def test_what_does_not_fit_says_what_would(folder, capsys):
    Path("cluster.toml").write_text(CLUSTER.replace("1.6MB", "0.5MB"))
    assert advise("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["strategy"] is None
    assert found["bottleneck"] == "memory"
    assert "bytes are missing" in found["strategies"]["latency"]["missing"]
    assert found["what_if"]["int4 experts"]["tokens_per_second"] > 0
    assert advise() == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "It cannot be served" in text
    assert "no room" in text


def test_a_profile_is_of_the_same_servers_and_helps(folder, capsys):
    rng = np.random.default_rng(0)
    shape = ModelShape.from_config("config.json")
    counts = rng.permuted(np.broadcast_to(2 ** np.arange(8) * 9, (2, 4, 8)), axis=2)
    facts = {"top_k": 2, "hidden_size": 64, "expert_bytes": shape.expert_bytes}
    Profile(counts, ("a", "b"), "small", **facts).save("p.npz")
    assert advise("--json") == 0
    flat = json.loads(capsys.readouterr().out)["strategies"]["exact"]["tokens_per_second"]
    assert advise("--json", "--profile", "p.npz") == 0
    assert json.loads(capsys.readouterr().out)["strategies"]["exact"]["tokens_per_second"] > flat
    Profile(counts, ("a", "x"), "small", **facts).save("q.npz")
    assert advise("--profile", "q.npz") == 2
    assert "both must name the same servers in the same order" in capsys.readouterr().err


def test_one_more_box_is_like_the_largest_with_usual_links(folder):
    grown = one_more_box(Cluster.from_toml("cluster.toml"))
    assert grown.names == ("a", "b", "b-2")
    assert [len(server.devices) for server in grown.servers] == [1, 2, 2]
    assert grown.bandwidth[2, :2].tolist() == [8e6, 8e6]
    assert grown.latency[0, 2] == 2e-3
    assert np.isinf(np.diag(grown.bandwidth)).all()
    alone = one_more_box(Cluster.from_dict({"server": [{"name": "a", "devices": [{"memory": 9}]}]}))
    assert alone.bandwidth[0, 1] == GIGABIT


def test_picture(folder, capsys):
    assert advise("--plot", "a.png", "--strategies", "exact") == 0
    assert Path("a.png").read_bytes()[:4] == b"\x89PNG"
    assert advise("--plot", "a.gif") == 2
    assert "unsupported suffix" in capsys.readouterr().err
