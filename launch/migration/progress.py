"""How far a migration has come, here and everywhere: travels with every step's control words, without a message for it."""

import threading
from collections.abc import Callable

from launch.engine.engine import Engine


class Progress:
    """This server's progress, and all servers' as the last step brought it.

    Args:
        wake: wakes the cluster if it sleeps, from any thread.

    Attributes:
        given_up: the last command that some server has given up.
    """

    def __init__(self, engine: Engine, wake: Callable[[], None]) -> None:
        self.given_up = 0
        self._engine, self._wake, self._lock = engine, wake, threading.Lock()

    def report(self, number: int, stage: int) -> None:
        """This server is at a stage of a command; from any thread."""
        with self._lock:
            progress = self._engine.migration_progress
            self._engine.migration_progress = progress._replace(command=number, stage=stage)
        self._wake()

    def give_up(self, number: int) -> None:
        """Have all servers end a command where it is; later than the last commit, nothing happens. From any thread."""
        with self._lock:
            self._engine.migration_progress = self._engine.migration_progress._replace(given_up=number)
        self._wake()

    def look(self) -> None:
        """Take notice of what the last step brought. Between two steps."""
        self.given_up = max(self.given_up, int(self._engine.received.given_up.max()))

    def all_at(self, number: int, stage: int) -> bool:
        """Whether all servers are at a stage of a command, or further. Between two steps."""
        received = self._engine.received
        return bool((received.command == number).all() and (received.stage >= stage).all())
