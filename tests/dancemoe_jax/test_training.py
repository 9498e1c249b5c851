"""Training: batches and text splits are functions of their seed, the loss falls, a resumed run is the same run."""

import argparse
import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

import launch.arguments
from dancemoe_jax.checkpoint.reader import load_model
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.training import TrainConfig, batch_at, init_state, schedule, train_step
from launch import corpus
from launch.commands import train
from launch.commands.evaluate import head, question, top_quarter_share, windows
from placement import InputError

MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=32,
    num_experts=4,
    top_k=2,
    expert_size=16,
    max_position=32,
    eos_token=256,
)
RECIPE = TrainConfig(steps=20, batch=6, context=32, warmup=5, learning_rate=1e-2)
STREAMS = [np.arange(300, dtype=np.uint16) % 10 + 10 * i for i in range(3)]


def arguments(tmp_path, *flags):
    parser = argparse.ArgumentParser()
    launch.arguments.train(parser)
    for name in ("letters", "digits"):
        alphabet = np.frombuffer(b"abcdefghij" if name == "letters" else b"0123456789", np.uint8)
        text = "\n\n".join(bytes(np.roll(alphabet, i)).decode() * 10 for i in range(60))
        (tmp_path / f"{name}.txt").write_text(text)
    domains = [f"--domain={name}={tmp_path / name}.txt" for name in ("letters", "digits")]
    small = {
        "layers": 1,
        "experts": 4,
        "top-k": 2,
        "hidden": 32,
        "expert-size": 16,
        "batch": 4,
        "context": 32,
        "steps": 20,
    }
    small = [f"--{flag}={value}" for flag, value in small.items()]
    return parser.parse_args([f"--out={tmp_path / 'model'}", *domains, *small, *flags])


