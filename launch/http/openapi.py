"""The published description of the API (OpenAPI 3.1), at /openapi.json."""

from typing import Any

from launch.http.fields import MOST_CHOICES, MOST_LOGPROBS
from launch.http.formats import TYPES
from placement.version import version

_TEXT: dict[str, Any] = {"type": "string"}
_ID = {"type": "integer", "minimum": 0}
_ERRORS = {
    400: "the request means nothing; the message says why",
    401: "no token that is known",
    403: "not an operator",
    404: "no such path or model",
    405: "not a method of this path",
    408: "the body does not come",
    409: "not now, or not here",
    413: "the body is too large",
    415: "the body is no application/json",
    429: "too many requests are under way; Retry-After says when to come again",
    500: "the step that served the request has failed",
    503: "no worker serves, or the server drains",
    504: "not answered in time",
}


def _null(schema: dict[str, Any]) -> dict[str, Any]:
    """null counts as not given."""
    return {"anyOf": [schema, {"type": "null"}]}


def _number(least: float, most: float | None = None) -> dict[str, Any]:
    return {"type": "number", "minimum": least, **({} if most is None else {"maximum": most})}


def _integer(least: int, most: int | None = None) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, **({} if most is None else {"maximum": most})}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _sampling(name: str) -> dict[str, Any]:
    stop = {"anyOf": [_TEXT, {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 64}]}
    fields = {
        "model": {"type": "string", "examples": [name]},
        "max_tokens": _integer(1),
        "n": _integer(1, MOST_CHOICES),
        "temperature": _number(0),
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": _integer(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10000},
        "seed": _integer(-(2**63), 2**63 - 1),
        "stop": stop,
        "stop_token_ids": {"type": "array", "items": _ID, "maxItems": 1024},
        "stream": {"type": "boolean"},
        "stream_options": _object([], include_usage=_null({"type": "boolean"})),
        "user": _TEXT,
        "return_servers": {"type": "boolean"},
        "response_format": _object([], type={"enum": list(TYPES)}, json_schema=_object([], schema={"type": "object"})),
    }
    return {field: _null(schema) for field, schema in fields.items()}


def _schemas(name: str) -> dict[str, Any]:
    ids = {"type": "array", "items": _ID, "minItems": 1}
    content = {"anyOf": [_TEXT, {"type": "null"}, {"type": "array", "items": _object(["text"], text=_TEXT)}]}
    messages = {"type": "array", "minItems": 1, "items": _object(["role"], role=_TEXT, content=content)}
    several = {"type": "array", "minItems": 1, "maxItems": MOST_CHOICES, "items": {"anyOf": [_TEXT, ids]}}
    prompt = {"anyOf": [_TEXT, ids, several]}
    logprobs = _null(_integer(0, MOST_LOGPROBS))
    tool = _object(["name"], name=_TEXT, parameters=_null({"type": "object"}))
    named = _object(["type", "function"], type={"const": "function"}, function=_object(["name"], name=_TEXT))
    chat = {
        "logprobs": _null({"type": "boolean"}),
        "top_logprobs": logprobs,
        "max_completion_tokens": _null(_integer(1)),
        "chat_template_kwargs": _null({"type": "object"}),
        "tools": _null(
            {"type": "array", "items": _object(["type", "function"], type={"const": "function"}, function=tool)}
        ),
        "tool_choice": _null({"anyOf": [{"enum": ["auto", "none", "required"]}, named]}),
    }
    problem = _object(["message", "type"], message=_TEXT, type=_TEXT, param=_null(_TEXT), code=_null(_TEXT))
    return {
        "Completion": _object(["prompt"], **_sampling(name), prompt=prompt, logprobs=logprobs),
        "Chat": _object(["messages"], **_sampling(name), messages=messages, **chat),
        "Tokenize": _object([], prompt=_null(_TEXT), messages=_null(messages)),
        "Detokenize": _object(["tokens"], tokens={"type": "array", "items": _ID}),
        "Profile": _object(["action"], action={"enum": ["start", "stop"]}),
        "Migration": _object(["what"], what={"enum": ["plan", "to", "memory", "abort"]}, dry={"type": "boolean"}),
        "Error": _object(["error"], error=problem),
        "Any": {"type": "object"},
    }


def _path(summary: str, body: str | None, kind: str = "application/json", *more: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": "#/components/schemas/Any"} if kind == "application/json" else {}
    kinds = {name: {"schema": schema if name == kind else {}} for name in (kind, *more)}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "done", "content": kinds}}
    responses |= {str(status): {"description": words, "content": error} for status, words in _ERRORS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": responses, "security": [{}, {"token": []}]}
    if body:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def openapi(name: str) -> dict[str, Any]:
    """The description, for a model of that name."""
    stream = "text/event-stream"
    model = _path("A model", None) | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]}
    ready = _path("Whether it can answer now, and every reason why not", None)
    ready["responses"]["503"] = {"description": "not now", "content": ready["responses"]["200"]["content"]}
    paths = {
        "/v1/completions": {"post": _path("Continue prompts", "Completion", "application/json", stream)},
        "/v1/chat/completions": {"post": _path("Answer a conversation", "Chat", "application/json", stream)},
        "/v1/models": {"get": _path("The models", None)},
        "/v1/models/{name}": {"get": model},
        "/tokenize": {"post": _path("Token ids of a text or conversation", "Tokenize")},
        "/detokenize": {"post": _path("Text of token ids", "Detokenize")},
        "/health": {"get": _path("Whether the front door lives", None)},
        "/ready": {"get": ready},
        "/status": {"get": _path("What the page shows (operators)", None)},
        "/metrics": {"get": _path("Figures for Prometheus (operators)", None, "text/plain")},
        "/placement": {"get": _path("The placement in force (operators)", None)},
        "/profile": {
            "get": _path("What was counted, as profile.npz (operators)", None, "application/octet-stream"),
            "post": _path("Start or stop counting (operators)", "Profile"),
        },
        "/migrations": {
            "get": _path("How migrations stand (operators, first server)", None),
            "post": _path("Plan, start or stop one (operators, first server)", "Migration"),
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "DanceMoE", "version": version()},
        "paths": paths,
        "components": {"schemas": _schemas(name), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }
