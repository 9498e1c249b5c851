"""Problem: what a strategy is given, built from a profile and a cluster in this one place."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from placement.data.cluster import Cluster
from placement.data.profile import Profile
from placement.data.workload import Workload
from placement.files import InputError, show
from placement.units import format_bytes

VALUE_BYTES, SUM_BYTES = 2, 4  # of a channel: activations travel as bfloat16, what experts made of them as float32
WEIGHT_BYTES, CODE_BYTES = 4, 2  # of each expert that a row is sent to
DISPATCH = ("ours", "sglang")
READ_BANDWIDTH, OPERATIONS = 500e9, 50e12  # bytes of weights and operations a second of a device of speed 1


@dataclass(frozen=True, eq=False)
class Tokens:
    """Expert sets of single tokens: ids int [T, L, k], server int [T], sequence int [T]."""

    ids: np.ndarray
    server: np.ndarray
    sequence: np.ndarray


@dataclass(frozen=True, eq=False)
class Problem:
    """minimise sum_n sum_l sum_e f_n^l(e) [e of layer l is on no device of server n], covered and within memory.

    The problem of paper section 3, with what planners beyond it need to know. N servers, D devices in mesh order,
    L layers, E experts in each.

    Attributes:
        names: names of the servers, [N].
        frequency: f, float64 [N, L, E]: each server's share of all assignments of one layer, summing to L in all.
        expert_bytes: bytes of one expert of each layer, int64 [L].
        budget: bytes for experts on each device, int64 [D].
        device_server: index of each device's server, int64 [D], ascending.
        speed: relative compute speed of each device, float64 [D].
        bandwidth: bytes/s between servers, float64 [N, N].
        latency: seconds between servers, float64 [N, N].
        top_k: experts per token and layer.
        hidden_size: width of the activations that travel.
        tokens: token-level sets, where the profile has them.
        workload: what the servers do at once, for what is measured in seconds.
        counted: tokens that `frequency` rests on, float; infinite where it is exact.
        source: the cluster's, for messages.
        dispatch: one of `DISPATCH`, whose rule chooses among copies on other servers (costs/routing.py).
    """

    names: tuple[str, ...]
    frequency: np.ndarray
    expert_bytes: np.ndarray
    budget: np.ndarray
    device_server: np.ndarray
    speed: np.ndarray
    bandwidth: np.ndarray
    latency: np.ndarray
    top_k: int
    hidden_size: int
    tokens: Tokens | None = None
    workload: Workload = field(default_factory=Workload)
    counted: float = math.inf
    source: str = "cluster"
    dispatch: str = "ours"

    @classmethod
    def build(cls, profile: Profile, cluster: Cluster, workload: Workload | None = None) -> "Problem":
        """Join a profile and a cluster; without a `workload` the usual one.

        Raises:
            InputError: they name different servers or device numbers, or a device has less memory than is reserved.
        """
        if profile.servers != cluster.names:
            raise InputError(
                f"{profile.source}: servers = {', '.join(profile.servers)}, but {cluster.source} has "
                f"{', '.join(cluster.names)}; both must name the same servers in the same order"
            )
        reserved = profile.reserved_bytes
        if isinstance(reserved, tuple) and len(reserved) != len(cluster.memory):
            raise InputError(
                f"{profile.source}: meta.reserved_bytes has {len(reserved)} entries, but {cluster.source} has "
                f"{len(cluster.memory)} devices; give one number or one per device"
            )
        budget = cluster.memory - np.asarray(reserved, np.int64)
        if (budget < 0).any():
            device = int(np.argmin(budget))
            server, index = cluster.device_names[device]
            raise InputError(
                f"{cluster.source}: {server} device {index}: memory of {cluster.memory[device]} bytes is "
                f"{-budget[device]} bytes less than {profile.source} reserves for all but experts; raise memory"
            )
        total = profile.counts.sum(dtype=np.float64)
        layers = profile.counts.shape[1]
        tokens = None
        if profile.ids is not None and profile.server is not None and profile.sequence is not None:
            tokens = Tokens(profile.ids, profile.server, profile.sequence)
        return cls(
            names=cluster.names,
            frequency=profile.counts * (layers / total if total > 0 else 0.0),
            expert_bytes=np.broadcast_to(np.asarray(profile.expert_bytes, np.int64), (layers,)),
            budget=budget,
            device_server=cluster.device_server,
            speed=cluster.speed,
            bandwidth=cluster.bandwidth,
            latency=cluster.latency,
            top_k=profile.top_k,
            hidden_size=profile.hidden_size,
            tokens=tokens,
            workload=Workload() if workload is None else workload,
            counted=float(total) / (layers * profile.top_k),
            source=cluster.source,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, L, E."""
        servers, layers, experts = self.frequency.shape
        return servers, layers, experts

    @cached_property
    def first_device(self) -> np.ndarray:
        """Index of each server's first device, int64 [N]."""
        return np.searchsorted(self.device_server, np.arange(len(self.names)))

    @cached_property
    def usable_bytes(self) -> np.ndarray:
        """Bytes of each device that experts can fill, int64 [D]; with equal sizes a whole number of experts."""
        size = self.expert_bytes[0]
        return self.budget // size * size if (self.expert_bytes == size).all() else self.budget

    @cached_property
    def demand(self) -> np.ndarray:
        """p of each server and layer, float64 [N, L, E], summing to 1 over the experts.

        A server without counts for a layer is taken to want what the others want; where nobody has any, all experts
        alike.
        """
        everyone = self.frequency.sum(0)
        everyone = np.where(everyone.sum(-1, keepdims=True) > 0, everyone, 1.0)
        known = self.frequency.sum(-1, keepdims=True) > 0
        weights = np.where(known, self.frequency, everyone)
        return weights / weights.sum(-1, keepdims=True)

    @cached_property
    def active(self) -> np.ndarray:
        """Servers that have users, bool [N]: those with statistics; all of them where nobody has any."""
        known = self.frequency.sum((1, 2)) > 0
        return known if known.any() else ~known

    @cached_property
    def exchange_seconds(self) -> np.ndarray:
        """alpha: seconds of an exchange without its bytes, there and back, float64 [N, N]; 0 on the diagonal."""
        alpha = self.latency + self.latency.T + self.workload.exchange_seconds
        return np.where(np.eye(len(self.names), dtype=bool), 0.0, alpha)

    @property
    def row_bytes(self) -> int:
        """Of one token's row on its way to another server: its activations, and the weight and slot of each expert."""
        return self.hidden_size * VALUE_BYTES + self.top_k * (WEIGHT_BYTES + CODE_BYTES)

    @property
    def sum_bytes(self) -> int:
        """Of the sum of a token's experts on its way back."""
        return self.hidden_size * SUM_BYTES

    @cached_property
    def row_seconds(self) -> np.ndarray:
        """beta: seconds one token's row takes from row to column, float64 [N, N]; 0 on the diagonal."""
        return self.row_bytes / self.bandwidth

    @cached_property
    def sum_seconds(self) -> np.ndarray:
        """beta': seconds its sum takes back from column to row, float64 [N, N]; 0 on the diagonal."""
        return self.sum_bytes / self.bandwidth.T

    @cached_property
    def assignment_seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of one token in one expert on a device of speed 1, in a prompt and in a decode step: float64 [L] each.

        Unless the workload says it, a roofline: a decoded token reads an expert's weights from memory for itself alone, the
        tokens of a chunk that choose one expert share the reading and compute two operations a weight of two bytes.
        """
        given = self.workload.assignment_seconds
        if given is not None:
            return np.full(len(self.expert_bytes), given), np.full(len(self.expert_bytes), given)
        sharing = max(1.0, self.workload.prefill_tokens * self.top_k / self.shape[2])
        read, compute = self.expert_bytes / READ_BANDWIDTH, self.expert_bytes / OPERATIONS
        return np.maximum(read / sharing, compute), np.maximum(read, compute)

    def held(self, resident: np.ndarray) -> np.ndarray:
        """Which server holds which expert: bool [N, L, E] from bool [D, L, E]."""
        return np.logical_or.reduceat(resident, self.first_device, axis=0)

    def used_bytes(self, resident: np.ndarray) -> np.ndarray:
        """Bytes of resident experts on each device: int64 [D] from bool [D, L, E]."""
        return resident.sum(2, dtype=np.int64) @ self.expert_bytes

    def require_capacity(self) -> None:
        """Refuse a cluster without room for one copy of every expert.

        Raises:
            InputError: saying how many bytes are missing, and on what.
        """
        _, layers, experts = self.shape
        needed, room = int(self.expert_bytes.sum()) * experts, int(self.usable_bytes.sum())
        if room < needed:
            rooms = np.add.reduceat(self.usable_bytes, self.first_device)
            where = ", ".join(f"{name} {format_bytes(size)}" for name, size in zip(self.names, rooms, strict=True))
            raise InputError(
                f"{self.source}: {needed - room} bytes are missing for one copy of every expert: {layers} x {experts} "
                f"experts take {needed} bytes, whole experts beside what is reserved have room in {room} "
                f"({show(where, 200)}); add memory or devices"
            )
