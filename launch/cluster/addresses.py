"""Addresses and ports: where servers meet, which of them are this machine, and how HOST:PORT is read and written.

Names, IPv4 and IPv6 alike, and machines in several networks. Holds no protocol.
"""

import socket
from typing import Any

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


def free_port(host: str = LOOPBACK) -> int:
    """A port of this machine that nothing uses now, for servers that all run here."""
    with listen(host, 0, "a free port") as listener:
        return listener.getsockname()[1]


def resolve(host: str, port: int, where: str) -> list[tuple[int, Any]]:
    """What a name or an address leads to, as (family, socket address) in the order to try them.

    Raises:
        InputError: nothing.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        words = getattr(error, "strerror", None) or "no name of a machine"
        raise InputError(
            f"{where}: {host!r} is not known here ({words}); give an address, or a name that DNS or /etc/hosts has"
        ) from None
    return [(family, address) for family, _, _, _, address in found]


def is_here(host: str, where: str) -> bool:
    """Whether a host is this machine, by whichever of its networks.

    Raises:
        InputError: the name leads nowhere.
    """
    return any(_is_own(family, address) for family, address in resolve(host, 0, where))


def _is_own(family: int, address: Any) -> bool:
    """Whether a socket address is one of this machine: only those can be bound."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def listen(host: str, port: int, who: str) -> socket.socket:
    """A socket that listens at an address of this machine, and nowhere else.

    Raises:
        InputError: the address is not this machine's, or the port is in use.
    """
    taken = ""
    for family, address in resolve(host, port, who):
        try:
            return socket.create_server(address, family=family, backlog=128)
        except OSError as error:
            if _is_own(family, address):
                taken = taken or error.strerror or str(error)
    if taken:
        raise InputError(f"{who}: port {port}: {taken}; end the program that uses it, or name another port")
    raise InputError(f"{who}: {host} is no address of this machine; give one that it has in the cluster's network")


def source_address(host: str, port: int, who: str) -> str:
    """This machine's own address towards another one: that of the network by which it reaches it. Sends nothing.

    Raises:
        InputError: no network leads there.
    """
    for family, address in resolve(host, port, who):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    raise InputError(f"{who}: no network of this machine leads to {host}; see its routes and the cluster file's hosts")


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
    host, port = split_address(coordinator, "coordinator")
    for candidate in range(port + 1, min(port + _PORTS, 2**16)):
        try:
            listen(host, candidate, "coordinator").close()
        except InputError:
            continue
        return join_address(host, candidate)
    raise InputError(f"coordinator {coordinator}: none of the {_PORTS} ports after it is free; end what uses them")
