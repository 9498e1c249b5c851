"""Placement: which device holds which experts, as `placement.json` records it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.data.arrays import check_grid
from placement.data.cluster import Cluster
from placement.files import InputError, is_name, read_json, show, write_bytes

FORMAT, HOSTED_FORMAT = "dancemoe.placement/1", "dancemoe.placement/2"  # the second says who hosts which layers


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts resident on every device.

    Attributes:
        resident: bool [D, L, E], devices in mesh order.
        devices: server name and index within the server of every device, [D].
        strategy: name of the strategy that chose it.
        model: `name`, `layers`, `experts`, `top_k`, `expert_bytes` (one number, or one per layer), and
            `reserved_bytes` (one number, or one per device) that the budgets were computed with.
        predicted: what `placement.evaluate` found for it.
        source: where it was read from, for messages.
        host: index of the server that hosts each layer for the sequences of each server, int64 [N, L]: its attention and KV
            cache are there. None is at home, where this project's servers run them.
    """

    resident: np.ndarray
    devices: tuple[tuple[str, int], ...]
    strategy: str
    model: Mapping[str, Any]
    predicted: Mapping[str, Any] = field(default_factory=dict)
    source: str = "placement"
    host: np.ndarray | None = None

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the servers in the order of their devices, [N]."""
        return tuple(dict.fromkeys(server for server, _ in self.devices))

    def require_home(self) -> None:
        """Refuse a placement that this project's servers cannot follow.

        Raises:
            InputError: a server's layers are hosted elsewhere.
        """
        if self.host is None:
            return
        away = np.argwhere(self.host != np.arange(len(self.host))[:, None])
        if len(away):
            server, layer = away[0]
            raise InputError(
                f"{self.source}: host: {self.servers[self.host[server, layer]]} hosts layer {layer} of "
                f"{self.servers[server]}'s sequences, but serving keeps every layer's attention at home; "
                "plan with another strategy, such as latency"
            )

    @property
    def expert_bytes(self) -> np.ndarray:
        """Bytes of one expert of every layer, int64 [L]."""
        return np.broadcast_to(np.asarray(self.model["expert_bytes"], np.int64), self.resident.shape[1:2])

    @property
    def used_bytes(self) -> np.ndarray:
        """Bytes of resident experts on every device, int64 [D]."""
        return self.resident.sum(2, dtype=np.int64) @ self.expert_bytes

    def validate(self, cluster: Cluster, reserved_bytes: int | Sequence[int] | None = None) -> None:
        """Check the placement against the cluster that is to run it.

        Args:
            cluster: must have the placement's servers and devices in the same order.
            reserved_bytes: bytes per device for all that is not an expert; None takes what the placement records.

        Raises:
            InputError: other devices than the cluster's, an expert that is nowhere, or a device over its memory.
        """
        if self.devices != cluster.device_names:
            mine, theirs = (_device_list(names) for names in (self.devices, cluster.device_names))
            found = f"devices = {mine}, but {cluster.source} has {theirs}"
            raise InputError(f"{self.source}: {found}; plan again for this cluster")
        missing = np.argwhere(~self.resident.any(0))
        if len(missing):
            layer, expert = missing[0]
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InputError(f"{self.source}: layer {layer} expert {expert} is on no device{more}; plan again")
        reserved = self.model.get("reserved_bytes", 0) if reserved_bytes is None else reserved_bytes
        budget, used = cluster.memory - np.asarray(reserved), self.used_bytes
        for i in np.flatnonzero(used > budget)[:1]:
            server, device = self.devices[i]
            raise InputError(
                f"{self.source}: {server} device {device} is over its memory by {used[i] - budget[i]} bytes: experts "
                f"take {used[i]}, {cluster.source} has {cluster.memory[i]} less {cluster.memory[i] - budget[i]} "
                "reserved; plan again with this cluster"
            )

    def to_dict(self) -> dict[str, Any]:
        """What `placement.json` holds."""
        devices = [
            {"server": server, "device": device, "experts": [np.flatnonzero(row).tolist() for row in layers]}
            for (server, device), layers in zip(self.devices, self.resident, strict=True)
        ]
        found = {
            "format": FORMAT,
            "model": dict(self.model),
            "strategy": self.strategy,
            "devices": devices,
            "predicted": dict(self.predicted),
        }
        if self.host is not None:
            names = self.servers
            host = {name: [names[n] for n in row] for name, row in zip(names, self.host.tolist(), strict=True)}
            found |= {"format": HOSTED_FORMAT, "host": host}
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `placement.json`, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        head = self.to_dict()
        devices, predicted = head.pop("devices"), head.pop("predicted")
        host = head.pop("host", None)
        # One line per device: a placement of many layers stays readable, and two of them can be compared line by line.
        lines = ",\n".join("    " + json.dumps(device) for device in devices)
        text = json.dumps(head, indent=2)[:-2] + f',\n  "devices": [\n{lines}\n  ],\n'
        if host is not None:
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in host.items())
            text += f'  "host": {{\n{lines}\n  }},\n'
        text += f'  "predicted": {json.dumps(_finite(predicted), allow_nan=False)}\n}}\n'
        write_bytes(path, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Placement":
        """Read `placement.json`.

        Raises:
            InputError: the file is missing, truncated, of another format, or inconsistent.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, parsed: Any, path: str = "placement") -> "Placement":
        """Build from what the JSON parses to; `path` is where it was read from.

        Raises:
            InputError: another format, or inconsistent.
        """
        if not isinstance(parsed, dict) or parsed.get("format") not in (FORMAT, HOSTED_FORMAT):
            found = show(parsed.get("format") if isinstance(parsed, dict) else parsed)
            must = f'must be "{FORMAT}" or "{HOSTED_FORMAT}"'
            raise InputError(f"{path}: format = {found}: {must}; write it with: python -m placement plan")
        model = _model(parsed.get("model"), f"{path}: model")
        tables, strategy, predicted = (parsed.get(key, {}) for key in ("devices", "strategy", "predicted"))
        if not isinstance(tables, list) or not tables:
            raise InputError(f"{path}: devices = {show(tables)}: must list at least one device")
        if not isinstance(strategy, str) or not strategy.isprintable():
            raise InputError(f"{path}: strategy = {show(strategy)}: must be a text of printable characters")
        if not isinstance(predicted, dict):
            raise InputError(f"{path}: predicted = {show(predicted)}: must be an object")
        _check_rows(tables, model["layers"], path)
        shape = check_grid((len(tables), model["layers"], model["experts"]), f"{path}: model")
        resident = np.zeros(shape, bool)
        names = tuple(_device(table, resident[i], f"{path}: devices[{i}]") for i, table in enumerate(tables))
        if len(set(names)) < len(names):
            raise InputError(f"{path}: devices = {_device_list(names)}: one is listed twice; keep one entry per device")
        reserved = model.get("reserved_bytes", 0)
        if isinstance(reserved, list) and len(reserved) != len(names):
            found = f"{len(reserved)} entries for {len(names)} devices"
            raise InputError(f"{path}: model.reserved_bytes: {found}; must be one number or one per device")
        resident.setflags(write=False)
        host = None
        if parsed["format"] == HOSTED_FORMAT:
            host = _hosts(parsed.get("host"), tuple(dict.fromkeys(name for name, _ in names)), model["layers"], path)
        return cls(resident, names, strategy, model, predicted, path, host)


