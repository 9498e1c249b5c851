"""Addresses and ports: where servers meet, and how HOST:PORT is read and written. Opens no connection."""

import socket

from placement import Cluster, InputError

LOOPBACK = "127.0.0.1"

DEFAULT_PORT = 8476
_PORTS = 100  # tried for the next program, from that of the present one on


def coordinator_address(cluster: Cluster, port: int = DEFAULT_PORT) -> str:
    """Where the servers meet: the first server's `host`, which may name a port itself ("10.0.0.1:8476").

    Raises:
        InputError: the port is none.
    """
    host = cluster.servers[0].host or LOOPBACK
    return join_address(*split_address(host, f"{cluster.source}: server[0].host", port))


def free_port() -> int:
    """A port of this machine that nothing uses now, for servers that all run here."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        return listener.getsockname()[1]


def is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return host in ("::1", "localhost") or host == socket.gethostname()


def split_address(address: str, where: str, port: int | None = None) -> tuple[str, int]:
    """Host and port of "host:port", "[v6]:port", or a host alone where there is a default port."""
    head, colon, tail = address.rpartition(":")
    if not colon or (":" in head and not head.endswith("]")):
        head, tail = address, "" if port is None else str(port)
    if not (tail.isdecimal() and 0 < int(tail) < 2**16 and head):
        raise InputError(f'{where} = {address!r}: must be host:port, such as "10.0.0.1:{DEFAULT_PORT}"')
    return head.strip("[]"), int(tail)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def next_address(coordinator: str) -> str:
    """Where the next program can meet, on this machine: its own service still uses the port of the present one.

    Raises:
        InputError: no port nearby is free.
    """
    host, _, port = coordinator.rpartition(":")
    for candidate in range(int(port) + 1, min(int(port) + _PORTS, 2**16)):
        try:
            socket.create_server(("", candidate)).close()
        except OSError:
            continue
        return join_address(host.strip("[]"), candidate)
    raise InputError(f"coordinator {coordinator}: none of the {_PORTS} ports after it is free; end what uses them")
