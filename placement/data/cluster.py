"""Cluster: servers, their devices and the links between them, as `cluster.toml` describes them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.files import InputError, is_name, read_toml, show
from placement.units import parse_bytes, parse_rate, parse_seconds

DEFAULT_LOAD_BANDWIDTH = 1e9
DEFAULT_BANDWIDTH = "1Gbps"
DEFAULT_LATENCY = "0.2ms"
_FASTEST = 1e6  # times the usual device; its inverse is the slowest
_USUAL = "1.0 is the usual device"
_MOST_SERVERS, _MOST_DEVICES = 1024, 4096  # arrays have a row for each device, and a column for each server


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        memory: bytes for weights and KV cache.
        load_bandwidth: bytes/s at which expert weights reach it from storage.
        speed: compute speed relative to the other devices.
    """

    memory: int
    load_bandwidth: float = DEFAULT_LOAD_BANDWIDTH
    speed: float = 1.0


@dataclass(frozen=True)
class Server:
    """One process and its devices; `host` is None for a process on this machine."""

    name: str
    devices: tuple[Device, ...]
    host: str | None = None


@dataclass(frozen=True, eq=False)
class Cluster:
    """Servers in mesh order and the links between them.

    Attributes:
        servers: N servers; their devices, one server after the other, are the D devices of every array.
        bandwidth: float64 [N, N], bytes/s from row to column; infinite on the diagonal.
        latency: float64 [N, N], seconds from row to column; 0 on the diagonal.
        source: where it was read from, for messages.
    """

    servers: tuple[Server, ...]
    bandwidth: np.ndarray
    latency: np.ndarray
    source: str = "cluster"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the servers, [N]."""
        return tuple(server.name for server in self.servers)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices in mesh order, [D]."""
        return tuple(device for server in self.servers for device in server.devices)

    @property
    def device_names(self) -> tuple[tuple[str, int], ...]:
        """Server name and index within the server of every device, [D]."""
        return tuple((server.name, index) for server in self.servers for index in range(len(server.devices)))

    @property
    def memory(self) -> np.ndarray:
        """Bytes of every device, int64 [D]."""
        return np.array([device.memory for device in self.devices], np.int64)

    @property
    def speed(self) -> np.ndarray:
        """Relative speed of every device, float64 [D]."""
        return np.array([device.speed for device in self.devices], np.float64)

    @property
    def load_bandwidth(self) -> np.ndarray:
        """Bytes/s from storage to every device, float64 [D]."""
        return np.array([device.load_bandwidth for device in self.devices], np.float64)

    @property
    def device_server(self) -> np.ndarray:
        """Index of every device's server, int64 [D], ascending."""
        return np.repeat(np.arange(len(self.servers)), [len(server.devices) for server in self.servers])

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> "Cluster":
        """Read a `cluster.toml`.

        Raises:
            InputError: the file is missing, is no TOML, or does not describe a cluster.
        """
        return cls.from_dict(read_toml(path), source=str(path))

    @classmethod
    def from_dict(cls, parsed: Mapping[str, Any], source: str = "cluster") -> "Cluster":
        """Build from what TOML parses to: `server` (a list), and optionally `network` and `link` (a list).

        Raises:
            InputError: unknown keys or units, duplicate names, no server, links of unknown servers, negative values.

        >>> servers = [{"name": "a", "devices": [{"memory": "12GB"}]}, {"name": "b", "devices": [{"memory": "8GiB"}]}]
        >>> cluster = Cluster.from_dict({"server": servers, "network": {"bandwidth": "500Mbps", "latency": "1ms"}})
        >>> cluster.memory.tolist(), cluster.bandwidth[0].tolist()
        ([12000000000, 8589934592], [inf, 62500000.0])
        """
        _check_keys(parsed, {"server", "network", "link"}, source)
        tables = parsed.get("server")
        if not isinstance(tables, list) or not tables:
            raise InputError(f"{source}: no server; add a [[server]] table with name and devices")
        servers = tuple(_server(table, f"{source}: server[{i}]") for i, table in enumerate(tables))
        index: dict[str, int] = {}
        for i, server in enumerate(servers):
            if server.name in index:
                where = f"{source}: server[{i}].name = {show(server.name)}"
                raise InputError(f"{where}: already used; give every server its own name")
            index[server.name] = i
        devices = sum(len(server.devices) for server in servers)
        if len(servers) > _MOST_SERVERS or devices > _MOST_DEVICES:
            found = f"{len(servers)} servers with {devices} devices"
            raise InputError(f"{source}: {found}; at most {_MOST_SERVERS} and {_MOST_DEVICES} are planned for")
        bandwidth, latency = _links(parsed, index, source)
        return cls(servers, bandwidth, latency, source)


