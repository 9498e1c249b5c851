"""convert: layers that are missing, counts that cannot be, facts that are missing, and files made to take memory or time."""

import base64
import json
import pickle
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from placement import InputError, Placement, Profile
from placement.__main__ import main
from placement.data.statistics import implausible
from placement.engines.saved_arrays import load_safetensors, load_torch
from placement.engines.unpickle import load_pickle
from placement.simulation.lockstep.predict import StepCosts
from tests.helpers.torch_files import text, torch_pickle, torch_save, zipped

FACTS = ["--name", "m", "--top-k", "2", "--hidden-size", "16", "--expert-bytes", "100"]
EIGHT = ["--servers", "a,b", "--ranks-per-server", "2"]
CONFIG = {
    **{"model_type": "deepseek_v2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": None},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 6, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "vocab_size": 50},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def convert(*args, out="new.out"):
    return main(["convert", *args, "--out", out])


def refused(capsys, *args):
    start = time.process_time()
    assert convert(*args) == 2
    assert time.process_time() - start < 10
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not Path("new.out").exists()
    return err


# ---- TensorRT-LLM's YAML

YAML = {
    "comments": "# by hand\nnum_slots: 8   # slots\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n  # layer 0\n"
    "  0: [0,1,2,3,  # rank 0\n      4,5,6,7]\n",
    "crlf": "num_slots: 8\r\ninitial_global_assignments:\r\n  0: [0,1,2,3,4,5,6,7]\r\nlayer_updates_per_iter: 0\r\n",
    "flow": "num_slots: 8\ninitial_global_assignments: {0: [0, 1, 2, 3, 4, 5, 6, 7]}\nlayer_updates_per_iter: 0\n",
    "quoted": "---\ninitial_global_assignments:\n  '0': [0, 1, 2, 3, 4, 5, 6, 7,]\nnum_slots: 8\n",
    "block": "\ufeffinitial_global_assignments:\n  0:\n" + "".join(f"  - {i}\n" for i in range(8)) + "num_slots: 8",
    "blank": "num_slots: 8\ninitial_global_assignments:\n" + "\n" * 100_000 + "  0: [0, 1, 2, 3, 4, 5, 6, 7]\n",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_however_it_is_written(capsys, name):
    Path("m.yaml").write_text(YAML[name], newline="")
    start = time.process_time()
    assert convert("m.yaml", *EIGHT, "--to", "vllm-ascend") == 0
    assert time.process_time() - start < 5
    (layer,) = json.loads(Path("new.out").read_text())["layer_list"]
    assert [device["device_expert"] for device in layer["device_list"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_slots: 8", "num_slots: " + "9" * 5000), "num_slots = '9999"),
        (("num_slots: 8", "num_slots: 8\nnum_slots: 8"), "line 2: num_slots: given twice"),
        (("[0, 1,", "[" + "9" * 5000 + ","), "line 2: '9999"),
        (("{0:", "{" + "9" * 5000 + ":"), "must be lists of experts from 0 to 100000 by layer"),
        (("[0, 1,", "[0, -1,"), "line 2: '-1, 2, 3, 4, 5, 6, 7]}': must be lists of experts"),
        (("7]", "7"), "layer 0: must be a list of experts; perhaps truncated"),
        (("}", ""), "no closing }"),
        (("7]}", "7], 0: [0]}"), "layer 0 is given twice"),
        (("7]}", "7], 1: [0]}"), "has [1, 8] slots per layer; num_slots is 8, layer 1 differs"),
        (("initial_global", "global"), "initial_global_assignments: missing"),
    ],
)
def test_damaged_yaml(capsys, change, message):
    Path("m.yaml").write_text(YAML["flow"].replace(*change))
    assert message in refused(capsys, "m.yaml", *EIGHT, "--to", "vllm-ascend")


def test_yaml_of_blank_lines_ends(capsys):
    Path("m.yaml").write_text("num_slots: 8\ninitial_global_assignments:\n" + "\n" * 100_000 + "x")
    assert "line 100003: 'x': must be lists of experts" in refused(capsys, "m.yaml", *EIGHT, "--to", "vllm-ascend")


# ---- layers


def ascend(ids, experts=((0, 1), (2, 3))):
    layers = [
        {"layer_id": i, "device_count": 2, "device_list": [{"device_expert": list(row)} for row in experts]}
        for i in ids
    ]
    Path("m.json").write_text(json.dumps({"moe_layer_count": len(layers), "layer_list": layers}))
    return ["m.json", "--servers", "a,b", "--name", "m", "--top-k", "2", "--expert-bytes", "100"]


def test_layer_ids_of_vllm_ascend(capsys):
    assert convert(*ascend([1, 2])) == 0  # from 1, and no device ids
    assert Placement.load("new.out").resident.tolist() == [
        [[True, True, False, False]] * 2,
        [[False, False, True, True]] * 2,
    ]
    assert "note: layers [1, 2] have experts; the result numbers them from 0" in capsys.readouterr().out
    Path("new.out").unlink()
    assert "m.json: layer 3 is missing between others" in refused(capsys, *ascend([1, 2, 4]))
    assert "layer_list[1].layer_id = 0: must be the index of a layer, in ascending order" in refused(
        capsys, *ascend([1, 0])
    )
    model = ["--servers", "a,b", "--model", "config.json"]
    six = ((0, 1, 2), (3, 4, 5))
    assert "layer 2 is missing, which --model has" in refused(capsys, ascend([1, 3], six)[0], *model)
    assert convert(ascend([0, 1, 2, 3], six)[0], *model) == 0  # all layers, the dense one among them
    assert Placement.load("new.out").resident.shape == (2, 3, 6)


def test_shared_experts_beside_routed_ones(capsys):
    mixed = ((0, 1, 2, 3, 8), (4, 5, 6, 7, 8))
    assert convert(*ascend([0, 1], mixed), "--experts", "8") == 0
    assert "the model has 8 experts: 8 in every layer are shared ones" in capsys.readouterr().out
    assert Placement.load("new.out").resident.sum() == 16
    Path("new.out").unlink()
    assert "has expert 9; the model has 8" in refused(
        capsys, *ascend([0], ((0, 1, 2, 3, 9), (4, 5, 6, 7))), "--experts", "8"
    )


def test_a_layer_is_missing_in_a_map_by_layer(capsys):
    rows = "".join(f"  {layer}: [0, 1, 2, 3]\n" for layer in (3, 4, 6))
    Path("m.yaml").write_text("num_slots: 4\ninitial_global_assignments:\n" + rows)
    flags = [*EIGHT, "--name", "m", "--top-k", "2", "--expert-bytes", "9"]
    assert "m.yaml: layer 5 is missing between others; record or write it again, or give --model" in refused(
        capsys, "m.yaml", *flags
    )
    Path("m.yaml").write_text(Path("m.yaml").read_text().replace("6:", "5:"))
    assert convert("m.yaml", *flags) == 0
    assert "layers [3, 4, 5] have experts" in capsys.readouterr().out


def test_rows_of_layers_without_experts(capsys):
    Path("m.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3]] * 3}))
    assert convert("m.json", *EIGHT, "--name", "m", "--top-k", "2", "--expert-bytes", "9") == 0
    assert "SGLang has rows for layers without, which --model tells" in capsys.readouterr().out


# ---- counts that cannot be


def test_counts_of_one_rank_of_several(capsys):
    counts = np.zeros((4, 64))
    counts[:, :8] = np.random.default_rng(0).integers(1000, 5000, (4, 8))
    torch_save("r.pt", {"logical_count": counts})
    assert convert("r.pt", "--servers", "a,b", *FACTS) == 0
    assert (
        f"56 of 64 experts of every layer were never counted in {counts.sum():,.0f} assignments"
        in capsys.readouterr().out
    )


def test_a_layer_without_counts_between_others(capsys):
    counts = np.random.default_rng(0).integers(1, 50, (4, 6)).astype(np.int64)
    counts[2] = 0
    torch_save("r.pt", {"logical_count": counts})
    assert "r.pt: layer 2 has no routing though others have" in refused(capsys, "r.pt", "--servers", "a", *FACTS)
    assert "layer 2 has no routing, but by --model it has experts" in refused(
        capsys, "r.pt", "--servers", "a", "--model", "config.json"
    )
    torch_save("r.pt", {"logical_count": counts[[0, 1, 3, 2]]})
    assert "layer 3 has no routing though others have" in refused(capsys, "r.pt", "--servers", "a", *FACTS)
    torch_save("r.pt", {"logical_count": counts[[2, 0, 2, 1, 2, 3]]})  # every second layer has experts
    assert convert("r.pt", "--servers", "a", *FACTS) == 0
    assert (Profile.load("new.out").counts[0] == counts[[0, 1, 3]]).all()


def test_implausible():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(1200, np.full(12, 1 / 12), (3, 5))
    assert implausible(counts) == []
    assert implausible(counts / 7) == []
    uneven = counts.copy()
    uneven[:, 3] *= 3
    assert "layer 3 has 3 times the assignments of a usual layer" in implausible(uneven)[0]
    assert (
        "layer 9 has 0.329 times" in implausible(counts // np.array([3, 1, 1, 1, 1])[:, None], [9, 10, 11, 12, 13])[0]
    )
    few = np.zeros((1, 5, 64), int)
    few[..., :3] = 5
    assert implausible(few) == []  # so few assignments cannot reach every expert


# ---- facts


def test_all_missing_facts_at_once_and_the_remedy_works(capsys):
    torch_save("r.pt", {"logical_count": np.ones((3, 6), np.int64)})
    message = refused(capsys, "r.pt")
    assert "r.pt: servers, name, top_k, hidden_size, expert_bytes: not in the file; give" in message
    flags = re.findall(r"(--[a-z-]+) ([A-Z0-9,]+[A-Z]*)(?= |$)", message.split("; or:")[0])
    given = {"--top-k": "2"}  # the model of this file has six experts
    assert convert("r.pt", *(part for flag, value in flags for part in (flag, given.get(flag, value)))) == 0
    assert Profile.load("new.out").servers == ("A", "B", "C")
    Path("new.out").unlink()
    capsys.readouterr()
    message = refused(capsys, "r.pt", "--top-k", "2")
    assert "servers, name, hidden_size, expert_bytes: not in the file" in message
    assert (
        "or: --model config.json says name, hidden_size and expert_bytes, --cluster cluster.toml names the servers"
        in message
    )
    Path("cluster.toml").write_text('[[server]]\nname = "x"\ndevices = [{ memory = 5 }]\n')
    assert convert("r.pt", "--top-k", "2", "--model", "config.json", "--cluster", "cluster.toml") == 0


def test_all_missing_facts_of_a_map(capsys):
    Path("m.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3]]}))
    message = refused(capsys, "m.json")
    assert "m.json: servers, name, top_k, expert_bytes: not in the file" in message
    flags = re.findall(r"(--[a-z-]+) ([A-Z0-9,]+[A-Z]*)(?= |$)", message.split("; or:")[0])
    flags = [(flag, "A,B" if flag == "--servers" else value) for flag, value in flags]  # of four slots
    assert convert("m.json", *(part for pair in flags for part in pair)) == 0


# ---- files made to crash, or to take memory or time


def nested(depth):
    return b"(" * depth + b"t" * depth


@pytest.mark.parametrize("kind", ["pt", "npy", "jsonl"])
def test_a_key_that_is_nested_deep(capsys, kind):
    program = b"}" + nested(200_000) + b"K\x01s"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x80\x02" + program + b"."
    contents = {"pt": zipped(program), "npy": npy}
    contents["jsonl"] = json.dumps({"routed_experts": base64.b64encode(npy).decode()}).encode()
    Path(f"r.{kind}").write_bytes(contents[kind])
    assert "a dict with the key ((((" in refused(capsys, f"r.{kind}", "--servers", "a", *FACTS)


def laughs(levels):
    """Lists of ten references to the list before."""
    program = b"}(" + text("logical_count") + b"](K\x01eq\x00"
    for level in range(levels):
        program += text(f"k{level}") + b"](" + (b"h" + bytes([level])) * 10 + b"eq" + bytes([level + 1])
    return program + b"u"


ENCODED = b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR"  # the bytes of a text that is kept


def test_lists_that_share_lists(capsys):
    Path("r.pt").write_bytes(zipped(laughs(9)))
    assert "the same values so often that they would fill the memory" in refused(
        capsys, "r.pt", "--servers", "a", *FACTS
    )


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (nested(100), "nested over 64 deep"),
        (b"]q\x00h\x00a", "nested over 64 deep"),  # a list in itself
        (text("x" * 10**5) + b"q\x00](" + ENCODED * 2000 + b"e", "much more than the file is large"),
    ],
)
def test_what_a_pickle_may_make(program, message):
    with pytest.raises(InputError, match=message):
        load_pickle(b"\x80\x02" + program + b".", "x")


def test_an_array_that_is_referred_to_many_times():
    array = np.zeros(10**5, np.int32)
    storages = []
    tensor = torch_pickle(array, storages)
    program = b"](" + tensor + b"q\x00" + b"h\x00" * 5000 + b"e"
    with pytest.raises(InputError, match="so often that they would fill the memory"):
        load_torch(zipped(program, storages), "x")


def test_texts_among_numbers_take_no_room(capsys):
    content = {"logical_count": [["x" * 10**6, *([1] * 10**5)]]}
    Path("r.json").write_text(json.dumps(content))
    assert "must be numbers of 2 or 3 dimensions, and nothing else" in refused(
        capsys, "r.json", "--servers", "a", *FACTS
    )
    with pytest.raises(InputError, match=r"truncated or damaged"):
        load_pickle(pickle.dumps(np.arange(3)).replace(b"<", b"?"), "x")


def test_a_map_that_claims_many_experts(capsys):
    Path("m.json").write_text(json.dumps({"physical_to_logical_map": [[0, 99_999]] * 200}))
    assert "entries are more than 16777216" in refused(capsys, "m.json", "--servers", "a", *FACTS)


def test_a_rank_of_a_huge_number(capsys, folder):
    from safetensors.numpy import save_file

    Path("meta_info.json").write_text(json.dumps({"num_experts": 6, "num_experts_per_token": 2}))
    for rank in ("0", "9999999999"):
        save_file({"1_0": np.ones(6, np.int32)}, f"rank{rank}.safetensors")
    assert "rank 1 of 10000000000 is missing" in refused(capsys, str(folder), "--servers", "a", *FACTS)


def test_safetensors_as_their_package_writes_them():
    from safetensors.numpy import save

    tensors = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.ones((0, 3), np.float32), "c": np.array(True)}
    found = load_safetensors(save(tensors, {"x": "y"}), "f")
    for key, array in tensors.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        assert (found[key] == array).all()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "I32", "shape": [2], "data_offsets": [0, 4]}, "bytes 0 to 4 of 8 for shape [2] of I32"),
        ({"dtype": "I32", "shape": [2], "data_offsets": [4, 12]}, "bytes 4 to 12 of 8"),
        ({"dtype": "I32", "shape": [2**30, 2**30], "data_offsets": [0, 8]}, "has no shape and data_offsets"),
        ({"dtype": "I32", "shape": [-2], "data_offsets": [0, 8]}, "has no shape and data_offsets"),
        ({"dtype": "I32", "shape": None, "data_offsets": [0, 8]}, "has no shape and data_offsets"),
        ({"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}, "dtype = 'BF16': must be one of"),
        (3, "dtype = None"),
    ],
)
def test_headers_of_safetensors(entry, message):
    header = json.dumps({"1_0": entry}).encode()
    with pytest.raises(InputError, match=re.escape(message)):
        load_safetensors(struct.pack("<Q", len(header)) + header + bytes(8), "f")
    with pytest.raises(InputError, match="f: truncated or damaged"):
        load_safetensors(struct.pack("<Q", 2**63) + header, "f")


