"""Rendering chat templates in a process of their own (template_worker.py), which is started when first needed."""

import atexit
import datetime
import json
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from dancemoe_jax.text import template_worker

_WAIT = 60.0  # seconds on the clock, for a machine that is busy; the worker's own limit is of processor time


class TemplateError(Exception):
    """A template cannot be rendered; the message says why."""


class TemplateProcess:
    """One worker, started again after a template that it had to be ended for. Safe from several threads, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        atexit.register(self.close)

    def render(self, template: str, variables: dict[str, Any], now: datetime.datetime) -> str:
        """The text of a template.

        Args:
            template: Jinja source.
            variables: what it knows; values of JSON.
            now: what its `strftime_now` formats.

        Raises:
            TemplateError: it fails, computes too long or takes too much memory.
        """
        try:
            request = json.dumps({"template": template, "variables": variables, "now": now.isoformat()}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"its variables are no JSON: {error}") from None
        with self._lock:
            answer = self._ask(request + b"\n")
        if "text" not in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, request: bytes) -> dict[str, str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(template_worker.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(request)
            stdin.flush()
            ready, _, _ = select.select([stdout], [], [], _WAIT)
            line = stdout.readline() if ready else b""
        except OSError:  # it ended
            line = b""
        if line.endswith(b"\n"):
            return json.loads(line)
        self.close()
        return {"error": f"it takes more than {template_worker.SECONDS:.0f} s of processor time"}


TEMPLATES = TemplateProcess()
