"""The service by which a program's processes find each other, in a process of its own: `python -m launch.cluster.coordination`.

JAX would run it in the first server's process, and its end would abort all others at once, with a stack in C++ and without a
word on who has gone. Here it outlives the first server by the seconds that the others need to say so and to end.

    parent -> stdin    "end": all have left; end of file: the parent has gone
"""

import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

_GRACE_S = 3.0  # between the end of the parent and its own
_END_S = 10.0


class CoordinationService:
    """The service of a program. Args: as of JAX's own, which it stands for."""

    def __init__(self, address: str, count: int, heartbeat_timeout: int, shutdown_timeout: int, **_: object) -> None:
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            address,
            str(count),
            str(heartbeat_timeout),
            str(shutdown_timeout),
        ]
        # A group of its own: signals to the server's are for the server to act on.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0, env=environment
        )

    def shutdown(self) -> None:
        """End it; all have left."""
        with suppress(OSError, subprocess.TimeoutExpired), self._process as process:
            assert process.stdin is not None
            process.stdin.write(b"end\n")
            process.stdin.close()
            process.wait(_END_S)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    address, *numbers = sys.argv[1:]
    count, heartbeat, shutdown = map(int, numbers)
    # Not by way of jax_runtime: all of JAX would take seconds and a hundred megabytes here.
    runtime: Any = importlib.import_module("jaxlib._jax")
    service = runtime.get_distributed_runtime_service(
        address, count, heartbeat_timeout=heartbeat, shutdown_timeout=shutdown
    )
    if not sys.stdin.buffer.readline():
        time.sleep(_GRACE_S)
        os._exit(1)
    service.shutdown()


if __name__ == "__main__":
    main()