def test_batches_are_a_function_of_seed_and_step_ordered_by_domain():
    batch = batch_at(RECIPE, STREAMS, 3)
    assert batch.shape == (6, 33)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, batch_at(RECIPE, STREAMS, 3))
    np.testing.assert_array_equal(batch // 10, np.repeat([0, 1, 2], 2)[:, None] * np.ones(33, int))
    np.testing.assert_array_equal((batch[:, 1:] - batch[:, :-1]) % 10, 1)
    assert not np.array_equal(batch, batch_at(RECIPE, STREAMS, 4))
    assert not np.array_equal(batch, batch_at(dataclasses.replace(RECIPE, seed=1), STREAMS, 3))


def test_learning_rate_rises_then_falls():
    rates = np.array([float(np.asarray(schedule(RECIPE)(step))) for step in range(21)])
    assert rates[0] == 0
    assert np.argmax(rates) == 5
    np.testing.assert_allclose([rates[5], rates[20]], [1e-2, 1e-3], rtol=1e-5)
    short = schedule(dataclasses.replace(RECIPE, steps=1, warmup=200))
    assert all(np.isfinite(np.asarray(short(step))) for step in range(2))


def test_loss_falls():
    state, losses = init_state(MODEL, RECIPE), []
    for step in range(20):
        state, metrics = train_step(state, batch_at(RECIPE, STREAMS, step), config=MODEL, train=RECIPE, num_domains=3)
        losses.append(np.asarray(metrics.domain_loss))
    assert int(state.step) == 20
    assert np.mean(losses[0]) > 5
    assert np.max(losses[-1]) < 0.7 * np.min(losses[0])
    assert float(metrics.balance) < 2
    assert float(metrics.grad_norm) > 0


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def test_an_interrupted_run_resumes_to_bitwise_the_same_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train.run(arguments(tmp_path / "a", "--save-every", "100"))
    assert re.search(r"trained 20 steps in \d+\.\d min", capsys.readouterr().out)

    def stops_at_13(tc, tokens, step):
        if step == 13:
            raise Interrupted
        return batch_at(tc, tokens, step)

    flags = arguments(tmp_path / "b", "--save-every", "10")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train, "batch_at", stops_at_13)
        train.run(flags)
    assert not flags.out.exists()
    train.run(flags)
    assert "resumed from step 10" in capsys.readouterr().out
    straight, resumed = (load_model(tmp_path / name / "model") for name in "ab")
    for ours, theirs in zip(jax.tree.leaves(resumed[1:3]), jax.tree.leaves(straight[1:3]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Exported weights are rounded to bfloat16; the checkpoints hold the whole state at full precision.
    saved = [tmp_path / name / "model.checkpoints" / "20" / "state" for name in "ab"]
    assert all(path.is_dir() for path in saved)
    full = [train.ocp.load(path.parent, init_state(straight.config, RECIPE)) for path in saved]
    for ours, theirs in zip(*(jax.tree.leaves(state) for state in full), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    with pytest.raises(InputError, match=r"learning_rate: 0[.]002 there, 0[.]1 here"):
        train.run(arguments(tmp_path / "b", "--learning-rate", "0.1"))
    with pytest.raises(InputError, match="steps: 20 there, 30 here"):
        train.run(arguments(tmp_path / "b", "--steps", "30"))
    shutil.rmtree(saved[1])
    with pytest.raises(InputError, match="20: damaged checkpoint") as error:
        train.run(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--batch", "3"], "--batch 3 is no multiple of the 2 domains"),
        (["--batch", "0"], "--batch 0"),
        (["--context", "4"], "--context 4"),
        (["--context", "100000"], "less than --context 100000"),
        (["--hidden", "48"], "--hidden 48"),
        (["--top-k", "5"], "--top-k 5 exceeds --experts 4"),
        (["--save-every", "0"], "--save-every 0"),
        (["--learning-rate", "inf"], "--learning-rate inf"),
        (["--balance", "-1"], "--balance -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--domain", "nameless"], "write NAME=PATH"),
        (["--domain", "more=/does/not/exist"], "has 0 documents"),
        (["--domain", "letters=/does/not/exist"], "the name 'letters' is taken"),
        (["--checkpoints", __file__], "is a file"),
        (["--out", __file__], "exists and is not only a model"),
    ],
)
def test_unusable_flags_are_one_line_and_write_nothing(tmp_path, flags, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        train.run(arguments(tmp_path, *flags))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.txt", "letters.txt"]


@pytest.fixture(scope="module", autouse=True)
def some_of_the_standard_library():
    """Reading all of it takes seconds."""
    files = list(corpus._stdlib_files())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_stdlib_files", lambda: iter(files[::6]))
        yield


@pytest.fixture(scope="module")
def domains(some_of_the_standard_library):
    return corpus.load_domains(0)


def test_no_held_out_document_or_sum_is_in_training(domains):
    for name in ("code", "prose"):
        domain = domains[name]
        assert len(domain.train) > 10 * len(domain.held_out) > 0
        assert not set(domain.train) & set(domain.held_out)
    shown = set()
    for document in domains["arithmetic"].train:
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", document):
            shown.add(frozenset((int(a), int(b)) if sign == "+" else (int(c), int(b))))
    held_out = corpus.held_out_sums()
    assert len(shown) > 4000
    assert len(held_out) > 500
    assert not shown & {frozenset(pair) for pair in held_out}


def test_the_held_out_part_alone_is_the_same(domains):
    alone = corpus.load_domains(0, train=False)
    for name, domain in domains.items():
        assert alone[name].held_out == domain.held_out
    assert corpus.load_domains(1, train=False)["arithmetic"].held_out != domains["arithmetic"].held_out


def test_prompts_are_held_out(domains):
    for name in ("code", "prose"):
        for prompt in corpus.prompts(domains[name], 5, 80, seed=1):
            assert 40 <= len(prompt) <= 80
            assert any(prompt.decode() in text for text in domains[name].held_out)
            assert not any(prompt.decode() in text for text in domains[name].train)
    held_out = corpus.held_out_sums()
    for prompt in corpus.prompts(domains["arithmetic"], 20, 80, seed=1):
        assert len(prompt) <= 80
        asked = re.findall(r"^(\d+) \+ (\d+) =$", prompt.decode().splitlines()[-1])
        assert tuple(map(int, asked[0])) in held_out
    assert corpus.prompts(domains["code"], 3, 80, seed=1) == corpus.prompts(domains["code"], 3, 80, seed=1)


def test_evaluation_windows_score_every_token_once():
    for length, width in ((2, 8), (9, 8), (10, 8), (13, 8), (100, 8), (57, 7), (33, 64)):
        inputs, targets, scored = windows(np.arange(length), width)
        np.testing.assert_array_equal(targets[scored], np.arange(1, length))
        np.testing.assert_array_equal(inputs[scored], np.arange(length - 1))
        assert (np.argmax(scored[1:], axis=1) >= width // 2).all()


def test_top_quarter_share():
    counts = np.zeros((2, 1, 8), int)
    counts[0, 0, :2], counts[1, 0, 6:] = 10, 30
    np.testing.assert_allclose(top_quarter_share(counts, counts), np.eye(2))
    np.testing.assert_allclose(top_quarter_share(counts, np.ones((2, 3, 8))[:, :1]), 0.25)


def test_a_question_does_not_give_its_answer_away():
    lines = ["12 + 34 = 46", "46 - 12 = 34", "34 + 12 = 46", "1 + 2 = 3", "5 * 6 = 30"]
    for seed in range(5):
        shown = question(lines, 12, 34, 2, seed).splitlines()
        assert sorted(shown[:-1]) == ["1 + 2 = 3", "5 * 6 = 30"]
        assert shown[-1] == "12 + 34 ="
    assert head(("äb", "cd"), 4) == ["äb", "c"]
