"""Calls of tools in a model's text, by the forms in which the families served write them. Runs no tool."""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from placement.files import InputError, parse_json

Types = Mapping[str, Mapping[str, Any]]
"""By the name of a tool, its parameters and their types as JSON schema calls them."""

MARKS = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
"""What calls are known by; special tokens of some vocabularies."""

# Qwen's (and Hermes'), a call each: <tool_call>{"name": …, "arguments": {…}}</tool_call>
_TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)", re.DOTALL)
# Qwen3-Coder's: <tool_call><function=NAME><parameter=NAME>value</parameter></function></tool_call>
_WRITTEN = re.compile(
    r"(?:<tool_call>\s*)?<function=([^>\n]+)>(.*?)</function>\s*(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL
)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# Mixtral's, all of them: [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
_LISTED = re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])", re.DOTALL)
# DeepSeek's: <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>, before V3.1 with `function` in the name's place,
# and the name and the arguments, fenced as code, in those of the arguments.
_SEPARATED = re.compile(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)\s*", re.DOTALL)
_FENCED = re.compile(r"\s*([^\n]+)\n```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_AROUND = re.compile(r"<｜tool▁calls▁(?:begin|end)｜>")


def tool_calls(text: str, *, demanded: bool = False, types: Types | None = None) -> tuple[str, list[dict[str, Any]]]:
    """The text without its calls, and these as OpenAI's API has them. What is no whole call stays text.

    Args:
        demanded: the text as a whole is one call, which is said by its grammar (formats.py) and not by the family's form.
        types: of the tools' parameters, for a form that has no types of its own; what is not known is a text.

    >>> text, (call,) = tool_calls('So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    >>> text, call["type"], call["function"]
    ('So:', 'function', {'name': 'add', 'arguments': '{"a": 1}'})
    """
    calls: list[dict[str, Any]] = []

    def taken(read: Callable[[re.Match[str]], Sequence[Any]]) -> Callable[[re.Match[str]], str]:
        def take(match: re.Match[str]) -> str:
            try:
                made = [_call(one) for one in read(match)]
            except InputError:
                return match[0]
            if not all(made):
                return match[0]
            calls.extend(call for call in made if call)
            return ""

        return take

    if demanded:
        found = re.fullmatch(r"\s*(\{.*\})\s*", text, re.DOTALL)
        return (taken(_of_json)(found) if found else text, calls)
    rest = _LISTED.sub(taken(_of_json), _TAGGED.sub(taken(_of_json), text))
    rest = _WRITTEN.sub(taken(lambda match: [_of_parameters(match, types or {})]), rest)
    rest = _SEPARATED.sub(taken(_of_separated), rest)
    return (_AROUND.sub("", rest).strip(), calls) if calls else (text, [])


def named_calls(found: Sequence[tuple[str, str]]) -> list[dict[str, Any]] | None:
    """Calls of tools by name, with arguments as JSON, in the form of OpenAI's API; None where one is no whole call."""
    try:
        return [call for name, text in found if (call := _call({"name": name, "arguments": _arguments(text)}))]
    except InputError:
        return None


def _of_json(match: re.Match[str]) -> Sequence[Any]:
    found = parse_json(match[1], "tool call")
    return found if isinstance(found, list) else [found]


def _of_separated(match: re.Match[str]) -> Sequence[Any]:
    name, text = match[1], match[2]
    if fenced := _FENCED.fullmatch(text):
        name, text = fenced[1], fenced[2]
    return [{"name": name.strip(), "arguments": _arguments(text)}]


def _of_parameters(match: re.Match[str], types: Types) -> dict[str, Any]:
    known = types.get(match[1].strip(), {})
    found = {name.strip(): _typed(value, known.get(name.strip())) for name, value in _PARAMETER.findall(match[2])}
    return {"name": match[1].strip(), "arguments": found}


def _typed(value: str, kind: Any) -> Any:
    """A parameter's value as its schema has it: a text, unless that says otherwise and the value is such a one."""
    kinds = kind if isinstance(kind, list) else [kind]
    if kind is None or "string" in kinds:
        return value
    try:
        return parse_json(value, "parameter")
    except InputError:
        return value


def _arguments(text: str) -> dict[str, Any]:
    """Raises InputError where they are no JSON object."""
    found = parse_json(text, "arguments")
    if not isinstance(found, dict):
        raise InputError("arguments: must be an object")
    return found


def _call(found: Any) -> dict[str, Any] | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, dict | str):
        return None
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": found["name"], "arguments": text},
    }
