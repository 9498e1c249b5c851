"""What CUDA, NCCL and XLA are told before JAX looks for devices, and what a card has. Nothing here matters on CPUs.

All of it goes through the environment, where a user's own settings win.
"""

import ctypes
import fcntl
import importlib.util
import ipaddress
import math
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from placement import InputError
from placement.files import read_lines

# Sends follow need: XLA would gather padded buffers from all servers instead, as soon as they are on several hosts.
# Each process tunes for its own card: tuning that is shared waits for the slowest, and cards may differ.
_XLA_FLAGS = {
    "xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer": "false",
    "xla_gpu_shard_autotuning": "false",
}
# What CUDA itself takes of a card that a process uses: its context, kernels, NCCL's buffers.
CONTEXT_BYTES = 768 * 2**20
# JAX takes its share of what CUDA shows of a card, which is a little less than the driver does.
_MARGIN, _MOST_SHARE = 1.015, 0.98
_SIOCGIFADDR = 0x8915


def has_gpu_plugin() -> bool:
    """Whether JAX's part for NVIDIA GPUs is installed."""
    names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    with suppress(ModuleNotFoundError):
        return any(importlib.util.find_spec(name) is not None for name in names)
    return False


def prepare_gpu(memory: Sequence[int], cards: Sequence[int], own: str | None, source: str = "cluster") -> None:
    """Set the environment for the cards that a server is about to use. Before JAX looks for devices.

    Args:
        memory: bytes that the cluster file promises of each card; cards: their numbers on this machine.
        own: address under which the other servers reach this one; None where there are none.
        source: the cluster file, for errors.

    Raises:
        InputError: more memory is promised than a card has.
    """
    if not has_gpu_plugin():
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.lstrip("-").partition("=")[0] for flag in flags}
    flags += [f"--{name}={value}" for name, value in _XLA_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if own is not None and (interface := interface_of(own)):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    totals = card_memory(cards)
    if totals:
        for number, promised, total in zip(cards, memory, totals, strict=True):
            check_promise(source, f"card {number}", promised, total)
        share = max(promised / total for promised, total in zip(memory, totals, strict=True))
        fraction = min(_MOST_SHARE, math.ceil(1e4 * _MARGIN * share) / 1e4)
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.4f}")


def check_promise(source: str, what: str, promised: int, total: int, spare: int = CONTEXT_BYTES) -> None:
    """Raise InputError where a cluster file promises more of a card than it has beside what CUDA takes."""
    if promised + spare > total:
        raise InputError(
            f"{source}: {what} has {total} bytes, {spare} of which CUDA needs; the file promises {promised}: "
            f"give memory = {max(total - spare, 0)} or less"
        )


def interface_of(address: str) -> str | None:
    """The network interface that has an address, for NCCL, which would take the first one that is up."""
    try:
        wanted = ipaddress.ip_address(socket.getaddrinfo(address, None)[0][4][0])
    except (OSError, ValueError):
        return None
    if wanted.version == 6:
        return _interface6(wanted.packed.hex())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                reply = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if reply[20:24] == wanted.packed:
                    return name
    return None


def _interface6(digits: str) -> str | None:
    table = Path("/proc/net/if_inet6")
    lines = [line.split() for _, line in read_lines(table)] if table.exists() else []
    return next((line[5] for line in lines if line[0] == digits), None)


def card_memory(cards: Sequence[int]) -> list[int] | None:
    """Bytes that each card has, by NVIDIA's driver; None where it cannot say."""

    class Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if driver.nvmlInit_v2():
        return None
    try:
        found = []
        for name in _visible(cards):
            card, memory = ctypes.c_void_p(), Memory()
            if isinstance(name, int):
                failed = driver.nvmlDeviceGetHandleByIndex_v2(name, ctypes.byref(card))
            else:
                failed = driver.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(card))
            if failed or driver.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory)):
                return None
            found.append(memory.total)
        return found
    finally:
        driver.nvmlShutdown()


def _visible(cards: Sequence[int]) -> list[int | str]:
    """The driver's names of cards that CUDA numbers among the visible ones."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not names:
        return list(cards)
    return [int(names[card]) if names[card].isdigit() else names[card] for card in cards if card < len(names)]
