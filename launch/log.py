"""What the program says about itself: one format, on standard error. Libraries only make loggers; commands configure here."""

import argparse
import contextlib
import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from typing import TextIO

log = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")


class _Json(logging.Formatter):
    """A line as a JSON object: time, level, logger, server if the process is one, message."""

    def __init__(self, server: str | None) -> None:
        super().__init__()
        self._server = server

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **({"server": self._server} if self._server else {}),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Plain(logging.Formatter):
    """The message alone; below the level of a user's interest, after the logger's name."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.name}: {text}" if record.levelno < logging.INFO else text


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every command has."""
    parser.add_argument(
        "--log-level", choices=LEVELS, default="info", help="least important lines on standard error (info)"
    )
    parser.add_argument("--log-json", action="store_true", help="those lines as JSON objects")


def configure(level: str = "info", as_json: bool = False, server: str | None = None) -> None:
    """Have this process log to standard error: its own lines from a level on, other libraries' warnings.

    Args:
        server: name of the server that this process is, for lines of JSON.
    """
    handler = _StandardError()
    handler.setFormatter(_Json(server) if as_json else _Plain())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("launch", "placement", "dancemoe_jax"):
        logging.getLogger(package).setLevel(level.upper())


def explain_failed_threads() -> None:
    """A thread that fails says so in one line; its traceback is for those who look for details."""

    def explain(failed: threading.ExceptHookArgs) -> None:
        name = failed.thread.name if failed.thread else "a thread"
        words = " ".join(str(failed.exc_value).split())
        log.error("%s has ended: %s: %s", name, failed.exc_type.__name__, words)
        if failed.exc_value is not None:
            log.debug("%s", name, exc_info=failed.exc_value)

    threading.excepthook = explain


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    def handleError(self, record: logging.LogRecord) -> None:
        """Nobody reads standard error any more: a server goes on without."""


def keep_output_clean() -> None:
    """Have only Python write to standard output: what C++ prints there (Gloo, XLA) becomes lines of the log (debug)."""
    sys.stdout.flush()
    own = os.dup(1)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(writing)
    # Line by line to a pipe too: a program that reads answers there waits for them.
    sys.stdout = open(own, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    threading.Thread(target=_log_lines, args=(reading,), name="native output", daemon=True).start()


def discard_output() -> None:
    """Write nothing to standard output any more: nobody reads it, and Python would fail at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _log_lines(descriptor: int) -> None:
    native = logging.getLogger("launch.native")
    with open(descriptor, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            native.debug("%s", line.rstrip("\n"))
