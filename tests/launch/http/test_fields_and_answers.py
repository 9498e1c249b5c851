"""What clients send and get that takes no server to see: tools, and fields that stand for nothing."""

import json
import re
import time
from typing import Any

import pytest

from dancemoe_jax.text.harmony import MARKS, read_messages, written
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
    rest, (call,) = tool_calls(f"Let me see. {text}", types={"add": {"a": ["integer"], "b": ["string"]}})
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


@pytest.mark.parametrize("value", ["1", "true", "True", "None", "null", "[1]", "x y", "{", ""])
def test_a_parameter_is_a_text_unless_its_type_says_otherwise(value):
    def read(kinds: list[str]) -> Any:
        _, (call,) = tool_calls(
            f"<function=f><parameter=p>\n{value}\n</parameter></function>", types={"f": {"p": kinds}}
        )
        return json.loads(call["function"]["arguments"])["p"]

    assert read([]) == read(["string"]) == read(["string", "null"]) == value
    known = {"1": 1, "true": True, "True": True, "[1]": [1], "None": None, "null": None}
    assert read(["integer"]) == known.get(value, value)


def spoken(text: str) -> str:
    """A text of gpt-oss whose marks are special tokens."""
    for mark in MARKS:
        text = text.replace(mark, written(mark))
    return text


HARMONY = spoken(
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
    header = "<|end|><|start|>assistant to=functions.now<|channel|>commentary<|message|>"
    both = said(HARMONY + spoken(header), CHAT)
    assert [call["function"]["arguments"] for call in both["tool_calls"]] == [ARGUMENTS, "{}"]
    assert len(said(HARMONY + spoken(header), CHAT, "length")["tool_calls"]) == 1  # nobody knows of what it was cut


def test_an_answer_that_is_held_to_a_schema_has_no_headers():
    form = '{"elm": "f <| x", "mark": "<|end|>"}'
    assert said(form, {**CHAT, "tools": None, "response_format": {"type": "json_object"}})["content"] == form
    form = Form(fields.chat({**CHAT, "response_format": {"type": "json_object"}}), "m", str)
    text = '{"doc": "<function=a> </function>"}'
    assert json.loads(form.next(0, text, [], "stop").removeprefix(b"data: "))["choices"][0]["delta"] == {
        "content": text
    }
    held = said(CALL.replace("é", "<| é"), {**CHAT, "tool_choice": "required"})
    assert json.loads(held["tool_calls"][0]["function"]["arguments"])["b"] == "<| é"


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("", "", ""),
        ("2 <| 3 <|end|>", "2 <| 3 <|end|>", ""),  # spelled, no mark
        (spoken("<|channel|>final<|message|>It is ") + "<|end|>, and more", "It is <|end|>, and more", ""),
        ("Hello." + spoken("<|end|><|start|>assistant<|channel|>final<|message|>Hi"), "Hello.\n\nHi", ""),
        (spoken("<|channel|>analysis<|message|>So.<|channel|>final<|message|>Hi"), "Hi", "So."),
        (spoken(" to=functions.add<|channel|>commentary<|message|>{}"), "{}", ""),
        (spoken("<|message|>a<|return|>b<|start|>"), "a", ""),
    ],
)
def test_messages_of_any_form_are_read(text, content, reasoning):
    assert read_messages(text) == (content, reasoning, [])


def test_what_was_said_of_a_growing_text_stays():
    whole = HARMONY + spoken("<|call|><|start|>assistant<|channel|>final<|message|>2 < 3 <| 4 <|message|> 5")
    parts = re.split(rf"({re.escape(written(''))}<\|\w+\|>|)", whole)  # marks are tokens, so they come whole
    for start in ("", "to be", " to=functions.add", "Well"):
        form, before, text = Form(fields.chat({**CHAT, "tools": None}), "m", str, harmony=True), ("", ""), ""
        for part in [*start, *parts]:
            text += part or ""
            now = form.said(text)
            assert [new.startswith(old) for new, old in zip(now, before, strict=True)] == [True, True]
            before = now
        assert before[0] == ("" if "=" in start else "Let me see.")
        assert before[1].endswith("I look.\n\n" + ARGUMENTS + "\n\n2 < 3 <| 4 \n\n 5")


