"""The model's parts: configurations refuse what cannot be, grouped experts equal dense ones, attention looks back only."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dancemoe_jax.checkpoint.families import fields_of, read_config
from dancemoe_jax.errors import ModelError
from dancemoe_jax.kernels.norm import rms_norm_xla, rotated_xla
from dancemoe_jax.model.attention import angles, attend
from dancemoe_jax.model.config import Latent, ModelConfig, Rope, Routing
from dancemoe_jax.model.decoder import Decoder, Experts, forward
from dancemoe_jax.model.experts import ExpertWeights, dense_experts, grouped_experts, swiglu
from dancemoe_jax.model.router import route, router_losses

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=6,
    top_k=2,
    expert_size=16,
    max_position=32,
)


CHANGES = [
    {},
    {"tie_embeddings": False},
    {"shared_expert_size": 24, "shared_expert_gate": True},
    {"qk_norm": ""},
    {"qk_norm": "all", "clip_qkv": 0.5},
    {"qkv_bias": True, "o_bias": True, "expert_bias": True, "swiglu_limit": 1.0},
    {"sinks": True, "windows": (5, 0), "routing": Routing(bias=True)},
    {"latent": Latent(12, 6, 4, 10), "dense_layers": (0,), "dense_size": 40},
    {"latent": Latent(12, 6, 4, 10, 14), "routing": Routing("sigmoid", True, 2.5, 3, 2, True), "num_kv_heads": 4},
]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_layers": 2.0}, "num_layers = 2.0"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"shared_expert_size": -1}, "shared_expert_size = -1"),
        ({"num_kv_heads": 3}, "no multiple of num_kv_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"top_k": 7}, "top_k = 7 exceeds num_experts = 6"),
        ({"rms_eps": float("nan")}, "rms_eps = nan"),
        ({"clip_qkv": -1.0}, "clip_qkv = -1.0"),
        ({"qkv_bias": 1}, "qkv_bias = 1"),
        ({"qk_norm": "each"}, "qk_norm = 'each' is not supported"),
        ({"rope": Rope(theta="big")}, "theta = 'big'"),
        ({"rope": Rope(kind="ntk")}, "rope kind = 'ntk' is not supported"),
        ({"routing": Routing(groups=4)}, "1 of 4 groups"),
        ({"routing": Routing(groups=6, top_groups=1)}, "exceeds the 1 experts of 1 groups"),
        ({"routing": Routing(correction=True, groups=6, top_groups=6)}, "judged by two experts each"),
        ({"dense_layers": (2,), "dense_size": 8}, "dense_layers = [2]"),
        ({"dense_layers": (0, 1), "dense_size": 8}, "some, not all"),
        ({"dense_layers": (0,)}, "dense_size = 0"),
        ({"windows": (4,)}, "one number for each layer"),
        ({"latent": Latent(8, 4, 3, 4)}, "rope_dim = 3 is odd"),
        ({"latent": Latent(0, 4, 4, 4)}, "kv_rank = 0"),
        ({"eos_token": 61}, "eos_token = 61"),
    ],
)
def test_impossible_configurations_are_refused(change, words):
    with pytest.raises(ModelError) as error:
        dataclasses.replace(CONFIG, **change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": False, "eos_token": 7},
        {"routing": Routing(normalize=False), "rope": Rope(theta=1e6)},
        {"dense_layers": (1,), "dense_size": 40, "qkv_bias": True, "o_bias": True},
    ],
)
def test_config_json_round_trip(tmp_path, change):
    config = dataclasses.replace(CONFIG, **change)
    (tmp_path / "config.json").write_text(json.dumps(fields_of(config)))
    assert read_config(tmp_path) == config
    assert read_config(tmp_path / "config.json") == config


def test_config_json_of_other_versions(tmp_path):
    fields = fields_of(CONFIG) | {"eos_token_id": [5, 6], "mlp_only_layers": None}
    fields["num_local_experts"] = fields.pop("num_experts")
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path) == dataclasses.replace(CONFIG, eos_token=5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "'llama' is not supported"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"num_attention_heads": 0, "head_dim": None}, "wrong type or value"),
        ({"attention_bias": 1}, "qkv_bias = 1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope type = 'ntk' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
        ({"rope_scaling": "yarn"}, "rope parameters are 'yarn'"),
        ({"mlp_only_layers": [0, 1]}, "dense_layers = [0, 1]"),
    ],
)
def test_config_json_that_does_not_fit_names_file_and_field(tmp_path, change, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields_of(CONFIG) | change))
    with pytest.raises(ModelError) as error:
        read_config(tmp_path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_config_json_missing_fields_or_not_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ModelError, match="no such file"):
        read_config(path)
    for text, words in (("{", "not readable as JSON"), ("[]", "holds a list, must be a JSON object")):
        path.write_text(text)
        with pytest.raises(ModelError, match=words):
            read_config(path)
    for missing in ("hidden_size", "num_experts", "max_position_embeddings"):
        path.write_text(json.dumps({k: v for k, v in fields_of(CONFIG).items() if k != missing}))
        with pytest.raises(ModelError, match=f"'{missing}' is missing"):
            read_config(path)


def test_layout_has_no_place_for_shared_experts():
    for change in ({"shared_expert_size": 8}, {"qk_norm": ""}, {"sinks": True}):
        with pytest.raises(ModelError, match="qwen3_moe layout"):
            fields_of(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("change", CHANGES)
def test_parameter_counts_are_those_of_the_arrays(change):
    config = dataclasses.replace(CONFIG, **change)
    decoder, experts = Decoder(config, nnx.Rngs(0)), Experts(config, nnx.Rngs(1))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(decoder) == config.other_params
    assert count(experts) == config.num_moe_layers * config.num_experts * config.expert_params


def routed_problem(seed, tokens=40, experts=6, k=2, skewed=False):
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (tokens, 16))
    w_in = jax.random.normal(keys[1], (experts, 24, 16)) * 0.3
    w_out = jax.random.normal(keys[2], (experts, 16, 12)) * 0.3
    logits = jax.random.normal(keys[3], (tokens, experts)) + (10.0 * (jnp.arange(experts) < k)[None] if skewed else 0)
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits), k)
    return x, w_in, w_out, weights, ids, jax.random.normal(keys[4], x.shape)


@pytest.mark.parametrize("tile", [1, 8, 64])
@pytest.mark.parametrize("skewed", [False, True])
def test_grouped_experts_equal_dense_ones_and_so_do_gradients(tile, skewed):
    x, w_in, w_out, weights, ids, direction = routed_problem(3, skewed=skewed)

    def objective(compute):
        return lambda *args: jnp.sum(compute(*args, weights, ids) * direction)

    def grouped(*args):
        return grouped_experts(*args, tile=tile)

    def dense(x, w_in, w_out, weights, ids):
        return dense_experts(x, ExpertWeights(w_in, w_out), weights, ids)

    np.testing.assert_allclose(grouped(x, w_in, w_out, weights, ids), dense(x, w_in, w_out, weights, ids), atol=2e-6)
    expected = jax.grad(objective(dense), argnums=(0, 1, 2))(x, w_in, w_out)
    for ours, theirs in zip(jax.grad(objective(grouped), argnums=(0, 1, 2))(x, w_in, w_out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_dense_experts_are_the_weighted_sum():
    x, w_in, w_out, weights, ids, _ = routed_problem(0, tokens=3)
    for token in range(3):
        parts = [weights[token, j] * swiglu(x[token], w_in[e], w_out[e]) for j, e in enumerate(ids[token])]
        np.testing.assert_allclose(
            dense_experts(x, ExpertWeights(w_in, w_out), weights, ids)[token], sum(parts), atol=1e-6
        )


def test_router_weights():
    h, router = jax.random.normal(jax.random.key(0), (50, 32)), jax.random.normal(jax.random.key(1), (6, 32))
    weights, ids, logits = route(CONFIG, router, h)
    raw, raw_ids, _ = route(dataclasses.replace(CONFIG, routing=Routing(normalize=False)), router, h)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(ids, raw_ids)
    np.testing.assert_allclose(raw, np.sort(jax.nn.softmax(logits))[:, :-3:-1], rtol=1e-6)
    np.testing.assert_allclose(raw / raw.sum(-1, keepdims=True), weights, rtol=1e-6)
    assert raw.sum(-1).max() < 1


def test_balance_loss_is_one_when_even_and_grows_with_skew():
    even = jnp.tile(jnp.eye(6) * 9, (10, 1))
    balance, z = router_losses(even, jnp.argmax(even, -1)[:, None])
    np.testing.assert_allclose(balance, 1, rtol=1e-5)
    np.testing.assert_allclose(z, jax.nn.logsumexp(even[0]) ** 2, rtol=1e-5)
    skewed = jnp.tile(jnp.eye(6)[:1] * 9, (60, 1))
    assert router_losses(skewed, jnp.argmax(skewed, -1)[:, None])[0] > 5


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_distance_only(interleaved):
    rope = Rope(theta=100.0, interleaved=interleaved)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def rotate(x, position):
        return rotated_xla(x, *angles(rope, 8, jnp.array([[position]]), x.dtype), interleaved)

    def score(i, j):
        return jnp.vdot(rotate(q, i), rotate(k, j))

    np.testing.assert_allclose(score(7, 4), score(23, 20), rtol=1e-4)
    assert abs(score(7, 4) - score(7, 5)) > 1e-3
    np.testing.assert_array_equal(rotate(q, 0), q)


def test_attention_of_grouped_queries_is_the_textbook_one():
    q = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 5, 2, 8))
    positions = jnp.arange(5)[None]
    got = attend(q, k, v, positions, positions, 8**-0.5)
    for t in range(5):
        for head in range(4):
            keys, values = k[0, : t + 1, head // 2], v[0, : t + 1, head // 2]
            expected = jax.nn.softmax(keys @ q[0, t, head] / np.sqrt(8)) @ values
            np.testing.assert_allclose(got[0, t, head], expected, atol=1e-5)


def test_rms_norm():
    x = jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(
        rms_norm_xla(x, jnp.array([1.0, 2.0]), 0.0), x / np.sqrt(12.5) * np.array([[1, 2]]), rtol=1e-6
    )


@pytest.mark.parametrize("change", CHANGES)
def test_forward_looks_back_only(change):
    config = dataclasses.replace(CONFIG, **change)
    decoder, experts = Decoder(config, nnx.Rngs(0)), Experts(config, nnx.Rngs(1))
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, config.vocab_size)
    logits, topk_ids = forward(config, decoder, experts, tokens)
    assert logits.shape == (2, 12, config.vocab_size)
    assert topk_ids.shape == (config.num_moe_layers, 24, config.top_k)
    changed, _ = forward(config, decoder, experts, tokens.at[:, 7].set((tokens[:, 7] + 1) % config.vocab_size))
    np.testing.assert_allclose(changed[:, :7], logits[:, :7], atol=1e-5)
    assert np.abs(changed[:, 7:] - logits[:, 7:]).max(-1).min() > 1e-3


def test_tied_head_is_the_embedding_and_untied_is_not():
    tokens = jnp.arange(6)[None]
    tied = Decoder(CONFIG, nnx.Rngs(0))
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    untied, experts = Decoder(config, nnx.Rngs(0)), Experts(CONFIG, nnx.Rngs(1))
    assert tied.head is None
    assert untied.head is not None
    other = forward(config, untied, experts, tokens)[0]
    untied.head = nnx.Param(untied.embedding[...])
    expected = forward(CONFIG, tied, experts, tokens)[0]
    np.testing.assert_array_equal(forward(config, untied, experts, tokens)[0], expected)
    assert np.abs(other - expected).max() > 0.1


def test_shared_expert_is_added_to_every_token():
    config = dataclasses.replace(CONFIG, shared_expert_size=24, num_layers=1)
    decoder, experts = Decoder(config, nnx.Rngs(0)), Experts(config, nnx.Rngs(1))
    tokens = jnp.arange(6)[None]
    with_it = forward(config, decoder, experts, tokens)[0]
    decoder.runs[0].shared_out = nnx.Param(jnp.zeros((1, config.hidden_size, 24)))
    without = forward(config, decoder, experts, tokens)[0]
    assert np.abs(with_it - without).max(-1).min() > 1e-3
    decoder.runs[0].shared_in = decoder.runs[0].shared_out = None
    plain = dataclasses.replace(config, shared_expert_size=0)
    np.testing.assert_array_equal(forward(plain, decoder, experts, tokens)[0], without)
