"""Answers in the form that gpt-oss writes ("harmony"): messages to several readers, each with a header that says to whom.

    <|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>Hello!

`analysis` is what the model thinks, `final` and `commentary` are for the user; a header with `to=functions.NAME` makes the
message a call of a tool. Source: https://cookbook.openai.com/articles/openai-harmony
"""

import re
from typing import NamedTuple

MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_ENDS = re.compile(r"<\|(?:start|end|call|return)\|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


class Messages(NamedTuple):
    """What a text says: to the user, to nobody, and to tools, as their names and arguments."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]


def read_messages(text: str, *, tools: bool = False) -> Messages:
    """The messages of a text so far. More of the text makes content and reasoning longer, and changes nothing of them.

    Args:
        tools: there are any; without them what is said to one is content.

    >>> read_messages("<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Hi")
    Messages(content='Hi', reasoning='So.', calls=[])
    """
    if "<|" not in text:
        return Messages(text, "", [])  # as answers that are held to a schema
    content, reasoning, calls = list[str](), list[str](), list[tuple[str, str]]()
    for message in _ENDS.split(text):
        header, mark, body = message.partition("<|message|>")
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if not mark or not body:
            continue
        if recipient and tools:
            calls.append((recipient[1], body))
        elif channel and channel[1] == "analysis":
            reasoning.append(body)
        else:
            content.append(body)
    return Messages("\n\n".join(content), "\n\n".join(reasoning), calls)
