"""A cluster that serves takes in servers: they report, read what a plan gives them, and then all become one program.

    report   a new server tells the first one who it is, and what it serves with; differences are refused
    plan     once all have come: the first server plans for the larger cluster, with the placement in force as its start
    stage    the new servers read their experts while the others serve; one that cannot is the end of it, and nothing changes
    commit   all leave between two steps and meet anew (`launch.elastic.process_group`), requests and their tokens with them

`Growth` is the first server's part, `report` that of a new one.
"""

import dataclasses
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jax

from dancemoe_jax.errors import DanceMoEError
from dancemoe_jax.expert_parallel.pool import read_ahead
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.addresses import join_address, next_address, split_address
from launch.cluster.fingerprint import cluster_fingerprint
from launch.cluster.jax_runtime import own_address
from launch.cluster.rendezvous import answer, difference, handshake
from launch.elastic.process_group import ProcessGroup, decode, encode, order
from launch.engine.host import Host
from launch.migration.controller import Controller
from placement import Cluster, InputError
from placement.units import format_bytes

_STAGE_S = 1800.0  # for a new server to read its experts
_ABORT_S = 5.0  # for whatever is under way to end
_LONGEST = 2**26  # of a line

Read = Callable[[int, int], ExpertWeights]


def described(cluster: Cluster, facts: Mapping[str, str]) -> dict[str, str]:
    """What has to be the same on a new server and on those that serve."""
    return {"cluster file": cluster_fingerprint(cluster), "version of JAX": jax.__version__, **facts}


class Growth:
    """Takes in new servers, one cluster file at a time. On the first server.

    Args:
        facts: what all servers serve with, fingerprints by what they are of.
        coordinator: where this program has met.
    """

    def __init__(self, controller: Controller, host: Host, facts: Mapping[str, str], coordinator: str) -> None:
        self._controller, self._host, self._facts, self._coordinator = controller, host, facts, coordinator
        self._address = own_address() if jax.process_count() > 1 else split_address(coordinator, "coordinator")[0]
        self._listener: socket.socket | None = None
        self._clients: dict[str, socket.socket] = {}
        self._thread: threading.Thread | None = None
        self._stage = ""
        self._lock = threading.Lock()

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What the command `migrate` asks for, where it is about new servers; everything else is the controller's."""
        what = asked.get("what")
        if what == "add":
            return self._add(asked["cluster"], str(asked["source"]), bool(asked.get("dry")))
        if what == "abort" and self._stage:
            if self._stage == _COMMITTING:
                raise InputError("--abort: too late, all are about to become one program")
            self.end()
            if self._thread is not None:
                self._thread.join(_ABORT_S)
            return {"aborted": "growth"}
        reply = self._controller.answer(asked)
        return {**reply, "growth": self._stage} if what == "status" else reply

    def end(self) -> None:
        """Take in nobody any more. Whoever waits at one of the sockets finds it at its end."""
        with self._lock:
            listener, self._listener = self._listener, None
            for waiting in [*self._clients.values(), *([listener] if listener else [])]:
                with suppress(OSError):
                    waiting.shutdown(socket.SHUT_RDWR)
        if listener is not None:
            listener.close()

    def _add(self, file: Mapping[str, Any], source: str, dry: bool) -> dict[str, Any]:
        cluster = Cluster.from_dict(file, source)
        present = self._controller.loaded.cluster
        for index, server in enumerate(present.servers):
            if [(s.name, s.devices) for s in cluster.servers[index : index + 1]] != [(server.name, server.devices)]:
                raise InputError(
                    f"{source}: server[{index}] is not {server.name} as it serves now; list the servers that serve first, "
                    f"as they are, and new ones after them"
                )
        new = cluster.names[len(present.names) :]
        if not new:
            raise InputError(f"{source}: no server that does not serve already; add a [[server]] table")
        if dry:
            planned, _ = self._controller.undisturbed(lambda: self._controller.grown(cluster, ", ".join(new)))
            return dataclasses.asdict(planned)
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise InputError(f"servers are being added already ({self._stage}); --abort that first")
            self._listener = listener = socket.create_server((self._address, 0))
            self._stage, arguments = _WAITING, (file, cluster, new, listener)
            self._thread = threading.Thread(target=self._grow, args=arguments, name="growth", daemon=True)
            self._thread.start()
        address = join_address(*listener.getsockname()[:2])
        return {"waiting": list(new), "address": address}

    def _grow(self, file: Mapping[str, Any], cluster: Cluster, new: tuple[str, ...], listener: socket.socket) -> None:
        clients = self._clients
        try:
            self._receive(listener, cluster, new, clients)
            self._controller.undisturbed(lambda: self._commit(file, cluster, clients))
        except (InputError, OSError) as error:
            problem = " ".join(str(error).split())
            print(f"placement: {', '.join(new)} not added: {problem}", file=sys.stderr, flush=True)
            for client in clients.values():
                answer(client, problem)
        finally:
            self.end()
            for client in clients.values():
                client.close()
            clients.clear()
            self._stage = ""

    def _receive(
        self, listener: socket.socket, cluster: Cluster, new: tuple[str, ...], clients: dict[str, socket.socket]
    ) -> None:
        """Until all have come, or nobody is waited for any more."""
        facts = described(cluster, self._facts)
        while len(clients) < len(new):
            try:
                client, _ = listener.accept()
            except OSError:
                raise InputError("given up") from None
            name, theirs = handshake(client)
            problem = difference(self._host_name, facts, {name: theirs})
            if name not in new:
                problem = f"server {name}: it is not waited for; {', '.join(new)} are"
            if problem:
                answer(client, problem)
                continue
            if name in clients:
                clients[name].close()
            clients[name] = client
            print(f"placement: {name} has come", file=sys.stderr, flush=True)

    def _commit(self, file: Mapping[str, Any], cluster: Cluster, clients: Mapping[str, socket.socket]) -> None:
        """Plan, wait until all have staged, and order everybody to reform."""
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
            client.sendall(group + b"\n")
        for name, client in clients.items():
            _staged(name, client)
        self._controller.note(decision)
        self._stage = _COMMITTING
        order(self._host, group)
        for client in clients.values():
            answer(client, None)
        self._controller.wait_for_end()

    @property
    def _host_name(self) -> str:
        return self._controller.loaded.cluster.names[0]


