"""A cluster that serves takes in servers: they report, read what a plan gives them, and then all become one program.

    report   a new server tells the first one who it is, and what it serves with; differences are refused
    plan     once all have come: the first server plans for the larger cluster, with the placement in force as its start
    stage    the new servers read their experts while the others serve; one that cannot is the end of it, and nothing changes
    commit   all leave between two steps and meet anew (`launch.elastic.process_group`), requests and their tokens with them

The first server's part; `launch.elastic.newcomer` is that of a new one.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from launch.cluster.addresses import join_address, listen, next_address, split_address
from launch.cluster.framing import Connection, Listener, MessageError
from launch.cluster.jax_runtime import own_address
from launch.cluster.rendezvous import answer, difference, handshake
from launch.elastic.newcomer import PROGRESS_S, PURPOSE, STAGED, described
from launch.elastic.process_group import ProcessGroup, command_change, encode
from launch.engine.host import Host
from launch.migration.controller import Controller
from placement import Cluster, InputError
from placement.units import format_bytes

log = logging.getLogger(__name__)

_COME_S = 1800.0  # for new servers to be started
_SILENT_S = 12 * PROGRESS_S  # of a new server that reads its experts
_ABORT_S = 5.0  # for whatever is under way to end
_BUSY_S = 5.0  # for a revision of the placement to end
_WAITING, _COMMITTING = "waiting for new servers", "all become one program"


class Growth:
    """Takes in new servers, one cluster file at a time. On the first server.

    Args:
        facts: what all servers serve with, fingerprints by what they are of.
        coordinator: where this program has met.
        secret: of the cluster.
        otherwise: answers requests that are not about new servers.
    """

    def __init__(
        self,
        controller: Controller,
        host: Host,
        facts: Mapping[str, str],
        coordinator: str,
        secret: bytes,
        otherwise: Callable[[Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        self._controller, self._host, self._facts, self._coordinator = controller, host, facts, coordinator
        self._address = own_address() if jax.process_count() > 1 else split_address(coordinator, "coordinator")[0]
        self._secret, self._otherwise = secret, otherwise
        self._admission: _Admission | None = None
        self._thread: threading.Thread | None = None
        self._stage = ""
        self._lock = threading.Lock()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the command `migrate` asks for, where it is about new servers; everything else goes on."""
        what = request.get("what")
        if what == "add":
            return self._add(request["cluster"], str(request.get("source", "")), bool(request.get("dry")))
        if what == "abort" and self._stage:
            if self._stage == _COMMITTING:
                raise InputError("--abort: too late, all are about to become one program")
            self.end()
            if self._thread is not None:
                self._thread.join(_ABORT_S)
            return {"aborted": "growth"}
        reply = self._otherwise(request)
        return {**reply, "growth": self._stage} if what == "status" else reply

    def end(self) -> None:
        """Take in nobody any more. A thread that waits for one of the new servers finds its connection at its end."""
        with self._lock:
            if self._admission is not None:
                self._admission.close()

    def _add(self, file: Mapping[str, Any], source: str, dry: bool) -> dict[str, Any]:
        cluster = Cluster.from_dict(file, source)
        new = _new_servers(self._controller.loaded.cluster, cluster, source)
        if dry:
            plan: Callable[[], Any] = lambda: self._controller.grown(cluster, ", ".join(new))  # noqa: E731
            planned, _ = self._controller.undisturbed(plan, _BUSY_S)
            return dataclasses.asdict(planned)
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise InputError(f"servers are being added already ({self._stage}); --abort that first")
            facts, first = described(cluster, self._facts), self._controller.loaded.cluster.names[0]
            self._admission = admission = _Admission(self._address, self._secret, new, first, facts)
            self._stage, arguments = _WAITING, (file, cluster, new, admission)
            self._thread = threading.Thread(target=self._grow, args=arguments, name="growth", daemon=True)
            self._thread.start()
        log.info("placement: waits %.0f min for %s", _COME_S / 60, ", ".join(new))
        return {"waiting": list(new), "address": admission.address}

    def _grow(self, file: Mapping[str, Any], cluster: Cluster, new: tuple[str, ...], admission: "_Admission") -> None:
        try:
            admission.wait(_COME_S)
            self._controller.undisturbed(lambda: self._commit(file, cluster, admission.clients))
        except (InputError, MessageError, OSError) as error:
            problem = " ".join(str(error).split())
            log.error("placement: %s not added: %s", ", ".join(new), problem)
            for client in admission.clients.values():
                answer(client, problem)
        finally:
            admission.close()
            self._stage = ""

    def _commit(self, file: Mapping[str, Any], cluster: Cluster, clients: Mapping[str, Connection]) -> None:
        """Plan, wait until all have staged, and command everybody to re-form."""
        names = ", ".join(clients)
        self._stage = f"{names}: planning"
        decision, target = self._controller.grown(cluster, names)
        worker, limits = self._controller.worker, self._controller.limits
        where = next_address(self._coordinator)
        back = ProcessGroup(
            self._controller.loaded.cluster,
            next_address(where),
            worker.placement,
            worker.epoch,
            f"{names} did not come",
            limits,
        )
        group = encode(file, ProcessGroup(cluster, where, target, worker.epoch + 1, f"{names} added", limits, back))
        self._stage = f"{names}: staging"
        for client in clients.values():
            client.send(group)
        for name, client in clients.items():
            _wait_until_staged(name, client)
        self._controller.journal.note(decision)
        self._stage = _COMMITTING
        command_change(self._host, group)
        for client in clients.values():
            answer(client, None)
        self._controller.wait_for_end()


