"""The command line as a user meets it: the demo end to end, and one clear line for whatever cannot be used."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dancemoe_jax import bundled_model
from launch.__main__ import main
from tests.helpers.paths import ROOT


def launch(*arguments, cwd, timeout=240):
    """`python -m launch …` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short run of the demo: its result, what it printed and where."""
    folder = tmp_path_factory.mktemp("demo")
    done = launch("demo", "--phase-seconds", 5, "--rate", 1.5, "--json", "figures.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text()), done.stdout, folder


def test_demo_passes_its_own_checks_and_prints_every_phase(demo):
    result, printed, folder = demo
    checks = result["checks"]
    assert checks["mismatches"] == checks["compilations_after_warmup"] == 0
    assert checks["within_budget"] is True
    assert checks["requests_checked"] >= 20
    assert checks["checked_across_migrations"] >= 2
    for phase in result["phases"]:
        assert f"\n{phase['name']} " in printed
        assert phase["requests"] > 0
    assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert sorted(p.name for p in folder.iterdir()) == ["figures.json", "report.html"]
    assert max(map(len, printed.splitlines())) <= 80, "a terminal of 80 columns"


def test_demo_keeps_a_rate_that_was_given(demo):
    result, *_ = demo
    assert result["load"] == {"requests_per_s": 4.5, "holds_per_s": None}


def test_demo_loads_its_machine_to_half_of_what_it_holds(tmp_path):
    done = launch("demo", "--phase-seconds", 2, "--json", "figures.json", "--picture", "demo.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.png", "figures.json", "report.html"]
    result = json.loads((tmp_path / "figures.json").read_text())
    load = result["load"]
    assert load["requests_per_s"] == pytest.approx(max(load["holds_per_s"] / 2, 3 * 0.3))
    assert f"this machine answers {load['holds_per_s']:.1f} requests a second" in done.stdout
    inside = [r for r in result["requests"] if 0 <= r["arrival_s"] <= result["phases"][-1]["end_s"]]
    seconds = result["phases"][-1]["end_s"]
    expected = load["requests_per_s"] * seconds
    assert abs(len(inside) - expected) < 5 * expected**0.5 + 1, "Poisson arrivals at that rate"


def test_demo_computes_less_network_time_where_fewer_calls_leave(demo):
    result, *_ = demo
    for phase in result["phases"]:
        assert phase["network_request_s"] > 0
        if phase["name"] in ("dance", "dance again"):
            assert phase["network_request_s"] < 0.95 * phase["network_request_uniform_s"]
    assert result["phases"][0]["network_request_s"] == result["phases"][0]["network_request_uniform_s"]
    assert {r["server"] for r in result["requests"]} == {s["name"] for s in result["cluster"]["servers"]}
    assert all(r["finished_s"] > r["arrival_s"] >= 0 for r in result["requests"])


def test_demo_shows_text_of_the_workload_that_the_phase_has(demo):
    result, *_ = demo
    workload = {phase["name"]: phase["workload"] for phase in result["phases"]}
    assert result["samples"]
    assert all(s["domain"] == workload[s["phase"]][s["server"]] for s in result["samples"])


def test_demo_cuts_remote_calls_by_two_fifths_both_times(demo):
    result, *_ = demo
    headline = result["headline"]
    assert headline["reduction_first"] >= 0.4
    # The window of a run this short still remembers some of the old workload: the full length reaches 0.4.
    assert headline["reduction_second"] >= 0.35
    for phase in result["phases"]:
        # What the planner counts is what the steps measured: local ratio of each server, mean over servers.
        assert 1 - phase["local_ratio_mean"] == pytest.approx(phase["remote_share"], abs=1e-6)


def test_demo_counts_are_whole_and_placements_differ(demo):
    result, *_ = demo
    for phase in result["phases"]:
        counts = np.array(phase["counts"])
        per_layer = counts.sum(2)
        assert (per_layer == per_layer[:, :1]).all(), "every token goes through every layer"
        assert (per_layer % result["model"]["top_k"] == 0).all()
    first, second, third = ([d["experts"] for d in p["devices"]] for p in result["placements"])
    assert first != second != third
    assert all(m["requests_in_flight"] > 0 and m["copies_added"] > 0 for m in result["migrations"])


def test_unequal_budgets_cost_unequal_memory(demo):
    result, *_ = demo
    devices = [d for server in result["cluster"]["servers"] for d in server["devices"]]
    held = [d["resident_bytes"] for d in devices]
    assert len(set(held)) == len(held)
    assert all(
        d["resident_bytes"] == d["slots"] * result["model"]["expert_bytes"] <= d["budget_bytes"] for d in devices
    )


@pytest.mark.slow  # three processes compile and serve
def test_demo_over_a_process_for_each_server(tmp_path):
    done = launch("demo", "--processes", "--phase-seconds", 4, "--json", "figures.json", cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    checks = result["checks"]
    assert checks["mismatches"] == checks["compilations_after_warmup"] == 0
    assert checks["within_budget"] is True
    assert checks["requests_checked"] > 0
    assert "one process for each server" in done.stdout.splitlines()[0]
    assert "[" not in done.stdout.splitlines()[1], "only the demo's own lines"
    uniform, dance, _, again = result["phases"]
    for phase in result["phases"]:
        assert None not in phase["local_ratio"].values(), "every server's users were served"
        assert 1 - phase["local_ratio_mean"] == pytest.approx(phase["remote_share"], abs=1e-6)
    assert dance["local_ratio_mean"] > uniform["local_ratio_mean"] + 0.1
    assert again["remote_share"] < again["remote_share_uniform"]
    assert all(m["copies_added"] * result["model"]["expert_bytes"] == m["bytes_moved"] for m in result["migrations"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "report.html"]


def test_first_line_comes_at_once(tmp_path):
    command = [sys.executable, "-u", "-m", "launch", "demo"]
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-1, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("DanceMoE demo")
        assert time.monotonic() - start < 10
        child.kill()
        child.stdout.read()


TOO_SMALL = '[[server]]\nname = "a"\ndevices = [{ memory = "20MB" }]\n'
NO_ROOM = '[[server]]\nname = "a"\ndevices = [{ memory = "200MB" }, { memory = "1MB" }]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOO_SMALL, "bytes are missing for one copy of every expert"),
        (NO_ROOM, "a device 1"),
        (TOO_SMALL.replace("20MB", "20 parsecs"), "20 parsecs"),
        (TOO_SMALL.replace("memory", "memry"), "memry"),
        (TOO_SMALL[:-5], "not valid TOML"),
        (None, "cluster.toml"),
    ],
)
def test_clusters_that_cannot_be_used(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("cluster.toml").write_text(text)
    before = sorted(tmp_path.iterdir())
    assert main(["demo", "--cluster", "cluster.toml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("command", [("demo",), ("generate", "--prompt", "x"), ("evaluate",)])
def test_model_directories_that_lack_a_file(command, missing, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bundled_model(), model)
    (model / missing).unlink()
    done = launch(*command, "--model", model, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x" * 300], "300 tokens; the model's context of 256"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "--max-tokens 0"),
        (["demo", "--rate", "0"], "--rate"),
        (["demo", "--report", "nowhere/report.html"], "--report nowhere/report.html"),
        (["train", "--out", "x", "--steps", "0"], "--steps 0"),
    ],
)
def test_flags_and_prompts_that_cannot_be_used(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_unknown_commands_and_flags_are_one_line(capsys):
    for arguments in (["dmeo"], ["demo", "--sed", "1"], []):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_generate_prints_prompt_and_continuation(tmp_path):
    done = launch("generate", "--prompt", "12 + 34 = 46\n47 + 38 =", "--max-tokens", 4, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["text"].startswith(" 85\n")
