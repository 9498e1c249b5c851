"""Every family's small checkpoints against transformers' logits: the dense model, and served over devices."""

import json
import shutil

import jax
import numpy as np
import pytest

from dancemoe_jax import (
    ModelError,
    Weights,
    assign_slots,
    bundled_model,
    decode_step,
    fill_pool,
    generate,
    init_state,
    load_model,
    make_mesh,
    place_decoder,
    place_tables,
    pool_layout,
    prefill,
    routing_tables,
)
from dancemoe_jax.checkpoint.families import FAMILIES, read_config
from dancemoe_jax.checkpoint.reader import ExpertFile, on_device
from dancemoe_jax.checkpoint.tensor_files import TensorFiles
from dancemoe_jax.checkpoint.writer import stored_tensors
from dancemoe_jax.model.decoder import forward
from placement.__main__ import main as placement_main
from tests.helpers.cluster_of_devices import DEVICE_SERVER, random_resident
from tests.helpers.paths import CHECKPOINTS

NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
PROMPT, TOTAL = 24, 40
TOLERANCE = 1e-4


def reference(name):
    """transformers' tokens [2, 40] and float32 logits [2, 40, vocab]."""
    with np.load(CHECKPOINTS / name / "logits.npz", allow_pickle=False) as stored:
        return stored["tokens"], stored["logits"]


def assert_equal(logits, expected):
    assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_every_family_has_several_checkpoints():
    kinds = [read_config(CHECKPOINTS / name).family for name in NAMES]
    assert set(kinds) == set(FAMILIES)
    assert all(kinds.count(kind) > 1 for kind in FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_dense_logits_are_those_of_transformers(name):
    file = ExpertFile(CHECKPOINTS / name)
    decoder, experts = file.decoder(), file.read_all()
    tokens, expected = reference(name)
    logits, _ = forward(file.config, decoder, on_device(file.config, experts), tokens)
    assert_equal(np.asarray(logits), expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder)) == file.config.other_params
    assert sum(leaf.size for leaf in jax.tree.leaves(file.read(0, 0))) == file.config.expert_params


