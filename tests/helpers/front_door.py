"""A front door of its own process for tests: started, waited for, talked to, ended."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from launch.cluster.addresses import free_port
from tests.helpers.paths import ROOT

START_S = 300.0


class Door:
    """`python -m launch serve --http …`, its log in a file."""

    def __init__(
        self, folder: Path, *flags: str, command: tuple[str, ...] = (), stdin: int = subprocess.DEVNULL
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = folder / f"door-{self.port}.log"
        shape = ["--context", "128", "--sequences", "4", "--max-step-tokens", "16"]
        given = [sys.executable, "-m", "launch", "serve", "--http", f"127.0.0.1:{self.port}", *shape, *flags]
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen([*command, *given], stdin=stdin, stdout=log, stderr=log, cwd=ROOT)
        self.http = httpx.Client(base_url=self.url, timeout=400)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=400)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def ready(self) -> dict[str, Any]:
        return self.http.get("/ready").json()

    def wait_until_ready(self, seconds: float = START_S) -> "Door":
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            with contextlib.suppress(httpx.TransportError):
                if self.ready()["ready"]:
                    return self
            time.sleep(0.1)
        raise AssertionError(f"not ready within {seconds} s: {self.log}")

    def worker(self) -> int:
        """Process id of the worker."""
        return json.loads(self.http.get("/ready").text)["worker"]["pid"]

    def stop(self, seconds: float = 60.0) -> int:
        """Drain it; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            self.client.close()
            self.http.close()


@contextlib.contextmanager
def front_door(folder: Path, *flags: str, **options: Any) -> Iterator[Door]:
    """A front door that is ready, ended after the block."""
    door = Door(folder, *flags, **options)
    try:
        yield door.wait_until_ready()
    finally:
        door.stop()
