"""Who has gone, said by those who remain: every two servers of a program keep a connection that ends when one of them does.

A step that fails says only that somebody is missing, and JAX may end a process before it says anything. What follows from
a loss is not decided here.
"""

import contextlib
import itertools
import selectors
import socket
import sys
import threading
from collections.abc import Iterator, Sequence

from launch.cluster.channel import Channel

_START_S = 60.0
_BYE = b"."
_SILENT_S, _PROBES = 10, 3  # a machine that is silent so long is asked so often, as long apart


@contextlib.contextmanager
def watching(names: Sequence[str], server: int, channel: Channel, host: str) -> Iterator[None]:
    """Within the block a line on standard error names a server that goes without having left its own block.

    Args:
        names: of all servers, each of which has to come here; server: index of this one.
        host: address under which the others reach it.

    Raises:
        RuntimeError: a server has not come.
    """
    peers = _connect(names, server, channel, host)
    left = threading.Event()
    threading.Thread(target=_listen, args=(names, server, peers, left), name="watch", daemon=True).start()
    yield
    # Only whoever comes to the end of the block says goodbye: an error is a loss to the others.
    left.set()
    for connection in peers:
        with contextlib.suppress(OSError):
            connection.sendall(_BYE)


def _connect(names: Sequence[str], server: int, channel: Channel, host: str) -> dict[socket.socket, int]:
    """A connection to each other server: asked for by the later one of the two."""
    peers: dict[socket.socket, int] = {}
    with socket.create_server((host, 0)) as listener:
        listener.settimeout(_START_S)
        channel.put(f"watch/{server}", f"{host} {listener.getsockname()[1]}".encode())
        for other in range(server):
            told = channel.get(f"watch/{other}", _START_S)
            if told is None:
                raise RuntimeError(f"server {names[other]} has not said within {_START_S:g} s where to watch it")
            where, port = told.decode().split()
            connection = socket.create_connection((where, int(port)), _START_S)
            connection.sendall(server.to_bytes(2))
            peers[connection] = other
        for _ in itertools.repeat(None, len(names) - 1 - server):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                absent = {*range(server + 1, len(names))} - {*peers.values()}
                raise RuntimeError(f"server {names[min(absent)]} has not come within {_START_S:g} s") from None
            peers[connection] = int.from_bytes(connection.recv(2, socket.MSG_WAITALL))
    for connection in peers:
        connection.settimeout(None)
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENT_S),
            (socket.TCP_KEEPINTVL, _SILENT_S),
            (socket.TCP_KEEPCNT, _PROBES),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return peers


def _listen(names: Sequence[str], server: int, peers: dict[socket.socket, int], left: threading.Event) -> None:
    """Until all have gone, or this server has left and the others too."""
    with selectors.DefaultSelector() as selector:
        for connection, other in peers.items():
            selector.register(connection, selectors.EVENT_READ, other)
        lost = False
        while selector.get_map():
            for key, _ in selector.select():
                connection: socket.socket = key.fileobj  # pyright: ignore[reportAssignmentType]
                try:
                    said = connection.recv(len(_BYE))
                except OSError:
                    said = b""
                selector.unregister(connection)
                # The others end because of the first.
                if said != _BYE and not lost and not left.is_set():
                    lost = True
                    print(
                        f"server {names[server]}: server {names[key.data]} has ended or cannot be reached any more",
                        file=sys.stderr,
                        flush=True,
                    )
