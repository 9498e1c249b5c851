"""Answers in the form of OpenAI's API, whole and as they grow. Knows no sockets."""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dancemoe_jax.text.harmony import Messages, read_messages
from launch.http.book import Accepted, Token
from launch.http.fields import Wanted
from launch.http.tool_calls import Types, named_call, tool_calls
from placement import InputError

Piece = Callable[[int], str]  # the text of a token by itself


class Form:
    """How one client's answer looks.

    Args:
        model: name that answers carry; piece: text of a token id by itself, for logprobs.
        harmony: in chats the model writes messages with headers (dancemoe_jax.text.harmony).

    Attributes:
        logprobs, servers: they are wanted; tools: calls are looked for, so an answer is read as a whole.
        plain: what it says is its text as it is.
    """

    def __init__(self, wanted: Wanted, model: str, piece: Piece, *, harmony: bool = False) -> None:
        self._wanted, self._piece = wanted, piece
        self.logprobs, self.servers, self.tools = wanted.logprobs is not None, wanted.servers, wanted.tools
        self._harmony = harmony and wanted.chat and wanted.schema is None  # whose grammar knows no headers
        self.plain = not (self._harmony or self.tools)
        self._types = _types(wanted.prompts[0]) if self.tools else {}
        self._demanded = wanted.schema is not None and wanted.schema.call
        kind = "chat.completion" if wanted.chat else "text_completion"
        prefix = "chatcmpl" if wanted.chat else "cmpl"
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        whole = {"id": self.id, "object": kind, "created": int(time.time()), "model": model}
        self._whole = whole
        self._chunk = {**whole, "object": "chat.completion.chunk"} if wanted.chat else whole
        # Of a chunk only the choice changes from token to token.
        self._head = json.dumps(self._chunk, separators=(",", ":"))[:-1] + ',"choices":['

    def whole(self, answers: Sequence[Accepted]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {**self._whole, "choices": [self._choice(i, a) for i, a in enumerate(answers)], "usage": usage(answers)}

    def _choice(self, index: int, accepted: Accepted) -> dict[str, Any]:
        assert accepted.ending is not None
        text = accepted.text.text
        reason = accepted.ending.reason
        if self._wanted.chat:
            message, reason = self._message(text, reason)
            content: dict[str, Any] = {"message": {"role": "assistant", **message}}
        else:
            content = {"text": text}
        return self._with_servers(
            {"index": index, **content, "logprobs": self._logprobs(accepted.tokens), "finish_reason": reason},
            accepted.tokens,
        )

    def _with_servers(self, choice: dict[str, Any], tokens: Sequence[Token]) -> dict[str, Any]:
        """A choice with the calls of experts of each token by the server that served them, where they are wanted."""
        if self.servers:
            choice["served_by"] = [token.served_by or [] for token in tokens]
        return choice

    def _message(self, text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
        """Content, reasoning and calls of tools of a whole text, and the reason that the calls make."""
        said = read_messages(text, tools=self.tools) if self._harmony else Messages(text, "", [])
        content, calls = said.content, list[dict[str, Any]]()
        if self.tools and not self._harmony and (self._wanted.schema is None or self._demanded):
            content, calls = tool_calls(content, demanded=self._demanded, types=self._types)
        cut = reason == "length" and bool(said.calls) and not said.calls[-1][1].strip()
        for name, arguments in said.calls[:-1] if cut else said.calls:
            try:
                calls.append(named_call(name, arguments))
            except InputError:
                content = "\n\n".join(filter(None, (content, arguments)))
        message: dict[str, Any] = {"content": content if content or not calls else None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if calls:
            message["tool_calls"] = calls
        return message, "tool_calls" if calls and reason == "stop" else reason

    def said(self, text: str) -> tuple[str, str]:
        """Reasoning and content of a text that grows; the whole text where it is read only at its end."""
        if self.plain or self.tools:
            return "", text
        said = read_messages(text)
        return said.reasoning, said.content

    def first(self, index: int) -> bytes:
        """What a chat's stream begins with."""
        return self._event(self._delta(index, {"role": "assistant", "content": ""}, None, None))

    def thought(self, index: int, text: str) -> bytes:
        """More of what a chat's model thinks."""
        return self._event(self._delta(index, {"reasoning_content": text}, None, None))

    def next(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> bytes:
        """More of an answer."""
        logprobs = self._logprobs(tokens)
        if self._wanted.chat:
            delta: dict[str, Any] = {"content": text}
            if self.tools:
                delta, reason = self._message(text, reason)
            if "tool_calls" in delta:
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
            choice = self._delta(index, delta if text else {}, logprobs, reason)
        else:
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._event(self._with_servers(choice, tokens))

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _event(self, choice: dict[str, Any]) -> bytes:
        end = '],"usage":null}\n\n' if self._wanted.usage else "]}\n\n"
        return f"data: {self._head}{json.dumps(choice, separators=(',', ':'))}{end}".encode()

    def last(self, answers: Sequence[Accepted]) -> bytes:
        """What a stream ends with."""
        end = b"data: [DONE]\n\n"
        if not self._wanted.usage:
            return end
        return f"data: {json.dumps({**self._chunk, 'choices': [], 'usage': usage(answers)})}\n\n".encode() + end

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._wanted.logprobs is None:
            return None
        found = [token for token in tokens if token.logprobs is not None]
        if self._wanted.chat:
            return {"content": [self._chat_logprob(token) for token in found], "refusal": None}
        return {
            "text_offset": [token.start for token in found],
            "tokens": [self._piece(token.id) for token in found],
            "token_logprobs": [token.logprobs[0] for token in found if token.logprobs],
            "top_logprobs": [
                {self._piece(i): value for i, value in token.logprobs[1]} for token in found if token.logprobs
            ],
        }

    def _chat_logprob(self, token: Token) -> dict[str, Any]:
        assert token.logprobs is not None
        own, likeliest = token.logprobs
        return {**self._one(token.id, own), "top_logprobs": [self._one(i, value) for i, value in likeliest]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _types(prompt: Mapping[str, Any]) -> Types:
    """The types of the parameters of the tools that a prompt knows of, as far as their schemas have any."""
    found = {}
    for tool in prompt["variables"]["tools"]:
        schema = tool["function"].get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        known = properties.items() if isinstance(properties, Mapping) else ()
        found[tool["function"]["name"]] = {name: _kinds(about) for name, about in known}
    return found


def _kinds(about: Any) -> list[str]:
    """The types of a schema, those of its alternatives included."""
    if not isinstance(about, Mapping):
        return []
    kind, ways = about.get("type"), [about.get(name) for name in ("anyOf", "oneOf")]
    own = kind if isinstance(kind, list) else [kind]
    others = [
        way.get("type") for several in ways if isinstance(several, list) for way in several if isinstance(way, Mapping)
    ]
    return [found for found in (*own, *others) if isinstance(found, str)]


def usage(answers: Sequence[Accepted]) -> dict[str, int]:
    """Tokens of an answer; a prompt counts once, however many answers it has."""
    prompts = {id(a.request.prompt): len(a.request.prompt) for a in answers}
    prompt, answer = sum(prompts.values()), sum(len(a.tokens) for a in answers)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def problem(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
