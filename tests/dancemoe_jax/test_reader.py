"""Model directories: what is written comes back, transformers agrees, and every unusable one is one clear line."""

import argparse
import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.reader import ExpertFile, load_model, on_device
from dancemoe_jax.checkpoint.writer import check_replaceable, save_hf
from dancemoe_jax.errors import ModelError
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, Experts, forward
from dancemoe_jax.text.tokenizer import byte_tokenizer
from launch import arguments
from launch.commands import evaluate, generate
from tests.helpers.paths import FIXTURES

FIXTURE = FIXTURES / "qwen3_moe_tiny"
CONFIG = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=4,
    top_k=2,
    expert_size=24,
    max_position=64,
    eos_token=256,
)
GATE = "model.layers.1.mlp.gate.weight"


def make(out: Path, dtype="float32", **changes):
    config = dataclasses.replace(CONFIG, **changes)
    decoder, experts = Decoder(config, nnx.Rngs(0)), Experts(config, nnx.Rngs(1))
    save_hf(out, config, decoder, experts, dtype)
    return config, decoder, experts


@pytest.fixture
def model(tmp_path):
    make(tmp_path / "model")
    return tmp_path / "model"


def refused(path: Path) -> str:
    """The message of the refusal to load, which must come before anything is on a device."""
    before = len(jax.live_arrays())
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert len(jax.live_arrays()) == before
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    config, decoder, experts = make(tmp_path / "model", tie_embeddings=tied)
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    assert jax.tree.structure(loaded.decoder) == jax.tree.structure(decoder)
    jax.tree.map(np.testing.assert_array_equal, loaded.decoder, decoder)
    assert isinstance(loaded.experts.w_in, np.ndarray)
    np.testing.assert_array_equal(loaded.experts.w_in, experts.w_in[...])
    np.testing.assert_array_equal(loaded.experts.w_out, experts.w_out[...])
    jax.tree.map(np.testing.assert_array_equal, on_device(config, loaded.experts), experts)


def test_one_expert_at_a_time(model):
    everything, file = load_model(model).experts, ExpertFile(model)
    for layer, expert in ((0, 0), (1, 3)):
        jax.tree.map(
            lambda one, all_of_them, at=(layer, expert): np.testing.assert_array_equal(one, all_of_them[at]),
            file.read(layer, expert),
            everything,
        )


def test_bfloat16_is_stored_rounded_and_loads_as_asked(tmp_path):
    _, decoder, experts = make(tmp_path / "model", "bfloat16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = np.asarray(experts.w_in[...]).astype(ml_dtypes.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        loaded = load_model(tmp_path / "model", dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded[1:3])} == {np.dtype(dtype)}
        np.testing.assert_array_equal(loaded.experts.w_in, rounded.astype(dtype))
        embedding = np.asarray(decoder.embedding[...]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(loaded.decoder.embedding[...], embedding.astype(dtype))


def with_tokenizer(directory: Path) -> Path:
    shutil.copytree(FIXTURE, directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def test_parity_with_transformers(tmp_path):
    """Weights, sharded with an index, and logits that transformers made (fixtures/make_qwen3_moe.py)."""
    model = load_model(with_tokenizer(tmp_path / "model"))
    stored = np.load(FIXTURE / "logits.npz")
    logits, _ = forward(model.config, model.decoder, on_device(model.config, model.experts), stored["tokens"])
    assert np.abs(logits - stored["logits"]).max() <= 1e-4 * np.abs(stored["logits"]).max()
    np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(stored["logits"], -1))
    # Logits that any model gives would prove nothing.
    assert stored["logits"].std() > 1


def test_saving_what_transformers_saved_gives_its_tensors(tmp_path):
    model = load_model(with_tokenizer(tmp_path / "theirs"))
    save_hf(tmp_path / "ours", model.config, model.decoder, on_device(model.config, model.experts), "float32")
    theirs = {}
    for shard in FIXTURE.glob("*.safetensors"):
        theirs |= load_file(shard)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_byte_tokenizer(model):
    tokenizer = load_model(model).tokenizer
    for text in ("def f(x):\n\treturn  x\r\n", " \x00\x7f é日本語🎉 ", "".join(map(chr, range(300)))):
        assert tokenizer.encode(text).ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.encode("a<|endoftext|>b").ids == [97, 256, 98]
    assert tokenizer.get_vocab_size() == 257
    assert tokenizer.decode([97, 256]) == "a"


def test_replaces_a_model_and_nothing_else(tmp_path, model):
    make(model, dtype="bfloat16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in model.iterdir()) == names
    modes = {(model / name).stat().st_mode for name in names}
    assert len(modes) == 1
    (model / "notes.txt").write_text("mine")
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=re.escape("notes.txt")):
        make(model)
    assert (model / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="not only a model"):
        make(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty")
    check_replaceable(tmp_path / "new")


def test_a_failed_write_leaves_the_old_model_alone(tmp_path, model, monkeypatch):
    before = (model / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("dancemoe_jax.checkpoint.writer.save_file", full)
    with pytest.raises(OSError, match="No space"):
        make(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"vocab_size": 256, "eos_token": None}, {"eos_token": 7}, {"shared_expert_size": 8}]
)
def test_models_that_the_layout_cannot_say_are_not_written(tmp_path, change):
    with pytest.raises(ModelError):
        make(tmp_path / "model", **change)
    assert not list(tmp_path.iterdir())


def test_missing_directory_and_files(tmp_path, model):
    assert "no such file" in refused(tmp_path / "nowhere")
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (model / name).unlink()
        assert f"{name}: no such file" in refused(model)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: damaged or truncated" in refused(model)


def test_missing_misshapen_and_quantised_tensors(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != GATE}, path)
    assert f"{GATE!r} is missing" in refused(model)
    save_file(tensors | {GATE: tensors[GATE].T.copy()}, path)
    assert f"{GATE!r} has shape [32, 4], config.json asks for [4, 32]" in refused(model)
    save_file(tensors | {GATE: tensors[GATE].astype(np.int8)}, path)
    assert f"{GATE!r} is stored as I8" in refused(model)


def test_weights_of_another_configuration(model):
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"num_experts": 5}))
    assert "has shape [4, 32], config.json asks for [5, 32]" in refused(model)
    (model / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": False}))
    assert "'lm_head.weight' is missing" in refused(model)


def test_damaged_or_foreign_tokenizer(model):
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer.json: not a tokenizer" in refused(model)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more", "words"])
    tokenizer.save(str(model / "tokenizer.json"))
    message = refused(model)
    assert "token id 258 has no row" in message
    assert "vocab_size = 257" in message


