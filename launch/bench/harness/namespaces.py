"""Servers joined by slow links on one machine: a Linux network namespace each, every link shaped to a rate.

A testbed is a set of namespaces of its own: one for each server, and a hub that holds the bridge between them. Nothing
is added to the machine's own network, so neither its firewall nor another testbed meets our traffic. Both directions
of a server's link are shaped where they leave, by a token bucket; latency is what the kernel gives. Bytes are the
kernel's own interface counters. It starts no server: `launch.cluster.processes` does, inside the namespaces given here.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from launch.cluster.signals import Interrupts
from placement import Cluster, InputError
from placement.files import parse_json

INTERFACE = "eth0"
_PREFIX = "dancemoe"
_NAMESPACES = Path("/run/netns")
_CONFIGURATION = Path("/etc/netns")  # `ip netns exec` shows the files in here as those of /etc
_SUBNET = "10.231.0"
_MOST = 250
# What may leave at once. Less costs throughput, as timers come late; more lets small messages through unshaped.
_BURST_SECONDS = 0.25e-3
_QUEUE_SECONDS = 0.05


@dataclass(frozen=True)
class Rates:
    """Bit/s that leave a server (`up`) and that reach it (`down`)."""

    up: float
    down: float


@dataclass(frozen=True)
class Traffic:
    """Bytes and packets that a server's interface has sent and received, Ethernet headers included."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(*(now - then for now, then in zip(vars(self).values(), vars(earlier).values(), strict=True)))


def missing() -> str | None:
    """What keeps a testbed from running here, in one line; None where nothing does."""
    if sys.platform != "linux":
        return f"the testbed needs Linux network namespaces; this is {sys.platform}"
    if os.geteuid() != 0:
        return "the testbed needs root to make network namespaces; run it with sudo"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the testbed needs the program {program}; install iproute2"
    return None


def link_rates(cluster: Cluster) -> dict[str, Rates]:
    """The links of a cluster as one access link for each server.

    Raises:
        InputError: some pair of servers is slower than the slower of its two access links, which these cannot give.
    """
    bits = np.where(np.eye(len(cluster.servers), dtype=bool), 0.0, cluster.bandwidth * 8)
    if len(bits) == 1:
        return {cluster.names[0]: Rates(math.inf, math.inf)}
    up, down = bits.max(1), bits.max(0)
    given = np.minimum(up[:, None], down[None, :])
    np.fill_diagonal(given, 0.0)
    for start, end in np.argwhere(~np.isclose(bits, given)):
        wanted, got = (f"{x[start, end] / 1e6:g} Mbit/s" for x in (bits, given))
        raise InputError(
            f"{cluster.source}: {cluster.names[start]} to {cluster.names[end]} has {wanted}; the testbed shapes one link per "
            f"server, which gives this pair {got}: make bandwidth the same for all links of the slower server"
        )
    return {name: Rates(float(u), float(d)) for name, u, d in zip(cluster.names, up, down, strict=True)}


class Testbed:
    """One network namespace per server, up inside a `with` block and gone after it, whatever ends the block.

    SIGTERM and SIGHUP end the block too. What a killed run left behind is removed when the next testbed comes up.

    Args:
        servers: their names, in mesh order.
        rates: bit/s of each server's link in both directions, one number for all or `Rates` by name.

    Attributes:
        servers: their names, in mesh order.
        addresses: IPv4 address by server.
        namespaces: network namespace by server, for `ip netns exec`.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(self, servers: Sequence[str], rates: float | Mapping[str, Rates] = 500e6) -> None:
        if not 1 <= len(servers) <= _MOST or len(set(servers)) < len(servers):
            raise InputError(f"testbed: servers = {list(servers)[:5]}: must be 1 to {_MOST} different names")
        self.servers = tuple(servers)
        self._rates = rates if isinstance(rates, Mapping) else dict.fromkeys(servers, Rates(rates, rates))
        for server in servers:
            link = self._rates.get(server)
            if link is None or not (link.up > 0 and link.down > 0):
                raise InputError(f"testbed: rate of {server} = {link}: must be bit/s greater than 0")
        self.addresses = {server: f"{_SUBNET}.{i + 1}" for i, server in enumerate(servers)}
        self._interrupts = Interrupts()
        self._name = ""
        self.namespaces: dict[str, str] = {}

    @classmethod
    def of(cls, cluster: Cluster) -> "Testbed":
        """The servers of a cluster, joined at the bandwidths of its file; its latencies are not reproduced.

        Raises:
            InputError: the bandwidths are not those of one link per server.
        """
        return cls(cluster.names, link_rates(cluster))

    def __enter__(self) -> "Testbed":
        """Bring everything up.

        Raises:
            InputError: something is missing here, or the system refuses a step.
        """
        if (reason := missing()) is not None:
            raise InputError(reason)
        remove_leftovers()
        self._interrupts.__enter__()
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._down()

    def traffic(self, server: str) -> Traffic:
        """What has crossed a server's link since the testbed came up."""
        shown = _run("ip", "-n", self.namespaces[server], "-s", "-j", "link", "show", "dev", INTERFACE)
        counters = parse_json(shown, "ip -j")[0]["stats64"]
        sent, received = counters["tx"], counters["rx"]
        return Traffic(sent["bytes"], received["bytes"], sent["packets"], received["packets"])

    @property
    def prefix(self) -> dict[str, list[str]]:
        """By server, what to put before a command to run it there (`launch.cluster.processes.start`)."""
        return {server: inside(namespace) for server, namespace in self.namespaces.items()}

    def measure(self, source: str, target: str, size: int = 8_000_000) -> tuple[float, float]:
        """What one TCP connection between two servers gets: bit/s of `size` bytes, seconds of a small round trip."""
        receive = [*inside(self.namespaces[target]), sys.executable, "-c", _RECEIVE, self.addresses[target], str(size)]
        with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
            try:
                assert receiver.stdout is not None
                port = receiver.stdout.readline().strip()
                send = [sys.executable, "-c", _SEND, self.addresses[target], port, str(size)]
                seconds, round_trip = map(float, _run(*inside(self.namespaces[source]), *send).split())
            finally:
                receiver.kill()
        return size * 8 / seconds, round_trip

    def _up(self) -> None:
        self._name = _unused_name()
        hub = f"{self._name}-hub"
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", "hub", "type", "bridge", "mcast_snooping", "0")
        _run("ip", "-n", hub, "link", "set", "hub", "up")
        for i, server in enumerate(self.servers):
            own, port, link = f"{self._name}-{i}", f"port{i}", self._rates[server]
            self._write_hosts(own, server)
            _run("ip", "netns", "add", own)
            self.namespaces[server] = own
            veth = ("type", "veth", "peer", "name", INTERFACE, "netns", own)
            _run("ip", "-n", hub, "link", "add", port, *veth)
            _run("ip", "-n", hub, "link", "set", port, "master", "hub", "addrgenmode", "none", "up")
            _run("ip", "-n", own, "link", "set", "lo", "up")
            _run("ip", "-n", own, "address", "add", f"{self.addresses[server]}/24", "dev", INTERFACE)
            _run("ip", "-n", own, "link", "set", INTERFACE, "addrgenmode", "none", "up")
            _shape(own, INTERFACE, link.up)
            _shape(hub, port, link.down)

    def _write_hosts(self, namespace: str, server: str) -> None:
        """/etc/hosts of a server: its own host name is its address on the link, which is what Gloo advertises."""
        others = [f"{address} {name}" for name, address in self.addresses.items() if not set(name) & set(" \t#")]
        own = f"{self.addresses[server]} {socket.gethostname()}"
        folder = _CONFIGURATION / namespace
        try:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", own, *others, ""]))
        except OSError as error:
            raise InputError(f"testbed: {folder}/hosts: cannot be written: {error.strerror or error}") from None

    def _down(self) -> None:
        try:
            with self._interrupts.held():
                if self._name:
                    _remove(self._name)
                self.namespaces = {}
        finally:
            self._interrupts.__exit__(None, None, None)


