"""From one JAX program to the next: all servers leave between two steps, and meet again as other servers than before.

A JAX program cannot take in processes, so a cluster that grows becomes another one. Requests go on in it: each process
keeps its own, with the tokens that they have (`Host.move`). What the next program is to be, the first server says.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.cluster.channel import ChannelLost
from launch.engine.host import Host
from placement import Cluster, InputError, Placement
from placement.files import parse_json

_NAME = "reform"
_LOOK_S = 0.5


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """A program of servers.

    Attributes:
        cluster: its servers.
        coordinator: host:port where they meet.
        placement: what is where at its start, None if that has yet to be planned; epoch: of it; reason: why it is.
        limits: memory of devices in bytes, where less is to be used than the cluster file says.
        back: what goes on where the servers of this one do not come together.
    """

    cluster: Cluster
    coordinator: str
    placement: Placement | None = None
    epoch: int = 0
    reason: str = "start"
    limits: Mapping[str, int] = field(default_factory=dict)
    back: "ProcessGroup | None" = None


def encode(file: Mapping[str, Any], group: ProcessGroup) -> dict[str, Any]:
    """A group as it travels to servers that know the cluster of its `back`; `decode` reads it. file: the parsed cluster
    file."""
    assert group.back is not None
    return {"cluster": dict(file), "next": _encode_one(group), "back": _encode_one(group.back)}


def _encode_one(group: ProcessGroup) -> dict[str, Any]:
    assert group.placement is not None
    return {
        "placement": group.placement.to_dict(),
        "coordinator": group.coordinator,
        "epoch": group.epoch,
        "reason": group.reason,
        "limits": dict(group.limits),
    }


def decode(message: Mapping[str, Any], present: Cluster | None = None) -> ProcessGroup:
    """A group that has travelled. present: the cluster that serves, on its servers.

    Raises:
        InputError: its cluster or its placement is none.
    """

    def group(cluster: Cluster, about: Mapping[str, Any], back: ProcessGroup | None = None) -> ProcessGroup:
        placement = Placement.from_dict(about["placement"], f"the placement for {about['reason']}")
        return ProcessGroup(
            cluster, about["coordinator"], placement, about["epoch"], about["reason"], about["limits"], back
        )

    try:
        back = group(present, message["back"]) if present is not None else None
        return group(Cluster.from_dict(message["cluster"], "the new cluster file"), message["next"], back)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"the next process group lacks {error}; use the same version everywhere") from None


class GroupChange:
    """Waits for the command to re-form, and has the host leave once all servers have received it.

    Attributes:
        group: the next one; None before it has been commanded.
    """

    def __init__(self, host: Host, cluster: Cluster) -> None:
        self.group: ProcessGroup | None = None
        self._host, self._cluster, self._ended = host, cluster, threading.Event()
        self._thread = threading.Thread(target=self._wait, name="group change", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        engine, channel = self._host.engine, self._host.channel
        while not self._ended.is_set():
            try:
                data = channel.get(_NAME, _LOOK_S)
            except ChannelLost:  # the first server has gone, which others say
                return
            if data is not None:
                self.group, engine.reform = decode(parse_json(data, _NAME), self._cluster), True
                self._host.wake()
                return

    def end(self) -> None:
        """Wait no more; to be called before the program ends."""
        self._ended.set()
        self._thread.join()


def command_change(host: Host, group: Mapping[str, Any]) -> None:
    """Have all servers re-form as an encoded group. On the first server."""
    host.channel.put(_NAME, json.dumps(group).encode())
