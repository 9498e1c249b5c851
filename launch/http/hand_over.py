"""Requests handed from one server's front door to another's, whose worker serves them; the first still owns them.

    asking -> serving   {request}    serving -> asking   {tokens, ended}

A connection is for one request, and ends with it. Where it ends before, the request is served here, with the tokens it has.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from dancemoe_jax.errors import DanceMoEError
from dancemoe_jax.inference.sampling_params import SamplingParams
from dancemoe_jax.model.config import ModelConfig
from launch.cluster.addresses import split_address
from launch.cluster.async_framing import AsyncConnection, connect_to
from launch.cluster.framing import MessageError
from launch.engine.request import Request
from launch.http.book import Accepted, Book, Refused, described
from launch.http.supervisor import Supervisor
from launch.serve.front_messages import SUBMITTED
from launch.serve.requests import Text

log = logging.getLogger(__name__)

PURPOSE = "hand over"
_CONNECT_S = 2.0
_ASKED = {"request": dict}
_ANSWER = {"tokens?": list, "ended?": list}


class Takes:
    """Serves requests of other front doors.

    Args:
        server: index of this one.
    """

    def __init__(self, book: Book, supervisor: Supervisor, config: ModelConfig, server: int) -> None:
        self._book, self._supervisor, self._config, self._server = book, supervisor, config, server

    async def take(self, connection: AsyncConnection) -> None:
        """Serve the request of a connection; one that is refused ends it."""
        given = (await connection.receive(_ASKED, _CONNECT_S))["request"]
        try:
            self._supervisor.check_hope()
            self._book.check_room(1)
            accepted = self._accept(given)
        except (Refused, DanceMoEError, LookupError, TypeError, ValueError) as error:
            log.debug("a request of another front door is not taken: %s", error)
            return
        self._supervisor.flush()
        gone = asyncio.create_task(self._until_gone(connection, accepted))
        try:
            sent = 0
            async for _ in accepted.changes():
                new = accepted.tokens[sent:]
                sent += len(new)
                message: dict[str, Any] = {"tokens": [[t.id, t.logprobs, t.served_by] for t in new]}
                if accepted.ending is not None:
                    message["ended"] = list(accepted.ending)
                connection.send(message)
            await asyncio.wait([gone], timeout=_CONNECT_S)  # it leaves when it has all
        finally:
            gone.cancel()
            self._book.fail(accepted.number, 499, "the other front door has gone")

    def _accept(self, given: dict[str, Any]) -> Accepted:
        fields = {name: given[name] for name in SUBMITTED}
        params: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields["params"].items()}
        request = Request(
            self._server,
            fields["prompt"],
            fields["max_tokens"],
            time.monotonic(),
            fields["label"],
            params=SamplingParams(**params),
            stop_token_ids=frozenset(fields["stop_token_ids"]),
            output=fields["output"],
            wants_servers=fields["servers"],
        )
        request.check(self._config, replays=False)
        return self._book.accept(request, NoText(), fields["logprobs"], fields["label"], fields["schema"])

    async def _until_gone(self, connection: AsyncConnection, accepted: Accepted) -> None:
        try:
            await connection.receive({})
        except MessageError:
            self._book.fail(accepted.number, 499, "the other front door has gone")


class NoText(Text):
    """In place of an answer's text, which is made where the client is."""

    def __init__(self) -> None:
        """It is given no tokens."""

    @property
    def text(self) -> str:
        """There is none."""
        return ""

    def finish(self) -> None:
        """There is nothing to finish."""


class Hands:
    """Gives requests to other front doors, and takes their tokens; flush: has the own worker serve what is not away."""

    def __init__(self, book: Book, secret: bytes, flush: Callable[[], None]) -> None:
        self._book, self._secret, self._flush = book, secret, flush
        self._tasks: set[asyncio.Task[None]] = set()

    def hand(self, accepted: Accepted, address: str) -> None:
        """Have another front door serve a request from now on, as long as it does."""
        task = asyncio.create_task(self._served_there(accepted, address))
        accepted.away = task.cancel
        self._book.handed += 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _served_there(self, accepted: Accepted, address: str) -> None:
        try:
            host, port = split_address(address, "a front door", 0)
            connection = await connect_to((host, port), self._secret, PURPOSE, _CONNECT_S)
            try:
                connection.send({"request": described(accepted)})
                while accepted.ending is None:
                    self._take(accepted, await connection.receive(_ANSWER))
            finally:
                connection.close()
        except (MessageError, OSError, TimeoutError) as error:
            log.debug("a request comes back from %s: %s", address, error)
        finally:
            accepted.away = None
            if accepted.ending is None:
                self._book.returned += 1
                self._flush()

    def _take(self, accepted: Accepted, message: dict[str, Any]) -> None:
        self._book.begun(accepted.number, here=False)
        for token, logprobs, served_by in message.get("tokens", ()):
            self._book.take(accepted.number, [token], logprobs, served_by)
        if "ended" in message and accepted.ending is None:
            raise MessageError(f"it ended there ({message['ended'][2] or message['ended'][0]})")
