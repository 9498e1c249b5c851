"""Servers meet before they become one program: each reports to the first, which compares what they bring.

Whoever is missing, and whoever has other inputs than the first, is named to all. It knows nothing of JAX but that its
service will answer at the port where the servers have met.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from launch.cluster.addresses import split_address
from placement import InputError

_LONGEST_HANDSHAKE = 2**16
_READ_SECONDS = 2.0
_RETRY_SECONDS = 0.1


@contextmanager
def rendezvous(
    names: tuple[str, ...], server: str, coordinator: str, facts: Mapping[str, str], timeout: float
) -> Iterator[None]:
    """Meet, and let the block, which starts JAX, begin only when everybody has come with the same facts.

    The first server enters the block before it tells the others to: they then find its service up.
    """
    host, port = split_address(coordinator, "coordinator")
    if server != names[0]:
        _report(server, names[0], host, port, facts, timeout)
        yield
        return
    clients = _receive(names, port, facts, timeout)
    telling = threading.Thread(target=_tell_when_up, args=(clients, port, time.monotonic() + timeout), daemon=True)
    telling.start()
    try:
        yield
    finally:
        for client in clients.values():
            client.close()


def _receive(names: tuple[str, ...], port: int, facts: Mapping[str, str], timeout: float) -> dict[str, socket.socket]:
    """On the first server: the connections of all others, once they have come. Raises InputError, and tells it to those
    who came, where one has not or differs."""
    clients: dict[str, socket.socket] = {}
    brought: dict[str, dict[str, str]] = {}
    deadline = time.monotonic() + timeout
    with _listen(names[0], port) as listener:
        while len(clients) < len(names) - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                client, _ = listener.accept()
            except TimeoutError:
                break
            name, theirs = handshake(client)
            if name not in names[1:]:
                answer(client, f"server {name}: no other server than {names[0]} has this name in its cluster file")
                continue
            if name in clients:  # started again while we wait, or twice by mistake
                answer(clients[name], f"server {name}: another process has come as this server")
            clients[name], brought[name] = client, theirs
    problem = difference(names[0], facts, brought) or _absence(names, clients, timeout, port)
    if problem:
        for client in clients.values():
            answer(client, problem)
        raise InputError(problem)
    return clients


def _absence(names: tuple[str, ...], clients: Mapping[str, Any], timeout: float, port: int) -> str | None:
    absent = [name for name in names[1:] if name not in clients]
    if not absent:
        return None
    which = f"server {absent[0]} has" if len(absent) == 1 else f"servers {', '.join(absent)} have"
    return (
        f"{which} not reported to {names[0]} within {timeout:g} s; start it, and see that it reaches port {port} there"
    )


def difference(first: str, facts: Mapping[str, str], brought: Mapping[str, Mapping[str, str]]) -> str | None:
    """What servers bring that differs from the facts of the first one, as a line; None where nothing does."""
    for name, theirs in brought.items():
        for what in sorted({*facts, *theirs}):
            ours, other = facts.get(what, "none"), theirs.get(what, "none")
            if ours != other:
                return (
                    f"server {name} has another {what} than {first}: {other[:12]} against {ours[:12]}; "
                    f"give every server the same"
                )
    return None


def _listen(server: str, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        if both:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"server {server}: port {port}: {error.strerror or error}; end the program that uses it, or name another port"
        ) from None


def handshake(client: socket.socket) -> tuple[str, dict[str, str]]:
    """Name and facts of who has connected; an empty name for whatever is no server."""
    client.settimeout(_READ_SECONDS)
    try:
        with client.makefile("rb") as lines:
            said = json.loads(lines.readline(_LONGEST_HANDSHAKE))
        return str(said["server"]), {str(key): str(value) for key, value in said["facts"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", {}


def answer(client: socket.socket, problem: str | None) -> None:
    """Let a server go on, or tell it why not; the connection ends."""
    with suppress(OSError), client:
        client.sendall(json.dumps({"problem": problem}).encode() + b"\n")


def _tell_when_up(clients: Mapping[str, socket.socket], port: int, deadline: float) -> None:
    """Let the others go on as soon as JAX's service answers at the port."""
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("localhost", port), _READ_SECONDS):
            break
        time.sleep(0.01)
    for client in clients.values():
        answer(client, None)


def _report(server: str, first: str, host: str, port: int, facts: Mapping[str, str], timeout: float) -> None:
    """On the others: report to the first server and wait for its word. Raises InputError with what it says."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host, port), max(_RETRY_SECONDS, deadline - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise InputError(
                    f"server {first} does not answer server {server} at {host}:{port} within {timeout:g} s "
                    f"({error.strerror or error}); start it, and see that this address reaches it"
                ) from None
            time.sleep(_RETRY_SECONDS)
    with connection:
        connection.settimeout(2 * timeout)  # it may have started to wait just before we came
        try:
            connection.sendall(json.dumps({"server": server, "facts": dict(facts)}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                problem = json.loads(lines.readline(_LONGEST_HANDSHAKE))["problem"]
        except (OSError, ValueError, LookupError, TypeError):
            raise InputError(
                f"server {first} at {host}:{port} ended before all servers had come; see what it says"
            ) from None
    if problem is not None:
        raise InputError(str(problem))
