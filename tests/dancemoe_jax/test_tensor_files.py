"""Tensors of Hugging Face directories: what opening refuses, what reading gives, and block-scaled encodings."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dancemoe_jax.checkpoint.shard import Shard
from dancemoe_jax.checkpoint.tensor_files import DTYPES, INDEX, TensorFiles
from dancemoe_jax.errors import ModelError

FLOAT8 = ml_dtypes.float8_e4m3fn


def save_shards(path, *shards):
    """Shards and their index."""
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, path / name)
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [path / name for name in names]


@pytest.mark.parametrize("kind", [k for k in DTYPES if not k.startswith("F8")])
def test_reads_every_plain_type_as_stored(tmp_path, rng, kind):
    array = rng.integers(0, 2, (5, 3, 2)).astype(DTYPES[kind])
    save_file({"a": array, "b": array[0]}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert files.kind("a") == kind
    assert files.shape("a") == (5, 3, 2)
    for index in (None, 2, -1, slice(1, 3), slice(3, None), slice(4, 1)):
        read = files.read("a", index)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array if index is None else array[index])
    np.testing.assert_array_equal(files.read("b", dtype=np.float32), array[0].astype(np.float32))


def test_scalars_and_empty_tensors(tmp_path):
    save_file({"scalar": np.array(3.0), "empty": np.zeros((0, 4), np.float32)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert files.read("scalar") == 3.0
    assert files.read("empty").shape == (0, 4)


def test_shards_are_one_set_of_names(tmp_path):
    save_shards(tmp_path, {"a": np.arange(3)}, {"b": np.arange(4), "c": np.arange(5)})
    files = TensorFiles(tmp_path)
    assert sorted(files.names()) == ["a", "b", "c"]
    assert "c" in files
    assert "d" not in files
    np.testing.assert_array_equal(files.read("c"), np.arange(5))
    with pytest.raises(ModelError, match="tensor 'd' is missing"):
        files.read("d")


def test_shards_are_read_by_their_headers_where_the_index_is_missing(tmp_path):
    shards = save_shards(tmp_path, {"a": np.arange(3)}, {"b": np.arange(4), "c": np.arange(5)})
    (tmp_path / INDEX).unlink()
    files = TensorFiles(tmp_path)
    assert sorted(files.names()) == ["a", "b", "c"]
    np.testing.assert_array_equal(files.read("c"), np.arange(5))
    save_file({"a": np.arange(9)}, shards[1])
    with pytest.raises(
        ModelError, match=r"'a' is in another shard too, and model\.safetensors\.index\.json, .* is missing"
    ):
        TensorFiles(tmp_path)
    shards[0].unlink()
    with pytest.raises(ModelError, match=r"index\.json is missing and so is model-00001-of-00002\.safetensors"):
        TensorFiles(tmp_path)


def drop_a_shard(shards):
    shards[1].unlink()


def truncate(shards):
    shards[1].write_bytes(shards[1].read_bytes()[:-8])


def spoil_the_header(shards):
    shards[1].write_bytes(shards[1].read_bytes().replace(b'"dtype"', b'"dtypo"'))


def swap_shards(shards):
    contents = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, reversed(contents), strict=True):
        shard.write_bytes(content)


def point_outside(shards):
    index = shards[0].parent / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[1].name, "../other.safetensors"))


def empty_index(shards):
    (shards[0].parent / "model.safetensors.index.json").write_text('{"weight_map": {}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_shard, "model-00002-of-00002.safetensors: no such file"),
        (truncate, "model-00002-of-00002.safetensors: damaged or truncated"),
        (spoil_the_header, "model-00002-of-00002.safetensors: damaged or truncated"),
        (swap_shards, "model-00001-of-00002.safetensors: tensor 'a' is missing"),
        (point_outside, "not an index of shards"),
        (empty_index, "not an index of shards"),
    ],
)
def test_opening_refuses(tmp_path, damage, message):
    damage(save_shards(tmp_path, {"a": np.arange(3)}, {"b": np.arange(4)}))
    with pytest.raises(ModelError, match=message) as error:
        TensorFiles(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_after_opening_is_named(tmp_path):
    save_file({"a": np.arange(300)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    truncate([None, tmp_path / "model.safetensors"])
    with pytest.raises(ModelError, match="changed since it was opened"):
        files.read("a")


def dequantised(values, scales, block):
    """Element by element, as the encoding is defined."""
    out = np.empty(values.shape, np.float32)
    for r, c in np.ndindex(values.shape):
        out[r, c] = np.float32(values[r, c]) * scales[r // block[0], c // block[1]]
    return out


@pytest.mark.parametrize("kind", [FLOAT8, ml_dtypes.float8_e5m2])
def test_float8_blocks_need_not_divide_the_matrix(tmp_path, rng, kind):
    block = (4, 8)
    values = rng.standard_normal((11, 19)).astype(kind)
    scales = rng.uniform(0.5, 2, (3, 3)).astype(np.float32)
    save_file({"w": values, "w_scale_inv": scales, "other": np.arange(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": block}}))
    files = TensorFiles(tmp_path)
    assert sorted(files.names()) == ["other", "w"]
    expected = dequantised(values, scales, block)
    np.testing.assert_array_equal(files.read("w"), expected)
    for index in (5, slice(3, 9), slice(4, 8), slice(9, None), slice(2, 2)):
        np.testing.assert_array_equal(files.read("w", index), expected[index])
    assert files.read("w", dtype=ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16


def test_float8_default_block_and_stacked_experts(tmp_path, rng):
    values = rng.standard_normal((2, 130, 129)).astype(FLOAT8)
    scales = rng.uniform(0.5, 2, (2, 2, 2)).astype(np.float32)
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    expected = np.stack([dequantised(v, s, (128, 128)) for v, s in zip(values, scales, strict=True)])
    np.testing.assert_array_equal(files.read("w"), expected)
    np.testing.assert_array_equal(files.read("w", 1), expected[1])


@pytest.mark.parametrize("scales", [None, np.ones((2, 3), np.float32), np.ones((3, 3), np.int32)])
def test_float8_without_fitting_scales_is_refused(tmp_path, scales):
    tensors = {"w": np.zeros((300, 300), FLOAT8)} | ({} if scales is None else {"w_scale_inv": scales})
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="float8 tensor 'w'"):
        TensorFiles(tmp_path)


def decoded_mxfp4(blocks, scales):
    """Value by value, as the encoding is defined: sign, exponent and mantissa of a nibble times a power of two."""
    experts, outputs, groups, packed = blocks.shape
    out = np.empty((experts, groups * packed * 2, outputs), np.float32)
    for e, o, g, b in np.ndindex(blocks.shape):
        for half in range(2):
            nibble = int(blocks[e, o, g, b]) >> (4 * half) & 15
            exponent, mantissa = nibble >> 1 & 3, nibble & 1
            size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
            value = (-size if nibble & 8 else size) * 2.0 ** (int(scales[e, o, g]) - 127)
            out[e, g * packed * 2 + 2 * b + half, o] = value
    return out


def test_mxfp4_comes_in_the_unquantised_layout(tmp_path, rng):
    blocks = rng.integers(0, 256, (3, 130, 2, 16), np.uint8)
    scales = rng.integers(100, 150, (3, 130, 2), np.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales, "w_bias": np.zeros(3)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert sorted(files.names()) == ["w", "w_bias"]
    assert files.kind("w") == "MXFP4"
    assert files.shape("w") == (3, 64, 130)
    expected = decoded_mxfp4(blocks, scales)
    np.testing.assert_array_equal(files.read("w"), expected)
    np.testing.assert_array_equal(files.read("w", 2), expected[2])
    np.testing.assert_array_equal(files.read("w", slice(1, 3)), expected[1:])
    assert files.read("w", 0, dtype="bfloat16").dtype == ml_dtypes.bfloat16


def test_mxfp4_scale_limits(tmp_path):
    blocks = np.full((1, 1, 3, 16), 0x22, np.uint8)  # all ones
    scales = np.array([[[0, 254, 255]]], np.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    low, high, invalid = np.split(TensorFiles(tmp_path).read("w")[0, :, 0], 3)
    assert (low == np.float32(2.0**-127)).all()
    assert (high == np.float32(2.0**127)).all()
    assert np.isnan(invalid).all()


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [((1, 4, 2, 8), (1, 4, 2)), ((1, 4, 2, 16), (1, 4, 1)), ((4, 2, 16), (4, 2))],
)
def test_mxfp4_of_another_shape_is_refused(tmp_path, blocks, scales):
    tensors = {"w_blocks": np.zeros(blocks, np.uint8), "w_scales": np.zeros(scales, np.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="'w_blocks' is U8"):
        TensorFiles(tmp_path)


def test_one_expert_costs_its_own_bytes(tmp_path, monkeypatch):
    """Only the expert's part of a stacked tensor is read."""
    read, original = [], Shard.read_into
    monkeypatch.setattr(Shard, "read_into", lambda s, o, array: (read.append(array.nbytes), original(s, o, array)))
    plain = np.zeros((8, 32, 32), np.float32)
    quantized = {"q_blocks": np.zeros((8, 32, 1, 16), np.uint8), "q_scales": np.zeros((8, 32, 1), np.uint8)}
    save_file({"w": plain, **quantized}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert not read
    files.read("w", 3)
    assert sum(read) == 4096
    files.read("q", 3)
    assert sum(read) == 4096 + 512 + 32
