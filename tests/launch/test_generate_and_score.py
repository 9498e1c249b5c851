"""`python -m launch generate` and `score` as a user runs them."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest

from launch.__main__ import main
from launch.commands import generate
from tests.helpers.paths import CHECKPOINTS, ROOT


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
