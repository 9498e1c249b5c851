"""What clients send and get that takes no server to see: tools, and fields that stand for nothing."""

import json
import re
from typing import Any

import pytest

from launch.http import fields
from launch.http.answers import Form
from launch.http.book import Refused
from launch.http.tool_calls import tool_calls

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '{"name": "add", "arguments": {"a": 1, "b": "é"}}'
CHAT = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}


WRITTEN = "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\né\n</parameter>\n</function>"
SEPARATED = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
ARGUMENTS = '{"a": 1, "b": "é"}'


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{CALL}\n</tool_call>",
        f"<tool_call>{CALL}",
        f"[TOOL_CALLS] [{CALL}]",
        f"[TOOL_CALLS][{CALL}]",
        f"<tool_call>\n{WRITTEN}\n</tool_call>",
        WRITTEN,
        "<｜tool▁calls▁begin｜>" + SEPARATED.format("add", ARGUMENTS) + "<｜tool▁calls▁end｜>",
        SEPARATED.format("function", f"add\n```json\n{ARGUMENTS}\n```").removesuffix("<｜tool▁call▁end｜>"),
    ],
)
def test_a_call_is_found_in_the_forms_of_the_families(text):
    rest, (call,) = tool_calls(f"Let me see. {text}", types={"add": {"a": "integer", "b": "string"}})
    assert rest == "Let me see."
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "é"}


def test_several_calls_have_ids_of_their_own():
    _, calls = tool_calls(f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>")
    assert len({call["id"] for call in calls}) == 2
    together = SEPARATED.format("add", '{"a": 1}') + "\n" + SEPARATED.format("sub", '{"a": 2}')
    rest, calls = tool_calls(f"Two:<｜tool▁calls▁begin｜>{together}<｜tool▁calls▁end｜>")
    assert (rest, [call["function"]["name"] for call in calls]) == ("Two:", ["add", "sub"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "<tool_call>{",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "[TOOL_CALLS] [3]",
        "<function=add><parameter=a>",
        SEPARATED.format("add", "[1]"),
        SEPARATED.format("add", "{cut"),
    ],
)
def test_what_is_no_call_stays_text(text):
    assert tool_calls(text) == (text, [])


@pytest.mark.parametrize("value", ["1", "true", "[1]", "x y", "{", ""])
def test_a_parameter_is_a_text_unless_its_type_says_otherwise(value):
    def read(kind: Any) -> Any:
        _, (call,) = tool_calls(
            f"<function=f><parameter=p>\n{value}\n</parameter></function>", types={"f": {"p": kind}}
        )
        return json.loads(call["function"]["arguments"])["p"]

    assert read(None) == read("string") == read(["string", "null"]) == value
    assert read("integer") == (json.loads(value) if value in ("1", "true", "[1]") else value)


HARMONY = (
    "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
    "<|end|><|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>" + ARGUMENTS
)


def said(text: str, body: dict[str, Any], reason: str = "stop") -> dict[str, Any]:
    form = Form(fields.chat(body), "m", str, harmony=True)
    (choice,) = json.loads(form.next(0, text, [], reason).removeprefix(b"data: "))["choices"]
    return {**choice["delta"], "finish_reason": choice["finish_reason"]}


def test_messages_with_headers_are_content_reasoning_and_calls():
    found = said(HARMONY, CHAT)
    assert (found["content"], found["reasoning_content"]) == ("I look.", "Let me see.")
    (call,) = found["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1, "b": "é"})
    assert found["finish_reason"] == "tool_calls"
    cut = said(HARMONY[:-3], CHAT, "length")
    assert (cut["content"], cut["finish_reason"]) == ("I look.\n\n" + ARGUMENTS[:-3], "length")
    assert "tool_calls" not in cut
    held = said(f"{CALL}", {**CHAT, "tool_choice": "required"})  # by its grammar, from the first token on
    assert held["tool_calls"][0]["function"]["name"] == "add"
    assert "<|" not in json.dumps([found, held])


def test_what_was_said_of_a_growing_text_stays():
    whole = HARMONY + "<|call|><|start|>assistant<|channel|>final<|message|>2 < 3 <| 4"
    form, before = Form(fields.chat({**CHAT, "tools": None}), "m", str, harmony=True), ("", "")
    for end in range(len(whole) + 1):
        if not re.search(r"<\|?[a-z]*\|?$", whole[:end]):  # marks are tokens, so they come whole
            now = form.said(whole[:end])
            assert [new.startswith(old) for new, old in zip(now, before, strict=True)] == [True, True]
            before = now
    assert before == ("Let me see.", "I look.\n\n" + ARGUMENTS + "\n\n2 < 3 <| 4")


def test_tools_are_for_the_template_and_their_calls_are_the_answer():
    wanted = fields.chat(CHAT)
    assert wanted.prompts[0]["variables"] == {"tools": [TOOL]}
    form = Form(wanted, "m", str)
    event = json.loads(form.next(0, f"<tool_call>{CALL}</tool_call>", [], "stop").removeprefix(b"data: "))
    (choice,) = event["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["delta"]["tool_calls"][0]["index"] == 0
    assert choice["delta"]["content"] is None
    cut = json.loads(form.next(0, f"<tool_call>{CALL}</tool_call>", [], "length").removeprefix(b"data: "))
    assert cut["choices"][0]["finish_reason"] == "length"
    for without in (fields.chat({**CHAT, "tool_choice": "none"}), fields.chat({**CHAT, "tools": None})):
        assert not without.tools
        assert "variables" not in without.prompts[0]


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [{}]},
        {"tools": [{"type": "function", "function": {}}]},
        {"tools": "add"},
        {"tool_choice": "sometimes"},
        {"tool_choice": {"type": "function", "function": {"name": "absent"}}},
        {"tool_choice": "required", "tools": None},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": [1]}}},
        {"response_format": []},
        {"tools": [{"type": "function", "function": {"name": "add", "parameters": 3}}], "tool_choice": "required"},
        {"chat_template_kwargs": {"messages": []}},
        {"logit_bias": {"5": 1}},
        {"presence_penalty": 0.5},
    ],
)
def test_what_cannot_be_done_is_refused_and_never_done_otherwise(given):
    with pytest.raises(Refused) as refused:
        fields.chat(CHAT | given)
    assert refused.value.status == 400
    assert refused.value.param in given


def test_seeds_of_any_sign_and_size_are_ours():
    assert fields.chat(CHAT | {"seed": -1}).seed == 2**32 - 1
    assert fields.chat(CHAT | {"seed": 2**40 + 3}).seed == 3
    assert fields.chat(CHAT).seed != fields.chat(CHAT).seed  # without one, answers differ
