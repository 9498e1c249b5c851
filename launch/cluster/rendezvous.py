"""Servers meet before they become one program: each reports to the first, which compares what they bring.

A server that is missing, and one that has other inputs than the first, is named to all. It knows nothing of JAX but that
its service will answer at the port of the rendezvous.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from launch.cluster.addresses import listen, split_address
from launch.cluster.framing import Connection, Listener, MessageError, OtherSecret, connect
from placement import InputError

PURPOSE = "rendezvous"
_READ_SECONDS = 5.0
_RETRY_SECONDS = 0.1
REPORT = {"server": str, "facts": dict}
REPLY = {"problem?": (str, type(None)), "absent?": list}
"""problem: why not to go on, None is that all is well; before that, as often as it changes, absent: who has not come yet."""

Absent = Callable[[Sequence[str]], None]


@contextmanager
def rendezvous(
    names: tuple[str, ...],
    server: str,
    coordinator: str,
    facts: Mapping[str, str],
    timeout: float,
    secret: bytes,
    *,
    absent: Absent = lambda _: None,
    patience: float = 0.0,
) -> Iterator[str]:
    """Meet, and let the block, which starts JAX, begin only when everybody has come with the same facts.

    The first server enters the block before it lets the others: they then find its service up. Gives the address
    of the rendezvous, as this server reaches it.

    Args:
        absent: called with those who have not come yet, as often as that changes.
        patience: seconds for the port to become free, which the last program may have just left.
    """
    host, port = split_address(coordinator, "coordinator")
    if server != names[0]:
        absent(names[:1])
        yield _report(server, names[0], host, port, facts, timeout, secret, absent)
        return
    clients, address = _receive(names, _listen(host, port, names[0], patience), port, facts, timeout, secret, absent)
    release = threading.Thread(
        target=_release_when_up, args=(clients, address, port, time.monotonic() + timeout), daemon=True
    )
    release.start()
    try:
        yield address
    finally:
        for client in clients.values():
            client.close()


def _listen(host: str, port: int, first: str, patience: float) -> socket.socket:
    deadline = time.monotonic() + patience
    while True:
        try:
            return listen(host, port, f"server {first}")
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_SECONDS)


def _receive(
    names: tuple[str, ...],
    listening: socket.socket,
    port: int,
    facts: Mapping[str, str],
    timeout: float,
    secret: bytes,
    absent: Absent,
) -> tuple[dict[str, Connection], str]:
    """On the first server: the connections of all others, once they have come, and the own address. Raises InputError, and
    tells it to those who came, where one has not or differs."""
    clients: dict[str, Connection] = {}
    brought: dict[str, dict[str, str]] = {}
    arrived: queue.SimpleQueue[tuple[Connection, str, dict[str, str]]] = queue.SimpleQueue()
    deadline = time.monotonic() + timeout
    address = str(listening.getsockname()[0])
    with Listener(listening, secret, PURPOSE, lambda client: arrived.put((client, *handshake(client)))):
        absent(names[1:])
        while len(clients) < len(names) - 1 and (left := deadline - time.monotonic()) > 0:
            try:
                client, name, theirs = arrived.get(timeout=left)
            except queue.Empty:
                break
            if name not in names[1:]:
                answer(client, f"server {name}: no other server than {names[0]} has this name in its cluster file")
                continue
            if name in clients:  # started again while we wait, or twice by mistake
                answer(clients[name], f"server {name}: another process has come as this server")
            clients[name], brought[name] = client, theirs
            _tell_absent([name for name in names[1:] if name not in clients], clients, absent)
    problem = difference(names[0], facts, brought) or _absence(names, clients, timeout, port)
    if problem:
        for client in clients.values():
            answer(client, problem)
        raise InputError(problem)
    return clients, address


def _tell_absent(left: Sequence[str], clients: Mapping[str, Connection], absent: Absent) -> None:
    absent(left)
    for client in clients.values():
        with suppress(MessageError):
            client.send({"absent": left})


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


def handshake(client: Connection) -> tuple[str, dict[str, str]]:
    """Name and facts of a server that has connected.

    Raises:
        MessageError: it says something else, or nothing in time.
    """
    message = client.receive(REPORT, _READ_SECONDS)
    return message["server"], {str(key): str(value) for key, value in message["facts"].items()}


def answer(client: Connection, problem: str | None) -> None:
    """Let a server go on, or tell it why not; the connection ends."""
    with suppress(MessageError), client:
        client.send({"problem": problem})


def _release_when_up(clients: Mapping[str, Connection], address: str, port: int, deadline: float) -> None:
    """Let the others go on as soon as JAX's service answers at the port."""
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((address, port), _READ_SECONDS):
            break
        time.sleep(0.01)
    for client in clients.values():
        answer(client, None)


def _report(
    server: str,
    first: str,
    host: str,
    port: int,
    facts: Mapping[str, str],
    timeout: float,
    secret: bytes,
    absent: Absent,
) -> str:
    """On the others: report to the first server, wait for its word, and give the address at which it was reached. Raises
    InputError with what it says."""
    deadline = time.monotonic() + timeout
    where = f"{host}:{port}"
    while True:
        try:
            connection = connect(
                (host, port), secret, PURPOSE, max(_RETRY_SECONDS, min(timeout, deadline - time.monotonic()))
            )
            break
        except OtherSecret as error:
            raise InputError(f"server {first}: {error}") from None
        except (OSError, MessageError) as error:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                words = getattr(error, "strerror", None) or str(error)
                raise InputError(
                    f"server {first} does not answer server {server} at {where} within {timeout:g} s "
                    f"({words}); start it, and see that this address reaches it"
                ) from None
            time.sleep(_RETRY_SECONDS)
    with connection:
        address = str(connection.socket.getpeername()[0])
        try:
            connection.send({"server": server, "facts": dict(facts)})
            # It may have started to wait just before we came.
            while "problem" not in (reply := connection.receive(REPLY, 2 * timeout)):
                absent(reply.get("absent", []))
            problem = reply["problem"]
        except MessageError:
            raise InputError(f"server {first} at {where} ended before all servers had come; see what it says") from None
    if problem is not None:
        raise InputError(problem)
    return address
