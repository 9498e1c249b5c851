"""A command that every server of a cluster runs: started once, it starts itself for each server of this machine."""

import logging
import socket
import sys
from collections.abc import Callable, Sequence

from launch.cluster.addresses import DEFAULT_PORT, free_port, is_here, split_address
from launch.cluster.processes import ServerFailed, prefixed, start
from placement import Cluster, InputError

log = logging.getLogger(__name__)


def _is_json(server: str, line: str) -> bool:
    return line.startswith("{")


def of_first(cluster: Cluster) -> Callable[[str, str], bool]:
    """Passes what the first server says on standard output, the transport's own words from C++ left out."""
    first = cluster.names[0]
    return lambda server, line: server == first and not line.startswith("[Gloo]")


def run_everywhere(
    command: str,
    cluster: Cluster,
    given: Sequence[str],
    coordinator: str | None,
    passes: Callable[[str, str], bool] = _is_json,
    *,
    as_json: bool = False,
) -> int:
    """Run `python -m launch COMMAND` with what was given for each server whose host is this machine; the exit status.

    Lines of JSON on the servers' standard output go to ours, what they say on standard error goes there with their names.

    Args:
        passes: server and line -> whether a line of its standard output goes to ours.
        as_json: the lines of the servers' logs are JSON, and name their server themselves.

    Raises:
        InputError: none of the servers is this machine.
    """
    names = [server.name for server in cluster.servers if _here(cluster, server.host)]
    if not names:
        raise InputError(f"{cluster.source}: no server's host is this machine ({socket.gethostname()}); give --server")
    if coordinator is None and len(names) == len(cluster.names) and cluster.servers[0].host is None:
        coordinator = f"127.0.0.1:{free_port()}"
    rest = [*given, *(["--coordinator", coordinator] if coordinator else [])]
    commands = {name: [sys.executable, "-m", "launch", command, *rest, "--server", name] for name in names}
    lines = prefixed()

    def output(server: str, stream: str, line: str) -> None:
        if stream == "stdout" and passes(server, line):
            print(line, flush=True)
        elif stream == "stderr":
            if as_json:
                print(line, file=sys.stderr, flush=True)
            else:
                lines(server, stream, line)

    with start(commands, output=output) as processes:
        try:
            processes.wait()
        except ServerFailed as failed:
            log.error("launch %s: %s", command, failed)
            return failed.status if failed.status in (1, 2) else 1
    return 0


def _here(cluster: Cluster, host: str | None) -> bool:
    if host is None:
        return True
    name, _ = split_address(host, f"{cluster.source}: host", DEFAULT_PORT)
    return is_here(name, f"{cluster.source}: host")
