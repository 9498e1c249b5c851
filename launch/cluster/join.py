"""A server's process joins the others: they meet, compare what they have, and become one JAX program.

JAX's own start aborts a process when another never comes, without a word on which, so the servers meet before it
(rendezvous.py), with their names and the fingerprints of their inputs. What they do afterwards is not known here, nor how
they are started (processes.py).
"""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dancemoe_jax.mesh import AXIS, make_mesh, shard_rows
from launch.cluster.addresses import coordinator_address, is_loopback, split_address
from launch.cluster.channel import open_channel
from launch.cluster.devices import ordered_devices, visible_devices
from launch.cluster.fingerprint import cluster_fingerprint
from launch.cluster.jax_runtime import abandon, own_address
from launch.cluster.liveness import watching
from launch.cluster.rendezvous import rendezvous
from placement import Cluster, InputError


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
    with rendezvous(cluster.names, server, coordinator, facts, timeout):
        jax.config.update("jax_num_cpu_devices", devices_here)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=visible_devices(cluster, index),
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(timeout)),
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=60,
        )
    try:
        devices = ordered_devices(cluster)
        _check_own_address(coordinator, server)
        _connect(devices)
        with watching(cluster.names, index, open_channel(), own_address()):
            yield devices
    except BaseException:
        abandon()
        raise
    jax.distributed.shutdown()


def _connect(devices: list[Any]) -> None:
    """Have all servers take part in one collective at once. The first makes the connections between them, waits half a
    minute for the slowest, and would otherwise come whenever each has compiled its first step."""
    mesh = make_mesh(devices)
    add = jax.shard_map(lambda a: jax.lax.psum(a, AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P())
    jax.jit(add)(shard_rows(mesh, np.zeros(mesh.size, np.int32))).block_until_ready()


def _check_own_address(coordinator: str, server: str) -> None:
    """Gloo tells the others to reach this machine where its own name leads."""
    host, _ = split_address(coordinator, "coordinator")
    if jax.default_backend() != "cpu" or is_loopback(host):
        return
    name = socket.gethostname()
    if is_loopback(name):
        raise InputError(
            f"server {server}: its host name {name} leads to no address that other servers reach (see /etc/hosts); "
            f"give it there the address of this machine in the cluster's network"
        )
