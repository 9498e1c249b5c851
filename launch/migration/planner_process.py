"""Revisions are weighed in a process of their own: planning is Python, and in the process that serves it would hold the
interpreter's lock against the thread that takes steps, for which all servers wait.

    parent                 child (python -m launch.migration.planner_process)
    Revision   -> stdin    launch.migration.revision.weigh, at low priority
    stdout     <-          (True, (placement, figures)), or (False, why not)

The child ends when its stdin does, so none is left behind by a server that is killed.
"""

import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress

from launch.cluster.priority import PLANNING, give_way
from launch.migration.revision import Revision, weigh
from placement import InputError, Placement
from placement.migration.decide import Figures


class Planning:
    """Weighs revisions elsewhere, one at a time; the process is started for the first and kept."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._over = threading.Lock(), False

    def weigh(self, revision: Revision) -> tuple[Placement, Figures]:
        """`launch.migration.revision.weigh`; the next call starts another process where this one's has gone.

        Raises:
            InputError: as there, or the process has gone.
        """
        with self._lock:
            if self._over:
                raise InputError("serving ends")
            process = self._process = self._process or _start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                pickle.dump(revision, process.stdin)
                process.stdin.flush()
                found, reply = pickle.load(process.stdout)
            except (OSError, EOFError, pickle.UnpicklingError):
                self._close()
                raise InputError(f"the process that plans has gone (status {process.returncode})") from None
        if not found:
            raise InputError(reply)
        return reply

    def end(self) -> None:
        """Weigh no more; a caller that waits for a plan gets none."""
        self._over = True
        if process := self._process:
            process.kill()
        with self._lock:
            self._close()

    def _close(self) -> None:
        if process := self._process:
            self._process = None
            with suppress(OSError), process:  # closes its pipes and waits for it
                process.kill()


def _start() -> subprocess.Popen[bytes]:
    # A group of its own: what a terminal sends to the server is for the server to act on.
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )


def main() -> None:
    give_way(PLANNING)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with suppress(EOFError, BrokenPipeError):
        while True:
            revision = pickle.load(sys.stdin.buffer)
            try:
                answer = True, weigh(revision)
            except InputError as error:
                answer = False, str(error)
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    main()
