"""A command that every server of a cluster runs: started once, it starts itself for each server of this machine."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from launch.cluster.addresses import DEFAULT_PORT, free_port, is_here, split_address
from launch.cluster.processes import Processes, ServerFailed, prefixed, start
from launch.log import discard_output
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
    drain: float | None = None,
    own: Callable[[int], Sequence[str]] | None = None,
) -> int:
    """Run `python -m launch COMMAND` with what was given for each server whose host is this machine; the exit status.

    Lines of JSON on the servers' standard output go to ours, what they say on standard error goes there with their names.

    Args:
        passes: server and line -> whether a line of its standard output goes to ours.
        as_json: the lines of the servers' logs are JSON, and name their server themselves.
        drain: the servers end in order when they are told to, within so many seconds: signals are passed on to them.
        own: arguments of the n-th of these servers alone.

    Raises:
        InputError: none of the servers is this machine.
    """
    names = [server.name for server in cluster.servers if _here(cluster, server.host)]
    if not names:
        raise InputError(f"{cluster.source}: no server's host is this machine ({socket.gethostname()}); give --server")
    if coordinator is None and len(names) == len(cluster.names) and cluster.servers[0].host is None:
        coordinator = f"127.0.0.1:{free_port()}"
    rest = [*given, *(["--coordinator", coordinator] if coordinator else [])]
    commands = {
        name: [sys.executable, "-m", "launch", command, *rest, *(own(n) if own else ()), "--server", name]
        for n, name in enumerate(names)
    }
    lines = _Lines(passes, as_json)
    with _passed_on(drain) as signals, start(commands, output=lines) as processes:
        signals.processes = processes
        try:
            processes.wait()
        except ServerFailed as failed:
            if signals.came:
                return 128 + signals.came[0]
            if not lines.closed:
                log.error("launch %s: %s", command, failed)
            return failed.status if failed.status in (1, 2) else 1
    return 1 if lines.closed else 0


class _Lines:
    """What the servers print, to this process's own streams.

    Attributes:
        closed: nobody reads standard output any more, and the servers are told to end.
    """

    def __init__(self, passes: Callable[[str, str], bool], as_json: bool) -> None:
        self.closed = False
        self._passes, self._as_json, self._named = passes, as_json, prefixed()

    def __call__(self, server: str, stream: str, line: str) -> None:
        if stream == "stderr" and self._as_json:
            print(line, file=sys.stderr, flush=True)
        elif stream == "stderr":
            self._named(server, stream, line)
        elif self._passes(server, line) and not self.closed:
            try:
                print(line, flush=True)
            except OSError as error:
                self.closed = True
                discard_output()
                log.error("answers cannot be written any more (%s); the servers end", error.strerror or error)
                os.kill(os.getpid(), signal.SIGTERM)


class _Signals:
    """Passes signals on, twice; the third ends this process.

    Attributes:
        came: numbers so far; processes: to which they go.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self.processes: Processes | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)
        if self.processes is None or len(self.came) > 2:
            raise SystemExit(128 + number)
        self.processes.signal(signal.SIGTERM)


@contextmanager
def _passed_on(drain: float | None) -> Iterator[_Signals]:
    """Within the block SIGINT and SIGTERM go to the servers, where these drain."""
    signals = _Signals()
    if drain is None:
        yield signals
        return
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _here(cluster: Cluster, host: str | None) -> bool:
    if host is None:
        return True
    name, _ = split_address(host, f"{cluster.source}: host", DEFAULT_PORT)
    return is_here(name, f"{cluster.source}: host")
