"""Calls of tools in a model's text, by the forms in which the families served write them. Runs no tool."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from placement.files import InputError, parse_json

Types = Mapping[str, Mapping[str, Sequence[str]]]
"""By the name of a tool, its parameters and their types as JSON schema calls them."""

# Qwen's and Hermes': <tool_call>{"name": …, "arguments": {…}}</tool_call>; Qwen3-Coder's:
# <tool_call><function=NAME><parameter=NAME>value</parameter></function></tool_call>
_TAG, _TAG_END = "<tool_call>", "</tool_call>"
_FUNCTION, _PARAMETER_END = "<function=", "</parameter>"
# Marks within a text that a parameter quotes are none: they do not stand behind white space or another mark.
_FUNCTION_END, _PARAMETER = re.compile(r"(?<=[\s>])</function>"), re.compile(r"(?<=[\s>])<parameter=([^<>\n]{1,256})>")
# Mixtral's, all of them: [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
_LIST = "[TOOL_CALLS]"
# DeepSeek's: <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>, before V3.1 with `function` in the name's place,
# and the name and the arguments, fenced as code, in those of the arguments.
_BEGIN, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

MARKS = (_TAG, _TAG_END, _LIST, _BEGIN, _SEPARATOR, _END, *_AROUND)
"""What calls are known by; special tokens of some vocabularies."""

_OPENING = re.compile("|".join(map(re.escape, (_TAG, _FUNCTION, _LIST, _BEGIN))))
_SPACE = re.compile(r"\s*")
_LONGEST_NAME, _MOST = 256, 1024  # characters, and calls of a text
_WORDS = {"true": True, "false": False, "none": None, "null": None}  # as Python and as JSON write them


def tool_calls(text: str, *, demanded: bool = False, types: Types | None = None) -> tuple[str, list[dict[str, Any]]]:
    """The text without its calls, and these as OpenAI's API has them. What is no whole call stays text.

    Args:
        demanded: the text as a whole is one call, which is said by its grammar (formats.py) and not by the family's form.
        types: of the tools' parameters, for a form that has no types of its own; what is not known is a text.

    >>> text, (call,) = tool_calls('So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    >>> text, call["type"], call["function"]
    ('So:', 'function', {'name': 'add', 'arguments': '{"a": 1}'})
    """
    if demanded:
        try:
            return "", [_call(_read(text))]
        except InputError:
            return text, []
    scan, rest, calls, at = _Scan(text, types or {}), list[str](), list[dict[str, Any]](), 0
    for _ in range(_MOST):
        opening = _OPENING.search(text, at)
        if opening is None:
            break
        try:
            found, end = scan.read(opening)
            made = [_call(one) for one in found]
        except InputError:
            rest.append(text[at : opening.end()])
            at = opening.end()
        else:
            rest.append(text[at : opening.start()])
            calls += made
            at = end
    rest.append(text[at:])
    if not calls:
        return text, []
    left = "".join(rest)
    for mark in _AROUND:
        left = left.replace(mark, "")
    return left.strip(), calls


def named_call(name: str, arguments: str) -> dict[str, Any]:
    """A call in the form of OpenAI's API. Raises InputError where the arguments are no JSON object."""
    return _call({"name": name, "arguments": _arguments(arguments)})


class _Scan:
    """Reads calls from a text, each part of which is looked at a few times at most, however often a mark stands in it."""

    def __init__(self, text: str, types: Types) -> None:
        self._text, self._types = text, types
        self._next: dict[str | re.Pattern[str], tuple[int, int]] = {}

    def read(self, opening: re.Match[str]) -> tuple[Sequence[Any], int]:
        """What is called at an opening, and where that ends. Raises InputError where it is no whole call."""
        at, mark = opening.end(), opening[0]
        if mark == _BEGIN:
            return self._separated(at)
        if mark == _FUNCTION:
            return self._function(at)
        at = self._space(at)
        if mark == _LIST:
            found, at = self._json(at)
            return found if isinstance(found, list) else [found], at
        if self._text.startswith(_FUNCTION, at):
            return self._function(at + len(_FUNCTION))
        found, at = self._json(at)
        return [found], self._skipped(_TAG_END, at)

    def _function(self, at: int) -> tuple[Sequence[Any], int]:
        name_end = self._text.find(">", at, at + _LONGEST_NAME)
        name, end = self._text[at:name_end].strip(), self._find(_FUNCTION_END, at)
        if name_end < 0 or not name or "\n" in name or end < 0:
            raise InputError("tool call: has no name, or no end")
        known, arguments, start = self._types.get(name, {}), {}, name_end
        while (opening := _PARAMETER.search(self._text, start, end)) is not None:
            after = _PARAMETER.search(self._text, opening.end(), end)
            own = self._find(_PARAMETER_END, opening.end())
            start = min(place for place in (after.start() if after else end, own, end) if place >= 0)
            parameter = opening[1].strip()
            arguments[parameter] = _typed(self._text[opening.end() : start], known.get(parameter, ()))
        return [{"name": name, "arguments": arguments}], self._skipped(_TAG_END, end + len("</function>"))

    def _separated(self, at: int) -> tuple[Sequence[Any], int]:
        separator, begin, end = (self._find(mark, at) for mark in (_SEPARATOR, _BEGIN, _END))
        if not 0 <= separator - at <= _LONGEST_NAME or 0 <= begin < separator or 0 <= end < separator:
            raise InputError("tool call: has no name")
        name, start = self._text[at:separator], separator + len(_SEPARATOR)
        ends = [place for mark in (_END, _AROUND[1], _BEGIN) if (place := self._find(mark, start)) >= 0]
        stop = min(ends, default=len(self._text))
        body = self._text[start:stop].strip()
        fenced, fence, rest = body.partition("\n```")
        if fence and "\n" not in fenced:
            name, body = fenced, rest.removeprefix("json").strip().removesuffix("```")
        if not body.strip() and not ends:
            raise InputError("tool call: is cut before its arguments")
        return [{"name": name.strip(), "arguments": _arguments(body)}], self._skipped(_END, stop)

    def _json(self, at: int) -> tuple[Any, int]:
        if not self._text.startswith(("{", "["), at):
            raise InputError("tool call: no JSON")
        try:
            _, end = json.JSONDecoder().raw_decode(self._text, at)
        except (ValueError, RecursionError):
            raise InputError("tool call: no JSON") from None
        return _read(self._text[at:end]), end

    def _find(self, mark: str | re.Pattern[str], at: int) -> int:
        """Where a mark is next, or -1. Looks for it once, where places that are asked for do not go back."""
        since, found = self._next.get(mark, (len(self._text) + 1, -1))
        if since <= at and (found < 0 or found >= at):
            return found
        if isinstance(mark, str):
            found = self._text.find(mark, at)
        else:
            found = match.start() if (match := mark.search(self._text, at)) else -1
        self._next[mark] = at, found
        return found

    def _space(self, at: int) -> int:
        return at + len(_SPACE.match(self._text, at)[0])  # pyright: ignore

    def _skipped(self, mark: str, at: int) -> int:
        """After a mark, if it is next."""
        after = self._space(at)
        return after + len(mark) if self._text.startswith(mark, after) else at


def _typed(value: str, kinds: Sequence[str]) -> Any:
    """A parameter's value as its schema has it: a text, unless that says otherwise and the value is such a one."""
    value = value.removeprefix("\n").removesuffix("\n")
    if not kinds or "string" in kinds:
        return value
    if (word := value.strip().lower()) in _WORDS:
        return _WORDS[word]
    try:
        return _read(value)
    except InputError:
        return value


def _read(text: str) -> Any:
    """JSON with numbers of any size. Raises InputError."""
    return parse_json(text, "tool call", any_number=True)


def _arguments(text: str) -> dict[str, Any]:
    """Raises InputError where they are no JSON object; nothing is an empty one."""
    found = _read(text) if text.strip() else {}
    if not isinstance(found, dict):
        raise InputError("arguments: must be an object")
    return found


def _call(found: Any) -> dict[str, Any]:
    """Raises InputError where it is no call."""
    name = found.get("name") if isinstance(found, dict) else None
    arguments = found.get("arguments", found.get("parameters")) if isinstance(found, dict) else None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict | str | None):
        raise InputError("tool call: must have a name and arguments")
    try:
        text = (
            arguments
            if isinstance(arguments, str)
            else json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
        )
    except ValueError:
        raise InputError("tool call: a number is not finite") from None
    # JSON can hold halves of surrogate pairs, which are no characters.
    name, text = (part.encode(errors="replace").decode() for part in (name, text))
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": text},
    }
