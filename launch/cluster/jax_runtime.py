"""What is asked of JAX beyond its public interface: leaving a program without the others, launchers' variables, own address.

Private JAX is used here and nowhere else.
"""

import ctypes
import gc
import socket

import jax
from jax._src import distributed
from jax.extend.backend import clear_backends

from placement import Cluster, InputError


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


def own_address() -> str:
    """The address under which the other servers reach this one: that from which it reaches where they have met."""
    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def abandon() -> None:
    """Drop the connection to the others without a word: its destructor would wait until they say goodbye too."""
    state = distributed.global_state
    for connection in (state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # never destroyed
    state.client = state.service = state.preemption_sync_manager = None


def leave_program() -> None:
    """Forget the devices of a program that has ended, and all that is on them."""
    gc.collect()
    clear_backends()
    jax.clear_caches()
