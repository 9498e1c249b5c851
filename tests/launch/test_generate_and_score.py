"""`python -m launch generate` and `score` as a user runs them."""

import argparse
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from dancemoe_jax import forward, load_model
from dancemoe_jax.checkpoint.reader import on_device
from launch.__main__ import main
from launch.commands import generate
from tests.helpers.paths import CHECKPOINTS, FIXTURES, ROOT


def launch(*arguments, stdin=None):
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_score_through_four_devices_gives_the_stored_logits(tmp_path):
    with np.load(CHECKPOINTS / "deepseek_v3" / "logits.npz", allow_pickle=False) as stored:
        tokens, expected = stored["tokens"], stored["logits"]
    np.save(tmp_path / "ids.npy", tokens)
    out = tmp_path / "logits.npy"
    launch(
        "score",
        "--model",
        CHECKPOINTS / "deepseek_v3",
        "--ids",
        tmp_path / "ids.npy",
        "--out",
        out,
        "--devices",
        4,
        "--placement-seed",
        5,
    )
    logits = np.load(out)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_a_seed_gives_the_same_text_in_every_batch_and_placement(tmp_path):
    lines = ["def main():", "12 + 30 =", "import sys", "def main():", "The with statement"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    rules = (
        "--temperature",
        0.9,
        "--top-p",
        0.95,
        "--repetition-penalty",
        1.05,
        "--seed",
        7,
        "--max-tokens",
        24,
        "--json",
    )

    def texts(*arguments, stdin=None):
        return [json.loads(line)["text"] for line in launch("generate", *rules, *arguments, stdin=stdin).splitlines()]

    batched = texts("--prompt-file", tmp_path / "prompts.txt")
    assert batched[0] == batched[3]
    assert len(set(batched)) == 4
    assert texts("--prompt-file", "-", "--devices", 3, stdin="\n".join(reversed(lines))) == batched[::-1]
    assert texts("--prompt", lines[1]) == batched[1:2]
    assert texts("--prompt", lines[1], "--seed", 8) != batched[1:2]


def test_text_ends_before_a_stop_string_and_at_a_stop_token():
    whole = json.loads(launch("generate", "--prompt", "12 + 30 =", "--max-tokens", 20, "--json"))
    assert whole["finish_reason"] == "length"
    assert len(whole["tokens"]) == 20
    stop = whole["text"][5:8]
    cut = json.loads(launch("generate", "--prompt", "12 + 30 =", "--max-tokens", 20, "--json", "--stop", stop))
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    streamed = launch("generate", "--prompt", "12 + 30 =", "--max-tokens", 20, "--stop", stop)
    assert streamed == "12 + 30 =" + cut["text"] + "\n"
    token = json.loads(launch("generate", "--prompt", "12 + 30 =", "--max-tokens", 20, "--json", "--stop-token", 10))
    assert token["text"] == whole["text"].split("\n")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature = -1.0"),
        (["generate", "--prompt", "x", "--top-p", "0"], "top_p = 0.0"),
        (["generate", "--prompt", "x", "--devices", "0"], "--devices 0"),
        (["generate", "--prompt", "x", "--context", "9999"], "--context 9999"),
        (["generate", "--prompt", "x", "--stop", ""], "stop"),
        (["generate", "--prompt-file", "absent.txt"], "absent.txt: cannot be read"),
        (["generate", "--prompt-file", "empty.txt"], "holds no prompt"),
        (["generate", "--prompt-file", "both.jsonl"], "line 2 must have"),
        (["generate", "--prompt-file", "typo.jsonl"], "typo.jsonl: line 3: not valid JSON"),
        (["score", "--ids", "absent.npy", "--out", "o.npy"], "absent.npy: cannot be read: No such file"),
        (["score", "--ids", "empty.txt", "--out", "o.npy"], "not a readable .npy file"),
        (["score", "--ids", "objects.npy", "--out", "o.npy"], "objects.npy: holds pickled objects; save it again"),
        (["score", "--ids", "floats.npy", "--out", "o.npy"], "holds float64 [2, 2]"),
        (["score", "--ids", "large.npy", "--out", "o.npy"], "must lie in 0..256"),
        (["score", "--ids", "long.npy", "--out", "o.npy"], "sequences of 300 tokens"),
        (["score", "--ids", "good.npy", "--out", "nowhere/o.npy"], "nowhere is no directory"),
        (["score", "--ids", "good.npy", "--out", "o.npy", "--placement-seed", "-1"], "--placement-seed -1"),
    ],
)
def test_unusable_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "both.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "messages": []}\n')
    (tmp_path / "typo.jsonl").write_text('plain\n\n{"prompt": "x"\n')
    arrays = {
        "floats": np.ones((2, 2)),
        "large": np.full((1, 2), 257),
        "long": np.zeros((1, 300), int),
        "good": np.zeros((1, 2), int),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "o.npy").exists()


