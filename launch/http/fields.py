"""What clients of OpenAI's API send, read into what is asked for. Knows neither tokens nor the worker.

A field that is null counts as not given. Fields that this server does not know are ignored, as vLLM does; fields that it
knows and cannot do are refused, so that nobody gets another answer than was asked for.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from launch.http.book import Refused
from launch.http.formats import AnswerSchema, response_format, tool_call

MOST_CHOICES = 128  # answers of one request
MOST_LOGPROBS = 20
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
# What may be given only with a value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a client asks for.

    Attributes:
        prompts: each as `RequestMaker` takes it: `prompt` or `messages`, and its variables for the chat template.
        n: answers to each prompt; seed: of the first one; each further one has the next.
        params: sampling fields that were given; max_tokens: None as many as fit.
        logprobs: likeliest tokens beside each chosen one whose probabilities are wanted; None: of none at all.
        tools: the model knows of tools, whose calls are looked for in its answers.
        servers: who served each token's calls of experts is wanted (`return_servers`).
        schema: that answers have to fit; None: they may be anything.
        usage: streams end with how many tokens it was.
    """

    chat: bool
    prompts: list[dict[str, Any]]
    n: int
    seed: int
    params: dict[str, Any]
    max_tokens: int | None
    stream: bool
    usage: bool
    logprobs: int | None
    model: str | None
    user: str
    tools: bool = False
    schema: AnswerSchema | None = None
    servers: bool = False


def completion(body: Mapping[str, Any]) -> Wanted:
    """A body of `/v1/completions`. Raises Refused."""
    given = _without_null(body)
    logprobs = _integer(given, "logprobs", 0, MOST_LOGPROBS, None)
    return _wanted(given, False, _prompts(given.get("prompt")), logprobs, _integer(given, "max_tokens", 1, None, 16))


def chat(body: Mapping[str, Any]) -> Wanted:
    """A body of `/v1/chat/completions`. Raises Refused."""
    given = _without_null(body)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: must be a list of at least one object with role and content", "messages")
    prompt: dict[str, Any] = {"messages": messages}
    variables = _typed(given, "chat_template_kwargs", dict, {})
    if reserved := sorted({"messages", "add_generation_prompt", "now"} & variables.keys()):
        raise Refused(400, f"chat_template_kwargs: {reserved[0]!r} is the server's own", "chat_template_kwargs")
    tools, call = _tools(given)
    if tools:
        variables = {**variables, "tools": tools}
    if variables:
        prompt["variables"] = variables
    most = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    wanted = _wanted(given, True, [prompt], _chat_logprobs(given), _integer(given, most, 1, None, None))
    if call and wanted.schema:
        raise Refused(400, "response_format: not together with a tool_choice that demands a call", "response_format")
    return dataclasses.replace(wanted, tools=bool(tools), schema=call or wanted.schema)


def _tools(given: Mapping[str, Any]) -> tuple[list[dict[str, Any]], AnswerSchema | None]:
    """Tools that the model is to know of, and what a call is to fit that is demanded."""
    tools, choice = _typed(given, "tools", list, []), given.get("tool_choice", "auto")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(400, 'tools: each must be {"type": "function", "function": {"name": …, …}}', "tools")
    call = tool_call(choice, tools)
    return ([] if choice == "none" else tools), call


def _chat_logprobs(given: Mapping[str, Any]) -> int | None:
    wanted = _typed(given, "logprobs", bool, False)
    top = _integer(given, "top_logprobs", 0, MOST_LOGPROBS, None)
    if top is not None and not wanted:
        raise Refused(400, "top_logprobs: needs logprobs: true", "top_logprobs")
    return (top or 0) if wanted else None


def _wanted(
    given: Mapping[str, Any], is_chat: bool, prompts: list[dict[str, Any]], logprobs: int | None, most: int | None
) -> Wanted:
    for name, values in _NEUTRAL.items():
        if name in given and given[name] not in values:
            raise Refused(400, f"{name}: not supported; leave it out or give {values[0]!r}", name)
    stream = _typed(given, "stream", bool, False)
    options = _without_null(_typed(given, "stream_options", dict, {}))
    if options and not stream:
        raise Refused(400, "stream_options: needs stream: true", "stream_options")
    params = {name: given[name] for name in _SAMPLING if name in given}
    params.setdefault("temperature", 1.0)  # OpenAI's
    if params.get("top_k") == -1:
        params["top_k"] = 0  # vLLM's word for all
    if "stop_token_ids" in given:
        params["stop_tokens"] = _typed(given, "stop_token_ids", list, [])
    if "stop" in params and params["stop"] in ("", []):
        del params["stop"]
    model = given.get("model")
    if not isinstance(model, str | None):
        raise Refused(400, "model: must be a text", "model")
    return Wanted(
        is_chat,
        prompts,
        _integer(given, "n", 1, MOST_CHOICES, 1) or 1,
        _seed(given),
        params,
        most,
        stream,
        _typed(options, "include_usage", bool, False),
        logprobs,
        model,
        _typed(given, "user", str, "")[:256],
        schema=response_format(given.get("response_format", {})),
        servers=_typed(given, "return_servers", bool, False),
    )


def _seed(given: Mapping[str, Any]) -> int:
    """OpenAI's seeds have 64 bits and may be negative; ours have 32. Without one answers differ from time to time."""
    seed = _integer(given, "seed", -(2**63), 2**64 - 1, None)
    return secrets.randbits(32) if seed is None else seed % 2**32


def _prompts(prompt: Any) -> list[dict[str, Any]]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, list) and prompt and not all(type(part) is int for part in prompt):
        several = prompt
    else:
        several = [prompt]
    if len(several) > MOST_CHOICES:
        raise Refused(400, f"prompt: {len(several)} of them; send at most {MOST_CHOICES} at once", "prompt")
    for part in several:
        ids = isinstance(part, list) and bool(part) and all(type(token) is int for token in part)
        if not isinstance(part, str) and not ids:
            raise Refused(400, "prompt: must be a text, a list of token ids, or a list of such", "prompt")
    return [{"prompt": part} for part in several]


def _without_null(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _integer(given: Mapping[str, Any], name: str, least: int, most: int | None, default: int | None) -> int | None:
    value = given.get(name, default)
    if value is None:
        return None
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if type(value) is not int or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise Refused(400, f"{name}: must be an integer {limits}", name)
    return value


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if not isinstance(value, kind):
        words: Callable[[type], str] = {
            bool: "true or false",
            dict: "an object",
            list: "a list",
            str: "a text",
        }.__getitem__
        raise Refused(400, f"{name}: must be {words(kind)}", name)
    return value
