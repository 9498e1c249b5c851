"""convert: other engines' files in their real layouts, malformed ones, and maps there and back."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

from placement import Placement, Profile
from placement.__main__ import main
from tests.helpers.torch_files import torch_save

FACTS = ["--name", "tiny", "--hidden-size", "16", "--expert-bytes", "100"]
CONFIG = {
    **{"model_type": "deepseek_v2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": None},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 6, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "vocab_size": 50},
    **{"_name_or_path": "org/tiny-deepseek"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def convert(*args, out="new.npz"):
    return main(["convert", *args, "--out", out])


def refused(capsys, status, out="new.npz"):
    stdout, err = capsys.readouterr()
    assert (status, stdout) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not Path(out).exists()
    return err


def counts_of(seed=0, shape=(3, 6)):
    return np.random.default_rng(seed).integers(1, 50, shape).astype(np.int32)


# ---- statistics in


def test_sglang_stat(folder, capsys):
    steps = np.stack([counts_of(i) for i in range(4)])
    dump = {"rank": 0, "logical_count": steps, "average_utilization_rate_over_window": None}
    torch_save("expert_distribution_recorder_1.5.pt", dump)
    torch_save("expert_distribution_recorder_2.5.pt", dump | {"average_utilization_rate_over_window": 0.5})
    assert convert(str(folder), "--servers", "a,b", "--top-k", "2", *FACTS) == 0
    assert "every server gets the mean" in capsys.readouterr().out
    profile = Profile.load("new.npz")
    assert profile.servers == ("a", "b")
    assert (profile.counts == steps.sum(0)[None]).all()  # twice the sum, over two servers
    assert (profile.model, profile.top_k, profile.hidden_size, profile.expert_bytes) == ("tiny", 2, 16, (100,) * 3)


def test_sglang_stat_layers_without_experts(folder, capsys):
    counts = np.vstack([np.zeros((1, 6), np.int32), counts_of()])
    torch_save("r.pt", {"rank": 0, "logical_count": counts[None]})
    assert convert("r.pt", "--servers", "a", "--model", "config.json") == 0
    profile = Profile.load("new.npz")
    assert (profile.counts[0] == counts[1:]).all()
    assert profile.model == "tiny-deepseek"
    assert (profile.top_k, profile.hidden_size, profile.expert_bytes) == (2, 16, (3 * 16 * 8 * 2,) * 3)
    assert profile.reserved_bytes != 0
    assert "are reserved for the weights" in capsys.readouterr().out
    assert convert("r.pt", "--servers", "a", "--top-k", "2", *FACTS) == 0  # found without the configuration too
    assert (Profile.load("new.npz").counts[0] == counts[1:]).all()
    assert "layers [0] have no routing" in capsys.readouterr().out


MAP = np.array([[0, 1, 2, 3, 4, 5, 0, 3], [5, 4, 3, 2, 1, 0, 5, 0]], np.int32)


def per_pass(rank, seed, ranks=2):
    return {
        "forward_pass_id": seed,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": counts_of(seed, (2, 8)),
    }


def test_sglang_per_pass(folder, capsys):
    expected = np.zeros((2, 2, 6), int)
    for rank in range(2):
        records = [per_pass(rank, seed) for seed in (rank, rank + 5)]
        torch_save(
            f"expert_distribution_recorder_7.1_{rank}.pt", {"records": records, "last_physical_to_logical_map": MAP}
        )
        for record in records:
            for layer in range(2):
                np.add.at(expected[rank, layer], MAP[layer], record["global_physical_count"][layer])
    assert convert(str(folder), "--servers", "a,b", "--top-k", "2", *FACTS, "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    assert (parsed["from"], parsed["to"], parsed["servers"]) == ("sglang", "profile", ["a", "b"])
    assert "before a rebalance" in " ".join(parsed["notes"])
    assert (Profile.load("new.npz").counts == expected).all()
    assert convert(str(folder), "--servers", "a", "--top-k", "2", *FACTS) == 0
    assert (Profile.load("new.npz").counts[0] == expected.sum(0)).all()
    Path("expert_distribution_recorder_7.1_0.pt").unlink()
    Path("new.npz").unlink()
    capsys.readouterr()
    message = refused(capsys, convert(str(folder), "--servers", "a,b", "--top-k", "2", *FACTS))
    assert "rank 0 of 2 is missing; give the files of all ranks" in message


@pytest.mark.parametrize("kind", ["arrivals", "copies"])
def test_sglang_ranks_that_do_not_tell_the_source(folder, capsys, kind):
    table = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    total: np.ndarray = np.zeros((2, 6), int)
    for rank in range(3):
        counts = counts_of(0, (2, 6))
        if kind == "arrivals":
            counts[:, np.arange(6) // 2 != rank] = 0
        record = {"rank": rank, "global_physical_count": counts}
        torch_save(f"r_{rank}.pt", {"records": [record], "last_physical_to_logical_map": table})
        total = counts if kind == "copies" else total + counts
    assert convert(str(folder), "--servers", "a,b,c", "--top-k", "2", *FACTS) == 0
    words = {"arrivals": "tokens that arrived at it", "copies": "recorded the same tokens"}[kind]
    assert words in capsys.readouterr().out
    assert np.allclose(Profile.load("new.npz").counts, total / 3)


def test_sglang_per_token(folder, capsys):
    rng = np.random.default_rng(0)
    expected = []
    for rank in range(2):
        records = []
        for step, lengths in enumerate([[3, 2], None]):
            number = sum(lengths) if lengths else 4
            top = rng.random((2, number, 6)).argsort(-1)[..., :2].astype(np.int32)  # physical slots 0 to 5
            wide = np.full((2, number, 8), -1, np.int32)  # the recorder's buffer is for k = 8
            wide[..., :2] = top
            physical = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in top]).astype(np.int32)
            record = {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary", "input_ids": [1] * number}
            record |= {"positions": [0] * number, "extend_seq_lens": lengths, "forward_mode": 1, "misc_objects": []}
            records.append(record | {"topk_ids_of_layer": wide, "global_physical_count": physical})
            expected.append(np.take_along_axis(MAP, top.reshape(2, -1), 1).reshape(top.shape).transpose(1, 0, 2))
        torch_save(f"r_{rank}.pt", {"records": records, "last_physical_to_logical_map": MAP})
    assert convert("r_0.pt", "r_1.pt", "--servers", "a,b", *FACTS) == 0
    profile = Profile.load("new.npz")
    assert profile.ids is not None
    assert profile.server is not None
    assert profile.sequence is not None
    assert profile.top_k == 2
    assert (profile.ids == np.concatenate(expected)).all()
    assert profile.server.tolist() == [0] * 9 + [1] * 9
    assert profile.sequence.tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        3,
        4,
        5,
        *(6 + np.array([0, 0, 0, 1, 1, 2, 3, 4, 5])).tolist(),
    ]
    assert profile.counts.sum() == profile.ids.size


def test_sglang_jax(folder, capsys):
    counts = counts_of()
    np.save("dist.npy", {"logical_count": counts, "timestamp": 1.5}, allow_pickle=True)  # pyright: ignore
    assert convert("dist.npy", "--servers", "a", "--top-k", "2", *FACTS) == 0
    assert "sglang-jax" in capsys.readouterr().out
    assert (Profile.load("new.npz").counts[0] == counts).all()


def trtllm_folder(folder, ranks=3, raw=False):
    from safetensors.numpy import save_file

    meta = {"num_experts": 6, "num_experts_per_token": 2}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    rng = np.random.default_rng(1)
    expected = np.zeros((ranks, 3, 6), int)
    for rank in range(ranks):
        counts, chosen = {}, {}
        for step in (10, 11):
            for layer in (1, 2, 3):
                ids = rng.random((5, 6)).argsort(-1)[:, :2].astype(np.int32)
                counts[f"{step}_{layer}"] = np.bincount(ids.ravel(), minlength=6).astype(np.int32)
                chosen[f"{step}_{layer}"] = ids
                expected[rank, layer - 1] += counts[f"{step}_{layer}"]
        save_file(counts, folder / f"rank{rank}.safetensors")
        if raw:
            save_file(chosen, folder / f"rank{rank}_raw.safetensors")
    return expected


@pytest.mark.parametrize("raw", [False, True])
def test_trtllm(folder, capsys, raw):
    expected = trtllm_folder(folder, raw=raw)
    assert convert(str(folder), "--servers", "a,b", "--ranks-per-server", "1,2", *FACTS) == 0
    profile = Profile.load("new.npz")
    assert (profile.counts == np.stack([expected[0], expected[1:].sum(0)])).all()
    assert profile.top_k == 2
    assert (profile.ids is not None) == raw
    if profile.ids is not None and profile.server is not None:
        assert (np.bincount(profile.ids[profile.server == 0, 1].ravel(), minlength=6) == expected[0, 1]).all()
    Path("cluster.toml").write_text(
        '[[server]]\nname = "x"\ndevices = [{ memory = 1 }, { memory = 1 }]\n'
        '[[server]]\nname = "y"\ndevices = [{ memory = 1 }]\n'
    )
    assert convert(str(folder), "--cluster", "cluster.toml", "--model", "config.json") == 0
    assert (Profile.load("new.npz").counts == np.stack([expected[:2].sum(0), expected[2]])).all()


def test_trtllm_refusals(folder, capsys):
    from safetensors.numpy import save_file

    trtllm_folder(folder)
    args = [str(folder), "--servers", "a,b,c", *FACTS]
    assert "3 ranks or files for 2 servers" in refused(capsys, convert(str(folder), "--servers", "a,b", *FACTS))
    save_file({"10_1": np.ones(5, np.int32)}, "rank1.safetensors")
    assert "rank1.safetensors: 10_1 has 5 counts; num_experts is 6" in refused(capsys, convert(*args))
    data = Path("rank0.safetensors").read_bytes()
    Path("rank1.safetensors").write_bytes(data[:-5])
    assert "rank1.safetensors: truncated or damaged" in refused(capsys, convert(*args))
    Path("rank1.safetensors").unlink()
    assert "rank 1 of 3 is missing" in refused(capsys, convert(*args))
    Path("meta_info.json").write_text("{}")
    assert "meta_info.json: num_experts = None" in refused(capsys, convert(*args))


def routing(seed, tokens):
    return np.random.default_rng(seed).random((tokens, 3, 6)).argsort(-1)[..., :2]


def npy64(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_routed_experts(folder, capsys):
    first, second, third = routing(0, 5), routing(1, 4), routing(2, 6)
    with_dense = np.concatenate([np.zeros((4, 1, 2), int), second], 1).astype("<i4")  # SGLang has all layers
    lines = [
        {"server": "b", "meta_info": {"routed_experts": npy64(first.astype(np.int16))}},
        {
            "server": "a",
            "prompt_routed_experts": third[:2].tolist(),
            "choices": [{"routed_experts": third[2:].tolist()}],
        },
    ]
    Path("all.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert convert("all.jsonl", "--servers", "a,b,quiet", "--experts", "6", *FACTS) == 0
    profile = Profile.load("new.npz")
    assert profile.ids is not None
    assert profile.server is not None
    assert profile.sequence is not None
    assert (profile.ids == np.concatenate([first, third])).all()
    assert (profile.server.tolist(), profile.sequence.tolist()) == ([1] * 5 + [0] * 6, [0] * 5 + [1] * 6)
    assert profile.counts[2].sum() == 0
    Path("sglang.jsonl").write_text(
        json.dumps({"meta_info": {"routed_experts": base64.b64encode(with_dense.tobytes()).decode()}})
    )
    assert convert("sglang.jsonl", "--servers", "a", "--model", "config.json") == 0
    assert np.array_equal(Profile.load("new.npz").ids, second)
    np.save("one.npy", first.astype(np.int16))
    np.save("two.npy", third.astype(np.int16))
    assert convert("one.npy", "two.npy", "--servers", "a,b", "--experts", "6", *FACTS) == 0
    assert np.array_equal(Profile.load("new.npz").server, [0] * 5 + [1] * 6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"routed_experts": [[[0, 1]], [[1]]]}, "line 1: routed_experts has rows of unequal lengths"),
        ({"routed_experts": [[0, 1]]}, "line 1: routed_experts has type int64 and shape (1, 2); must be numbers of 3"),
        ({"routed_experts": "%%"}, "line 1: routed_experts = '%%': not base64"),
        ({"routed_experts": "AAAA"}, "bare int32 without its shape; give --model config.json, or --layers and --top-k"),
        ({"routed_experts": [[[0, 7]]]}, "routed_experts has the id 7, but there are 6 experts"),
        ({"routed_experts": [[[1, 1]]]}, "no assignment was counted"),
        ({"text": 1}, "line 1: routed_experts: missing; ask for it with the request"),
        ([], "must be an object with routed_experts"),
        ({"server": 3, "routed_experts": [[[0, 1]]]}, "line 1: server = 3: must be a name"),
        ({"server": "z", "routed_experts": [[[0, 1]]]}, "server = 'z': not among a"),
    ],
)
def test_routed_experts_refused(folder, capsys, line, message):
    Path("r.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    assert message in refused(capsys, convert("r.jsonl", "--servers", "a", "--experts", "6", *FACTS))


def test_some_requests_without_a_server(folder, capsys):
    lines = [{"server": "a", "routed_experts": [[[0, 1]]]}, {"routed_experts": [[[0, 1]]]}]
    Path("r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "r.jsonl: line 2: server: missing, but other requests" in refused(capsys, convert("r.jsonl", *FACTS))


# ---- what a file lacks


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--servers", "a", "--top-k", "2", "--hidden-size", "16", "--expert-bytes", "1"],
            "name: not in the file; give --name",
        ),
        (
            ["--servers", "a", "--name", "m", "--expert-bytes", "1", "--top-k", "2"],
            "hidden_size: not in the file; give --hidden-size",
        ),
        (["--servers", "a", "--name", "m", "--hidden-size", "1", "--top-k", "2"], "give --expert-bytes, or --model"),
        (["--servers", "a", *FACTS], "top_k: not in the file; give --top-k, or --model config.json"),
        (["--top-k", "2", *FACTS], "servers: not in the file; give --servers a,b,c or --cluster"),
        (["--servers", "a,a", "--top-k", "2", *FACTS], "--servers = 'a,a': must be different names"),
        (["--servers", "a", "--top-k", "2", *FACTS, "--experts", "8"], "experts = 6, but --experts says 8"),
        (["--servers", "a", "--model", "config.json", "--top-k", "2", "--to", "omni-infer"], "holds statistics"),
        (
            ["--servers", "a", "--top-k", "2", *FACTS, "--reserved-bytes", "1 XB"],
            "--reserved-bytes = '1 XB': unknown unit",
        ),
        (
            ["--servers", "a", "--top-k", "2", *FACTS, "--ranks-per-server", "0"],
            "--ranks-per-server = '0': must be numbers",
        ),
        (["--servers", "a", "--model", "absent"], "absent: cannot be read"),
    ],
)
def test_missing_facts(folder, capsys, args, message):
    torch_save("r.pt", {"rank": 0, "logical_count": counts_of()})
    assert message in refused(capsys, convert("r.pt", *args))


def test_a_model_of_another_shape(folder, capsys):
    torch_save("r.pt", {"rank": 0, "logical_count": counts_of(0, (7, 6))})
    text = refused(capsys, convert("r.pt", "--servers", "a", "--model", "config.json"))
    assert "has 7 layers, but --model has 4 layers, 3 of them with experts" in text
    torch_save("r.pt", {"rank": 0, "logical_count": counts_of(0, (3, 5))})
    text = refused(capsys, convert("r.pt", "--servers", "a", "--model", "config.json"))
    assert "experts = 5, but --model says 6" in text


def test_plan_takes_facts_from_a_model(folder, capsys):
    meta = {"experts": 6}
    np.savez("thin.npz", counts=np.ones((1, 3, 6)), servers=np.array(["a"]), meta=np.array(json.dumps(meta)))
    Path("cluster.toml").write_text('[[server]]\nname = "a"\ndevices = [{ memory = "1MB" }]\n')
    args = ["plan", "--cluster", "cluster.toml", "--profile", "thin.npz", "--out", "new.json"]
    assert "meta.model: missing" in refused(capsys, main(args), "new.json")
    assert main([*args, "--model", "config.json"]) == 0
    assert Placement.load("new.json").model["expert_bytes"] == 768
    Path("config.json").write_text(json.dumps(CONFIG | {"n_routed_experts": 8}))
    Path("new.json").unlink()
    capsys.readouterr()
    assert "thin.npz: experts = 6, but config.json has 8" in refused(
        capsys, main([*args, "--model", "config.json"]), "new.json"
    )


# ---- maps


def placement_file(resident, name="p.json"):
    width = {"a": 1, "b": len(resident) - 1}
    devices = tuple((server, i) for server, number in width.items() for i in range(number))
    model = {"name": "tiny", "layers": resident.shape[1], "experts": resident.shape[2], "top_k": 2}
    Placement(resident, devices, "dance", {**model, "expert_bytes": 100, "reserved_bytes": 0}).save(name)
    return [
        "--servers",
        "a,b",
        "--ranks-per-server",
        f"1,{width['b']}",
        "--top-k",
        "2",
        "--name",
        "tiny",
        "--expert-bytes",
        "100",
    ]


def equal_map(seed=0, devices=3, layers=3, experts=6, slots=3):
    rng = np.random.default_rng(seed)
    resident = np.zeros((devices, layers, experts), bool)
    for layer in range(layers):
        for device in range(devices):
            chosen = (np.arange(slots) + 2 * device) % experts if device < 3 else rng.permutation(experts)[:slots]
            resident[device, layer, rng.permutation(experts)[chosen] if layer == 9 else (chosen + layer) % experts] = (
                True
            )
    return resident


ENGINES = {"sglang": "map.json", "trtllm": "map.yaml", "vllm-ascend": "map_a.json", "omni-infer": "map.npy"}


@pytest.mark.parametrize("engine", ENGINES)
def test_maps_there_and_back(folder, capsys, engine):
    resident = equal_map()
    flags = placement_file(resident)
    out = ENGINES[engine]
    assert convert("p.json", "--to", engine, out=out) == 0
    assert "note: ranks in order: a/0 b/0 b/1" in capsys.readouterr().out
    assert convert(out, *flags, out="back.json") == 0
    back = Placement.load("back.json")
    assert (back.resident == resident).all()
    assert back.devices == (("a", 0), ("b", 0), ("b", 1))
    assert back.strategy == "converted"


def test_layouts_of_maps(folder, capsys):
    resident = equal_map()
    placement_file(resident)
    rows = [[e for device in resident[:, layer] for e in np.flatnonzero(device).tolist()] for layer in range(3)]
    assert convert("p.json", "--to", "sglang", out="m.json") == 0
    assert json.loads(Path("m.json").read_text()) == {"physical_to_logical_map": rows}
    assert convert("p.json", "--to", "sglang", "--model", "config.json", out="m.json") == 0
    trivial = [i % 6 for i in range(9)]  # the dense layer 0, as SGLang itself fills it
    assert json.loads(Path("m.json").read_text()) == {"physical_to_logical_map": [trivial, *rows]}
    assert convert("p.json", "--to", "trtllm", "--first-layer", "1", out="m.yaml") == 0
    lines = Path("m.yaml").read_text().splitlines()
    assert lines[:2] == ["initial_global_assignments:", f"  1: {rows[0]}"]
    assert lines[-2:] == ["layer_updates_per_iter: 0", "num_slots: 9"]
    assert convert("m.yaml", "--servers", "a,b,c", "--to", "omni-infer", out="m.npy") == 0
    assert (np.load("m.npy") == resident).all()
    assert convert("p.json", "--to", "vllm-ascend", out="m.json") == 0
    parsed = json.loads(Path("m.json").read_text())
    assert parsed["moe_layer_count"] == 3
    assert parsed["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 3,
        "device_list": [{"device_id": d, "device_expert": np.flatnonzero(resident[d, 1]).tolist()} for d in range(3)],
    }


def test_maps_of_saved_tensors_and_dicts(folder, capsys):
    resident = equal_map()
    flags = placement_file(resident)
    rows = np.nonzero(resident.transpose(1, 0, 2))[2].reshape(3, 9)
    torch_save("m.pt", {"physical_to_logical_map": rows})
    np.save("d.npy", {"physical_to_logical_map": rows}, allow_pickle=True)  # pyright: ignore
    np.save("bare.npy", rows)
    for args in (["m.pt"], ["d.npy"], ["bare.npy", "--from", "sglang-jax", "--to", "placement"]):
        assert convert(*args, *flags, out="back.json") == 0
        assert (Placement.load("back.json").resident == resident).all()
        Path("back.json").unlink()


@pytest.mark.parametrize("engine", ["sglang", "trtllm", "vllm-ascend"])
def test_unequal_slots_are_refused_with_the_remedy(folder, capsys, engine):
    resident = equal_map()
    resident[1, 2] = True
    placement_file(resident)
    Path("new.out").write_text("old")
    assert convert("p.json", "--to", engine, out="new.out") == 2
    err = capsys.readouterr().err
    assert "p.json: device 1 holds 6 experts of layer 2, device 0 holds 3 of layer 0" in err
    assert "--equal-slots" in err
    assert Path("new.out").read_text() == "old"
    assert convert("p.json", "--to", "omni-infer", out="new.npy") == 0
    assert (np.load("new.npy") == resident).all()


def edit(path, change):
    parsed = json.loads(Path(path).read_text())
    change(parsed)
    Path(path).write_text(json.dumps(parsed))


@pytest.mark.parametrize(
    ("engine", "change", "message"),
    [
        ("sglang", lambda m: m["physical_to_logical_map"][1].__setitem__(0, 7), "has expert 7; the model has 6"),
        (
            "sglang",
            lambda m: m["physical_to_logical_map"].__setitem__(1, [0, 1, 2] * 3),
            "layer 1 expert 3 is on no device (and 2 more)",
        ),
        ("sglang", lambda m: m["physical_to_logical_map"][1].pop(), "rows of unequal lengths"),
        (
            "sglang",
            lambda m: [row.append(0) for row in m["physical_to_logical_map"]],
            "has 10 slots, which 3 devices cannot share",
        ),
        ("vllm-ascend", lambda m: m.update(moe_layer_count=2), "moe_layer_count = 2: must be the length of layer_list"),
        (
            "vllm-ascend",
            lambda m: m["layer_list"][1]["device_list"].pop(),
            "layer_list[1].device_count = 3: device_list has 2",
        ),
        (
            "vllm-ascend",
            lambda m: [d.update(device_expert=[0, 1, 2]) for d in m["layer_list"][2]["device_list"]],
            "layer 2 expert 3 is on no device",
        ),
        ("vllm-ascend", lambda m: m["layer_list"][0]["device_list"][0].update(device_expert=[1, 1]), "an expert twice"),
        ("vllm-ascend", lambda m: m["layer_list"][0]["device_list"][0].update(device_expert=[-1]), "has the value -1"),
    ],
)
def test_bad_maps(folder, capsys, engine, change, message):
    flags = placement_file(equal_map())
    assert convert("p.json", "--to", engine, out="m.json") == 0
    edit("m.json", change)
    capsys.readouterr()
    assert message in refused(capsys, convert("m.json", *flags, "--experts", "6", out="new.json"), "new.json")


def test_a_second_copy_on_a_rank_is_left_out(folder, capsys):
    table = [[0, 1, 0, 2, 3, 0], [0, 1, 2, 2, 3, 3]]  # as EPLB may plan it
    Path("m.json").write_text(json.dumps({"physical_to_logical_map": table}))
    flags = ["--servers", "a,b", "--top-k", "1", "--name", "m", "--expert-bytes", "1"]
    assert convert("m.json", *flags, out="back.json") == 0
    assert "note: 2 slots hold a second copy of an expert on their rank" in capsys.readouterr().out
    expected = [[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 1, 1], [0, 0, 1, 1]]]
    assert Placement.load("back.json").resident.astype(int).tolist() == expected
    assert "needs the same number everywhere" in refused(capsys, convert("m.json", *flags, "--to", "trtllm"))


def test_more_bad_maps(folder, capsys):
    flags = placement_file(equal_map())
    pattern = equal_map().astype(np.int32)
    pattern[:, 1, 4] = 0
    np.save("m.npy", pattern)
    args = ["--from", "omni-infer", *flags]
    assert "layer 1 expert 4 is on no device" in refused(capsys, convert("m.npy", *args, out="new.json"), "new.json")
    np.save("m.npy", pattern + 1)
    assert "other numbers than 0 and 1" in refused(capsys, convert("m.npy", *args, out="new.json"), "new.json")
    np.save("m.npy", pattern[0])
    assert "must be numbers of 3 dimensions" in refused(capsys, convert("m.npy", *args, out="new.json"), "new.json")
    np.save("m.npy", np.ones((4, 3, 6), np.int32))
    assert "has 4 ranks, the flags name 3 devices" in refused(
        capsys, convert("m.npy", *args, out="new.json"), "new.json"
    )
    Path("m.yaml").write_text("num_slots: 9\n")
    text = refused(capsys, convert("m.yaml", *flags, out="new.json"), "new.json")
    assert "m.yaml: initial_global_assignments: missing" in text
    Path("m.yaml").write_text("num_slots: 9\ninitial_global_assignments:\n  0: [0, 1]\n")
    assert "has [2] slots per layer; num_slots is 9" in refused(
        capsys, convert("m.yaml", *flags, out="new.json"), "new.json"
    )
    for name, content in (("m.json", "{}"), ("m.txt", "x")):
        Path(name).write_text(content)
        assert "say it with --from" in refused(capsys, convert(name, *flags, out="new.json"), "new.json")
    assert "name the engine with --to" in refused(capsys, convert("p.json", out="new.json"), "new.json")
    assert "files of several formats" in refused(capsys, convert("p.json", "m.yaml", out="new.json"), "new.json")


def test_yaml_in_block_style(folder):
    resident = equal_map(layers=2)
    flags = placement_file(resident)
    rows = np.nonzero(resident.transpose(1, 0, 2))[2].reshape(2, 9).tolist()
    text = "initial_global_assignments:\n"
    for layer, row in enumerate(rows):
        text += f"  {layer + 3}:\n" + "".join(f"  - {expert}\n" for expert in row)
    Path("m.yaml").write_text(text + "layer_updates_per_iter: 0\nnum_slots: 9\n")
    assert convert("m.yaml", *flags, out="back.json") == 0
    assert (Placement.load("back.json").resident == resident).all()
