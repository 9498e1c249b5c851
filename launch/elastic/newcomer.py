"""A new server's part in being taken in by a cluster that serves: it reports, reads what a plan gives it, and joins."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dancemoe_jax.errors import DanceMoEError
from dancemoe_jax.expert_parallel.pool import read_ahead
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.addresses import split_address
from launch.cluster.fingerprint import cluster_fingerprint
from launch.cluster.framing import Connection, MessageError, connect
from launch.elastic.process_group import ProcessGroup, decode
from placement import Cluster, InputError

log = logging.getLogger(__name__)

PURPOSE = "growth"
PROGRESS_S = 5.0  # between two messages of a server that reads
STAGED = {"problem?": (str, type(None)), "experts?": int, "bytes?": int, "seconds?": (int, float)}
_OTHERS_S = 3600.0  # for other new servers to come and read
_LONGEST = 2**26  # bytes of a message

Read = Callable[[int, int], ExpertWeights]


def described(cluster: Cluster, facts: Mapping[str, str]) -> dict[str, str]:
    """What has to be the same on a new server and on those that serve."""
    return {"cluster file": cluster_fingerprint(cluster), "version of JAX": jax.__version__, **facts}


def report(
    address: str,
    cluster: Cluster,
    server: str,
    facts: Mapping[str, str],
    read: Read,
    staging_bytes: int,
    timeout: float,
    secret: bytes,
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
        secret: of the cluster.

    Raises:
        InputError: nobody waits there, or the cluster takes in no such server.
        ModelError: the checkpoint lacks what the server is to hold.
    """
    host, port = split_address(address, "--join")
    try:
        connection = connect((host, port), secret, PURPOSE, timeout)
    except MessageError as error:
        raise InputError(f"--join {address}: {error}") from None
    except OSError as error:
        raise InputError(
            f"--join {address}: nobody takes in servers there ({error.strerror or error}); run `python -m launch migrate "
            f"--add` on the first server, which says where"
        ) from None
    with connection:
        log.info("%s: waits %.0f min for all new servers to come", server, _OTHERS_S / 60)
        group = decode(_reply(connection, {"server": server, "facts": described(cluster, facts)}, address))
        placement = group.placement
        assert placement is not None
        own = placement.resident[placement_devices(cluster, server)]
        try:
            kept, figures = _read_own(own, read, staging_bytes, connection)
        except DanceMoEError as error:
            connection.send({"problem": " ".join(str(error).split())})
            raise
        except MessageError:
            raise InputError(_over(address)) from None
        log.info("%s: %d experts staged", server, figures["experts"])
        _reply(connection, figures, address)

    def staged(layer: int, expert: int) -> ExpertWeights:
        return kept.pop((layer, expert), None) or read(layer, expert)

    return group, staged


def placement_devices(cluster: Cluster, server: str) -> list[int]:
    """Indices of a server's devices."""
    return [index for index, (name, _) in enumerate(cluster.device_names) if name == server]


def _read_own(
    own: Any, read: Read, staging_bytes: int, connection: Connection
) -> tuple[dict[tuple[int, int], ExpertWeights], dict[str, Any]]:
    """Read all experts of bool [devices, layers, experts] once; those that fit into memory, and figures."""
    begin, total = time.monotonic(), 0
    wanted = [(int(layer), int(expert)) for layer, expert in zip(*own.any(0).nonzero(), strict=True)]
    kept: dict[tuple[int, int], ExpertWeights] = {}
    due = begin + PROGRESS_S
    for at, weights in zip(wanted, read_ahead(read, wanted, threads=2), strict=True):
        size = sum(part.nbytes for part in jax.tree.leaves(weights))
        if total + size <= staging_bytes:
            kept[at] = weights
        total += size
        if time.monotonic() > due:
            due = time.monotonic() + PROGRESS_S
            connection.send({"bytes": total})
    return kept, {"experts": len(wanted), "bytes": total, "seconds": time.monotonic() - begin}


def _reply(connection: Connection, message: Mapping[str, Any], address: str) -> dict[str, Any]:
    """What the first server answers. Raises InputError where that is a problem."""
    try:
        connection.send(message)
        reply = connection.receive(None, _OTHERS_S, _LONGEST)
    except MessageError:
        raise InputError(_over(address)) from None
    if reply.get("problem"):
        raise InputError(str(reply["problem"]))
    return reply


def _over(address: str) -> str:
    return f"--join {address}: the cluster there has ended or takes in nobody any more; see what it says"
