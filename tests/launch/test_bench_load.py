"""`python -m launch bench load`, with a checkpoint of a few megabytes and, slowly, at its real size."""

import json

import pytest

from dancemoe_jax.checkpoint.reader import ExpertFile
from launch.__main__ import main
from launch.bench import load as bench


def test_the_made_checkpoint_is_a_model_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHARD_BYTES", 2**20)
    config = bench.MODEL.__class__(
        vocab_size=300,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        num_experts=8,
        top_k=2,
        expert_size=96,
        tie_embeddings=False,
    )
    size = bench.write_checkpoint(tmp_path, config)
    parameters = config.other_params + 2 * 8 * config.expert_params
    assert size == 2 * parameters
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + size // 2**20
    file = ExpertFile(tmp_path)
    assert file.config == config
    assert file.read(1, 7).w_in.shape == (192, 64)


def test_unusable_flags(tmp_path, capsys):
    assert main(["bench", "load", "--repeats", "0"]) == 2
    assert main(["bench", "load", "--folder", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_loading_keeps_its_promises(tmp_path, capsys):
    assert main(["bench", "load", "--folder", str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["checkpoint_bytes"] > 2e9
    assert figures["kept_bytes"] < figures["peak_bytes"] <= figures["allowed_bytes"]
    assert figures["speed_ratio"] >= 0.7
    assert not list(tmp_path.iterdir())
