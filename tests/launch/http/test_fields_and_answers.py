"""What clients send and get that takes no server to see: tools, and fields that stand for nothing."""

import json

import pytest

from launch.http import fields
from launch.http.answers import Form
from launch.http.book import Refused
from launch.http.tool_calls import tool_calls

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '{"name": "add", "arguments": {"a": 1, "b": "é"}}'
CHAT = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}


@pytest.mark.parametrize(
    "text",
    [f"<tool_call>\n{CALL}\n</tool_call>", f"<tool_call>{CALL}", f"[TOOL_CALLS] [{CALL}]", f"[TOOL_CALLS][{CALL}]"],
)
def test_a_call_is_found_in_the_forms_of_the_families(text):
    rest, (call,) = tool_calls(f"Let me see. {text}")
    assert rest == "Let me see."
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "é"}


def test_several_calls_have_ids_of_their_own():
    _, calls = tool_calls(f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>")
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "<tool_call>{",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "[TOOL_CALLS] [3]",
    ],
)
def test_what_is_no_call_stays_text(text):
    assert tool_calls(text) == (text, [])


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
