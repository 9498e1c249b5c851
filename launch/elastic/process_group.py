"""From one JAX program to the next: all servers leave between two steps, and meet again as other servers than before.

A JAX program cannot take in processes, so a cluster that grows becomes another one. Requests go on in it: each process
keeps its own, with the tokens that they have (`Host.move`). What the next program is to be, the first server says.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.engine.host import Host
from placement import Cluster, Placement

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


def encode(file: Mapping[str, Any], group: ProcessGroup) -> bytes:
    """A world as it travels to those who know the cluster of its `back`; `decode` reads it. file: the parsed cluster file."""
    assert group.back is not None
    return json.dumps({"cluster": dict(file), "world": _told(group), "back": _told(group.back)}).encode()


def _told(group: ProcessGroup) -> dict[str, Any]:
    assert group.placement is not None
    about = {
        "coordinator": group.coordinator,
        "epoch": group.epoch,
        "reason": group.reason,
        "limits": dict(group.limits),
    }
    return {"placement": group.placement.to_dict(), **about}


def decode(data: bytes, present: Cluster | None = None) -> ProcessGroup:
    """A world that has travelled. present: the cluster that serves, on its servers.

    Raises:
        InputError: its cluster or its placement is none.
    """
    told = json.loads(data)

    def group(cluster: Cluster, said: Mapping[str, Any], back: ProcessGroup | None = None) -> ProcessGroup:
        placement = Placement.from_dict(said["placement"], f"the placement for {said['reason']}")
        return ProcessGroup(
            cluster, said["coordinator"], placement, said["epoch"], said["reason"], said["limits"], back
        )

    back = group(present, told["back"]) if present is not None else None
    return group(Cluster.from_dict(told["cluster"], "the new cluster file"), told["world"], back)


class GroupChange:
    """Waits for the order to reform, and has the host leave once all servers have heard it.

    Attributes:
        world: the next one; None before it has been ordered.
    """

    def __init__(self, host: Host, cluster: Cluster) -> None:
        self.group: ProcessGroup | None = None
        self._host, self._cluster, self._ended = host, cluster, threading.Event()
        self._thread = threading.Thread(target=self._wait, name="regrouping", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        engine, channel = self._host.engine, self._host.channel
        while not self._ended.is_set():
            data = channel.get(_NAME, _LOOK_S)
            if data is not None:
                self.group, engine.reform = decode(data, self._cluster), True
                self._host.wake()
                return

    def end(self) -> None:
        """Wait no more; to be called before the program ends."""
        self._ended.set()
        self._thread.join()


def order(host: Host, group: bytes) -> None:
    """Have all servers reform. On the first server."""
    host.channel.put(_NAME, group)
