"""The form that an answer is held to, as clients of OpenAI's API say it: `response_format`, and `tool_choice` where a call is
demanded. Knows no tokens."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from launch.http.book import Refused

TYPES = ("text", "json_object", "json_schema")
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class AnswerSchema(NamedTuple):
    """A JSON schema as text, and the field that asks for it; call: what fits it is a call of a tool."""

    text: str
    field: str
    call: bool = False


def response_format(given: Any) -> AnswerSchema | None:
    """What `response_format` asks for; None: any text. Raises Refused."""
    form = given if isinstance(given, dict) else {}
    kind = form.get("type") or "text"
    if not isinstance(given, dict) or kind not in TYPES:
        raise Refused(400, f"response_format: type must be one of {', '.join(TYPES)}", "response_format")
    if kind == "text":
        return None
    schema: Any = ANY_OBJECT
    if kind == "json_schema":
        about = form.get("json_schema")
        schema = about.get("schema") if isinstance(about, dict) else None
        if not isinstance(schema, dict):
            raise Refused(400, "response_format: json_schema must have an object schema", "response_format")
    return _as_text(schema, "response_format")


def tool_call(choice: Any, tools: list[dict[str, Any]]) -> AnswerSchema | None:
    """What `tool_choice` demands: a call of any of the tools, of the one that is named, or nothing. Raises Refused."""
    if choice in ("auto", "none"):
        return None
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        functions = [function for function in functions if function["name"] == name]
        if not isinstance(name, str):
            raise Refused(400, 'tool_choice: must be "auto", "none", "required" or name a function', "tool_choice")
    if not functions:
        raise Refused(400, "tool_choice: demands a call, and no such function is in tools", "tool_choice")
    calls = [_call(function) for function in functions]
    return _as_text(calls[0] if len(calls) == 1 else {"anyOf": calls}, "tools", call=True)


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or ANY_OBJECT
    if not isinstance(parameters, dict):
        raise Refused(400, "tools: a function's parameters must be an object, a JSON schema", "tools")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _as_text(schema: Any, field: str, call: bool = False) -> AnswerSchema:
    try:
        return AnswerSchema(json.dumps(schema), field, call)
    except (RecursionError, ValueError) as error:
        raise Refused(400, f"{field}: no JSON schema ({error})", field) from None
