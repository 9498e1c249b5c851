"""Hugging Face directory to store and back, for every family; interrupted runs, damage, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from dancemoe_jax import ModelError, bundled_model, load_model
from dancemoe_jax.checkpoint.orbax_store import StoreWriter
from dancemoe_jax.checkpoint.reader import ExpertFile, on_device
from dancemoe_jax.model.decoder import forward
from launch.__main__ import main
from tests.helpers.paths import CHECKPOINTS


def assert_same(first: ExpertFile, second: ExpertFile, exact=True):
    compare = np.testing.assert_array_equal if exact else lambda a, b: np.testing.assert_allclose(a, b, atol=0.02)
    jax.tree.map(compare, first.decoder(), second.decoder())
    jax.tree.map(compare, first.read_all(), second.read_all())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3_fp8", "gpt_oss_mxfp4", "qwen2_moe_mixed"])
def test_there_and_back(tmp_path, name, capsys):
    store, back = tmp_path / "store", tmp_path / "back"
    assert main(["convert", str(CHECKPOINTS / name), str(store), "--dtype", "float32"]) == 0
    assert main(["convert", str(store), str(back), "--dtype", "float32", "--shard-size", "100KB"]) == 0
    original = ExpertFile(CHECKPOINTS / name)
    assert_same(original, ExpertFile(store))
    assert_same(original, ExpertFile(back))
    assert len(list(back.glob("*.safetensors"))) > 1
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "store"]
    assert "MB" in capsys.readouterr().out


def test_the_bundled_model_keeps_its_tokenizer_and_its_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(bundled_model()), "store"]) == 0
    assert main(["convert", "store", "back"]) == 0
    first, second, third = (load_model(path) for path in (bundled_model(), tmp_path / "store", tmp_path / "back"))
    for other in (second, third):
        assert other.config == first.config
        jax.tree.map(np.testing.assert_array_equal, first[1:3], other[1:3])
        assert other.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_int8_stores_stay_int8_and_go_back_multiplied_out(tmp_path):
    store, back = tmp_path / "store", tmp_path / "back"
    assert main(["convert", str(CHECKPOINTS / "gpt_oss"), str(store), "--dtype", "float32", "--int8"]) == 0
    assert main(["convert", str(store), str(back), "--dtype", "float32"]) == 0
    assert ExpertFile(store).read(0, 0).w_in.dtype == np.int8
    jax.tree.map(
        np.testing.assert_array_equal,
        ExpertFile(store).read(1, 2),
        ExpertFile(CHECKPOINTS / "gpt_oss", int8=True).read(1, 2),
    )
    assert_same(ExpertFile(CHECKPOINTS / "gpt_oss"), ExpertFile(back), exact=False)
    config, decoder = ExpertFile(store).config, ExpertFile(store).decoder()
    logits = [
        forward(config, decoder, on_device(config, ExpertFile(p).read_all()), np.array([[1, 2, 3]]))[0]
        for p in (store, back)
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_an_interrupted_conversion_goes_on_and_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    store = tmp_path / "store"
    written = []
    original = StoreWriter._save

    def interrupted(self, bundle, leaves):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(bundle)
        original(self, bundle, leaves)

    monkeypatch.setattr(StoreWriter, "_save", interrupted)
    arguments = ["convert", str(CHECKPOINTS / "gpt_oss"), str(store), "--dtype", "float32"]
    assert main(arguments) == 1
    assert not store.exists()
    reads = []
    monkeypatch.setattr(StoreWriter, "_save", original)
    read = ExpertFile.read
    monkeypatch.setattr(ExpertFile, "read", lambda self, *at: reads.append(at) or read(self, *at))
    assert main(arguments) == 0
    monkeypatch.undo()
    assert_same(ExpertFile(CHECKPOINTS / "gpt_oss"), ExpertFile(store))
    assert 0 < len(reads) < ExpertFile(store).config.num_moe_layers * ExpertFile(store).config.num_experts
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_or_missing_expert_is_named(tmp_path):
    store = tmp_path / "store"
    assert main(["convert", str(CHECKPOINTS / "mixtral"), str(store)]) == 0
    bundle = next((store / "experts" / "00001").iterdir())
    for file in sorted((bundle / "state").rglob("*")):
        if file.is_file() and file.stat().st_size > 1000:
            data = bytearray(file.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            file.write_bytes(data)
    with pytest.raises(ModelError, match="of MoE layer 1"):
        ExpertFile(store).read_all()
    shutil.rmtree(bundle)
    with pytest.raises(ModelError, match="of MoE layer 1"):
        ExpertFile(store).read_all()


def test_what_is_refused(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    store = tmp_path / "store"
    assert main(["convert", str(CHECKPOINTS / "mixtral"), str(store)]) == 0
    cases = [
        ([str(CHECKPOINTS / "mixtral"), str(tmp_path / "taken")], "not a model store"),
        ([str(store), str(tmp_path / "taken")], "not empty"),
        ([str(store), str(tmp_path / "new"), "--int8"], "--int8"),
        ([str(store), str(tmp_path / "new"), "--shard-size", "big"], "--shard-size"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "new")], "config.json"),
    ]
    for arguments, words in cases:
        capsys.readouterr()
        assert main(["convert", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()
