"""Which server a process is where SLURM, Open MPI or Kubernetes started one for each server of the cluster file."""

import os
import re
import socket

from launch.cluster.addresses import coordinator_address, join_address
from placement import Cluster, InputError

_PORTS = range(65535 - 2**12 + 1, 2**16)  # where jobs meet, by their numbers: two on one machine rarely take the same
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


def from_environment(cluster: Cluster) -> tuple[str, str] | None:
    """Server and coordinator of this process by its launcher's variables, the n-th task being the n-th server; None where
    there is none, or where it started this process alone, as `srun --pty bash` does.

    Raises:
        InputError: there are more or fewer tasks than servers, or it cannot be said where they meet.
    """
    found = _slurm() or _open_mpi(cluster) or _kubernetes(cluster)
    if found is None:
        return None
    launcher, count, index, coordinator = found
    if count != len(cluster.servers) or not 0 <= index < count:
        raise InputError(
            f"{cluster.source}: {len(cluster.servers)} servers, but {count} tasks were started by {launcher}; start one "
            f"each, or give --server"
        )
    return cluster.names[index], coordinator


def _slurm() -> tuple[str, int, int, str] | None:
    """Of a job step of several tasks."""
    if not all(name in os.environ for name in _SLURM):
        return None
    count = _number("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", ""))
    if count < 2:
        return None
    first = _first_node(os.environ["SLURM_STEP_NODELIST"])
    port = _PORTS[_number("SLURM_JOB_ID") % len(_PORTS)]
    return "SLURM", count, _number("SLURM_PROCID"), join_address(first, port)


def _first_node(nodes: str) -> str:
    """Of a list such as "node03,login" or "node[03-05,07],login"."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if not found:
        raise InputError(f"SLURM_STEP_NODELIST = {nodes!r}: names no node; give --server and --coordinator")
    return found[1] + (found[2] or "")


def _open_mpi(cluster: Cluster) -> tuple[str, int, int, str] | None:
    if not all(name in os.environ for name in _OPEN_MPI) or _number(_OPEN_MPI[0]) < 2:
        return None
    # The first server's host goes first: the launcher's own address may be that of a login machine.
    coordinator = coordinator_address(cluster)
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri", "")  # noqa: SIM112
    launcher = re.search(r"^(\d+).*?tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", uri)
    if cluster.servers[0].host is None and launcher:
        coordinator = join_address(launcher[2], _PORTS[int(launcher[1]) // 2**12 % len(_PORTS)])
    return "Open MPI", _number(_OPEN_MPI[0]), _number(_OPEN_MPI[1]), coordinator


def _kubernetes(cluster: Cluster) -> tuple[str, int, int, str] | None:
    """Of an indexed job, or of a StatefulSet whose first pod is the first server's host."""
    first = cluster.servers[0].host
    if "KUBERNETES_SERVICE_HOST" not in os.environ or len(cluster.servers) < 2:
        return None
    own = re.fullmatch(r"(.+)-(\d+)", socket.gethostname())
    if "JOB_COMPLETION_INDEX" in os.environ:
        index = _number("JOB_COMPLETION_INDEX")
        if first is None:
            raise InputError(
                f"{cluster.source}: server[0].host is missing; give the first pod's name, such as JOB-0.SERVICE"
            )
    elif own and first and first.split(".")[0].split(":")[0] == f"{own[1]}-0":
        index = int(own[2])
    else:
        return None
    count = len(cluster.servers) if index < len(cluster.servers) else index + 1
    return "Kubernetes", count, index, coordinator_address(cluster)


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"{name} = {text!r}: must be a number; unset it, or give --server")
    return int(text)
