"""Calls of tools in a model's text, by the forms in which the families served write them. Runs no tool."""

import json
import re
import secrets
from typing import Any

from placement.files import InputError, parse_json

# Qwen's (and Hermes'), a call each: <tool_call>{"name": …, "arguments": {…}}</tool_call>
_TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)", re.DOTALL)
# Mixtral's, all of them: [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
_LISTED = re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])", re.DOTALL)


def tool_calls(text: str, *, demanded: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """The text without its calls, and these as OpenAI's API has them. What is no whole call stays text.

    Args:
        demanded: the text as a whole is one call, which is said by its grammar (formats.py) and not by the family's form.

    >>> text, (call,) = tool_calls('So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    >>> text, call["type"], call["function"]
    ('So:', 'function', {'name': 'add', 'arguments': '{"a": 1}'})
    """
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        try:
            found = parse_json(match[1], "tool call")
        except InputError:
            return match[0]
        made = [_call(one) for one in (found if isinstance(found, list) else [found])]
        if not all(made):
            return match[0]
        calls.extend(call for call in made if call)
        return ""

    if demanded:
        found = re.fullmatch(r"\s*(\{.*\})\s*", text, re.DOTALL)
        return (take(found) if found else text, calls)
    rest = _LISTED.sub(take, _TAGGED.sub(take, text))
    return (rest.strip(), calls) if calls else (text, [])


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
