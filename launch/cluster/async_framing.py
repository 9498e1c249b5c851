"""The messages of `framing` for a process that waits for many things at once (asyncio)."""

import asyncio
import hmac
import json
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from launch.cluster.framing import GREETING_SECONDS, LINE_BYTES, Fields, MessageError, parse, proof_of

log = logging.getLogger(__name__)

LONGEST = 2**27  # bytes of a message, once the other side has proved that it knows the secret
_UNSENT = 2**28  # bytes that may wait for the other side


class AsyncConnection:
    """A stream with messages on it, for one task that receives and any that send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; returns before it has gone.

        Raises:
            MessageError: the other end has gone, or takes nothing in.
        """
        transport = self._writer.transport
        if transport.is_closing():
            raise MessageError("has gone")
        if transport.get_write_buffer_size() > _UNSENT:
            raise MessageError("takes nothing in")
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def receive(
        self, fields: Fields | None, seconds: float | None = None, longest: int = LONGEST
    ) -> dict[str, Any]:
        """The next message. fields: None takes any; seconds: for all of it.

        Raises:
            MessageError: it is none, has other fields, is too long, or has not come in time.
        """
        try:
            async with asyncio.timeout(seconds):
                line = await self._reader.readuntil(b"\n")
        except TimeoutError:
            raise MessageError(f"no whole message within {seconds} s") from None
        except asyncio.IncompleteReadError as error:
            raise MessageError("ended before its message did" if error.partial else "has gone") from None
        except asyncio.LimitOverrunError:
            raise MessageError(f"a line of more than {longest} bytes") from None
        except OSError as error:
            raise MessageError(error.strerror or str(error)) from None
        if len(line) > longest:
            raise MessageError(f"a line of more than {longest} bytes")
        return parse(line, fields)

    def close(self) -> None:
        """End it."""
        self._writer.transport.abort()


Handle = Callable[[AsyncConnection], Awaitable[None]]


async def listen_at(path: str | socket.socket, secret: bytes, purpose: str, handle: Handle) -> asyncio.Server:
    """Take connections at a socket until it is closed, each in a task of its own.

    Args:
        path: of a Unix socket that does not exist yet, in a folder of this user alone; or a bound socket that listens.
        handle: called with every connection that has proved to know the secret; the connection ends with it.
    """

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = AsyncConnection(reader, writer)
        try:
            await _greet(connection, secret, purpose)
            await handle(connection)
        except MessageError as error:
            log.debug("a connection for %s has ended: %s", purpose, error)
        finally:
            connection.close()

    if not isinstance(path, str):
        return await asyncio.start_server(take, sock=path, limit=LONGEST)
    before = os.umask(0o077)
    try:
        return await asyncio.start_unix_server(take, path, limit=LONGEST)
    finally:
        os.umask(before)


async def _greet(connection: AsyncConnection, secret: bytes, purpose: str) -> None:
    ours = secrets.token_hex(16)
    connection.send({"nonce": ours})
    message = await connection.receive({"nonce": str, "proof": str}, GREETING_SECONDS, LINE_BYTES)
    nonces = (ours, message["nonce"])
    if not hmac.compare_digest(message["proof"].encode(), proof_of(secret, "client", purpose, *nonces).encode()):
        connection.send({"refused": "another secret"})
        raise MessageError("another cluster secret")
    connection.send({"proof": proof_of(secret, "listener", purpose, *nonces)})


async def connect_to(address: tuple[str, int], secret: bytes, purpose: str, seconds: float) -> AsyncConnection:
    """A connection to a listener for the same purpose, once both have proved that they know the secret.

    Raises:
        OSError: nobody listens there; TimeoutError, which is one: not within so many seconds.
        MessageError: whatever listens there is none of ours.
    """
    async with asyncio.timeout(seconds):
        connection = AsyncConnection(*await asyncio.open_connection(*address, limit=LONGEST))
    try:
        theirs = (await connection.receive({"nonce": str}, GREETING_SECONDS, LINE_BYTES))["nonce"]
        ours = secrets.token_hex(16)
        connection.send({"nonce": ours, "proof": proof_of(secret, "client", purpose, theirs, ours)})
        reply = await connection.receive({"proof?": str, "refused?": str}, GREETING_SECONDS, LINE_BYTES)
        if not hmac.compare_digest(reply.get("proof", ""), proof_of(secret, "listener", purpose, theirs, ours)):
            raise MessageError("another cluster secret")
    except BaseException:
        connection.close()
        raise
    return connection
