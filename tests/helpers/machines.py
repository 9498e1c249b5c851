"""Three servers of the bundled model in network namespaces, each with a front door and clients of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.bench.harness.namespaces import Testbed, inside
from tests.helpers.paths import HELPERS, ROOT

NAMES = ("edge-a", "edge-b", "edge-c")
SERVER = """
[[server]]
name = "{name}"
host = "{host}"
devices = [{{ memory = "{memory}" }}]
"""
ASK = """
import sys, urllib.request
url, token, body = sys.argv[1:]
headers = {"authorization": "Bearer " + token, "content-type": "application/json"}
request = urllib.request.Request(url, body.encode() or None, headers)
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=60).read())
"""


class Machines:
    """Three front doors, each inside the namespace of its server; flags: of all of them."""

    def __init__(self, folder: Path, bed: Testbed, *flags: str, memory: str = "32MB") -> None:
        self.bed, self.folder = bed, folder
        self.cluster = folder / "cluster.toml"
        network = '[network]\nbandwidth = "500Mbps"\nlatency = "0.2ms"\n'
        servers = (SERVER.format(name=name, host=bed.addresses[name], memory=memory) for name in NAMES)
        self.cluster.write_text("".join(servers) + network)
        shape = ["--context", "128", "--sequences", "4", "--max-step-tokens", "16", *flags]
        self.processes = {}
        for name in NAMES:
            given = ["serve", "--cluster", str(self.cluster), "--server", name, "--http", f"{bed.addresses[name]}:8000"]
            with open(self.log_file(name), "wb") as log:
                self.processes[name] = subprocess.Popen(
                    [*inside(bed.namespaces[name]), sys.executable, "-m", "launch", *given, *shape],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                )

    def log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def url(self, name: str) -> str:
        return f"http://{self.bed.addresses[name]}:8000"

    def worker(self, name: str) -> int:
        """Process id of a front door's worker."""
        pid = self.processes[name].pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def client(self, name: str, *command: str) -> subprocess.Popen[str]:
        """A process inside a server's namespace, whose standard input and output are pipes."""
        return subprocess.Popen(
            [*inside(self.bed.namespaces[name]), sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start_clients(self, name: str, requests: list[dict[str, Any]]) -> subprocess.Popen[str]:
        """Clients of a server that stream these requests (`stream_client`)."""
        client = self.client(name, str(HELPERS / "stream_client.py"))
        assert client.stdin
        client.stdin.write(json.dumps({"url": f"{self.url(name)}/v1", "requests": requests}))
        client.stdin.close()
        return client

    def ask(self, name: str, path: str, token: str, body: dict[str, Any] | None = None) -> bytes:
        """What a server's front door answers an operator there. Raises CalledProcessError where that is an error."""
        given = [f"{self.url(name)}{path}", token, json.dumps(body) if body else ""]
        command = [*inside(self.bed.namespaces[name]), sys.executable, "-c", ASK, *given]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def stop(self) -> list[int]:
        """End all; their exit statuses."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        try:
            return [process.wait(120) for process in self.processes.values()]
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()

    @property
    def log(self) -> str:
        return "\n".join(self.log_file(name).read_text(errors="replace")[-3000:] for name in NAMES)
