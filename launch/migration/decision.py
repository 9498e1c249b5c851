"""What a revision of the placement is: when it is due, what speaks for it, and what came of it. Holds no state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from placement import Cluster, InputError, Profile, Workload
from placement.migration.decide import Figures
from placement.units import format_bytes


@dataclasses.dataclass
class Decision:
    """A revision and what came of it: with the `Figures` of its plan where there was one."""

    at: float
    reason: str
    verdict: str = "kept"
    why: str = ""
    epoch: int = 0
    tokens: float = 0.0
    step_s: float | None = None
    planned_step_s: float | None = None
    remote_share: float | None = None
    planned_remote_share: float | None = None
    saving_s: float | None = None
    cost_s: float | None = None
    transfer_s: float | None = None
    bytes: int = 0
    copies: int = 0
    rounds: int = 0
    outcome: dict[str, Any] | None = None

    def take(self, figures: Figures) -> None:
        vars(self).update(vars(figures))


def pace(seen: np.ndarray) -> tuple[Workload, float]:
    """What servers do, and how often: the workload that planning takes, and its chunks in a second.

    Args:
        seen: prefill steps, decode steps, tokens in them, and the seconds in which they were, decayed alike; [5].
    """
    prefills, decodes, prefilled, decoded, seconds = seen.tolist()
    if not round(prefills + decodes) or not seconds > 0:
        return Workload(), 0.0
    chunks = max(1.0, prefills)
    chunk = max(1, round(prefilled / prefills)) if prefills else 0
    steps = round(decodes / chunks)
    active = max(1, round(decoded / decodes)) if decodes else 1
    return Workload(active, chunk, steps if chunk else max(1, steps)), chunks / seconds


def describe(decision: Decision) -> str:
    """A decision as a line."""
    words = [f"placement: epoch {decision.epoch}: {decision.verdict}, {decision.why}"]
    if decision.step_s is not None and decision.planned_step_s is not None:
        words.append(
            f"a chunk and its steps {1e3 * decision.step_s:.1f} ms, planned {1e3 * decision.planned_step_s:.1f} ms"
        )
        words.append(
            f"remote {100 * (decision.remote_share or 0):.1f} %, planned {100 * (decision.planned_remote_share or 0):.1f} %"
        )
        words.append(f"{decision.copies} copies, {format_bytes(decision.bytes)}, {decision.rounds} rounds")
        words.append(f"saves {decision.saving_s or 0:.2f} s for {decision.cost_s or 0:.2f} s")
    if decision.outcome:
        words.append(
            f"moved in {decision.outcome['seconds']:.2f} s, longest stall {1e3 * decision.outcome['longest_stall_s']:.1f} ms"
        )
    return "; ".join(words)


def limited(cluster: Cluster, limits: Mapping[str, int]) -> Cluster:
    """A cluster whose devices have at most so much memory."""
    servers = tuple(
        dataclasses.replace(
            server,
            devices=tuple(
                dataclasses.replace(
                    device, memory=min(device.memory, limits.get(f"{server.name}/{index}", device.memory))
                )
                for index, device in enumerate(server.devices)
            ),
        )
        for server in cluster.servers
    )
    return dataclasses.replace(cluster, servers=servers)


def with_limits(
    profile: Profile, cluster: Cluster, limits: Mapping[str, int], requested: Mapping[str, int | None]
) -> dict[str, int]:
    """Limits after a change: bytes for a device or all of a server, or None for as much as the cluster file says."""
    result, least = dict(limits), int(np.max(np.asarray(profile.reserved_bytes)))
    for name, size in requested.items():
        devices = [
            f"{server}/{index}" for server, index in cluster.device_names if name in (server, f"{server}/{index}")
        ]
        if not devices:
            raise InputError(f"{name}: no such server or device; known are {', '.join(cluster.names)}")
        for device in devices:
            if size is None:
                result.pop(device, None)
            elif size == 0 or size >= least:
                result[device] = max(size, least)
            else:
                raise InputError(f"{name}: {size} bytes are less than the {least} that a device needs beside experts")
    return result
