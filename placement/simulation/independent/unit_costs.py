"""How long one step of a server uses ports, links and devices under a placement. Holds no clock and no queue."""

from dataclasses import dataclass

import numpy as np

from placement.costs.network_use import NetworkUse, network_use
from placement.costs.routing import serving_server
from placement.data.problem import VALUE_BYTES, Problem

DENSE, OUT, EXPERTS, BACK = range(4)  # the groups of a step, one after the other in every layer
PROMPT, DECODED, STEP = range(3)  # the units of work: a prompt token, a decoded token, a decode step


@dataclass(frozen=True)
class Compute:
    """Seconds of computing on one device of speed 1.0, all layers together.

    Attributes:
        prefill_token: per prompt token.
        expert_share: the part of `prefill_token` spent in experts, done where the copies are.
        decode_step: per decode step, whatever the number of sequences: attention, shared weights, launching.
        decode_token: per sequence and decode step, in experts.
    """

    prefill_token: float
    expert_share: float
    decode_step: float
    decode_token: float

    @classmethod
    def roofline(
        cls,
        problem: Problem,
        flops: float = 50e12,
        memory: float = 500e9,
        launch: float = 0.5e-3,
        dense_bytes: float | None = None,
    ) -> "Compute":
        """From a device's rates: prefill is bound by arithmetic, decode by reading weights.

        With two bytes and two operations per weight and token, bytes of weights are also operations per token.

        Args:
            problem: gives the bytes of the top_k experts that a token uses per layer.
            flops: operations per second that a device of speed 1.0 reaches.
            memory: bytes of weights per second that it reads.
            launch: seconds per layer and decode step for starting work.
            dense_bytes: weights outside the experts; None takes as many bytes as a token uses in experts.
        """
        active = float(problem.top_k * problem.expert_bytes.sum())
        dense = active if dense_bytes is None else dense_bytes
        total = max(active + dense, 1.0)
        step = dense / memory + launch * problem.shape[1]
        return cls(total / flops, active / total, step, active / memory)


@dataclass(frozen=True, eq=False)
class Steps:
    """Unit costs of one placement. Work comes in three units: a prompt token, a decoded token, a decode step.

    A step of a server runs through its groups in order: dense work at home, sending, experts, receiving. A group lasts
    `base`; where others use the same resources, it lasts as much longer as its most delayed resource. Resources are
    each server's devices taken together, 0..N-1, its port out, N..2N-1, its port in, 2N..3N-1, and links slower than
    the ports they join, from 3N. Entries say which group uses how much of which resource, in order of groups.

    Attributes:
        unit: seconds of each entry per unit, float64 [3, entries].
        resource: of each entry, int64 [entries].
        group: of each entry, int64 [entries], ascending; group g of server n is 4 n + g.
        base: seconds of each group per unit, float64 [3, 4 N].
        link_bytes: from row to column per token that entered at a server, there and back: float64 [N source, N, N] as
            two parts, `bytes_out` [N, N] from the source to others; what comes back is its transpose.
        device_seconds: computing on each device per unit, float64 [3, N source, D].
        use: how often tokens need which exchange.
        resources: number of resources.
    """

    unit: np.ndarray
    resource: np.ndarray
    group: np.ndarray
    base: np.ndarray
    bytes_out: np.ndarray
    device_seconds: np.ndarray
    use: NetworkUse
    resources: int

    def waiting(self, server: int, tokens: float) -> float:
        """Expected seconds of exchange latency of one step with so many tokens, over all layers.

        sum_l E[max over exchanges of alpha_nm] with alpha_nm the round trip of the pair; an exchange takes place where
        at least one token needs it.
        """
        return float(self.use.of(server).waiting(tokens=tokens).sum())

    def alone(self, server: int, amount: np.ndarray) -> float:
        """Seconds of a step on an idle cluster; amount of each unit, float64 [3]."""
        groups = slice(4 * server, 4 * server + 4)
        return float((amount @ self.base[:, groups]).sum() + self.waiting(server, amount[:2].sum()))

    @classmethod
    def build(cls, problem: Problem, resident: np.ndarray, compute: Compute) -> "Steps":
        """Derive the unit costs.

        Args:
            problem: the workload that runs: token-level sets where a server has them, else counts with experts taken
                as independent (`network_use`). A server without any wants what the others want.
            resident: bool [D, L, E], every expert resident somewhere.
            compute: speed of the devices.
        """
        serving = serving_server(problem, problem.held(resident))
        use = network_use(problem, serving)
        calls = _device_calls(problem, resident, serving)
        volume = use.pairs * (problem.hidden_size * VALUE_BYTES)
        entries, base, resources = _entries(problem, volume, calls, compute)
        return cls(
            unit=np.array([entry[2:] for entry in entries]).T,
            resource=np.array([entry[1] for entry in entries], np.int64),
            group=np.array([entry[0] for entry in entries], np.int64),
            base=base,
            bytes_out=volume.sum(1),
            device_seconds=_device_seconds(problem, calls, compute),
            use=use,
            resources=resources,
        )


