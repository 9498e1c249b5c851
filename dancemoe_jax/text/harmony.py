"""Answers in the form that gpt-oss writes ("harmony"): messages to several readers, each with a header that says to whom.

    <|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>Hello!

`analysis` is what the model thinks, `final` and `commentary` are for the user; a header with `to=functions.NAME` makes the
message a call of a tool. Source: https://cookbook.openai.com/articles/openai-harmony
"""

import re
from typing import NamedTuple

MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_SIGN = "\ue000"  # of private use: tells a mark from text that only spells one
_MARK = re.compile(rf"{_SIGN}(<\|\w+\|>)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
_PERHAPS_RECIPIENT = re.compile(r"\s*(?:t(?:o(?:=\S*)?)?)?\s*")


def written(mark: str) -> str:
    """How the special token of a mark stands in the text that `read_messages` takes."""
    return _SIGN + mark


class Messages(NamedTuple):
    """What a text says: to the user, to nobody, and to tools, as their names and arguments."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]


def read_messages(text: str, *, tools: bool = False) -> Messages:
    """The messages of a text so far. More of the text makes content and reasoning longer, and changes nothing of them.

    Args:
        text: with special tokens as `written` has them.
        tools: there are any; without them what is said to one is content.

    >>> text = "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    >>> for mark in MARKS:
    ...     text = text.replace(mark, written(mark))
    >>> read_messages(text)
    Messages(content='Hi', reasoning='So.', calls=[])
    """
    found: dict[str, list[str]] = {"content": [], "reasoning": []}
    calls: list[tuple[str, str]] = []
    first, *rest = _MARK.split(text)
    if _PERHAPS_RECIPIENT.fullmatch(first):
        header, first = first, ""
    else:
        header = ""  # a model that writes no headers
    found["content"] += [first] if first else []
    channel = ""
    for mark, piece in zip(rest[::2], rest[1::2], strict=True):
        if mark == "<|message|>":
            recipient = _RECIPIENT.search(header)
            if recipient and tools:
                calls.append((recipient[1], piece))
            elif piece:
                found["reasoning" if channel == "analysis" and not recipient else "content"].append(piece)
        elif mark == "<|channel|>":
            channel = (re.findall(r"\w+", piece) or [""])[0]
            header += piece
        elif mark == "<|start|>":
            header, channel = piece, ""
        elif mark in ("<|end|>", "<|call|>", "<|return|>"):
            header = channel = ""
    return Messages("\n\n".join(found["content"]), "\n\n".join(found["reasoning"]), calls)
