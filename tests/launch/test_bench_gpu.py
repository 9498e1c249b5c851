"""The benchmark of one card: what it does without one, and how its shares are counted."""

import json

import jax
import pytest

from launch.__main__ import main
from launch.bench.harness.gpu_checks import checks
from launch.bench.harness.gpu_models import MODELS
from launch.bench.harness.gpu_speed import Ceilings, cut, shrunk, with_shares
from tests.helpers.paths import CHECKPOINTS


def test_without_a_card_it_says_so(capsys):
    assert main(["bench", "gpu"]) == 2
    assert "no GPU: JAX finds CPUs only" in capsys.readouterr().err


def test_an_unknown_model_is_refused(capsys, tmp_path):
    assert main(["bench", "gpu", "--dry-run", "--models", "gpt-9", "--out", str(tmp_path / "r.json")]) == 2
    assert "known are mixtral" in capsys.readouterr().err


def test_every_checkpoint_of_the_tests_is_checked():
    names = [name for name, _ in checks(CHECKPOINTS, None)]
    assert [name for name in names if name.startswith("family")] == [
        f"family {path.name}" for path in sorted(CHECKPOINTS.iterdir())
    ]
    assert names[-3:] == ["bundled model against the CPU", "migration in place", "two processes on the card"]


def test_shares_are_of_the_slower_of_reading_and_computing():
    row = with_shares({"seconds": 2.0, "bytes": 100.0, "operations": 30.0}, Ceilings(copy=100.0, matmul=20.0))
    assert row["of_memory_floor"] == 0.5
    assert row["of_matmul_rate"] == 0.75
    assert row["of_floor"] == 0.75


def test_layers_are_cut_to_what_fits_half_of_a_card():
    assert cut(MODELS["mixtral"], 80 * 10**9, 2, False).num_layers == 4
    assert cut(MODELS["mixtral"], 12 * 10**9, 2, False).num_layers == 2
    assert cut(MODELS["deepseek-v2-lite"], 10**9, 2, False).num_layers == 2  # the dense one and one with experts
    assert all(shrunk(config).num_moe_layers == 1 for config in MODELS.values())


def test_two_processes_serve_the_texts_of_one():
    found = dict(checks(None, jax.devices("cpu")[0]))["two processes on the card"]()
    assert found == {"passed": True, "tokens": 3 * 24}


@pytest.mark.slow
def test_the_dry_run_is_complete(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["bench", "gpu", "--dry-run", "--json", "--out", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["complete"]
    assert all(check["passed"] for check in found["checks"].values())
    assert len(found["speed"]) == len(MODELS) * 2 * 2
    assert not [row for row in found["speed"] if "failed" in row]
