"""Chat templates: where a model keeps its template, and what of a conversation it is given."""

import json
from pathlib import Path
from typing import Any

from dancemoe_jax.errors import ModelError, RequestError

LARGEST_TEMPLATE = 2**20  # characters; published ones have 20,000


def read_chat_templates(path: Path, field: Any) -> tuple[str | None, str | None]:
    """A model's chat template, and the one for conversations with tools where that is another.

    A file of its own goes before the field of tokenizer_config.json, which is a text or a list of named ones.

    Raises:
        ModelError: the file cannot be read, the field is something else, or a template is absurdly long.
    """
    file, where = path / "chat_template.jinja", path / "tokenizer_config.json"
    tools = None
    if file.exists():
        where = file
        try:
            field = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: not readable as text ({error}); download it again or remove it") from None
    elif isinstance(field, list):
        named = {str(entry.get("name")): entry.get("template") for entry in field if isinstance(entry, dict)}
        field, tools = named.get("default", next(iter(named.values()), None)), named.get("tool_use")
    for template in (field, tools):
        if not isinstance(template, str | None):
            raise ModelError(
                f"{where}: chat_template is a {type(template).__name__}, must be a text or a list of objects with name "
                "and template"
            )
        if template is not None and len(template) > LARGEST_TEMPLATE:
            raise ModelError(f"{where}: the chat template has {len(template)} characters; download it again")
    return field, tools


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls of tools have their arguments as objects, as templates are written for, and not as JSON in a text,
    as OpenAI's API has them. What is no such text stays as it is.

    >>> call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    >>> with_objects([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["tool_calls"][0]["function"]
    {'name': 'add', 'arguments': {'a': 1}}
    """
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    given = function.get("arguments", "") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(given, str | None):
        return call
    try:
        arguments = json.loads(given) if given else {}
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Checked messages, with contents that are lists of text parts joined: not every template knows lists.

    Raises:
        RequestError: they are no conversation, or hold something else than text.

    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "4 + "}, {"type": "text", "text": "5"}]}])
    [{'role': 'user', 'content': '4 + 5'}]
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: must be a list of at least one object with role and content")
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{number}]: must be an object with a text as its role")
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            known = [text for text in texts if isinstance(text, str)]
            if len(known) < len(texts):
                raise RequestError(f"messages[{number}]: content has a part without text; only text can be served")
            content = "".join(known)
        if not isinstance(content, str | None):
            raise RequestError(f"messages[{number}]: content is a {type(content).__name__}, must be a text")
        plain.append({**message, "content": content})
    return plain
