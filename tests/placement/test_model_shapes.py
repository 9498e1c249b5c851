"""Model shapes: the published parameter counts, sizes in bytes, and configurations that are refused."""

import json

import pytest

from placement import InputError
from placement.__main__ import main
from placement.data.model_shapes import ModelShape

MIXTRAL = {
    **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    **{"vocab_size": 32000, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}
DEEPSEEK_V2_LITE = {
    **{"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64},
    **{"n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
    **{"moe_layer_freq": 1, "vocab_size": 102400, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}
DEEPSEEK_V3 = {
    **{"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3},
    **{"moe_layer_freq": 1, "vocab_size": 129280, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
QWEN2 = {
    **{"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
    **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1},
    **{"vocab_size": 151936, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}
QWEN3 = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
    **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": []},
    **{"vocab_size": 151936, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}
OLMOE = {
    **{"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
    **{"vocab_size": 50304, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}
GPT_OSS = {
    **{"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32},
    **{"num_experts_per_tok": 4, "experts_per_token": 4, "vocab_size": 201088, "tie_word_embeddings": False},
    "quantization_config": {"quant_method": "mxfp4"},
}
# Parameters as published, and layers with experts, experts, top-k.
PUBLISHED = {
    "Mixtral-8x7B": (MIXTRAL, 46.7e9, (32, 8, 2)),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15.7e9, (26, 64, 6)),
    "DeepSeek-V3": (DEEPSEEK_V3, 671e9, (58, 256, 8)),
    "Qwen1.5-MoE-A2.7B": (QWEN2, 14.3e9, (24, 60, 4)),
    "Qwen3-30B-A3B": (QWEN3, 30.5e9, (48, 128, 8)),
    "OLMoE-1B-7B": (OLMOE, 6.92e9, (16, 64, 8)),
    "gpt-oss-20b": (GPT_OSS, 20.9e9, (24, 32, 4)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    config, parameters, shape = PUBLISHED[name]
    model = ModelShape.from_dict(config)
    assert model.parameters == pytest.approx(parameters, rel=0.01)
    assert (len(model.layers), model.experts, model.top_k) == shape
    assert model.layers[-1] == config["num_hidden_layers"] - 1
    assert model.hidden_size == config["hidden_size"]


def test_bytes():
    lite = ModelShape.from_dict(DEEPSEEK_V2_LITE)
    assert (lite.dtype, lite.expert_bytes) == ("bf16", 17301504)
    assert lite.layers[0] == 1
    assert lite.bytes == 2 * lite.parameters
    assert ModelShape.from_dict(DEEPSEEK_V2_LITE, "fp32").expert_bytes == 2 * 17301504
    # The published checkpoint of gpt-oss-20b takes 13.76 GB, that of DeepSeek-V3 without its extra layer about 677 GB.
    oss = ModelShape.from_dict(GPT_OSS)
    assert (oss.dtype, oss.base) == ("mxfp4", "bf16")
    assert oss.bytes == pytest.approx(13.76e9, rel=0.01)
    assert oss.expert_bytes == 3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 2
    assert ModelShape.from_dict(GPT_OSS, "bf16").bytes == 2 * oss.parameters
    v3 = ModelShape.from_dict(DEEPSEEK_V3)
    assert v3.dtype == "fp8"
    assert v3.bytes == pytest.approx(675e9, rel=0.01)


def test_layers_without_experts():
    model = ModelShape.from_dict(QWEN3 | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]})
    assert model.layers == tuple(range(5, 48, 2))
    assert model.other_matrix > ModelShape.from_dict(QWEN3).other_matrix


def test_models_that_also_see():
    outer = {"model_type": "something_vl", "text_config": QWEN3}
    assert ModelShape.from_dict(outer).parameters == ModelShape.from_dict(QWEN3).parameters


def test_command(tmp_path, capsys):
    folder = tmp_path / "Mixtral-8x7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    for path in (folder, folder / "config.json"):
        assert main(["model", str(path), "--json"]) == 0
        parsed = json.loads(capsys.readouterr().out)
        assert (parsed["name"], parsed["layers"], parsed["experts"], parsed["top_k"]) == ("Mixtral-8x7B", 32, 8, 2)
        assert parsed["expert_bytes"] == 3 * 4096 * 14336 * 2
        assert parsed["all_experts_bytes"] + parsed["other_bytes"] == parsed["total_bytes"]
        assert parsed["parameters"] == pytest.approx(46.7e9, rel=0.01)
    assert main(["model", str(folder), "--dtype", "int4"]) == 0
    text = capsys.readouterr().out
    assert "Mixtral-8x7B" in text
    assert "46.7 billion parameters" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama': must be one of mixtral, deepseek_v2"),
        ({"hidden_size": None}, "hidden_size = None: must be an integer from 1"),
        ({"num_local_experts": "8"}, "num_local_experts = '8': must be an integer"),
        ({"num_experts_per_tok": 9}, "9 experts per token of 8"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok = None: must be an integer"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method = 'hqq': its sizes are not known"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.bits = None: must be an integer from 1",
        ),
    ],
)
def test_refused(tmp_path, capsys, changes, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL | changes))
    assert main(["model", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{path}: " in err
    assert message in err


def test_refused_files(tmp_path, capsys):
    path = tmp_path / "config.json"
    for text, message in (("[]", "must be an object"), ("{", "not valid JSON")):
        path.write_text(text)
        assert main(["model", str(path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="--dtype: 'f8' is unknown"):
        ModelShape.from_dict(MIXTRAL, "f8")
    dense = QWEN3 | {"mlp_only_layers": list(range(48))}
    with pytest.raises(InputError, match="no layer has experts"):
        ModelShape.from_dict(dense)


# ---- quantized checkpoints: the files as their tools write them, and the sizes of the published ones

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
WEIGHTS = {"num_bits": 4, "group_size": 32, "type": "int"}
PACKED = {
    **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
MLX = {"group_size": 64, "bits": 4}
LINEAR = 28_991_029_248 + 905_969_664  # weights of Qwen3-30B-A3B in linear layers; the others stay in bfloat16


@pytest.mark.parametrize(
    ("changes", "size", "dtype"),
    [
        ({"quantization_config": AWQ}, LINEAR * (4 + 20 / 128) / 8, "awq 4 bits"),
        ({"quantization_config": PACKED}, LINEAR * 4.5 / 8, "compressed-tensors 4 bits"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}, LINEAR, "fp8 per tensor"),
        ({"quantization_config": AWQ | {"quant_method": "gptq"}}, LINEAR * 4.19 / 8, "gptq 4 bits"),
    ],
)
def test_quantized_sizes(changes, size, dtype):
    model = ModelShape.from_dict(QWEN3 | changes)
    rest = 2 * (model.parameters - LINEAR)
    assert model.dtype == dtype
    assert model.bytes == pytest.approx(size + rest, rel=1e-3)
    assert model.expert_bytes * 48 * 128 + model.other_bytes == model.bytes
    assert ModelShape.from_dict(QWEN3 | changes, "bf16").bytes == 2 * model.parameters


def test_mlx_quantizes_embeddings_too():
    model = ModelShape.from_dict(QWEN3 | {"quantization": MLX, "quantization_config": MLX})
    assert model.bytes == pytest.approx(17.2e9, rel=1e-3)
    assert model.expert_bytes == 3 * 2048 * 768 * 9 // 16
    gates = MLX | {"model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}}
    assert ModelShape.from_dict(QWEN3 | {"quantization": gates}).expert_bytes == model.expert_bytes


@pytest.mark.parametrize(
    ("name", "content", "size"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, 16.9e9),
        (
            "hf_quant_config.json",
            {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
            },
            18.1e9,
        ),
    ],
)
def test_quantization_in_a_file_beside(tmp_path, capsys, name, content, size):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    (tmp_path / name).write_text(json.dumps(content))
    assert main(["model", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_bytes"] == pytest.approx(size, rel=0.01)
    for damaged, message in (
        ("[]", "must be an object"),
        ("{", "not valid JSON"),
        ('{"bits": "x"}', "quantization_config."),
    ):
        (tmp_path / name).write_text(damaged)
        assert main(["model", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ("awq", "quantization_config = 'awq': must be an object"),
        ({"bits": 4}, "quant_method = None: its sizes are not known; give the experts' type with --dtype"),
        (AWQ | {"bits": 0}, "bits = 0: must be an integer from 1 to 16"),
        (AWQ | {"group_size": 0}, "group_size = 0: must be -1 or an integer from 1"),
        (AWQ | {"modules_to_not_convert": ["model.layers.1.mlp.experts.3"]}, "leaves experts out"),
        (AWQ | {"modules_to_not_convert": "gate"}, "modules_to_not_convert = 'gate': must be a list"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size = [0, 128]: must be two integers"),
        (PACKED | {"config_groups": {}}, "config_groups = {}: must be one group with weights"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "quant_algo = 'W4A8': its sizes are not known"),
        (MLX | {"model.layers.0.mlp.experts": {"bits": 8}}, "layers of different bits, whose sizes are not known"),
    ],
)
def test_quantization_refused(quantized, message):
    with pytest.raises(InputError) as caught:
        ModelShape.from_dict(QWEN3 | {"quantization_config": quantized})
    assert message in str(caught.value)
    dtypes = str(caught.value).split("one of ")[1].split(", ")  # the remedy works
    assert ModelShape.from_dict(QWEN3 | {"quantization_config": quantized}, dtypes[0]).bytes > 0


KIMI_K2 = DEEPSEEK_V3 | {
    **{"model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384},
    **{"first_k_dense_replace": 1, "vocab_size": 163840},
}


def test_kimi_k2_is_counted_as_deepseek_v3():
    model = ModelShape.from_dict(KIMI_K2)
    assert model.parameters == 1_026_408_232_448
    assert model.parameters == ModelShape.from_dict(KIMI_K2 | {"model_type": "deepseek_v3"}).parameters
    assert (len(model.layers), model.experts, model.top_k, model.dtype) == (60, 384, 8, "fp8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["mixtral"]}, "model_type = ['mixtral']: must be one of"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers = 2147483648: must be an integer from 1 to 10000"),
        ({"hidden_size": 2**40}, "hidden_size = 1099511627776: must be an integer from 1 to 2147483648"),
        ({"num_experts_per_tok": None, "experts_per_token": "2"}, "experts_per_token = '2': must be an integer"),
    ],
)
def test_fields_of_other_types(changes, message):
    with pytest.raises(InputError) as caught:
        ModelShape.from_dict(MIXTRAL | changes)
    assert message in str(caught.value)


def test_another_family_is_told_the_other_way():
    with pytest.raises(
        InputError, match="for another model give convert --name, --top-k, --hidden-size and --expert-bytes"
    ):
        ModelShape.from_dict(MIXTRAL | {"model_type": "llama"})


def test_names_that_cannot_be_printed(tmp_path):
    assert ModelShape.from_dict(MIXTRAL | {"_name_or_path": "a\nb"}, source=str(tmp_path / "m/config.json")).name == "m"
    assert ModelShape.from_dict(MIXTRAL | {"_name_or_path": "org/name/"}).name == "name"