def _hosts(table: Any, servers: tuple[str, ...], layers: int, path: str) -> np.ndarray | None:
    """Host of every server's layers, int64 [N, L]; None where all are at home."""
    index = {name: n for n, name in enumerate(servers)}
    if not isinstance(table, dict) or set(table) != set(index):
        found = list(table) if isinstance(table, dict) else table
        raise InputError(
            f"{path}: host = {show(found)}: must have an entry for each of {show(', '.join(servers), 200)}"
        )
    host = np.empty((len(servers), layers), np.int64)
    for name, row in table.items():
        if not isinstance(row, list) or len(row) != layers:
            found = f"{len(row)} servers" if isinstance(row, list) else show(row)
            raise InputError(f"{path}: host.{show(name)}: {found}; must be {layers} servers, one per layer")
        for layer, server in enumerate(row):
            if not isinstance(server, str) or server not in index:
                raise InputError(f"{path}: host.{show(name)}[{layer}] = {show(server)}: no such server in devices")
            host[index[name], layer] = index[server]
    if (host == np.arange(len(servers))[:, None]).all():
        return None
    host.setflags(write=False)
    return host


def _finite(value: Any) -> Any:
    """`value` with null for what is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device_list(names: Sequence[tuple[str, int]]) -> str:
    return show(" ".join(f"{server}/{device}" for server, device in names), 200)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _model(model: Any, where: str) -> dict[str, Any]:
    if not isinstance(model, dict):
        raise InputError(f"{where} = {show(model)}: must be an object with name, layers, experts, top_k, expert_bytes")
    if not isinstance(model.get("name"), str) or not model["name"].isprintable():
        raise InputError(f"{where}.name = {show(model.get('name'))}: must be a text of printable characters")
    for key in ("layers", "experts", "top_k"):
        if not _is_count(model.get(key), 1) or model[key] > 10**5:
            raise InputError(f"{where}.{key} = {show(model.get(key))}: must be an integer from 1 to 100000")
    sizes = model.get("expert_bytes")
    per_layer = isinstance(sizes, list) and len(sizes) == model["layers"]
    if not all(_is_count(size, 1) for size in (sizes if per_layer and isinstance(sizes, list) else [sizes])):
        raise InputError(f"{where}.expert_bytes = {show(sizes)}: must be a number of bytes, or one per layer")
    reserved = model.get("reserved_bytes", 0)
    if not all(_is_count(size, 0) for size in (reserved if isinstance(reserved, list) else [reserved])):
        raise InputError(f"{where}.reserved_bytes = {show(reserved)}: must be a number of bytes, or one per device")
    return model


def _check_rows(tables: Sequence[Any], layers: int, path: str) -> None:
    """Check the entries of `devices`, before an array is made that has the sizes that `model` claims."""
    for i, table in enumerate(tables):
        where = f"{path}: devices[{i}]"
        if not isinstance(table, dict) or not is_name(table.get("server")) or not _is_count(table.get("device"), 0):
            raise InputError(f"{where} = {show(table)}: must have server (a text), device (an index) and experts")
        rows = table.get("experts")
        if not isinstance(rows, list) or len(rows) != layers:
            found = f"{len(rows)} lists" if isinstance(rows, list) else show(rows)
            raise InputError(f"{where}.experts: {found}; must be {layers} lists, one per layer")


def _device(table: Any, resident: np.ndarray, where: str) -> tuple[str, int]:
    """Check the experts of one entry of `devices` and mark them in `resident`, bool [L, E]."""
    experts = resident.shape[1]
    for layer, ids in enumerate(table["experts"]):
        if not isinstance(ids, list) or not all(_is_count(expert, 0) and expert < experts for expert in ids):
            raise InputError(f"{where}.experts[{layer}] = {show(ids)}: must list expert ids from 0 to {experts - 1}")
        if len(set(ids)) < len(ids):
            raise InputError(f"{where}.experts[{layer}] = {show(ids)}: lists an expert twice; keep one")
        resident[layer, ids] = True
    return table["server"], table["device"]
