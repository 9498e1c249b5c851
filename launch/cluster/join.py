"""A server's process joins the others: they meet, compare what they have, and become one JAX program.

JAX's own start aborts a process when another never comes, without a word on which, so the servers meet before it
(rendezvous.py), with their names and the fingerprints of their inputs. What they do afterwards is not known here, nor how
they are started (processes.py).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dancemoe_jax.mesh import AXIS, make_mesh, shard_rows
from launch.cluster.addresses import DEFAULT_PORT, coordinator_address, resolve, source_address, split_address
from launch.cluster.channel import ChannelLost, open_channel
from launch.cluster.devices import ordered_devices, prepare_devices
from launch.cluster.fingerprint import cluster_fingerprint
from launch.cluster.jax_runtime import abandon, is_of_exchange, leave_at_once, start_program
from launch.cluster.liveness import watching
from launch.cluster.rendezvous import rendezvous
from launch.cluster.secret import load_secret
from placement import Cluster, InputError

log = logging.getLogger(__name__)

_LATER_S = 0.5  # than the server that has gone: whatever started all is to see that one end first
_LOSS_S = 3.0  # between a step that fails and the word that another server has ended


@contextmanager
def join(
    cluster: Cluster,
    server: str,
    *,
    coordinator: str | None = None,
    agree: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    secret: bytes | None = None,
    lost: Callable[[str], None] | None = None,
    absent: Callable[[Sequence[str]], None] = lambda _: None,
    patience: float = 0.0,
) -> Iterator[list[Any]]:
    """Be one server of the cluster for the length of a block, with all the cluster's devices in mesh order.

    It has to come before anything that makes JAX look for devices. Where there are no accelerators, a server gets as
    many virtual CPU devices as its file lists, and Gloo carries what they exchange. A block that ends with an error
    leaves at once, without the others.

    Args:
        cluster: all servers, the same on each of them.
        server: the name of this one.
        coordinator: host:port where they meet, on the first server; default: `coordinator_address`.
        agree: fingerprints by what they are of, which must be the same on all servers; the cluster file and the version
            of JAX are compared in any case.
        timeout: seconds to wait for the others.
        secret: of the cluster; default: `load_secret()`.
        lost: called with the name of the first server that goes within the block without having left its own, which a line
            of the log says; by default this process ends then, with status 1.
        absent: called with those who have not come yet, as often as that changes.
        patience: seconds for the first server's port to become free.

    Raises:
        InputError: no such server; the port is in use; a server did not come, or came with something else; a server
            has other devices than its file says.
    """
    if server not in cluster.names:
        raise InputError(f"server {server}: not in {cluster.source}; known are {', '.join(cluster.names)}")
    index, count = cluster.names.index(server), len(cluster.servers)
    if count == 1:
        prepare_devices(cluster, index, None)
        yield ordered_devices(cluster)
        return
    threading.Thread(target=_say_unknown_hosts, args=(cluster,), name="names", daemon=True).start()
    coordinator = coordinator or coordinator_address(cluster)
    secret = load_secret() if secret is None else secret
    facts = {"cluster file": cluster_fingerprint(cluster), "version of JAX": jax.__version__, **(agree or {})}
    with rendezvous(
        cluster.names, server, coordinator, facts, timeout, secret, absent=absent, patience=patience
    ) as address:
        own = _start(cluster, server, address, coordinator, timeout)
    with _joined(cluster, index, own, secret, lost) as devices:
        yield devices
    jax.distributed.shutdown()


def _say_unknown_hosts(cluster: Cluster) -> None:
    """A warning for every host of the file that is not known here: the server would be waited for in vain. It may become
    known meanwhile, as names of pods do."""
    for number, server in enumerate(cluster.servers):
        if server.host:
            where = f"{cluster.source}: server[{number}].host"
            try:
                resolve(*split_address(server.host, where, DEFAULT_PORT), where)
            except InputError as error:
                log.warning("%s; it is waited for all the same", error)


@contextmanager
def _joined(
    cluster: Cluster, index: int, own: str, secret: bytes, lost: Callable[[str], None] | None
) -> Iterator[list[Any]]:
    """Within the block this process is one of the program, and knows of the loss of another; an error leaves at once."""
    loss = _Loss(lost)
    try:
        devices = ordered_devices(cluster)
        _connect(devices)
        with watching(cluster.names, index, open_channel(), own, secret, loss):
            yield devices
    except BaseException as error:
        loss.end_if_it_explains(error)
        abandon()
        raise


def _start(cluster: Cluster, server: str, address: str, coordinator: str, timeout: float) -> str:
    """Become one of the processes that meet at an address of the first one; the address under which they reach this one."""
    index, (_, port) = cluster.names.index(server), split_address(coordinator, "coordinator")
    own = address if index == 0 else source_address(address, port, f"server {server}")
    log.info("%s: meets the others at %s port %d, is reached at %s", server, address, port, own)
    cards = prepare_devices(cluster, index, own)
    start_program(address, port, own, len(cluster.servers), index, cards, timeout)
    return own


class _Loss:
    """What follows from the loss of another server: the caller's answer, or the end of this process."""

    def __init__(self, answer: Callable[[str], None] | None) -> None:
        self._answer, self._came = answer, threading.Event()

    def __call__(self, name: str) -> None:
        self._came.set()
        if self._answer is None:
            time.sleep(_LATER_S)
            leave_at_once()
        self._answer(name)

    def end_if_it_explains(self, error: BaseException) -> None:
        """End this process where a step has failed because another server has gone, which may be known only soon."""
        wait = _LOSS_S if is_of_exchange(error) or isinstance(error, ChannelLost) else 0.0
        if isinstance(error, Exception) and self._came.wait(wait):
            leave_at_once()


def _connect(devices: list[Any]) -> None:
    """Have all servers take part in one collective at once. The first makes the connections between them, waits half a
    minute for the slowest, and would otherwise come whenever each has compiled its first step."""
    mesh = make_mesh(devices)
    add = jax.shard_map(lambda a: jax.lax.psum(a, AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P())
    jax.jit(add)(shard_rows(mesh, np.zeros(mesh.size, np.int32))).block_until_ready()