def test_request_lines(capsys):
    lines = [
        json.dumps({"server": "a", "note": "x\u2028y\u0085z", "routed_experts": [[[0, 1]]]}, ensure_ascii=False)
    ] * 2
    Path("r.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert convert("r.jsonl", "--experts", "6", "--name", "m", "--hidden-size", "16", "--expert-bytes", "1") == 0
    assert Profile.load("new.out").counts.sum() == 4
    Path("new.out").unlink()
    flags = ["--experts", "6", "--name", "m", "--hidden-size", "16", "--expert-bytes", "1"]
    Path("r.jsonl").write_text("\n".join([lines[0], lines[1][:-1]]), encoding="utf-8")
    capsys.readouterr()
    assert "r.jsonl: line 2: not valid JSON" in refused(capsys, "r.jsonl", *flags)
    Path("r.jsonl").write_text("\n".join([lines[0][:-3] + "}", lines[1]]), encoding="utf-8")
    assert "r.jsonl: line 1: not valid JSON" in refused(capsys, "r.jsonl", *flags)
    Path("r.json").write_text(json.dumps([json.loads(line) for line in lines], indent=1))
    assert convert("r.json", *flags) == 0


@pytest.mark.parametrize("command", ["plan", "compare", "bench", "simulate"])
def test_a_seed_below_0_is_one_line(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--seed", "-1"])
    assert stop.value.code == 2
    assert "argument --seed: invalid whole number from 0 value: '-1'" in capsys.readouterr().err


def test_costs_that_sum_to_no_number():
    with pytest.raises(InputError, match=r"must be 3 finite seconds from 0 to 1e\+06"):
        StepCosts.from_dict({"prefill": [1e308, 0, 0], "decode": [0, 0, 0]})


def test_a_count_that_no_list_can_have(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["simulate", "--profile", "p.npz", "--sequences", "1" + "0" * 30])
    assert stop.value.code == 2
    assert "--sequences: invalid whole number from 1 to 10000000 value" in capsys.readouterr().err
