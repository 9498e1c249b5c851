"""How serving ends on request: a first signal drains all servers, a second one cancels what runs, a third ends the process.

A signal to one server is for all of them: without it no step can be taken.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from launch.cluster.channel import ChannelLost
from launch.engine.host import Host

log = logging.getLogger(__name__)

_NAME = "drain"
_LOOK_S = 0.5


class Drain:
    """Ends serving in order.

    Args:
        server: name of this one.
        seconds: for running requests to finish; then they are cancelled.
        close: takes no more requests; pending: how many are not answered yet.

    Attributes:
        cancelled: the signal because of which requests were cancelled, or 0; begun: no more requests are taken.
    """

    def __init__(self, server: str, seconds: float, close: Callable[[], None], pending: Callable[[], int]) -> None:
        self.cancelled, self.begun = 0, False
        self._server, self._seconds, self._close, self._pending = server, seconds, close, pending
        self._signals: list[int] = []
        self._changed = threading.Event()
        self._ended = threading.Event()

    @contextmanager
    def watching(self, host: Host) -> Iterator[None]:
        """Within the block signals drain and cancel; for one program, in the main thread."""
        self._ended.clear()
        threads = [
            threading.Thread(target=target, args=(host,), name="drain", daemon=True)
            for target in (self._follow_signals, self._follow_others)
        ]
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._changed.set()
            for number, handler in before.items():
                signal.signal(number, handler)
            for thread in threads:
                thread.join(5 * _LOOK_S)

    def _handle(self, number: int, frame: Any) -> None:
        self._signals.append(number)
        self._changed.set()
        if len(self._signals) > 2:
            raise KeyboardInterrupt

    def _follow_signals(self, host: Host) -> None:
        deadline = float("inf")
        while not self._ended.is_set():
            self._changed.wait(min(_LOOK_S, max(0.0, deadline - time.monotonic())))
            if self._ended.is_set():
                return
            self._changed.clear()
            if self._signals and not self.begun:
                self._tell_others(host)
                self._begin()
            if self.begun and deadline == float("inf"):
                deadline = time.monotonic() + self._seconds
            late = time.monotonic() > deadline and self._pending() > 0
            if self.begun and (len(self._signals) > 1 or late) and not self.cancelled:
                self.cancelled = self._signals[-1] if self._signals else signal.SIGTERM
                why = f"did not finish within {self._seconds:g} s" if late else "are cancelled by a second signal"
                log.warning("%s: %d requests %s; serving ends", self._server, self._pending(), why)
                host.stop()

    def _follow_others(self, host: Host) -> None:
        """Drain where another server does."""
        try:
            while not self._ended.is_set() and not self.begun:
                if host.channel.get(_NAME, _LOOK_S) is not None:
                    self._begin()
                    self._changed.set()
        except ChannelLost:
            return

    def _tell_others(self, host: Host) -> None:
        try:
            host.channel.put(_NAME, b"")
        except ChannelLost:
            return

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            log.info(
                "%s: draining: %d requests run on, at most %g s; no more are taken; a second signal cancels them",
                self._server,
                self._pending(),
                self._seconds,
            )
            self._close()
