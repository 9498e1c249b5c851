"""Who has gone, said by those who remain: every two servers of a program keep a connection that ends when one of them does.

A step that fails says only that somebody is missing, and JAX may end a process before it says anything. What follows from
a loss is not decided here.
"""

import contextlib
import json
import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from launch.cluster.addresses import listen
from launch.cluster.channel import Channel
from launch.cluster.framing import Connection, Listener, MessageError, connect
from placement.files import parse_json

log = logging.getLogger(__name__)

PURPOSE = "liveness"
_START_S = 60.0
_READ_S = 5.0
_BYE = b"."
_SILENT_S, _PROBES = 10, 3  # a machine that is silent so long is asked so often, as long apart


@contextlib.contextmanager
def watching(
    names: Sequence[str],
    server: int,
    channel: Channel,
    host: str,
    secret: bytes,
    lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Within the block a line of the log names a server that goes without having left its own block.

    Args:
        names: of all servers, each of which has to come here; server: index of this one.
        host: address under which the others reach it.
        lost: called with the name of the first that goes, from a thread of its own.

    Raises:
        RuntimeError: a server has not come.
    """
    peers = _connect(names, server, channel, host, secret)
    left = threading.Event()
    arguments = (names, server, peers, left, lost)
    threading.Thread(target=_listen, args=arguments, name="liveness", daemon=True).start()
    yield
    # Only a server that comes to the end of the block says goodbye: an error is a loss to the others.
    left.set()
    for connection in peers:
        with contextlib.suppress(OSError):
            connection.sendall(_BYE)


def _connect(names: Sequence[str], server: int, channel: Channel, host: str, secret: bytes) -> dict[socket.socket, int]:
    """A connection to each other server: asked for by the later one of the two."""
    peers: dict[socket.socket, int] = {}
    came: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()

    def take(connection: Connection) -> None:
        other = connection.receive({"server": int}, _READ_S)["server"]
        connection.send({"server": server})
        came.put((other, connection.socket))

    listening = listen(host, 0, f"server {names[server]}")
    with Listener(listening, secret, PURPOSE, take):
        channel.put(f"watch/{server}", json.dumps(listening.getsockname()[:2]).encode())
        for other in range(server):
            message = channel.get(f"watch/{other}", _START_S)
            if message is None:
                raise RuntimeError(f"server {names[other]} has not said within {_START_S:g} s where to watch it")
            where, port = parse_json(message, f"watch/{other}")
            try:
                connection = connect((where, port), secret, PURPOSE, _START_S)
                connection.send({"server": server})
                connection.receive({"server": int}, _START_S)
            except (OSError, MessageError) as error:
                raise RuntimeError(f"server {names[other]} cannot be watched at {where}:{port} ({error})") from None
            peers[connection.socket] = other
        deadline = time.monotonic() + _START_S
        while absent := {*range(server + 1, len(names))} - {*peers.values()}:
            try:
                other, connected = came.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"server {names[min(absent)]} has not come within {_START_S:g} s") from None
            if other in absent:
                peers[connected] = other
    for connected in peers:
        _keep_alive(connected)
    return peers


def _keep_alive(connected: socket.socket) -> None:
    """Have the system find out that the other machine has gone without a word."""
    connected.settimeout(None)
    for option, value in (
        ("TCP_KEEPIDLE", _SILENT_S),
        ("TCP_KEEPINTVL", _SILENT_S),
        ("TCP_KEEPCNT", _PROBES),
    ):
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _listen(
    names: Sequence[str],
    server: int,
    peers: dict[socket.socket, int],
    left: threading.Event,
    lost: Callable[[str], None] | None,
) -> None:
    """Until all have gone, or this server has left and the others too."""
    with selectors.DefaultSelector() as selector:
        for connected, other in peers.items():
            selector.register(connected, selectors.EVENT_READ, other)
        found = False
        while selector.get_map():
            for key, _ in selector.select():
                connected: socket.socket = key.fileobj  # pyright: ignore[reportAssignmentType]
                try:
                    word = connected.recv(len(_BYE))
                except OSError:
                    word = b""
                selector.unregister(connected)
                # The others end because of the first.
                if word != _BYE and not found and not left.is_set():
                    found = True
                    gone = names[key.data]
                    log.error("server %s: server %s has ended or cannot be reached any more", names[server], gone)
                    if lost is not None:
                        threading.Thread(target=lost, args=(gone,), name="lost", daemon=True).start()
