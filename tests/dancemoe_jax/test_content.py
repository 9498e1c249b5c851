"""What a checkpoint holds: numbers that are none, tensors that nothing uses, and content that changes under a server."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dancemoe_jax import ModelError, bundled_model
from dancemoe_jax.checkpoint.families import config_from_fields
from dancemoe_jax.checkpoint.fingerprint import model_fingerprint
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.checkpoint.tensor_files import TensorFiles
from dancemoe_jax.text.tokenizer import byte_tokenizer
from launch.__main__ import main
from tests.helpers.paths import FIXTURES

FAMILIES = FIXTURES / "families"
ROUTER = "model.layers.0.mlp.gate.weight"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    """A small Qwen3-MoE as float32, and a function that changes its tensors."""
    shutil.copytree(FAMILIES / "qwen3_moe", tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    files = TensorFiles(tmp_path / "model")
    tensors = {name: files.read(name, dtype=np.float32) for name in files.names()}

    def change(extra=None, **fields_changed):
        (tmp_path / "model" / "config.json").write_text(json.dumps(fields | fields_changed))
        save_file(tensors | (extra or {}), tmp_path / "model" / "model.safetensors")
        return tmp_path / "model"

    change.tensors = tensors
    change()
    return change


def spoilt(array, value, at=-1):
    array = array.copy()
    array.reshape(-1)[at] = value
    return array


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [ROUTER, UP, "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_weights_that_are_no_numbers_are_named(model, name, value):
    path = model({name: spoilt(model.tensors[name], value)})
    with pytest.raises(ModelError, match=f"{name}' holds NaN or infinity") as error:
        file = ExpertFile(path)
        file.decoder()
        file.read_all()
    assert str(path) in str(error.value)


def test_bfloat16_infinity_is_found_too(model):
    path = model({UP: spoilt(model.tensors[UP], np.inf).astype(ml_dtypes.bfloat16)})
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        ExpertFile(path, ml_dtypes.bfloat16).read(1, 3)


def test_weights_too_large_for_the_type_that_is_asked_for(model):
    path = model({UP: spoilt(model.tensors[UP], 1e6)})
    ExpertFile(path).read(1, 3)
    ExpertFile(path, ml_dtypes.bfloat16).read(1, 3)
    with pytest.raises(ModelError, match="too large for float16; load it with --dtype bfloat16 or float32"):
        ExpertFile(path, np.float16).read(1, 3)


def test_a_store_is_not_made_of_weights_that_are_no_numbers(model, tmp_path, capsys):
    path = model({ROUTER: spoilt(model.tensors[ROUTER], np.nan)})
    assert main(["convert", str(path), str(tmp_path / "store")]) == 2
    assert "holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def extra_tensors(tensors):
    """By what they are: tensors that the configuration or the family has no place for."""
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    return {
        "biases": {"model.layers.1.self_attn.q_proj.bias": np.ones(len(q), np.float32)},
        "head bias": {"lm_head.bias": np.ones(64, np.float32)},
        "shared expert": {"model.layers.0.mlp.shared_expert.up_proj.weight": np.ones((16, 32), np.float32)},
        "another expert": {UP.replace("experts.3", "experts.8"): tensors[UP]},
        "adapter": {"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 32), np.float32)},
        "another layer": {"model.layers.2.input_layernorm.weight": np.ones(32, np.float32)},
    }


@pytest.mark.parametrize("what", ["biases", "head bias", "shared expert", "another expert", "adapter", "another layer"])
def test_tensors_that_would_not_be_used_are_refused(model, what):
    extra = extra_tensors(model.tensors)[what]
    with pytest.raises(ModelError, match="would not be used") as error:
        ExpertFile(model(extra))
    assert next(iter(extra)) in str(error.value)
    assert "\n" not in str(error.value)


def test_spare_tensors_may_be_there(model):
    spare = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.layers.0.self_attn.k_scale": np.ones(1, np.float32),
        "model.layers.0.self_attn.k_proj.input_scale": np.ones(1, np.float32),
    }
    ExpertFile(model(spare))
    path = FAMILIES / "deepseek_v3"
    tensors = load_file(path / "model.safetensors")
    layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    next_token = {f"model.layers.{layers}.embed_tokens.weight": np.ones((2, 2), np.float32)}
    copied = model() / ".." / "v3"
    shutil.copytree(path, copied)
    save_file(tensors | next_token, copied / "model.safetensors")
    ExpertFile(copied)


def test_a_file_replaced_under_a_server_is_noticed(model):
    path = model()
    file = ExpertFile(path)
    before = file.read(1, 3)
    other = {UP: model.tensors[UP] + 1}
    model(other)
    os.utime(path / "model.safetensors", ns=(10**18, 10**18))
    with pytest.raises(ModelError, match="changed since it was opened") as error:
        file.read(1, 3)
    assert "model.safetensors" in str(error.value)
    assert not np.array_equal(ExpertFile(path).read(1, 3).w_in, before.w_in)


def test_a_file_that_was_only_touched_or_copied_is_read_on(model):
    path = model()
    weights = path / "model.safetensors"
    file, strict = ExpertFile(path, fingerprint=model_fingerprint(path)), ExpertFile(path)
    before = file.read(1, 3)
    os.utime(weights, ns=(10**18, 10**18))
    assert np.array_equal(file.read(1, 3).w_in, before.w_in)
    shutil.copy(weights, path / "copy")
    os.replace(path / "copy", weights)
    assert np.array_equal(file.read(1, 3).w_in, before.w_in)
    with pytest.raises(ModelError, match="changed since it was opened"):
        strict.read(1, 3)
    model({UP: model.tensors[UP] + 1})
    os.utime(weights, ns=(10**18, 10**18))
    with pytest.raises(ModelError, match="changed since it was opened"):
        file.read(1, 3)


def test_fingerprints_tell_models_apart_by_one_byte_anywhere(model, tmp_path):
    path = shutil.copytree(bundled_model(), tmp_path / "bundled")
    before = model_fingerprint(path)
    assert model_fingerprint(bundled_model()) == before
    size = (path / "model.safetensors").stat().st_size
    for at in (size // 3, 6_000_000, size - 1):
        with (path / "model.safetensors").open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            assert model_fingerprint(path) != before
            file.seek(at)
            file.write(byte)
        assert model_fingerprint(path) == before
    for name in ("tokenizer.json", "config.json"):
        text = (path / name).read_text()
        (path / name).write_text(text + " ")
        assert model_fingerprint(path) != before
        (path / name).write_text(text)
    with pytest.raises(ModelError, match="no such file"):
        model_fingerprint(tmp_path / "absent")


def test_fingerprints_of_large_models_read_a_part_of_every_tensor(tmp_path, rng):
    tensors = {f"t{n}": rng.integers(0, 255, 100_000).astype(np.uint8) for n in range(5)} | {"s": np.zeros(3, np.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = model_fingerprint(tmp_path, whole=2**14)
    for name in tensors:
        for at in (0, -1):
            save_file(
                tensors | {name: spoilt(tensors[name], tensors[name][at] ^ 1, at)}, tmp_path / "model.safetensors"
            )
            assert model_fingerprint(tmp_path, whole=2**14) != before, (name, at)


def test_kimi_k2_is_deepseek_v3_by_another_name():
    fields = json.loads((FAMILIES / "deepseek_v3" / "config.json").read_text())
    assert config_from_fields(fields | {"model_type": "kimi_k2"}, "x") == config_from_fields(fields, "x")


def test_yarn_stretches_the_context_though_max_position_embeddings_stays():
    fields = json.loads((FAMILIES / "qwen3_moe" / "config.json").read_text()) | {"max_position_embeddings": 40960}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert config_from_fields(fields | {"rope_scaling": yarn}, "x").max_position == 131072
    assert config_from_fields(fields, "x").max_position == 40960


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": ["mixtral"]},
        {"num_hidden_layers": 2**31},
        {"vocab_size": 10**400},
        {"rope_scaling": {"rope_theta": "x" * 10**5}},
    ],
)
def test_absurd_fields_are_one_line(change):
    fields = json.loads((FAMILIES / "qwen3_moe" / "config.json").read_text())
    with pytest.raises(ModelError) as error:
        config_from_fields(fields | change, "x")
    assert len(str(error.value)) < 1100
