"""The paths of OpenAI's API: bodies in, answers out, whole or streamed."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from launch.http import fields
from launch.http.answers import Form, problem
from launch.http.book import Accepted, Refused, Token
from launch.http.service import Service
from placement.files import InputError, parse_json

LONGEST_BODY = 8 * 2**20  # bytes
BODY_SECONDS = 30.0
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def read_body(request: HttpRequest) -> dict[str, Any]:
    """The JSON object that a client has sent. Raises Refused."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("application/json", ""):
        raise Refused(415, f"content-type {kind[:100]!r}: send application/json")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > LONGEST_BODY:
        raise Refused(413, f"a body of {declared} bytes; send at most {LONGEST_BODY}")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > LONGEST_BODY:
                    raise Refused(413, f"a body of more than {LONGEST_BODY} bytes; send a shorter one")
    except ClientDisconnect:
        raise Refused(400, "the client left before its body had come") from None
    except TimeoutError:
        raise Refused(408, f"the body has not come within {BODY_SECONDS:g} s") from None
    try:
        body = parse_json(b"".join(parts).decode("utf-8"), "it")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 (byte {error.start + 1})") from None
    except InputError as error:
        raise Refused(400, f"the body is not JSON that is read here ({str(error).removeprefix('it: ')})") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


class Endpoints:
    """What is answered at each path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, fields.completion)

    async def chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, fields.chat)

    async def _answer(self, request: HttpRequest, read: Callable[[Mapping[str, Any]], fields.Wanted]) -> Response:
        wanted = read(await read_body(request))
        answers = await self._service.accept(wanted)
        for accepted in answers:
            accepted.parent = request.headers.get("traceparent", "")
        form = Form(wanted, self._service.names[0], self._service.piece, harmony=self._service.harmony)
        return _Answer(self._service, answers, form, wanted.stream, wanted.chat)

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.names]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name not in self._service.names:
            raise Refused(404, f"the model {name[:100]!r} does not exist", "model")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "dancemoe",
            "max_model_len": service.config.max_position,
            "chat": service.bundle.chat_template is not None,
        }

    async def tokenize(self, request: HttpRequest) -> Response:
        body = await read_body(request)
        given = {name: body[name] for name in ("prompt", "messages") if body.get(name) is not None}
        if len(given) != 1 or not isinstance(next(iter(given.values())), str if "prompt" in given else list):
            raise Refused(400, "must have either a text prompt or a list messages")
        ids = await self._service.encode(given)
        return JSONResponse({"count": len(ids), "max_model_len": self._service.config.max_position, "tokens": ids})

    async def detokenize(self, request: HttpRequest) -> Response:
        tokens = (await read_body(request)).get("tokens")
        size = self._service.config.vocab_size
        if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < size for t in tokens):
            raise Refused(400, f"tokens: must be a list of token ids from 0 to {size - 1}", "tokens")
        return JSONResponse({"prompt": self._service.bundle.decode(tokens)})


class _Answer(Response):
    """Sends answers as they grow, or when all have ended; a client that leaves ends its requests."""

    def __init__(self, service: Service, answers: list[Accepted], form: Form, stream: bool, chat: bool) -> None:
        super().__init__()
        self._service, self._answers, self._form, self._streams, self._chat = service, answers, form, stream, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(self._until_gone(receive))
        try:
            await (self._stream(send) if self._streams else self._whole(scope, receive, send))
        finally:
            watching.cancel()
            self._service.leave(self._answers)

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._service.leave(self._answers)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        for accepted in self._answers:
            ending = await accepted.end()
            if ending.status != 200:
                headers = {"retry-after": "5"} if ending.status == 503 else None
                response = JSONResponse(problem(ending.status, ending.message), ending.status, headers)
                return await response(scope, receive, send)
        await JSONResponse(self._form.whole(self._answers))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})

        async def more(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        await asyncio.gather(*(self._one(i, accepted, more) for i, accepted in enumerate(self._answers)))
        failed = next((a.ending for a in self._answers if a.ending and a.ending.status != 200), None)
        if failed is None:
            await more(self._form.last(self._answers))
        else:
            await more(f"data: {json.dumps(problem(failed.status, failed.message))}\n\n".encode())
        await send({"type": "http.response.body", "body": b""})

    async def _one(self, index: int, accepted: Accepted, more: Callable[[bytes], Awaitable[None]]) -> None:
        if self._chat:
            await more(self._form.first(index))
        tokens = characters = thoughts = 0
        async for _ in accepted.changes():
            if self._form.tools and accepted.ending is None:
                continue  # what looks like text may become a call
            ending, new = accepted.ending, accepted.tokens[tokens:]
            thought, text = self._form.said(accepted.text.text)
            if len(thought) > thoughts:
                await more(self._form.thought(index, thought[thoughts:]))
            parts = self._parts(new, text, characters)
            tokens, characters, thoughts = tokens + len(new), len(text), len(thought)
            for number, (part, words) in enumerate(parts, 1):
                ended = number == len(parts) and ending is not None and ending.status == 200
                if ended or words or (part and (self._form.logprobs or self._form.servers)):
                    await more(self._form.next(index, words, part, ending.reason if ended and ending else None))

    def _parts(self, tokens: list[Token], text: str, start: int) -> list[tuple[list[Token], str]]:
        """New tokens, and the text from a place on, as they are sent: one by one where each has servers to tell."""
        if len(tokens) < 2 or not self._form.servers or not self._form.plain:
            return [(tokens, text[start:])]
        places = [start, *(token.start for token in tokens[1:]), len(text)]
        return [([t], text[first:end]) for t, (first, end) in zip(tokens, itertools.pairwise(places), strict=True)]