@pytest.mark.parametrize("name", NAMES)
def test_served_logits_are_those_of_transformers_under_random_placements(name):
    file = ExpertFile(CHECKPOINTS / name)
    config, mesh = file.config, make_mesh(jax.devices()[:4])
    copies = config.num_moe_layers * config.num_experts
    capacity = tuple(max(1, round(share * copies)) for share in (0.2, 0.3, 0.4, 0.5))
    layout = pool_layout(capacity, DEVICE_SERVER)
    shapes = {"config": config, "layout": layout, "mesh": mesh}
    tokens, expected = reference(name)
    decoder = place_decoder(file.decoder(), mesh)
    # Both sequences on each device: four times the same answer, from four different homes.
    everywhere = np.broadcast_to(tokens, (4, *tokens.shape))
    for seed in range(2):
        slots = assign_slots(layout, random_resident(np.random.default_rng(seed), capacity, config))
        tables = place_tables(routing_tables(layout, slots), mesh)
        weights = Weights(decoder, fill_pool(mesh, layout, slots, file.read), tables)
        state, grid = init_state(config, mesh, 2), np.zeros((4, 2), np.int32)
        for start in range(0, PROMPT, 12):
            chunk = everywhere[:, :, start : start + 12]
            sequences = np.broadcast_to(np.arange(2, dtype=np.int32), grid.shape)
            state, result = prefill(
                weights, state, chunk, sequences, grid + start, grid + 12, **shapes, all_logits=True
            )
            assert_equal(
                np.asarray(result.logits), np.broadcast_to(expected[:, start : start + 12], result.logits.shape)
            )
        for position in range(PROMPT, TOTAL):
            state, result = decode_step(
                weights, state, everywhere[:, :, position], grid + position, np.ones(grid.shape, bool), **shapes
            )
            assert_equal(np.asarray(result.logits), np.broadcast_to(expected[:, position], result.logits.shape))
        assert np.asarray(state.counts).sum() == 4 * 2 * TOTAL * config.num_moe_layers * config.top_k


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_written_as_they_were_read(name):
    file, original = ExpertFile(CHECKPOINTS / name), TensorFiles(CHECKPOINTS / name)
    written = dict(stored_tensors(file.config, file.decoder(), file.read, np.float32))
    ignored = f"model.layers.{file.config.num_layers}."  # DeepSeek-V3's extra layer for training
    assert set(written) == {tensor for tensor in original.names() if not tensor.startswith(ignored)}
    for tensor, array in written.items():
        np.testing.assert_array_equal(array, original.read(tensor).astype(np.float32), err_msg=tensor)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_int8_experts_are_close_and_half_the_size(name):
    plain, rounded = ExpertFile(CHECKPOINTS / name), ExpertFile(CHECKPOINTS / name, int8=True)
    config = plain.config
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(rounded.read(0, 0)))
    assert size == config.expert_bytes(4, int8=True)
    tokens, expected = reference(name)
    mesh, layout = make_mesh(jax.devices()[:1]), pool_layout([config.num_moe_layers * config.num_experts])
    slots = assign_slots(layout, np.ones((1, config.num_moe_layers, config.num_experts), bool))
    tables = place_tables(routing_tables(layout, slots), mesh)
    weights = Weights(plain.decoder(), fill_pool(mesh, layout, slots, rounded.read), tables)
    rows = np.arange(2, dtype=np.int32)[None]
    _, result = prefill(
        weights,
        init_state(config, mesh, 2),
        tokens[None],
        rows,
        0 * rows,
        0 * rows + TOTAL,
        config=config,
        layout=layout,
        mesh=mesh,
        all_logits=True,
    )
    error = np.abs(np.asarray(result.logits)[0] - expected)
    assert 0 < np.median(error) < 0.02 * expected.std()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mixtral", {"model_type": "dbrx"}, "'dbrx' is not supported; supported: mixtral, deepseek_v2"),
        ("mixtral", {"num_local_experts": 16}, "has shape [6, 32], config.json asks for [16, 32]"),
        ("mixtral", {"intermediate_size": 40}, "config.json asks for"),
        ("deepseek_v2_lite", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ("deepseek_v2_grouped", {"topk_group": 9}, "9 of 4 groups"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_rank = None"),
        ("deepseek_v3", {"rope_scaling": {"type": "longrope"}}, "rope type = 'longrope' is not supported"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' is not supported"),
        ("olmoe", {"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq' are not supported"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path, name, change, words):
    directory = tmp_path / name
    shutil.copytree(CHECKPOINTS / name, directory)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | change))
    before = len(jax.live_arrays())
    with pytest.raises(ModelError) as error:
        ExpertFile(directory)
    assert words in str(error.value)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_planner_counts_the_same_parameters(name, capsys):
    assert placement_main(["model", str(CHECKPOINTS / name / "config.json"), "--json"]) == 0
    sizes, config = json.loads(capsys.readouterr().out), read_config(CHECKPOINTS / name)
    assert sizes["expert_parameters"] == config.expert_params
    assert sizes["other_parameters"] == config.other_params


def test_the_bundled_model_says_what_it_says_in_transformers():
    model = load_model(bundled_model())
    config, mesh = model.config, make_mesh(jax.devices()[:4])
    layout = pool_layout((60, 70, 80, 90), DEVICE_SERVER)
    slots = assign_slots(layout, random_resident(np.random.default_rng(0), layout.capacity, config))
    pool = fill_pool(mesh, layout, slots, lambda layer, e: jax.tree.map(lambda a: a[layer, e], model.experts))
    tables = place_tables(routing_tables(layout, slots), mesh)
    weights = Weights(place_decoder(model.decoder, mesh), pool, tables)
    with np.load(CHECKPOINTS.parent / "bundled.npz", allow_pickle=False) as stored:
        prompts = [stored[f"prompt_{i}"].tolist() for i in range(2)]
        for i, prompt in enumerate(prompts):
            logits = forward(config, model.decoder, on_device(config, model.experts), np.array([prompt]))[0]
            assert_equal(np.asarray(logits)[0], stored[f"logits_{i}"])
        expected = [stored[f"output_{i}"].tolist() for i in range(2)]
    assert generate(weights, prompts, len(expected[0]), config=config, layout=layout, mesh=mesh) == expected