def _device_calls(problem: Problem, resident: np.ndarray, serving: np.ndarray) -> np.ndarray:
    """Expert calls that a token of each source makes to each device, float64 [N, L, D]; copies in a server share."""
    copies = np.add.reduceat(resident.astype(np.int64), problem.first_device, axis=0)
    weight = problem.top_k * problem.demand
    calls = np.zeros((*problem.shape[:2], len(resident)))
    for device, server in enumerate(problem.device_server):
        part = resident[device] / np.maximum(copies[server], 1)
        for layer in range(problem.shape[1]):
            here = np.flatnonzero(resident[device, layer])
            wanted = weight[:, layer, here] * (serving[:, layer, here] == server)
            calls[:, layer, device] = wanted @ part[layer, here]
    return calls


def _layer_seconds(problem: Problem, compute: Compute) -> tuple[np.ndarray, float]:
    """Seconds of one expert call of each layer per unit, float64 [3, L], and the dense part of a prompt token."""
    share = problem.expert_bytes / problem.expert_bytes.sum() / problem.top_k
    expert = compute.prefill_token * compute.expert_share
    return np.stack([expert * share, compute.decode_token * share, 0 * share]), compute.prefill_token - expert


def _dense(problem: Problem, compute: Compute) -> np.ndarray:
    """Dense seconds per unit at each server, its devices sharing tokens and every one reading the weights: [3, N]."""
    speed = np.add.reduceat(problem.speed, problem.first_device)
    slowest = np.minimum.reduceat(problem.speed, problem.first_device)
    token = _layer_seconds(problem, compute)[1]
    return np.stack([token / speed, 0.0 * speed, compute.decode_step / slowest])


def _device_seconds(problem: Problem, calls: np.ndarray, compute: Compute) -> np.ndarray:
    seconds, _ = _layer_seconds(problem, compute)
    busy = np.einsum("ul,nld->und", seconds, calls) / problem.speed
    dense = _dense(problem, compute)
    for device, server in enumerate(problem.device_server):
        busy[:, server, device] += dense[:, server]
    return busy


def _entries(
    problem: Problem, volume: np.ndarray, calls: np.ndarray, compute: Compute
) -> tuple[list[tuple[float, ...]], np.ndarray, int]:
    """Entries (group, resource, seconds per prompt token, per decoded token, per step), bases [3, 4 N], resources."""
    servers = len(problem.names)
    port_out, port_in, slow = ports(problem)
    seconds, _ = _layer_seconds(problem, compute)
    # A layer waits for the busiest device of each server, and for the slowest server.
    busiest = np.maximum.reduceat(calls / problem.speed, problem.first_device, axis=2)
    base = np.zeros((3, servers, 4))
    base[..., DENSE] = _dense(problem, compute)
    base[..., EXPERTS] = np.einsum("ul,nl->un", seconds, busiest.max(-1))
    total = volume.sum(-1)
    for group, rate, port in ((OUT, problem.bandwidth, port_out), (BACK, problem.bandwidth.T, port_in)):
        base[:2, :, group] = np.maximum((volume / rate[:, None]).max(-1), total / port[:, None]).sum(-1)
    expert = np.einsum("ul,nlm->unm", seconds, busiest)
    sent = volume.sum(1)
    entries: list[tuple[float, ...]] = []
    for n in range(servers):
        partners = np.flatnonzero(sent[n])
        entries.append((4 * n + DENSE, n, *base[:, n, DENSE]))
        for group, own, own_port, far, far_port in (
            (OUT, servers + n, port_out, 2 * servers, port_in),
            (BACK, 2 * servers + n, port_in, servers, port_out),
        ):
            if group == BACK:
                for m in sorted({n, *np.flatnonzero(expert[0, n] + expert[1, n])}):
                    entries.append((4 * n + EXPERTS, int(m), *expert[:, n, m].tolist()))
            used = [(own, sent[n].sum() / own_port[n])]
            for m in partners.tolist():
                used.append((far + m, sent[n, m] / far_port[m]))
                pair = (n, m) if group == OUT else (m, n)
                if pair in slow:
                    used.append((slow[pair], sent[n, m] / problem.bandwidth[pair]))
            entries.extend((4 * n + group, resource, s, s, 0.0) for resource, s in used)
    return entries, base.reshape(3, -1), 3 * servers + len(slow)


def ports(problem: Problem) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, int], int]]:
    """Bytes/s of each server's port out and in, as fast as its fastest link, and resources of links slower than both.

    Returns:
        float64 [N], float64 [N], and resource by (from, to).
    """
    servers = len(problem.names)
    if servers == 1:
        return np.full(1, np.inf), np.full(1, np.inf), {}
    finite = np.where(np.eye(servers, dtype=bool), 0.0, problem.bandwidth)
    port_out, port_in = finite.max(1), finite.max(0)
    slow = np.argwhere((finite > 0) & (finite < np.minimum(port_out[:, None], port_in)))
    return port_out, port_in, {(int(n), int(m)): 3 * servers + i for i, (n, m) in enumerate(slow)}
