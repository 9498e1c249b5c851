"""`bench peers` where no peer is installed, and its writers and callers against stand-ins for the peers' packages."""

import argparse
import ctypes
import itertools
import json
import sys
from types import ModuleType

import numpy as np
import pytest

from dancemoe_jax.checkpoint.families import config_from_fields
from launch.bench import peers
from launch.bench.harness import peer_llama
from launch.bench.harness.peer_binaries import BINARY, LlamaBinaries
from launch.bench.harness.peer_gguf import write_gguf
from launch.bench.harness.peer_shapes import SHAPES, Shape, cut
from placement import InputError
from tests.helpers import fake_gguf

TINY = Shape(
    "tiny",
    SHAPES["qwen3-30b-a3b"].fields
    | {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    2,
)


def arguments(*flags):
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(peers, "SHAPES", {"tiny": TINY})


@pytest.fixture
def nobody(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)


def test_absent_peers_are_named_with_the_remedy_and_ours_is_measured(tiny, nobody, capsys):
    sizes = ("--batches", "1,2", "--used", "5", "--prompts", "7", "--rounds", "1", "--steps", "3")
    peers.run(arguments("--shapes", "tiny", "--kinds", "float32", *sizes, "--json"))
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    cases = [(entry["what"], entry["number"], entry["used"]) for entry in found["results"]]
    assert cases == [("decode", 1, 5), ("decode", 2, 5), ("prefill", 7, 0)]
    assert all(0 < entry["seconds"]["ours"] < 60 and entry["ratio"] == {} for entry in found["results"])
    assert set(found["absent"]) == {"llama.cpp", "transformers"}
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["llama.cpp", "transformers"]
    assert "pip install llama-cpp-python gguf" in printed.err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--shapes", "gpt"), "--shapes gpt"),
        (("--kinds", ""), "--kinds"),
        (("--batches", "0"), "--batches 0"),
        (("--used", "x"), "--used x"),
        (("--rounds", "0"), "--rounds 0"),
        (("--layers", "0"), "--layers 0"),
        (("--batches", "", "--prompts", ""), "nothing is left"),
        (("--llama-cpp", "/nowhere"), "--llama-cpp"),
    ],
)
def test_flags_out_of_range_are_refused_in_one_line(flags, word, nobody):
    with pytest.raises(InputError, match=word) as refused:
        peers.run(arguments(*flags))
    assert "\n" not in str(refused.value)


def test_an_engine_that_fails_is_named(nobody):
    with pytest.raises(InputError, match=r"llama\.cpp: .*; leave it out"):
        peers.Worker(
            "llama.cpp", threads=1, path="/nowhere.gguf", vocabulary=8, sequences=1, context=8, cache="float32"
        )


def test_a_table_says_ratios_and_settings(capsys):
    seconds = {"ours": [0.01, 0.012, 0.011], "llama.cpp": [0.02, 0.022, 0.024]}
    entry = peers._entry("tiny", TINY.config(), "float32", peers.Case("decode", 4, 50), seconds)
    assert entry["ratio"]["llama.cpp"] == pytest.approx(2.0)
    peers._print([entry], peers._settings(arguments()))
    printed = capsys.readouterr().out
    assert "decode 4 at 50" in printed
    assert "2.00" in printed
    assert "logits asked" in " ".join(printed.split())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q8_0"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_gguf_file_holds_the_parameters_of_the_shape(name, kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", fake_gguf.installed())
    config = SHAPES[name].config() | {"vocab_size": 64}
    narrow = {"intermediate_size": 128, "moe_intermediate_size": 64, "hidden_size": 256}
    config |= {key: value for key, value in narrow.items() if key in config}
    write_gguf(tmp_path / "m.gguf", config, kind)
    found = json.loads((tmp_path / "m.gguf").read_text())
    per_weight = {"F32": 4, "BF16": 2, "Q8_0": 34 / 32}
    count = sum(tensor["bytes"] / per_weight[tensor["kind"]] for tensor in found["tensors"].values())
    ours = config_from_fields(config, "config.json")
    assert count == ours.other_params + ours.expert_params * ours.num_experts * ours.num_moe_layers
    assert found["keys"]["{arch}.block_count".format(**found)] == ours.num_layers
    norms = [tensor["kind"] for tensor in found["tensors"].values() if len(tensor["shape"]) == 1]
    assert set(norms) == {"F32"}


class FakeLlama(ModuleType):
    """llama.cpp's calls: writes down each batch as (position, sequence, whether logits are asked for)."""

    def __init__(self):
        super().__init__("llama_cpp.llama_cpp")
        self.batches, self.copied, self.logits = [], [], (ctypes.c_float * 64)()

    def __getattr__(self, name):
        if name.endswith("_default_params"):
            return lambda: type("Params", (), {})()
        return lambda *arguments: 1

    def llama_batch_init(self, tokens, embedding, sequences):
        ids = [(ctypes.c_int32 * 1)() for _ in range(tokens)]
        columns = {name: [0] * tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return type("Batch", (), {"n_tokens": 0, "seq_id": ids, **columns})()

    def llama_decode(self, context, batch):
        rows = range(batch.n_tokens)
        self.batches.append([(batch.pos[i], batch.seq_id[i][0], batch.logits[i]) for i in rows])
        return 0

    def llama_memory_seq_cp(self, memory, source, target, *span):
        self.copied.append((source, target))

    def llama_get_logits(self, context):
        return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_is_asked_for_all_logits_and_each_sequence_has_its_own_cache(monkeypatch):
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", fake)
    engine = peer_llama.LlamaCpp("m.gguf", 16, threads=2, sequences=3, context=3000, cache="bfloat16")
    assert engine.prefill(2100) > 0
    assert [len(batch) for batch in fake.batches] == [2048, 52]
    assert [row for batch in fake.batches for row in batch] == [(position, 0, 1) for position in range(2100)]
    fake.batches.clear()
    assert len(engine.decode(2, 50, 3)) == 3
    assert fake.copied == [(0, 1), (0, 2)]
    assert fake.batches[0] == [(position, 0, 1) for position in range(49)]
    assert fake.batches[1:] == [[(position, 0, 1), (position, 1, 1)] for position in (49, 50, 51)]
    fake.batches.clear()
    engine.decode(3, 50, 1)  # the prompt is there already
    assert [len(batch) for batch in fake.batches] == [3]


def test_binaries_are_called_and_what_they_say_is_read(tmp_path):
    program = tmp_path / BINARY
    program.write_text('#!/bin/sh\necho "$@" > "$0.said"\necho \'{"n_kv_max": 1, "t_pp": 0.5, "t_tg": 0.8}\'\n')
    program.chmod(0o755)
    engine = LlamaBinaries(str(tmp_path), "m.gguf", threads=2, context=300, cache="float32")
    assert engine.prefill(128) == 0.5
    assert engine.decode(4, 50, 8) == [0.1]
    said = (tmp_path / f"{BINARY}.said").read_text().split()
    asked = dict(itertools.pairwise(said))
    assert {key: asked[key] for key in ("-t", "-c", "-npp", "-ntg", "-npl", "-ctk")} == {
        "-t": "2",
        "-c": "2048",
        "-npp": "50",
        "-ntg": "8",
        "-npl": "4",
        "-ctk": "f32",
    }
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="no such model"):
        engine.prefill(128)


def test_weights_that_are_cut_begin_again_at_the_end():
    np.testing.assert_array_equal(cut(np.arange(5), 12, 3), [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
