"""The real `openai` client against a front door: what it gets is what `generate` says, streamed or not."""

import json
import math

import openai
import pytest

MODEL = "tiny-moe"
PROMPTS = ["def main(", "The import statement", "12 + 30 = "]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_the_text_of_generate(door, generated, prompt):
    expected = generated(prompt, max_tokens=12)
    found = door.client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == (expected["text"], expected["finish_reason"])
    assert (found.model, found.object) == (MODEL, "text_completion")
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.total_tokens == len(prompt) + found.usage.completion_tokens == len(prompt) + 12


def test_a_stream_is_the_same_text_in_pieces(door, generated):
    expected = generated("def main(", max_tokens=100, temperature=0.8, top_p=0.9, seed=5)
    stream = door.client.completions.create(
        model=MODEL, prompt="def main(", max_tokens=100, temperature=0.8, top_p=0.9, seed=5, stream=True
    )
    chunks = list(stream)
    assert len(chunks) > 5
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected["text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == expected["finish_reason"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_streamed_or_not(door):
    given = {
        "model": MODEL,
        "messages": [{"role": "system", "content": "import os"}, {"role": "user", "content": "def "}],
        "max_completion_tokens": 10,
        "temperature": 0,
    }
    whole = door.client.chat.completions.create(**given)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 10
    chunks = list(door.client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_and_answers_have_places_of_their_own(door, generated):
    found = door.client.completions.create(
        model=MODEL, prompt=["a = ", "b = "], n=2, max_tokens=6, temperature=1.0, seed=2**32 - 1
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    # Each further answer has the next seed.
    expected = [
        generated(p, max_tokens=6, temperature=1.0, seed=s)["text"] for p in ("a = ", "b = ") for s in (2**32 - 1, 0)
    ]
    assert [choice.text for choice in found.choices] == expected
    assert found.usage.prompt_tokens == 8
    ids = door.client.completions.create(model=MODEL, prompt=list(b"def main("), max_tokens=12, temperature=0)
    assert ids.choices[0].text == generated("def main(", max_tokens=12)["text"]


@pytest.mark.parametrize("stop", ["\n", ["zzz", "\n"]])
def test_a_stop_text_ends_an_answer_which_does_not_hold_it(door, generated, stop):
    expected = generated("12 + 30 = ", max_tokens=40, stop="\n")
    assert expected["finish_reason"] == "stop"
    found = door.client.completions.create(model=MODEL, prompt="12 + 30 = ", max_tokens=40, temperature=0, stop=stop)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected["text"], "stop")


def test_a_token_that_ends_an_answer_is_its_last(door, generated):
    expected = generated("12 + 30 = ", max_tokens=40, stop="\n")["text"]
    given = {"model": MODEL, "prompt": "12 + 30 = ", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    given["extra_body"] = {"stop_token_ids": [ord("\n")]}
    found = door.client.completions.create(**given)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
    assert found.choices[0].logprobs.tokens == [*expected, "\n"]
    assert found.usage.completion_tokens == len(expected) + 1
    chunks = list(door.client.completions.create(**given, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_null_is_not_given_and_unknown_fields_change_nothing(door, generated):
    body = {"prompt": "def main(", "max_tokens": 8, "temperature": 0, "stop": None, "n": None, "model": None}
    body |= {"seed": None, "logprobs": None, "stream": None, "stream_options": None, "no_such_field": {"a": 1}}
    found = door.http.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["text"] == generated("def main(", max_tokens=8)["text"]


def test_models_and_tokens(door):
    assert [model.id for model in door.client.models.list()] == [MODEL]
    assert door.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        door.client.completions.create(model="gpt-4", prompt="x")
    found = door.http.post("/tokenize", json={"prompt": "é!"}).json()
    assert found == {"count": 3, "max_model_len": 128, "tokens": list("é!".encode())}
    assert door.http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "é!"}
    assert door.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["count"] == 2


def test_a_client_that_leaves_frees_its_place(door):
    stream = door.client.completions.create(model=MODEL, prompt="def ", max_tokens=120, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    found = door.client.completions.create(model=MODEL, prompt="def ", max_tokens=2, temperature=0)
    assert found.usage.completion_tokens == 2
    for _ in range(50):
        if (left := door.http.get("/ready").json()["requests"]) == 0:
            break
    assert left == 0


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("completions", {"prompt": 5}, "prompt: must be a text"),
        ("completions", {"prompt": [[1], "a", {}]}, "prompt: must be a text"),
        ("completions", {}, "prompt: must be a text"),
        ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens: must be an integer of at least 1"),
        ("completions", {"prompt": "x", "n": 0}, "n: must be an integer from 1"),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature = -1"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p = 0"),
        ("completions", {"prompt": "x", "stop": [""]}, "none of them empty"),
        ("completions", {"prompt": "x", "echo": True}, "echo: not supported"),
        ("completions", {"prompt": "x" * 128}, "128 tokens; the model's context of 128"),
        ("completions", {"prompt": "x" * 10**6}, "a prompt of 1000000 characters"),
        ("completions", {"prompt": [300]}, "token ids must lie in 0..256"),
        ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, "needs stream"),
        ("chat/completions", {"messages": []}, "messages: must be a list"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "content is a int"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "needs logprobs"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(door, path, body, words):
    found = door.http.post(f"/v1/{path}", json=body)
    assert found.status_code == 400, found.text
    assert words in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"\xff{}", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"prompt=x", "application/x-www-form-urlencoded", 415),
        (b" " * (8 * 2**20 + 1), "application/json", 413),
    ],
)
def test_what_is_no_body_is_refused(door, content, kind, status):
    found = door.http.post("/v1/completions", content=content, headers={"content-type": kind})
    assert found.status_code == status
    assert found.json()["error"]["message"]


def test_paths_and_methods(door):
    assert door.http.get("/v1/nothing").status_code == 404
    assert door.http.get("/v1/completions").status_code == 405
    assert json.loads(door.http.get("/health").text) == {"status": "live"}
    assert door.ready()["ready"] is True


def test_logprobs_are_those_of_the_models_logits(door):
    given = {"model": MODEL, "prompt": "def main(", "max_tokens": 6}
    greedy = door.client.completions.create(**given, temperature=0, logprobs=3).choices[0]
    found = greedy.logprobs
    assert "".join(found.tokens) == greedy.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(6)]
    for own, likeliest in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert len(likeliest) == 3
        assert own == max(likeliest.values()) < 0  # the likeliest was taken
        assert sum(math.exp(value) for value in likeliest.values()) < 1
    # Whatever the temperature is, they are the model's own: the first token's are the same.
    hot = door.client.completions.create(**given, temperature=2.0, seed=1, logprobs=3).choices[0].logprobs
    assert hot.top_logprobs[0] == found.top_logprobs[0]
    chat = door.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "def main("}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content
    assert [part.logprob for part in content] == pytest.approx(found.token_logprobs)
    assert [len(part.top_logprobs) for part in content] == [2] * 6
    assert bytes(content[0].bytes).decode() == content[0].token
    chunks = list(door.client.completions.create(**given, temperature=0, logprobs=3, stream=True))
    parts = [
        value for chunk in chunks if chunk.choices[0].logprobs for value in chunk.choices[0].logprobs.token_logprobs
    ]
    assert parts == pytest.approx(found.token_logprobs)
