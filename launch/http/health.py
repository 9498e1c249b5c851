"""Whether this server can answer now, and every reason why not."""

import time
from typing import Any

from launch.http.book import Book
from launch.http.supervisor import Supervisor


class Health:
    """Of a front door and its worker.

    Args:
        server: name of this one.
    """

    def __init__(self, server: str, book: Book, supervisor: Supervisor) -> None:
        self._server, self._book, self._supervisor = server, book, supervisor

    def report(self) -> dict[str, Any]:
        """`ready`, and `reasons` why not, each with a `code` for programs and a `message` for people; `requests` that are
        under way, and the worker."""
        reasons, supervisor = self._reasons(), self._supervisor
        worker = supervisor.worker
        about = {"pid": worker.process.pid, "phase": worker.phase, "steps": worker.steps} if worker else None
        return {
            "ready": not reasons,
            "server": self._server,
            "reasons": reasons,
            "requests": len(self._book),
            "worker": about,
            "restarts": supervisor.restarts,
        }

    def _reasons(self) -> list[dict[str, str]]:
        supervisor, found = self._supervisor, []

        def add(code: str, message: str) -> None:
            found.append({"code": code, "message": message})

        if self._book.refusing is not None:
            add("draining", self._book.refusing[1])
        if not supervisor.serving:
            add("starting" if not supervisor.served else "worker", supervisor.state)
        if supervisor.problem:
            add("problem", supervisor.problem)
        stuck = supervisor.stuck_for(time.monotonic())
        if stuck > supervisor.stuck:
            add("stuck", f"no step has ended for {stuck:.1f} s while requests wait")
        if stats := supervisor.stats:
            if stats["covered"] < 1:
                add("coverage", f"{1 - stats['covered']:.1%} of the experts are on no device")
            if stats["controller"] is False:
                add("controller", "the thread that revises the placement has ended; see the log, and start again")
        return found