def test_broken_index_and_missing_shard(tmp_path):
    path = with_tokenizer(tmp_path / "model")
    shard = next(iter(sorted(path.glob("*.safetensors"))))
    shard.unlink()
    assert f"{shard.name}: no such file" in refused(path)
    for text in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (path / "model.safetensors.index.json").write_text(text)
        assert "not an index of shards" in refused(path)


def command(module, *flags):
    parser = argparse.ArgumentParser()
    getattr(arguments, module.__name__.rpartition(".")[2])(parser)
    module.run(parser.parse_args(list(flags)))


def test_generate_command_continues_as_the_dense_model_does(model, capsys):
    command(generate, f"--model={model}", "--prompt=12 + 34 =", "--max-tokens=6", "--json")
    result = json.loads(capsys.readouterr().out)
    loaded, tokens = load_model(model), list(b"12 + 34 =")
    experts = on_device(loaded.config, loaded.experts)
    for token in result["tokens"]:
        assert token == int(np.argmax(forward(loaded.config, loaded.decoder, experts, jnp.array([tokens]))[0][0, -1]))
        tokens.append(token)
    assert result["prompt_tokens"] == 9
    assert 1 <= len(result["tokens"]) <= 6
    assert result["text"] == loaded.tokenizer.decode(result["tokens"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "x" * 64], "--prompt: 64 tokens; the model's context of 64"),
        (["--prompt", ""], "--prompt: 0 tokens"),
        (["--prompt", "x", "--max-tokens", "0"], "--max-tokens 0"),
    ],
)
def test_generate_command_refuses(model, flags, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        command(generate, f"--model={model}", *flags)


def test_evaluate_command_on_an_untrained_model(model, tmp_path, capsys):
    text = "\n\n".join(f"paragraph {i} of no great interest to anybody" for i in range(400))
    for name in ("one", "two"):
        (tmp_path / name).write_text(text)
    flags = [f"--model={model}", "--bytes=1000", f"--domain=one={tmp_path / 'one'}", f"--domain=two={tmp_path / 'two'}"]
    command(evaluate, *flags, "--json")
    result = json.loads(capsys.readouterr().out)
    # The two domains are the same text: nothing may tell them apart, and a random model knows neither.
    assert result["text"]["one"] == result["text"]["two"]
    assert result["text"]["one"]["bits_per_byte"] > 7
    assert result["text"]["one"]["zlib_bits_per_byte"] < 5
    np.testing.assert_allclose(result["routing"]["own"], result["routing"]["others"])
    assert 0.25 < result["routing"]["own"] <= 1
    command(evaluate, *flags)
    assert "zlib -9" in capsys.readouterr().out


def test_an_untrained_model_cannot_add(model):
    loaded = load_model(model)
    domain = evaluate.load_domains(0, train=False)["arithmetic"]
    right, asked = evaluate.sums_right(loaded, on_device(loaded.config, loaded.experts), domain)
    assert asked == len(evaluate.held_out_sums())
    assert right == 0


def test_bundled_model_loads_and_fits_its_size():
    model = load_model(bundled_model())
    assert model.config.num_layers >= 6
    assert model.config.num_experts >= 32
    assert model.config.top_k >= 4
    assert sum(file.stat().st_size for file in bundled_model().iterdir()) <= 12e6