def _new_servers(present: Cluster, cluster: Cluster, source: str) -> tuple[str, ...]:
    """Names that a cluster file has beside the servers that serve. Raises InputError where it changes those, or has none."""
    for index, server in enumerate(present.servers):
        if [(s.name, s.devices) for s in cluster.servers[index : index + 1]] != [(server.name, server.devices)]:
            raise InputError(
                f"{source}: server[{index}] is not {server.name} as it serves now; list the servers that serve first, "
                f"as they are, and new ones after them"
            )
    new = cluster.names[len(present.names) :]
    if not new:
        raise InputError(f"{source}: no server that does not serve already; add a [[server]] table")
    return new


class _Admission:
    """Where new servers report.

    Attributes:
        address: host:port; clients: those that have come and fit, by name.
    """

    def __init__(self, host: str, secret: bytes, new: tuple[str, ...], first: str, facts: Mapping[str, str]) -> None:
        self.clients: dict[str, Connection] = {}
        self._new, self._first, self._facts = new, first, facts
        self._arrived: queue.SimpleQueue[tuple[Connection, str, dict[str, str]] | None] = queue.SimpleQueue()
        listening = listen(host, 0, f"server {first}")
        self.address = join_address(*listening.getsockname()[:2])
        take: Callable[[Connection], None] = lambda client: self._arrived.put((client, *handshake(client)))  # noqa: E731
        self._listener = Listener(listening, secret, PURPOSE, take)

    def close(self) -> None:
        """Wait for nobody any more."""
        self._listener.close()
        for client in list(self.clients.values()):
            client.close()
        self._arrived.put(None)

    def wait(self, seconds: float) -> None:
        """Until all have come. Raises InputError where they do not, or nobody is waited for any more."""
        deadline = time.monotonic() + seconds
        while absent := [name for name in self._new if name not in self.clients]:
            try:
                arrived = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise InputError(f"{', '.join(absent)} did not come within {seconds:.0f} s") from None
            if arrived is None:
                raise InputError("given up")
            client, name, theirs = arrived
            problem = difference(self._first, self._facts, {name: theirs})
            if name not in self._new:
                problem = f"server {name}: it is not waited for; {', '.join(self._new)} are"
            if problem:
                answer(client, problem)
                continue
            if name in self.clients:
                self.clients[name].close()
            self.clients[name] = client
            log.info("placement: %s has come", name)


def _wait_until_staged(name: str, client: Connection) -> None:
    """Until a new server has read its experts. Raises InputError where it cannot, or says nothing any more."""
    while True:
        try:
            message = client.receive(STAGED, _SILENT_S)
        except MessageError as error:
            raise InputError(f"server {name} has gone while it was staging ({error})") from None
        if message.get("problem"):
            raise InputError(f"server {name}: {message['problem']}")
        if "seconds" in message:
            break
    log.info(
        "placement: %s has read %d experts, %s, in %.1f s",
        name,
        message["experts"],
        format_bytes(message["bytes"]),
        message["seconds"],
    )
