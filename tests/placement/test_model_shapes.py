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