def test_a_newline_alone_ends_a_prompt(tmp_path):
    lines = ["one\u2028still one", "two\x85\x0c", "{not JSON}"[1:], '{"prompt": "four"}']
    (tmp_path / "prompts").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n\n")
    arguments = argparse.Namespace(prompt=None, prompt_file=str(tmp_path / "prompts"))
    assert generate._read_prompts(arguments) == [*lines[:3], "four"]


def test_the_form_of_a_sum_that_is_shown_to_users_is_answered_right(capsys):
    shown = r"1 + 1 = 2\n47 + 38 ="
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert shown in " ".join(capsys.readouterr().out.split())
    assert f"printf '{shown}'" in (ROOT / "launch" / "README.md").read_text()
    assert main(["generate", "--prompt", shown.replace(r"\n", "\n"), "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == "1 + 1 = 2\n47 + 38 = 85\n"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model one of whose experts overflows, a prompt that chooses it and one that does not, and the second one's token."""
    path = tmp_path_factory.mktemp("models") / "overflows"
    shutil.copytree(FIXTURES / "families" / "qwen3_moe", path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.save(str(path / "tokenizer.json"))
    model = load_model(path)
    prompts = np.random.default_rng(0).integers(0, 64, (40, 2))
    logits, ids = forward(model.config, model.decoder, on_device(model.config, model.experts), prompts)
    chosen = (np.asarray(ids)[1].reshape(40, -1, 1) == np.arange(model.config.num_experts)).any(1)
    expert = int(np.argmin(chosen.sum(0)))
    bad, good = (int(np.flatnonzero(chosen[:, expert] == wanted)[0]) for wanted in (True, False))
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].fill(3e38)
    save_file(tensors, path / "model.safetensors")
    texts = [" ".join(f"w{token}" for token in prompts[row]) for row in (bad, good)]
    return path, texts, int(np.asarray(logits)[good, -1].argmax()), prompts[[good, bad]]


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_a_prompt_of_which_the_model_makes_infinity_ends_with_an_error_and_the_others_are_answered(
    overflowing, kernels, tmp_path, capsys
):
    path, texts, token, ids = overflowing
    (tmp_path / "prompts.txt").write_text("\n".join([texts[0], texts[1], texts[1]]))
    given = ["--model", str(path), "--kernels", kernels]
    assert (
        main(["generate", *given, "--prompt-file", str(tmp_path / "prompts.txt"), "--max-tokens", "1", "--json"]) == 2
    )
    out, err = capsys.readouterr()
    bad, *good = [json.loads(line) for line in out.splitlines()]
    assert (bad["finish_reason"], bad["tokens"]) == ("error", [])
    assert "from layer 1 on" in bad["error"]
    assert [(one["finish_reason"], one["tokens"]) for one in good] == [("length", [token])] * 2
    assert err == f"launch generate: prompt 1: {bad['error']}\n"
    np.save(tmp_path / "ids.npy", ids)
    assert main(["score", *given, "--ids", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "o.npy")]) == 2
    assert "sequence 1 of --ids: its numbers are NaN or infinity from layer 1 on" in capsys.readouterr().err
    assert not (tmp_path / "o.npy").exists()
