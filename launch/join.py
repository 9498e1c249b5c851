"""A server's process joins the others: they meet, compare what they have, and become one JAX program.

JAX's own start aborts a process when another never comes, without a word on which, so the servers meet before it
(`launch.meeting`), with their names and the fingerprints of their inputs. What they do afterwards is not known here, nor
how they are started (`launch.processes`).
"""

import ctypes
import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the only way to leave without waiting for the others
from jax.sharding import PartitionSpec as P

from dancemoe_jax.mesh import AXIS, deal, make_mesh
from launch.channel import open_channel
from launch.meeting import DEFAULT_PORT, join_address, meeting, split_address
from launch.watch import watching
from placement import Cluster, InputError

LOOPBACK = "127.0.0.1"
_HEAD_BYTES = 2**20


def coordinator_address(cluster: Cluster, port: int = DEFAULT_PORT) -> str:
    """Where the servers meet: the first server's `host`, which may name a port itself ("10.0.0.1:8476").

    Raises:
        InputError: the port is none.
    """
    host = cluster.servers[0].host or LOOPBACK
    return join_address(*split_address(host, f"{cluster.source}: server[0].host", port))


def from_environment(cluster: Cluster, timeout: float = 60.0) -> tuple[str, str] | None:
    """Server and coordinator of this process as SLURM, Open MPI or Kubernetes tell them, the n-th task being the n-th
    server; None outside of these.

    Raises:
        InputError: there are more or fewer tasks than servers.
    """
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [0], None, int(timeout))
    address, count, index, _ = found
    if address is None or count is None or index is None:
        return None
    if count != len(cluster.servers):
        raise InputError(
            f"{cluster.source}: {len(cluster.servers)} servers, but {count} tasks were started; start one each"
        )
    return cluster.names[index], address


def free_port() -> int:
    """A port of this machine that nothing uses now, for servers that all run here."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        return listener.getsockname()[1]


def cluster_fingerprint(cluster: Cluster) -> str:
    """Hash of what a cluster file says, whatever its layout and comments; hosts are left out, as each may see its own."""
    said = repr([(server.name, server.devices) for server in cluster.servers]).encode()
    return hashlib.sha256(said + cluster.bandwidth.tobytes() + cluster.latency.tobytes()).hexdigest()


def folder_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of the names, sizes and first MiB of a file, or of all files below a folder: cheap for a large model.

    Raises:
        InputError: it does not exist or cannot be read.
    """
    root, digest = Path(path), hashlib.sha256()
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    try:
        for file in files:
            digest.update(repr((file.relative_to(root).as_posix(), file.stat().st_size)).encode())
            with open(file, "rb") as stream:
                digest.update(stream.read(_HEAD_BYTES))
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


@contextmanager
def join(
    cluster: Cluster,
    server: str,
    *,
    coordinator: str | None = None,
    agree: Mapping[str, str] | None = None,
    timeout: float = 60.0,
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

    Raises:
        InputError: no such server; the port is in use; a server did not come, or came with something else; a server
            has other devices than its file says.
    """
    if server not in cluster.names:
        raise InputError(f"server {server}: not in {cluster.source}; known are {', '.join(cluster.names)}")
    index, count = cluster.names.index(server), len(cluster.servers)
    devices_here = len(cluster.servers[index].devices)
    if count == 1:
        jax.config.update("jax_num_cpu_devices", devices_here)
        yield ordered_devices(cluster)
        return
    coordinator = coordinator or coordinator_address(cluster)
    facts = {"cluster file": cluster_fingerprint(cluster), "version of JAX": jax.__version__, **(agree or {})}
    with meeting(cluster.names, server, coordinator, facts, timeout):
        jax.config.update("jax_num_cpu_devices", devices_here)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
        jax.distributed.initialize(
            coordinator, count, index, local_device_ids=_visible(cluster, index), cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(timeout)), heartbeat_timeout_seconds=30, shutdown_timeout_seconds=60,
        )  # fmt: skip
    try:
        devices = ordered_devices(cluster)
        _check_own_address(coordinator, server)
        _connect(devices)
        with watching(cluster.names, index, open_channel(), own_address()):
            yield devices
    except BaseException:
        _abandon()
        raise
    jax.distributed.shutdown()


def own_address() -> str:
    """The address under which the other servers reach this one: that from which it reaches where they have met."""
    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def _connect(devices: list[Any]) -> None:
    """Have all servers take part in one collective at once. The first makes the connections between them, waits half a
    minute for the slowest, and would otherwise come whenever each has compiled its first step."""
    mesh = make_mesh(devices)
    add = jax.shard_map(lambda a: jax.lax.psum(a, AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P())
    jax.jit(add)(deal(mesh, np.zeros(mesh.size, np.int32))).block_until_ready()


def ordered_devices(cluster: Cluster) -> list[Any]:
    """All devices in the order of the cluster file, for `make_mesh`.

    Raises:
        InputError: a server has fewer devices than its file lists, or more processes run than there are servers.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    ordered = []
    for index, server in enumerate(cluster.servers):
        own = [device for device in devices if device.process_index == index]
        if len(own) < len(server.devices):
            raise InputError(
                f"{cluster.source}: server {server.name} lists {len(server.devices)} devices, its process has {len(own)} "
                f"({devices[0].platform}); list what is there, or make them visible"
            )
        ordered += own[: len(server.devices)]
    return ordered


def _visible(cluster: Cluster, index: int) -> list[int]:
    """Accelerators for a server's process: servers of one machine share out what is there, in file order."""
    host, own = cluster.servers[index].host, len(cluster.servers[index].devices)
    shared = [len(server.devices) for server in cluster.servers[:index] if server.host == host]
    first = 0 if "CUDA_VISIBLE_DEVICES" in os.environ else sum(shared)
    return list(range(first, first + own))


def _abandon() -> None:
    """Drop the connection to the others without a word: its destructor would wait until they say goodbye too."""
    state = distributed.global_state
    for connection in (state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # never destroyed
    state.client = state.service = state.preemption_sync_manager = None


def _check_own_address(coordinator: str, server: str) -> None:
    """Gloo tells the others to reach this machine where its own name leads."""
    host, _ = split_address(coordinator, "coordinator")
    if jax.default_backend() != "cpu" or _is_loopback(host):
        return
    name = socket.gethostname()
    if _is_loopback(name):
        raise InputError(
            f"server {server}: its host name {name} leads to no address that other servers reach (see /etc/hosts); "
            f"give it there the address of this machine in the cluster's network"
        )


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return host in ("::1", "localhost") or host == socket.gethostname()