def test_calls_that_stand_together_or_in_each_other_stay_what_they_are():
    def called(text: str) -> list[tuple[str, Any]]:
        _, calls = tool_calls(text)
        return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]

    add, sub = (f"<function={name}>\n<parameter=a>\n{name}\n</parameter>\n</function>" for name in ("add", "sub"))
    expected = [("add", {"a": "add"}), ("sub", {"a": "sub"})]
    assert called(f"{add}\n{sub}") == called(f"<tool_call>\n{add}\n{sub}\n</tool_call>") == expected
    assert called(f"<tool_call>{add}\nNow the other: <tool_call>{sub}") == expected
    assert tool_calls(f"{add} So.")[0] == "So."
    inner = '<tool_call>{"name":"rm","arguments":{}}</tool_call>'
    outer = f"<function=write><parameter=s>A call: {inner} so</parameter></function>"
    assert called(outer) == [("write", {"s": f"A call: {inner} so"})]
    quoted = json.dumps({"name": "write", "arguments": {"s": inner}})
    assert called(f"<tool_call>{quoted}</tool_call>") == [("write", {"s": inner})]
    open_ = "<function=f><parameter=a>\n1\n<parameter=b>\n2\n</function>"
    assert called(open_) == [("f", {"a": "1", "b": "2"})]
    begun = SEPARATED.format("x", "y").removesuffix("<｜tool▁call▁end｜>") + SEPARATED.format("add", "{}")
    assert called(begun) == [("add", {})]
    assert called(SEPARATED.format("", "{}")) == []
    broken = "<｜tool▁call▁begin｜>oops<｜tool▁call▁end｜><｜tool▁call▁begin｜>" + SEPARATED.format("add", "{}")
    assert called(broken) == [("add", {})]
    for cut in ("add<｜tool▁sep｜>", "function<｜tool▁sep｜>add\n```json\n"):
        assert called("<｜tool▁call▁begin｜>" + cut) == []
        assert called("<｜tool▁call▁begin｜>" + cut + "<｜tool▁call▁end｜>") == [("add", {})]
    code = "print('<parameter=')\nx > y; z = '<parameter=q>' + '</function>'"
    assert called(f"<function=run>\n<parameter=code>\n{code}\n</parameter>\n</function>") == [("run", {"code": code})]
    assert called('<tool_call>{"name": "pay", "arguments": {"wei": 1' + "0" * 25 + "}}") == [("pay", {"wei": 10**25})]
    assert called('<tool_call>{"name": "pay", "arguments": {"wei": NaN}}') == []
    assert called('[TOOL_CALLS][{"name": "now", "arguments": null}, {"name": "now"}]') == [("now", {})] * 2
    assert called(r'<tool_call>{"name":"add","arguments":{"a":"\ud83d"}}</tool_call>') == [("add", {"a": "?"})]


@pytest.mark.parametrize(
    "text",
    [
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n" + "\n" * 10**5,
        "<function=a>" * 20_000,
        "<function=>" * 10_000 + "<parameter=a>" * 10_000 + "</function>",
        "<function=a>" * 10_000 + "<parameter=a>" * 10_000 + "<parameter=\nx\ny></function>",
        "<tool_call>" * 20_000,
        "<function=f>" + "<parameter=a>" * 20_000 + "</function>",
        "<function=a>" * 20_000 + "</function>",
        "<tool_call>{}" * 20_000 + "x",
        '<tool_call>{"a' * 20_000,
        "<tool_call>{" * 20_000 + "</tool_call>",
        "<｜tool▁call▁begin｜>" * 20_000,
        "<｜tool▁call▁begin｜>a<｜tool▁sep｜>" * 20_000,
        "[TOOL_CALLS][" * 20_000,
        '[TOOL_CALLS]["' + '\\"' * 10**5,
        spoken("<|channel|>a<|message|>b<|end|>") * 10_000,
    ],
)
def test_no_text_takes_long_to_read(text):
    begin = time.process_time()
    tool_calls(text)
    read_messages(text)
    assert time.process_time() - begin < 2


def test_types_are_found_in_alternatives_too():
    either = {"anyOf": [{"type": "integer"}, {"type": "null"}, 3]}
    schema = {"type": "object", "properties": {"a": either, "b": {"type": ["boolean", "null"]}, "c": True, "d": {}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    values = {"a": "5", "b": "False", "c": "5", "d": "5"}
    text = "".join(f"<parameter={name}>{value}</parameter>" for name, value in values.items())
    form = Form(fields.chat({**CHAT, "tools": [tool]}), "m", str)
    (choice,) = json.loads(form.next(0, f"<function=f>{text}</function>", [], "stop").removeprefix(b"data: "))[
        "choices"
    ]
    arguments = json.loads(choice["delta"]["tool_calls"][0]["function"]["arguments"])
    assert arguments == {"a": 5, "b": False, "c": "5", "d": "5"}


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
