"""Signals that ask a program to end, made exceptions, so that `with` blocks clean up behind it. Holds no cleaning up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """Inside the block SIGTERM and SIGHUP raise SystemExit with 128 + signal, as SIGINT raises KeyboardInterrupt.

    Signals that somebody else handles already stay theirs. Outside the main thread, where Python handles no signals,
    it does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, _leave)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that signals asking to end, Ctrl-C included, do not break into: they come after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        came: list[int] = []
        before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (*_ENDING, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for number in came[:1]:
                signal.raise_signal(number)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
