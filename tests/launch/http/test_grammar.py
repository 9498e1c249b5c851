"""Answers held to a JSON schema, and calls of tools that are demanded, by the real `openai` client."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.helpers.front_door import front_door

MODEL = "tiny-moe"
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4}
TEXT = {
    "type": "object",
    "properties": {"word": {"type": "string", "pattern": "^[a-z]{3,8}$"}, "sub": {"$ref": "#/$defs/n"}},
    "required": ["word", "sub"],
    "additionalProperties": False,
    "$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 5}]}},
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
NEGATE = {"type": "function", "function": {"name": "negate", "parameters": {"type": "object", "maxProperties": 0}}}
MESSAGES = [{"role": "user", "content": "def main("}]


def fits(schema: dict, value) -> bool:
    if schema is POINT:
        return list(value) == ["x", "on"] and 0 <= value["x"] <= 999 and isinstance(value["on"], bool)
    if schema is LIST:
        return 2 <= len(value) <= 4 and set(value) <= {"red", "green", "blue"}
    return 3 <= len(value["word"]) <= 8 and (value["sub"] is None or -5 <= value["sub"] <= 5)


def answer_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def ask(door, schema: dict, **given):
    return door.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=90, response_format=answer_format(schema), **given
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "seed": 3}, {"top_p": 0.5, "seed": 4}])
@pytest.mark.parametrize("schema", [POINT, LIST, TEXT])
def test_answers_fit_their_schema_streamed_or_not(door, schema, sampling):
    whole = ask(door, schema, **sampling)
    assert whole.choices[0].finish_reason == "stop"
    assert fits(schema, json.loads(whole.choices[0].message.content)), whole.choices[0].message.content
    pieces = list(ask(door, schema, stream=True, **sampling))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert len(pieces) > 2


def test_any_object_is_one(door):
    found = door.client.completions.create(
        model=MODEL,
        prompt="x = ",
        max_tokens=100,
        temperature=0,
        extra_body={"response_format": {"type": "json_object"}},
    )
    text, reason = found.choices[0].text, found.choices[0].finish_reason
    assert text.startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)


def test_others_in_the_batch_are_answered_as_ever(door):
    def plain(number: int) -> str:
        given = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}
        return door.client.completions.create(model=MODEL, prompt="def f(", max_tokens=60, **given).choices[0].text

    expected = [plain(number) for number in range(3)]
    alone = ask(door, TEXT, temperature=1.0, seed=9).choices[0].message.content
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(plain, number) for number in range(3)]
        held = [pool.submit(ask, door, TEXT, temperature=1.0, seed=9) for _ in range(3)]
        assert [one.result(100) for one in others] == expected
        assert {one.result(100).choices[0].message.content for one in held} == {alone}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "at /properties/a: Invalid type: strin"),
        ({"type": "array", "items": {"type": "string", "pattern": "(("}}, "at /items: regex parse error"),
    ],
)
def test_a_bad_schema_is_refused_with_its_place(door, schema, place):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(door, schema)
    assert place in str(refused.value)
    assert refused.value.body["param"] == "response_format"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_demanded_comes(door, stream):
    named = {"type": "function", "function": {"name": "negate"}}
    for choice, names in (("required", {"add", "negate"}), (named, {"negate"})):
        found = door.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=90, tools=[ADD, NEGATE], tool_choice=choice, stream=stream
        )
        if stream:
            found = [chunk for chunk in found if chunk.choices[0].delta.tool_calls][-1]
        (answer,) = found.choices
        assert answer.finish_reason == "tool_calls"
        (call,) = (answer.delta if stream else answer.message).tool_calls
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        assert arguments == {} or 0 <= arguments["a"] <= 9


def test_the_next_worker_goes_on_where_the_answer_was(tmp_path):
    schema = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 10, "maxItems": 10}
    given = {"temperature": 1.0, "seed": 6}
    with front_door(tmp_path, "--hold", "120") as door:
        expected = ask(door, schema, **given).choices[0].message.content
        assert len(json.loads(expected)) == 10
        stream, text, killed = ask(door, schema, stream=True, **given), "", False
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if len(text) > 20 and not killed:
                os.kill(door.worker(), signal.SIGKILL)
                killed = True
                time.sleep(0.1)
        assert text == expected
        assert door.ready()["restarts"] == 1
