"""Messages between our own processes over sockets: one line of JSON each, then as many bytes as it announces.

    connect   listener -> {nonce}   client -> {nonce, proof}   listener -> {proof}: both know the cluster's secret
    message   a JSON object on one line of bounded length, with known fields of known types
    payload   bytes whose number both sides know from the message before

Whatever else comes, or nothing in time, ends the one connection that it came by. The secret keeps strangers out; it is
never sent, and what is sent is not encrypted. What messages mean is not known here.
"""

import collections
import errno
import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from placement.files import parse_json

log = logging.getLogger(__name__)

LINE_BYTES = 2**16
GREETING_SECONDS = 5.0  # for each line of the greeting
_SEND_SECONDS = 60.0  # without room for another piece at the other end
_PIECE = 2**20  # bytes of a payload that are sent at once
_WAITING = 64  # connections that have not proved anything; one more ends the oldest
_LOGGED = 5  # refused connections of a listener that are worth a warning

Fields = Mapping[str, type | tuple[type, ...]]
"""Names of a message's fields and their types; a name that ends with "?" may be absent."""


class MessageError(Exception):
    """A connection brought no message of the expected form, or none in time. The text says which, in one line."""


class OtherSecret(MessageError):
    """The other side has another secret."""


def parse(line: bytes, fields: Fields | None) -> dict[str, Any]:
    """A line as a message. fields: None takes any.

    Raises:
        MessageError: it is no JSON object, or has other fields.
    """
    try:
        message = parse_json(line, "it")
    except ValueError:
        raise MessageError("not a line of JSON") from None
    if not isinstance(message, dict):
        raise MessageError("not a JSON object")
    if fields is None:
        return message
    known = {name.removesuffix("?") for name in fields}
    if unknown := sorted(set(message) - known):
        raise MessageError(f"field {unknown[0]!r} is unknown")
    for name, kind in fields.items():
        value = message.get(name.removesuffix("?"), _ABSENT)
        if value is _ABSENT and name.endswith("?"):
            continue
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise MessageError(f"field {name.removesuffix('?')!r} is missing or of another type")
    return message


_ABSENT = object()