def _check_keys(table: Any, known: set[str], where: str) -> None:
    if not isinstance(table, Mapping):
        raise InputError(f"{where} = {show(table)}: must be a table with {', '.join(sorted(known))}")
    for key in table:
        if key not in known:
            raise InputError(f"{where}: unknown key {show(key)}; known are {', '.join(sorted(known))}")


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not is_name(value):
        raise InputError(f"{where}.{key} = {show(value)}: must be a text of printable characters")
    return value


def _server(table: Any, where: str) -> Server:
    _check_keys(table, {"name", "host", "devices"}, where)
    name = _text(table, "name", where)
    host = _text(table, "host", where) if "host" in table else None
    devices = table.get("devices")
    if not isinstance(devices, list) or not devices:
        raise InputError(f'{where}.devices = {show(devices)}: must list a device, such as {{ memory = "12GB" }}')
    return Server(name, tuple(_device(device, f"{where}.devices[{i}]") for i, device in enumerate(devices)), host)


def _device(table: Any, where: str) -> Device:
    _check_keys(table, {"memory", "load_bandwidth", "speed"}, where)
    if "memory" not in table:
        raise InputError(f'{where}.memory: missing; write for example memory = "12GB"')
    memory = parse_bytes(table["memory"], f"{where}.memory")
    load_bandwidth = DEFAULT_LOAD_BANDWIDTH
    if "load_bandwidth" in table:
        load_bandwidth = parse_rate(table["load_bandwidth"], f"{where}.load_bandwidth", "2GB/s")
    speed = table.get("speed", 1.0)
    if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 < speed <= _FASTEST:
        raise InputError(
            f"{where}.speed = {show(speed)}: must be a number greater than 0 and at most {_FASTEST:g}; {_USUAL}"
        )
    if speed < 1 / _FASTEST:
        raise InputError(f"{where}.speed = {show(speed)}: must be at least {1 / _FASTEST:g}; {_USUAL}")
    return Device(memory, load_bandwidth, float(speed))


def _links(parsed: Mapping[str, Any], index: dict[str, int], source: str) -> tuple[np.ndarray, np.ndarray]:
    network, links = parsed.get("network", {}), parsed.get("link", [])
    _check_keys(network, {"bandwidth", "latency"}, f"{source}: network")
    if not isinstance(links, list):
        raise InputError(f"{source}: link = {show(links)}: must be [[link]] tables")
    shape = (len(index), len(index))
    bandwidth = np.full(shape, parse_rate(network.get("bandwidth", DEFAULT_BANDWIDTH), f"{source}: network.bandwidth"))
    latency = np.full(shape, parse_seconds(network.get("latency", DEFAULT_LATENCY), f"{source}: network.latency"))
    given: set[tuple[int, int]] = set()
    for i, link in enumerate(links):
        where = f"{source}: link[{i}]"
        _check_keys(link, {"from", "to", "bandwidth", "latency", "both"}, where)
        ends = []
        for key in ("from", "to"):
            name = link.get(key)
            if not isinstance(name, str) or name not in index:
                raise InputError(f"{where}.{key} = {show(name)}: no such server; known are {', '.join(index)}")
            ends.append(index[name])
        if ends[0] == ends[1]:
            raise InputError(f"{where}.to = {show(link['to'])}: a link joins two different servers; remove it")
        both = link.get("both", False)
        if not isinstance(both, bool):
            raise InputError(f"{where}.both = {show(both)}: must be true or false")
        for pair in [(ends[0], ends[1]), (ends[1], ends[0])][: 1 + both]:
            if pair in given:
                start, end = (tuple(index)[i] for i in pair)
                raise InputError(f"{where}: {start} to {end} is given twice; keep one [[link]] per direction")
            given.add(pair)
            if "bandwidth" in link:
                bandwidth[pair] = parse_rate(link["bandwidth"], f"{where}.bandwidth")
            if "latency" in link:
                latency[pair] = parse_seconds(link["latency"], f"{where}.latency")
    np.fill_diagonal(bandwidth, np.inf)
    np.fill_diagonal(latency, 0.0)
    bandwidth.setflags(write=False)
    latency.setflags(write=False)
    return bandwidth, latency