_WAITING, _COMMITTING = "waiting for new servers", "all become one program"


def _staged(name: str, client: socket.socket) -> None:
    """Wait until a new server has read its experts. Raises InputError where it cannot."""
    client.settimeout(_STAGE_S)
    try:
        with client.makefile("rb") as lines:
            told = json.loads(lines.readline(_LONGEST))
    except (OSError, ValueError):
        raise InputError(f"server {name} has gone while it was staging") from None
    if told["problem"]:
        raise InputError(f"server {name}: {told['problem']}")
    print(
        f"placement: {name} has read {told['experts']} experts, {format_bytes(told['bytes'])}, in {told['seconds']:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def report(
    address: str,
    cluster: Cluster,
    server: str,
    facts: Mapping[str, str],
    read: Read,
    staging_bytes: int,
    timeout: float,
) -> tuple[ProcessGroup, Read]:
    """Be taken in by a cluster that serves: what program to join, and what reads experts, from memory where they are staged.

    Args:
        address: where `migrate --add` waits for new servers.
        cluster: with this server.
        facts: what it serves with.
        read: (layer, expert) -> its weights from the own checkpoint.
        staging_bytes: host memory for experts until their devices take them; the others are read, so that a checkpoint
            that lacks one is found, and read again.
        timeout: seconds to wait for an answer there.

    Raises:
        InputError: nobody waits there, or the cluster takes in no such server.
        ModelError: the checkpoint lacks what the server is to hold.
    """
    host, port = split_address(address, "--join")
    try:
        connection = socket.create_connection((host, port), timeout)
    except OSError as error:
        raise InputError(
            f"--join {address}: nobody takes in servers there ({error.strerror or error}); run `python -m launch migrate "
            f"--add` on the first server, which says where"
        ) from None
    with connection, connection.makefile("rwb") as stream:
        connection.settimeout(None)  # others may have to come first
        said = {"server": server, "facts": described(cluster, facts)}
        group = decode(_told(stream, said, address))
        placement = group.placement
        assert placement is not None
        try:
            kept, told = _read_own(placement.resident[placement_devices(cluster, server)], read, staging_bytes)
        except DanceMoEError as error:
            _send(stream, {"problem": " ".join(str(error).split())})
            raise
        print(f"{server}: {told['experts']} experts staged", file=sys.stderr, flush=True)
        _told(stream, {"problem": None, **told}, address)

    def staged(layer: int, expert: int) -> ExpertWeights:
        return kept.pop((layer, expert), None) or read(layer, expert)

    return group, staged


def placement_devices(cluster: Cluster, server: str) -> list[int]:
    """Indices of a server's devices."""
    return [index for index, (name, _) in enumerate(cluster.device_names) if name == server]


def _read_own(own: Any, read: Read, staging_bytes: int) -> tuple[dict[tuple[int, int], ExpertWeights], dict[str, Any]]:
    """Read all experts of bool [devices, layers, experts] once; those that fit into memory, and figures."""
    begin, total = time.monotonic(), 0
    wanted = [(int(layer), int(expert)) for layer, expert in zip(*own.any(0).nonzero(), strict=True)]
    kept: dict[tuple[int, int], ExpertWeights] = {}
    for at, weights in zip(wanted, read_ahead(read, wanted, threads=2), strict=True):
        size = sum(part.nbytes for part in jax.tree.leaves(weights))
        if total + size <= staging_bytes:
            kept[at] = weights
        total += size
    return kept, {"experts": len(wanted), "bytes": total, "seconds": time.monotonic() - begin}


def _send(stream: Any, said: Mapping[str, Any]) -> None:
    stream.write(json.dumps(said).encode() + b"\n")
    stream.flush()


def _told(stream: Any, said: Mapping[str, Any], address: str) -> bytes:
    """What the first server answers. Raises InputError where that is a problem."""
    try:
        _send(stream, said)
        line = stream.readline(_LONGEST)
        problem = json.loads(line).get("problem")
    except (OSError, ValueError):
        raise InputError(f"--join {address}: the cluster there has ended or takes in nobody any more") from None
    if problem:
        raise InputError(str(problem))
    return line
