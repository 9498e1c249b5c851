"""Special tokens that say what an answer is: read where they do, and never shown."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.text.harmony import MARKS
from dancemoe_jax.text.tokenizer import TokenizerBundle, byte_tokenizer
from launch.http import fields
from launch.http.answers import Form
from launch.http.book import Book
from launch.http.service import Service
from launch.serve.lines import answer_fields
from launch.serve.requests import RequestMaker

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
EOS, CONTEXT = 256, 512


class Supervisor:
    """Has no worker."""

    def check_hope(self) -> None:
        pass

    def flush(self) -> None:
        pass


def answered(marks: tuple[str, ...], text: str, body: dict[str, Any]) -> dict[str, Any]:
    """The choice that a client gets where a model with such special tokens has given a text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    template = "{{ messages[0].content }}"
    bundle = TokenizerBundle(Path("model"), tokenizer, False, frozenset({EOS}), {}, template)
    config = dataclasses.replace(
        read_config(bundled_model()), vocab_size=tokenizer.get_vocab_size(), max_position=CONTEXT
    )
    book, supervisor = Book(4, CONTEXT, EOS), Supervisor()
    service = Service(bundle, config, ("m",), 0, book, supervisor)  # pyright: ignore

    async def run() -> dict[str, Any]:
        wanted = fields.chat(body) if "messages" in body else fields.completion(body)
        (accepted,) = await service.accept(wanted)
        book.take(accepted.number, [*tokenizer.encode(text).ids, EOS])
        form = Form(wanted, "m", service.piece, harmony=service.harmony)
        return form.whole([accepted])["choices"][0]

    return asyncio.run(run())


CHAT = {"messages": [{"role": "user", "content": "1 + 1"}]}
SPOKEN = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 2é."


def test_headers_are_read_and_not_shown():
    message = answered(MARKS, SPOKEN, CHAT)["message"]
    assert message == {"role": "assistant", "content": "It is 2é.", "reasoning_content": "Easy."}
    call = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
    choice = answered(MARKS, call, {**CHAT, "tools": [TOOL]})
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_a_mark_that_is_only_spelled_is_text():
    tokenizer_marks = tuple(mark for mark in MARKS if mark != "<|end|>")
    choice = answered((*tokenizer_marks, "<|end|>"), SPOKEN + " <|", CHAT)
    assert choice["message"]["content"] == "It is 2é. <|"
    assert answered(tokenizer_marks, SPOKEN, CHAT)["message"]["content"] == (
        "analysisEasy.<|end|>assistantfinalIt is 2é."  # a vocabulary without one of them is another model's
    )


def test_variables_of_the_template_may_have_any_name():
    choice = answered((), "Hi", {**CHAT, "chat_template_kwargs": {"given": 1, "self": 2, "source": 3}})
    assert choice["message"]["content"] == "Hi"


def test_a_completion_is_the_text_without_special_tokens():
    choice = answered(MARKS, SPOKEN, {"prompt": "1 + 1", "max_tokens": 200})
    assert choice["text"] == "analysisEasy.assistantfinalIt is 2é."


@pytest.mark.parametrize("tools", [True, False])
def test_a_mark_that_is_a_special_token_is_for_calls_alone(tools):
    text = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]'
    choice = answered(("[TOOL_CALLS]", "[OTHER]"), "[OTHER]" + text, {**CHAT, **({"tools": [TOOL]} if tools else {})})
    if tools:
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"
    else:
        assert choice["message"] == {"role": "assistant", "content": text.removeprefix("[TOOL_CALLS]")}


def test_lines_with_messages_have_the_content_too():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    bundle = TokenizerBundle(Path("model"), tokenizer, False, frozenset({EOS}), {}, "{{ messages[0].content }}")
    maker = RequestMaker(bundle, dataclasses.replace(read_config(bundled_model()), vocab_size=300))
    for given, content, reasoning in (
        ({"messages": CHAT["messages"]}, "It is 2é.", "Easy."),
        ({"prompt": "1 + 1"}, "analysisEasy.assistantfinalIt is 2é.", None),
    ):
        request, text = maker.make(given, 0, 0.0)
        for token in tokenizer.encode(SPOKEN).ids:
            request.take(token, EOS, CONTEXT)
        text.finish()
        answer = answer_fields("a", request, text.messages, "stop", 1.0)
        assert (answer["text"], answer.get("reasoning")) == (content, reasoning)