class Connection:
    """A socket with messages on it. Closed by a `with` block; to be used by one thread at a time.

    Attributes:
        peer: who is at the other end, for messages to people.
    """

    def __init__(self, connected: socket.socket, peer: str = "") -> None:
        self.socket, self.peer = connected, peer or _name(connected)
        self._buffer = bytearray()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; a thread that waits here finds it closed."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def send(self, message: Mapping[str, Any], *payloads: memoryview) -> None:
        """Send a message, and bytes after it.

        Raises:
            MessageError: the other end has gone, or takes nothing in for a minute.
        """
        try:
            self.socket.settimeout(_SEND_SECONDS)
            self.socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            for payload in payloads:
                for first in range(0, len(payload), _PIECE):
                    self.socket.sendall(payload[first : first + _PIECE])
        except OSError as error:
            raise MessageError(f"{self.peer}: {_words(error)}") from None

    def receive(self, fields: Fields | None, seconds: float | None, longest: int = LINE_BYTES) -> dict[str, Any]:
        """The next message. fields: None takes any; seconds: for all of it, None waits as long as the connection lives.

        Raises:
            MessageError: it is none, has other fields, is longer than `longest` bytes, or has not come in time.
        """
        try:
            return parse(self._line(seconds, longest), fields)
        except OSError as error:
            raise MessageError(f"{self.peer}: {_words(error)}") from None
        except MessageError as error:
            raise MessageError(f"{self.peer}: {error}") from None

    def _line(self, seconds: float | None, longest: int) -> bytes:
        deadline, looked = None if seconds is None else time.monotonic() + seconds, 0
        while (end := self._buffer.find(b"\n", looked)) < 0:
            looked = len(self._buffer)
            if looked > longest:
                raise MessageError(f"a line of more than {longest} bytes")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise MessageError(f"no whole message within {seconds:g} s")
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(min(_PIECE, longest + 1))
            except TimeoutError:
                continue
            if not data:
                raise MessageError("ended before its message did" if self._buffer else "has gone")
            self._buffer += data
        if end > longest:
            raise MessageError(f"a line of more than {longest} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def receive_into(self, buffer: memoryview, seconds: float) -> None:
        """Fill a buffer with the bytes that follow. seconds: without a single one.

        Raises:
            MessageError: they do not all come.
        """
        at = min(len(buffer), len(self._buffer))
        buffer[:at] = self._buffer[:at]
        del self._buffer[:at]
        try:
            self.socket.settimeout(seconds)
            while at < len(buffer):
                count = self.socket.recv_into(buffer[at:])
                if not count:
                    raise MessageError(f"{self.peer}: ended before its message did")
                at += count
        except OSError as error:
            raise MessageError(f"{self.peer}: {_words(error)}") from None


def connect(address: tuple[str, int] | str, secret: bytes, purpose: str, seconds: float) -> Connection:
    """A connection to a `Listener` for the same purpose, once both have proved that they know the secret.

    Args:
        address: host and port, or the path of a Unix socket.

    Raises:
        OSError: nobody listens there.
        OtherSecret: it has another secret.
        MessageError: whatever listens there is none of ours.
    """
    if isinstance(address, str):
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(seconds)
            connected.connect(address)
        except BaseException:
            connected.close()
            raise
    else:
        connected = socket.create_connection(address, seconds)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = Connection(connected, address if isinstance(address, str) else f"{address[0]}:{address[1]}")
    try:
        theirs = connection.receive({"nonce": str}, max(seconds, 0.1))["nonce"]
        ours = secrets.token_hex(16)
        proof = proof_of(secret, "client", purpose, theirs, ours)
        connection.send({"nonce": ours, "proof": proof})
        reply = connection.receive({"proof?": str, "refused?": str}, GREETING_SECONDS)
        if not hmac.compare_digest(reply.get("proof", ""), proof_of(secret, "listener", purpose, theirs, ours)):
            raise OtherSecret(f"{connection.peer} has another cluster secret; give all the same --secret-file")
    except BaseException:
        connection.close()
        raise
    return connection


def proof_of(secret: bytes, side: str, purpose: str, *nonces: str) -> str:
    """What shows that a side knows the secret, for one purpose and one greeting."""
    return hmac.new(secret, "\n".join(("dancemoe", side, purpose, *nonces)).encode(), "sha256").hexdigest()


class Listener:
    """Takes connections until it is closed, each in a thread of its own.

    Args:
        listening: a bound socket that listens; it is closed with this.
        purpose: what the connections are for; a proof for one purpose does not serve another.
        handle: called with every connection that has proved to know the secret, which is then its to close; a
            MessageError or OSError out of it ends the connection.
    """

    def __init__(
        self, listening: socket.socket, secret: bytes, purpose: str, handle: Callable[[Connection], None]
    ) -> None:
        self._socket, self._secret, self._purpose, self._handle = listening, secret, purpose, handle
        self._waiting: collections.deque[Connection] = collections.deque()
        self._refused = 0
        threading.Thread(target=self._accept, name=f"{purpose} listener", daemon=True).start()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more connections; those that have been handed over are not touched."""
        with suppress(OSError):  # a thread that waits in accept would keep the port open
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in list(self._waiting):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._socket.accept()
            except OSError as error:
                if self._socket.fileno() < 0 or not _passing(error):
                    return
                time.sleep(0.1)  # too many open files, or the client has gone already
                continue
            connection = Connection(accepted)
            while len(self._waiting) >= _WAITING:
                self._waiting.popleft().close()
            self._waiting.append(connection)
            threading.Thread(target=self._take, args=(connection,), name=self._purpose, daemon=True).start()

    def _take(self, connection: Connection) -> None:
        try:
            try:
                self._greet(connection)
            finally:
                with suppress(ValueError):
                    self._waiting.remove(connection)
            self._handle(connection)
        except (MessageError, OSError) as error:
            connection.close()
            self._refused += 1
            level = logging.WARNING if self._refused <= _LOGGED else logging.DEBUG
            log.log(level, "a connection for %s was ended: %s", self._purpose, error)
        except BaseException:
            connection.close()
            raise

    def _greet(self, connection: Connection) -> None:
        ours = secrets.token_hex(16)
        connection.send({"nonce": ours})
        message = connection.receive({"nonce": str, "proof": str}, GREETING_SECONDS, longest=1024)
        nonces = (ours, message["nonce"])
        if not hmac.compare_digest(
            message["proof"].encode(), proof_of(self._secret, "client", self._purpose, *nonces).encode()
        ):
            connection.send({"refused": "another secret"})
            raise MessageError(f"{connection.peer} has another cluster secret, or is no server of ours")
        connection.send({"proof": proof_of(self._secret, "listener", self._purpose, *nonces)})


def _passing(error: OSError) -> bool:
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR)


def _name(connected: socket.socket) -> str:
    try:
        peer = connected.getpeername()
    except OSError:
        return "a client"
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local client"


def _words(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
