"""The Orbax model store: what comes back, what is noticed, and what an interruption leaves."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

import dancemoe_jax.checkpoint.orbax_store
from dancemoe_jax.checkpoint.extents import find_extents, read_extent
from dancemoe_jax.checkpoint.orbax_store import ExpertStore, StoreWriter, is_store
from dancemoe_jax.errors import ModelError

LAYERS, EXPERTS, HIDDEN, INNER = 2, 5, 32, 24
RECIPE = {"source": "here"}


@pytest.fixture(autouse=True)
def small_bundles(monkeypatch):
    """Two experts to a checkpoint, so that a layer needs several."""
    monkeypatch.setattr(dancemoe_jax.checkpoint.orbax_store, "BUNDLE", 10_000)


@pytest.fixture(params=["biases", "weights only"])
def model(rng, request):
    """Decoder tensors and experts of a tiny model. Its biases are so small that they do not lie in a file by themselves."""

    def normal(*shape):
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    decoder = {"model.embed.weight": normal(30, HIDDEN), "a.norm": rng.standard_normal(HIDDEN), "a/b": normal(100, 60)}
    experts = [
        [
            {"w_in": normal(2 * INNER, HIDDEN), "w_out": normal(HIDDEN, INNER)}
            | ({"b_in": normal(2 * INNER)} if request.param == "biases" else {})
            for _ in range(5)
        ]
        for _ in range(LAYERS)
    ]
    return decoder, experts


def write(path, model, stop_at=None, recipe=RECIPE):
    """Write the model; returns which experts were asked for, after an interruption at `stop_at` at the latest."""
    decoder, experts = model
    asked = []

    def read(layer, expert):
        if (layer, expert) == stop_at:
            raise KeyboardInterrupt
        asked.append((layer, expert))
        return experts[layer][expert]

    writer = StoreWriter(path, recipe)
    try:
        writer.write_decoder({name: array.nbytes for name, array in decoder.items()}, decoder.__getitem__)
        for layer in range(LAYERS):
            writer.write_layer(layer, EXPERTS, 5000, lambda expert, layer=layer: read(layer, expert))
        writer.finish({"model_type": "tiny"})
    except KeyboardInterrupt:
        assert stop_at is not None
    return asked


def same(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].tobytes() == right[k].tobytes() for k in left
    )


def test_everything_comes_back_bit_by_bit(tmp_path, model):
    write(tmp_path / "store", model)
    decoder, experts = model
    store = ExpertStore(tmp_path / "store")
    assert store.config_fields == {"model_type": "tiny"}
    assert (store.num_layers, store.num_experts) == (LAYERS, EXPERTS)
    assert store.expert_arrays()["w_in"] == ((2 * INNER, HIDDEN), np.dtype(ml_dtypes.bfloat16))
    assert same(store.decoder_tensors(), decoder)
    assert store.decoder.shape("a/b") == (100, 60)
    np.testing.assert_array_equal(store.decoder.read("a/b", slice(1, 3), np.float32), decoder["a/b"][1:3].astype("f4"))
    grid = list(np.ndindex(LAYERS, EXPERTS))
    with ThreadPoolExecutor(4) as threads:
        for (layer, expert), read in zip(grid, threads.map(lambda at: store.read(*at), grid), strict=True):
            assert same(read, experts[layer][expert])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    assert not (tmp_path / "store" / "recipe.json").exists()


@pytest.mark.parametrize("model", ["weights only"], indirect=True)
def test_experts_are_read_from_where_they_lie(tmp_path, model, monkeypatch):
    write(tmp_path / "store", model)
    store = ExpertStore(tmp_path / "store")
    monkeypatch.setattr(dancemoe_jax.checkpoint.orbax_store.ts, "open", None)
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        assert same(store.read(layer, expert), model[1][layer][expert])


@pytest.mark.parametrize("model", ["biases"], indirect=True)
def test_an_expert_that_lies_there_in_part_is_read_once(tmp_path, model, monkeypatch):
    write(tmp_path / "store", model)
    read = []
    monkeypatch.setattr(dancemoe_jax.checkpoint.orbax_store, "read_extent", lambda *at: read.append(at))
    assert same(ExpertStore(tmp_path / "store").read(1, 3), model[1][1][3])
    assert not read


@pytest.mark.parametrize("compressed", [False, True])
def test_what_orbax_compresses_lies_nowhere(tmp_path, rng, compressed):
    tree = {"a": rng.standard_normal((64, 32)), "zero": np.zeros((64, 32)), "tiny": np.ones(3)}
    context = ocp.Context()
    context.array.saving.use_compression = compressed
    with context:
        ocp.save(str(tmp_path / "x"), tree)
    extents = find_extents(tmp_path / "x" / "state")
    assert set(extents) == (set() if compressed else {"a", "zero"})
    for name, extent in extents.items():
        np.testing.assert_array_equal(read_extent(extent, (64, 32), np.dtype("f8")), tree[name])


@pytest.mark.parametrize(
    ("chunk", "codecs", "lies"),
    [
        ([64, 32], [{"name": "bytes", "configuration": {"endian": "little"}}], True),
        ([64, 16], [{"name": "bytes", "configuration": {"endian": "little"}}], False),
        ([64, 32], [{"name": "bytes", "configuration": {"endian": "big"}}], False),
        ([64, 32], [{"name": "transpose", "configuration": {"order": [1, 0]}}, {"name": "bytes"}], False),
    ],
)
def test_what_is_stored_in_another_way_lies_nowhere(tmp_path, rng, chunk, codecs, lies):
    array = rng.standard_normal((64, 32))
    metadata = {"shape": [64, 32], "data_type": "float64", "codecs": codecs}
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    kvstore = {
        "driver": "ocdbt",
        "base": f"file://{tmp_path}/",
        "path": "a/",
        "config": {"max_inline_value_bytes": 1024},
    }
    stored = ts.open({"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}, create=True).result()
    stored.write(array).result()
    extents = find_extents(tmp_path)
    assert set(extents) == ({"a"} if lies else set())
    if lies:
        np.testing.assert_array_equal(read_extent(extents["a"], (64, 32), np.dtype("f8")), array)


def test_checkpoints_are_orbax_checkpoints(tmp_path, model):
    """Anyone can load them with Orbax, and one expert of several through a partial target."""
    write(tmp_path / "store", model)
    decoder, experts = model
    directory = tmp_path / "store" / "experts" / "00001" / "00002"
    loaded = ocp.load(str(directory))
    assert loaded.keys() == {"00002", "00003"}
    assert same(loaded["00003"], experts[1][3])
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        part = ocp.load(str(directory), {"00002": {k: np.empty_like(v) for k, v in experts[1][2].items()}})
    assert part.keys() == {"00002"}
    assert same(part["00002"], experts[1][2])
    assert "a.norm" in ocp.load(str(tmp_path / "store" / "decoder" / "00000"))


def data_files(directory):
    files = [f for f in directory.rglob("d/*") if f.is_file()]
    assert files
    return files


def flip(directory, needle):
    """Change one bit inside stored data."""
    for file in data_files(directory):
        content = bytearray(file.read_bytes())
        at = content.find(needle)
        if at >= 0:
            content[at + 1] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError("bytes not found")


def test_a_flipped_bit_is_noticed_and_named(tmp_path, model):
    write(tmp_path / "store", model)
    decoder, experts = model
    flip(tmp_path / "store" / "experts" / "00001", experts[1][4]["w_out"].tobytes())
    flip(tmp_path / "store" / "decoder", decoder["a/b"].tobytes())
    store = ExpertStore(tmp_path / "store")
    assert same(store.read(1, 3), experts[1][3])
    with pytest.raises(ModelError, match="expert 4 of MoE layer 1 is damaged"):
        store.read(1, 4)
    with pytest.raises(ModelError, match="tensor 'a/b' is damaged"):
        store.decoder_tensors()


@pytest.mark.parametrize("damage", [os.unlink, lambda file: os.truncate(file, 10)])
def test_lost_bytes_are_named(tmp_path, model, damage):
    write(tmp_path / "store", model)
    for file in data_files(tmp_path / "store" / "experts" / "00000" / "00002"):
        damage(file)
    store = ExpertStore(tmp_path / "store")
    store.read(0, 1)
    with pytest.raises(ModelError, match="expert 3 of MoE layer 0 cannot be read") as error:
        store.read(0, 3)
    assert "\n" not in str(error.value)


def test_a_missing_expert_is_named(tmp_path, model):
    write(tmp_path / "store", model)
    directory = tmp_path / "store" / "experts" / "00001"
    (directory / "00004").rename(directory / "elsewhere")
    with pytest.raises(ModelError, match=r"expert 4 of MoE layer 1 cannot be read .*no such checkpoint"):
        ExpertStore(tmp_path / "store").read(1, 4)


def test_an_interrupted_write_goes_on_where_it_stopped(tmp_path, model):
    path = tmp_path / "store"
    assert (1, 2) in write(path, model, stop_at=(1, 3))
    assert not path.exists()
    assert write(path, model) == [(1, 2), (1, 3), (1, 4)]  # the checkpoint that was under way, and what follows
    store = ExpertStore(path)
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        assert same(store.read(layer, expert), model[1][layer][expert])


def test_an_unfinished_store_of_something_else_is_discarded(tmp_path, model):
    write(tmp_path / "store", model, stop_at=(1, 3))
    assert len(write(tmp_path / "store", model, recipe={"source": "elsewhere"})) == LAYERS * EXPERTS


def test_a_torn_checkpoint_does_not_count_as_written(tmp_path, model):
    write(tmp_path / "store", model, stop_at=(0, 2))
    torn = tmp_path / ".store.unfinished" / "experts" / "00000" / "00002.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "junk").touch()
    assert write(tmp_path / "store", model)[0] == (0, 2)
    assert not list((tmp_path / "store").rglob("*tmp*"))


def test_a_store_replaces_a_store_and_nothing_else(tmp_path, model, rng):
    path = tmp_path / "store"
    write(path, model)
    other = (model[0], [[{k: -v for k, v in e.items()} for e in layer] for layer in model[1]])
    write(path, other, recipe={"source": "other"})
    assert same(ExpertStore(path).read(0, 0), other[1][0][0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert not is_store(tmp_path / "mine")
    with pytest.raises(ModelError, match="not a model store"):
        StoreWriter(tmp_path / "mine", RECIPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": "dancemoe.model/9"}, "format is 'dancemoe.model/9'"),
        (lambda m: {k: v for k, v in m.items() if k != "experts"}, "not a store's contents"),
        (lambda m: m | {"experts": []}, "not a store's contents"),
    ],
)
def test_an_unusable_manifest_is_one_line(tmp_path, model, change, message):
    write(tmp_path / "store", model)
    file = tmp_path / "store" / "model.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ModelError, match=message):
        ExpertStore(tmp_path / "store")


def test_a_directory_without_manifest_is_no_store(tmp_path):
    with pytest.raises(ModelError, match=r"model\.json: no such file"):
        ExpertStore(tmp_path)
