"""How long one step of a server uses ports, links and devices under a placement. Holds no clock and no queue."""

from dataclasses import dataclass

import numpy as np

from placement.costs.computing import longest_alone
from placement.costs.hosting import Hops, at_home, moved_bytes, moved_seconds, seen_from_hosts
from placement.costs.network_use import NetworkUse, network_use
from placement.costs.routing import serving_server
from placement.costs.token_sets import token_sets
from placement.data.problem import Problem

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
    `base`; where others use the same resources, it lasts as much longer as its most delayed resource. Only the dense group
    uses several resources one after the other, where layers are hosted elsewhere: each host's devices, and a port for each
    hop, the one that most of its sources share. Resources are
    each server's devices taken together, 0..N-1, its port out, N..2N-1, its port in, 2N..3N-1, and links slower than
    the ports they join, from 3N. Entries say which group uses how much of which resource, in order of groups.

    Attributes:
        unit: seconds of each entry per unit, float64 [3, entries].
        resource: of each entry, int64 [entries].
        group: of each entry, int64 [entries], ascending; group g of server n is 4 n + g.
        base: seconds of each group per unit, float64 [3, 4 N].
        sent: bytes per token that entered at a server, as (source, from, to) int64 [3, sends] and `sent_bytes` float64
            [2, sends], of prompts and decoded; some pairs of servers occur more than once.
        device_seconds: computing on each device per unit, float64 [3, N source, D].
        use: how often tokens need which exchange.
        hop_seconds: waiting of a step for its hops from host to host, float64 [N].
        resources: number of resources.
    """

    unit: np.ndarray
    resource: np.ndarray
    group: np.ndarray
    base: np.ndarray
    sent: np.ndarray
    sent_bytes: np.ndarray
    device_seconds: np.ndarray
    use: NetworkUse
    hop_seconds: np.ndarray
    resources: int

    def waiting(self, server: int, tokens: float) -> float:
        """Expected seconds of exchange latency of one step with so many tokens, over all layers.

        sum_l E[max over exchanges of alpha_nm] with alpha_nm the round trip of the pair; an exchange takes place where
        at least one token needs it.
        """
        return float(self.use.of(server).waiting(tokens=tokens).sum() + self.hop_seconds[server])

    def link_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes from row to column, [N, N], of so many prompt and decoded tokens that entered at each server, [N, 2]."""
        servers = len(tokens)
        pair = self.sent[1] * servers + self.sent[2]
        size = (tokens.T[:, self.sent[0]] * self.sent_bytes).sum(0)
        sent = np.bincount(pair, size, minlength=servers * servers)
        return sent.reshape(servers, servers)

    def alone(self, server: int, amount: np.ndarray) -> float:
        """Seconds of a step on an idle cluster; amount of each unit, float64 [3]."""
        groups = slice(4 * server, 4 * server + 4)
        return float((amount @ self.base[:, groups]).sum() + self.waiting(server, amount[:2].sum()))

    @classmethod
    def build(cls, problem: Problem, resident: np.ndarray, compute: Compute, host: np.ndarray | None = None) -> "Steps":
        """Derive the unit costs.

        Args:
            problem: the workload that runs: token-level sets where a server has them, else counts with experts taken
                as independent (`network_use`). A server without any wants what the others want.
            resident: bool [D, L, E], every expert resident somewhere.
            compute: speed of the devices.
            host: who hosts each source's layers, int [N, L]; None is at home.
        """
        serving = seen_from_hosts(serving_server(problem, problem.held(resident)), host)
        use, hops = network_use(problem, serving, host), Hops.of(problem, host)
        calls = _device_calls(problem, resident, serving)
        where = at_home(problem) if host is None else host
        dense = _dense(problem, compute, where)
        entries, base, resources = _entries(problem, use.pairs, calls, compute, where, dense, hops)
        base += _excess(problem, resident, serving, calls, compute, use.pairs if len(hops.source) else None)
        sent, sent_bytes = _sends(problem, use.pairs, where, hops)
        return cls(
            unit=np.array([entry[2:] for entry in entries]).T,
            resource=np.array([entry[1] for entry in entries], np.int64),
            group=np.array([entry[0] for entry in entries], np.int64),
            base=base,
            sent=sent,
            sent_bytes=sent_bytes,
            device_seconds=_device_seconds(problem, calls, compute, dense),
            use=use,
            hop_seconds=hops.waiting(problem),
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


def _dense(problem: Problem, compute: Compute, host: np.ndarray) -> np.ndarray:
    """Dense seconds per unit of each source at each server, [3, N source, N]: each layer is its host's.

    A server's devices share tokens, and every one reads the weights.
    """
    servers, layers, _ = problem.shape
    speed = np.add.reduceat(problem.speed, problem.first_device)
    slowest = np.minimum.reduceat(problem.speed, problem.first_device)
    token = _layer_seconds(problem, compute)[1]
    whole = np.stack([token / speed, 0.0 * speed, compute.decode_step / slowest])
    part = np.zeros((servers, servers))
    np.add.at(part, (np.arange(servers)[:, None], host), 1.0 / layers)
    return whole[:, None] * part


def _device_seconds(problem: Problem, calls: np.ndarray, compute: Compute, dense: np.ndarray) -> np.ndarray:
    seconds, _ = _layer_seconds(problem, compute)
    busy = np.einsum("ul,nld->und", seconds, calls) / problem.speed
    return busy + dense[..., problem.device_server]


def _excess(
    problem: Problem,
    resident: np.ndarray,
    serving: np.ndarray,
    calls: np.ndarray,
    compute: Compute,
    pairs: np.ndarray | None,
) -> np.ndarray:
    """What a decode step's experts take beyond the mean of the busiest device, float64 [3, 4 N], waiting for the longest.

    A token alone waits for the device with most of its experts; each further token of a step adds the mean. `pairs` is given
    where layers have hosts: those that send nothing belong to what the hosts do one after the other.
    """
    seconds, _ = _layer_seconds(problem, compute)
    mean = np.maximum.reduceat(calls / problem.speed, problem.first_device, axis=2).max(-1)
    active = np.bincount(token_sets(problem).source, minlength=len(problem.names)) > 0
    more = np.where(active[:, None], np.maximum(longest_alone(problem, resident, serving) - mean, 0.0), 0.0)
    more = more * seconds[DECODED]
    apart = np.zeros(more.shape, bool) if pairs is None else pairs.sum(-1) == 0
    base = np.zeros((3, len(more), 4))
    base[STEP, :, EXPERTS], base[STEP, :, DENSE] = (more * ~apart).sum(-1), (more * apart).sum(-1)
    return base.reshape(3, -1)


def _sends(problem: Problem, pairs: np.ndarray, host: np.ndarray, hops: Hops) -> tuple[np.ndarray, np.ndarray]:
    """What a token of each source sends where, as `Steps.sent` and `Steps.sent_bytes`."""
    source, layer, partner = np.nonzero(pairs)
    at, number = host[source, layer], pairs[source, layer, partner]
    size = np.concatenate([number * problem.row_bytes, number * problem.sum_bytes])
    row = np.stack([~hops.home, np.ones(len(hops.home))]) * moved_bytes(problem)
    ways = ((source, at, partner), (source, partner, at), (hops.source, hops.start, hops.end))
    sent = np.concatenate([np.array(way, np.int64).reshape(3, -1) for way in ways], axis=1)
    return sent, np.concatenate([np.broadcast_to(size, (2, len(size))), row], axis=1)


def _entries(
    problem: Problem,
    pairs: np.ndarray,
    calls: np.ndarray,
    compute: Compute,
    host: np.ndarray,
    dense: np.ndarray,
    hops: Hops,
) -> tuple[list[tuple[float, ...]], np.ndarray, int]:
    """Entries (group, resource, seconds per prompt token, per decoded token, per step), bases [3, 4 N], resources."""
    servers = len(problem.names)
    port_out, port_in, slow = ports(problem)
    seconds, _ = _layer_seconds(problem, compute)
    # A layer waits for the busiest device of each server, and for the slowest server.
    busiest = np.maximum.reduceat(calls / problem.speed, problem.first_device, axis=2)
    moving = _hop_entries(problem, hops, port_out, port_in, slow)
    if len(hops.source):  # a hosted layer that needs nobody else is part of what the hosts do one after the other
        alone = pairs.sum(-1) == 0
        dense, busiest = (
            dense + np.einsum("ul,nlm->unm", seconds, busiest * alone[..., None]),
            busiest * ~alone[..., None],
        )
    base = np.zeros((3, servers, 4))
    base[..., DENSE] = dense.sum(-1)
    base[..., DENSE] += np.array([sum(own.values(), np.zeros(3)) for own in moving]).T
    base[..., EXPERTS] = np.einsum("ul,nl->un", seconds, busiest.max(-1))
    row, back = problem.row_bytes, problem.sum_bytes
    for group, size, rate, port in (
        (OUT, row, problem.bandwidth, port_out),
        (BACK, back, problem.bandwidth.T, port_in),
    ):
        slowest = size * np.maximum((pairs / rate[host]).max(-1), pairs.sum(-1) / port[host])
        base[:2, :, group] = slowest.sum(-1)
    expert = np.einsum("ul,nlm->unm", seconds, busiest)
    entries: list[tuple[float, ...]] = []
    for n in range(servers):
        entries += [(4 * n + DENSE, int(m), *dense[:, n, m].tolist()) for m in np.unique(host[n])]
        entries += [(4 * n + DENSE, r, *s.tolist()) for r, s in moving[n].items()]
        sent = np.zeros((servers, servers))
        np.add.at(sent, host[n], pairs[n])  # rows of the source's tokens, from host to partner
        for group in (OUT, BACK):
            if group == BACK:
                for m in sorted({n, *np.flatnonzero(expert[0, n] + expert[1, n])}):
                    entries.append((4 * n + EXPERTS, int(m), *expert[:, n, m].tolist()))
            used = _port_seconds(problem, row * sent if group == OUT else back * sent.T, port_out, port_in, slow)
            own = (servers if group == OUT else 2 * servers) + n
            entries.extend((4 * n + group, r, s, s, 0.0) for r, s in (used or {own: 0.0}).items())
    return entries, base.reshape(3, -1), 3 * servers + len(slow)


def _port_seconds(
    problem: Problem, sent: np.ndarray, port_out: np.ndarray, port_in: np.ndarray, slow: dict[tuple[int, int], int]
) -> dict[int, float]:
    """Seconds for which bytes from row to column, [N, N], keep each port and slow link that they use."""
    servers = len(sent)
    used: dict[int, float] = {}
    for n in np.flatnonzero(sent.any(1)).tolist():
        used[servers + n] = float(sent[n].sum() / port_out[n])
    for m in np.flatnonzero(sent.any(0)).tolist():
        used[2 * servers + m] = float(sent[:, m].sum() / port_in[m])
    for pair in zip(*(axis.tolist() for axis in sent.nonzero()), strict=True):
        if pair in slow:
            used[slow[pair]] = float(sent[pair] / problem.bandwidth[pair])
    return used


def _hop_entries(
    problem: Problem, hops: Hops, port_out: np.ndarray, port_in: np.ndarray, slow: dict[tuple[int, int], int]
) -> list[dict[int, np.ndarray]]:
    """Seconds of hops at the ports or slow links that they wait for, by resource, [3] units; one table a source."""
    servers = len(problem.names)
    found: list[dict[int, np.ndarray]] = [{} for _ in range(servers)]
    every = (hops.source, hops.start, hops.end, hops.home)
    for source, start, end, home in zip(*(values.tolist() for values in every), strict=True):
        seconds = moved_seconds(problem)[start, end] * np.array([not home, 1.0, 0.0])
        # What leaves home meets others at the first host's port, what comes later at its host's own.
        resource = slow.get((start, end), 2 * servers + end if start == source else servers + start)
        found[source][resource] = found[source].get(resource, 0.0) + seconds
    return found


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
