"""What is asked of JAX beyond its public interface: where it listens, what it does about a loss, leaving without the others.

Private JAX is used here and nowhere else.
"""

import ctypes
import functools
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, NoReturn

import jax
from jax._src import compiler, distributed, xla_bridge
from jax.extend.backend import clear_backends

from launch.cluster.addresses import join_address, source_address, split_address
from launch.cluster.coordination import CoordinationService

log = logging.getLogger(__name__)

_HEARTBEAT_S = (
    100  # a process that is stopped for less goes on; one that ends is missed at once (launch.cluster.liveness)
)
_SHUTDOWN_S = 60


def start_program(
    address: str, port: int, own: str, count: int, index: int, devices: list[int], timeout: float
) -> None:
    """Become one of the processes of a program that meets at an address, which only it and the others' exchanges use.

    Args:
        address: of the first process, as this one reaches it; own: of this process, as the others reach it.
        devices: accelerators of this process.
        timeout: seconds for all to come.
    """
    _exchange_at(own)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    coordinator = join_address(address, port)
    with _service_elsewhere():
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=coordinator,
            initialization_timeout=max(1, round(timeout)),
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )


@contextmanager
def _service_elsewhere() -> Iterator[None]:
    """Within the block JAX makes its service in a process of its own, which outlives this one by some seconds."""
    library: Any = distributed._jax  # pyright: ignore[reportPrivateImportUsage]
    make = library.get_distributed_runtime_service
    library.get_distributed_runtime_service = CoordinationService
    try:
        yield
    finally:
        library.get_distributed_runtime_service = make


def _exchange_at(own: str) -> None:
    """Have exchanges on the CPU listen at an address: they take the one that the machine's name leads to otherwise."""
    library: Any = xla_bridge._jax  # pyright: ignore[reportPrivateImportUsage]
    make = library.make_gloo_tcp_collectives
    original = make.func if isinstance(make, functools.partial) else make
    library.make_gloo_tcp_collectives = functools.partial(original, hostname=own)


def write_cache_everywhere() -> None:
    """Have every process of a program write what it compiles to its cache: JAX lets only the first one, but on CPUs each
    server's programs are its own."""
    names: Any = compiler
    names.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))


def store_client() -> Any:
    """What puts and gets values in the store that the processes of this program started with."""
    return distributed.global_state.client


def own_address() -> str:
    """The address under which the other servers reach this one: that from which it reaches the rendezvous."""
    host, port = split_address(str(distributed.global_state.coordinator_address), "coordinator")
    return source_address(host, port, "coordinator")


def abandon() -> None:
    """Drop the connection to the others without a word: its destructor would wait until they say goodbye too."""
    state = distributed.global_state
    for connection in (state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # never destroyed
    state.client = state.service = state.preemption_sync_manager = None


def is_of_exchange(error: BaseException) -> bool:
    """Whether a step has failed in what processes exchange: errors of Gloo come as ValueError too, where a step is begun."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in str(error))


def leave_at_once() -> NoReturn:
    """End this process with status 1: JAX may abort it while it cleans up behind itself, or wait for servers that have
    gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def leave_program() -> None:
    """Forget the devices of a program that has ended, and all that is on them."""
    gc.collect()
    clear_backends()
    jax.clear_caches()