def inside(namespace: str) -> list[str]:
    """What to put before a command to run it inside a network namespace; the process keeps its id."""
    return ["ip", "netns", "exec", namespace]


def remove_leftovers() -> None:
    """Remove the namespaces of testbeds whose process is gone."""
    for name in {_testbed_of(path.name) for folder in (_NAMESPACES, _CONFIGURATION) for path in _entries(folder)} - {
        ""
    }:
        _, pid, started, _ = name.split("-")
        if _started(int(pid)) != started:
            _remove(name)


def _remove(name: str) -> None:
    """Remove a testbed's namespaces, what still runs inside them, and their files."""
    for path in _entries(_NAMESPACES):
        if _testbed_of(path.name) == name:
            inhabitants = subprocess.run(
                ["ip", "netns", "pids", path.name], capture_output=True, text=True, check=False
            )
            for pid in map(int, inhabitants.stdout.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)
    for folder in _entries(_CONFIGURATION):
        if _testbed_of(folder.name) == name:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty, or not there: then it is not ours to remove
        _CONFIGURATION.rmdir()


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _unused_name() -> str:
    """A name that shows which process the testbed belongs to: its id, when it began, and a number."""
    used = {_testbed_of(path.name) for path in _entries(_NAMESPACES)}
    mine = f"{_PREFIX}-{os.getpid()}-{_started(os.getpid())}"
    return next(name for i in range(len(used) + 1) if (name := f"{mine}-{i}") not in used)


def _testbed_of(namespace: str) -> str:
    """Name of the testbed that a namespace belongs to; "" where it is none of ours."""
    parts = namespace.split("-")
    ours = len(parts) == 5 and parts[0] == _PREFIX and all(part.isdecimal() for part in parts[1:4])
    return "-".join(parts[:4]) if ours else ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" where there is no such process. Ids are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _shape(namespace: str, interface: str, bits: float) -> None:
    if math.isfinite(bits):
        burst = max(4096, round(bits / 8 * _BURST_SECONDS))
        queue = max(65536, round(bits / 8 * _QUEUE_SECONDS))
        bucket = ("tbf", "rate", f"{round(bits)}bit", "burst", str(burst), "limit", str(queue))
        _run("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *bucket)


def _run(*command: str) -> str:
    """Output of a command. Raises InputError with its error output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise InputError(
            f"testbed: {' '.join(command[:8])}: {reason}; it needs root and a kernel with veth, bridge and tbf"
        )
    return done.stdout


_RECEIVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(20):
    peer.sendall(peer.recv(1))
left = int(sys.argv[2])
while left and (data := peer.recv(min(left, 1 << 20))):
    left -= len(data)
peer.sendall(b".")
"""
_SEND = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
trips = []
for _ in range(20):
    start = time.perf_counter()
    peer.sendall(b".")
    peer.recv(1)
    trips.append(time.perf_counter() - start)
start = time.perf_counter()
peer.sendall(bytes(int(sys.argv[3])))
peer.recv(1)
print(time.perf_counter() - start, sorted(trips)[10])
"""
