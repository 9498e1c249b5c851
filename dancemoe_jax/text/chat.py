"""Chat templates: where a model keeps its template, and the sandbox that renders it."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dancemoe_jax.errors import ModelError, RequestError


def read_chat_template(path: Path, field: Any) -> str | None:
    """A file of its own goes before the field of tokenizer_config.json: a text, or a list of named ones."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: not readable as text ({error}); download it again or remove it") from None
    if isinstance(field, list):
        named = {entry.get("name"): entry.get("template") for entry in field if isinstance(entry, dict)}
        field = named.get("default", next(iter(named.values()), None))
    if not isinstance(field, str | None):
        raise ModelError(
            f"{path / 'tokenizer_config.json'}: chat_template is a {type(field).__name__}, must be a text or a list of "
            "objects with name and template"
        )
    return field


def template_environment(now: Callable[[], datetime.datetime]) -> jinja2.Environment:
    """What chat templates expect to find, and nothing they could harm: no file, no attribute of Python's own objects."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter writes <, > and & as escapes for web pages, which models are not.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; for serving it is nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
