"""Replanning while a simulation runs: what has been seen, whether a move pays, and how weights travel. Holds no clock."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from placement.data.problem import Problem, Tokens
from placement.migration.decide import Policy, Verdict, objection, weigh
from placement.simulation.independent.unit_costs import Compute, Steps, ports

DECAY = 0.5  # what counts keep of their weight from one interval to the next
Planner = Callable[[Problem, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Replan:
    """When and how the placement is revised.

    Attributes:
        planner: problem and resident bool [D, L, E] in force -> the next one.
        load_bandwidth: bytes/s from each device's storage, float64 [D].
        policy: when a revision is due and what it has to save, the runtime's rule; its strategy and bandwidth are not used.
        always: adopt every plan, whether it pays or not.
    """

    planner: Planner
    load_bandwidth: np.ndarray
    policy: Policy = field(default_factory=lambda: Policy(interval=300.0))
    always: bool = False


@dataclass(frozen=True, eq=False)
class Load:
    """Weights that one server takes in.

    Attributes:
        total_bytes: all of them.
        disk_seconds: reading from its own storage, its devices at the same time.
        link_bytes: from each other server, float64 [N].
        link_seconds: for these, on idle links.
        resource: ports and links used, as `Steps` numbers them, int64 [entries].
        resource_seconds: for how long each is needed, float64 [entries].
    """

    total_bytes: int
    disk_seconds: float
    link_bytes: np.ndarray
    link_seconds: float
    resource: np.ndarray
    resource_seconds: np.ndarray


def trade_places(problem: Problem) -> Problem:
    """The workload after a shift: what entered at server n + 1 now enters at n, and the first server's at the last."""
    servers = len(problem.names)
    tokens = problem.tokens
    if tokens is not None:
        tokens = Tokens(tokens.ids, (tokens.server - 1) % servers, tokens.sequence)
    return replace(problem, frequency=np.roll(problem.frequency, -1, axis=0), tokens=tokens)


def observe(workloads: list[Problem], seen: np.ndarray) -> Problem:
    """The problem as statistics show it, when each server has served tokens of several workloads.

    Counts are the expected ones of the tokens served. Of the recorded tokens of a workload each server keeps an evenly
    spaced part, in proportion to what it has served of it.

    Args:
        workloads: the same cluster under each workload.
        seen: tokens served of each workload at each server, float64 [workloads, N].
    """
    weight = [s[:, None, None] * w.demand for s, w in zip(seen, workloads, strict=True)]
    frequency = np.sum(weight, axis=0)
    frequency *= frequency.shape[1] / max(frequency.sum(), 1e-300)
    share = seen / np.maximum(seen.max(0), 1e-300)
    parts = []
    for part, workload in zip(share, workloads, strict=True):
        if workload.tokens is None:
            return replace(workload, frequency=frequency, tokens=None)
        source = workload.tokens.server
        order = np.argsort(source, kind="stable")
        count = np.bincount(source, minlength=len(part))
        rank = np.empty(len(source), np.int64)
        rank[order] = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
        wanted = part[source]
        keep = np.floor((rank + 1) * wanted) > np.floor(rank * wanted)
        tokens = workload.tokens
        parts.append((tokens.ids[keep], source[keep], tokens.sequence[keep]))
    joined = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return replace(workloads[0], frequency=frequency, tokens=Tokens(*joined))


def loads(problem: Problem, old: np.ndarray, new: np.ndarray, load_bandwidth: np.ndarray) -> list[Load]:
    """What each server takes in to get from one placement to another, each expert by its faster way.

    A device's storage is read by that device alone; from other servers weights come over the fastest link from a
    holder.

    Args:
        old: bool [D, L, E] in force.
        new: bool [D, L, E] to come.
        load_bandwidth: bytes/s from each device's storage, float64 [D].

    Returns:
        One entry per server, [N].
    """
    held, servers = problem.held(old), len(problem.names)
    port_out, port_in, slow = ports(problem)
    result = []
    for n in range(servers):
        disk, link, total = [0.0], np.zeros(servers), 0
        rate = np.where(np.arange(servers) == n, 0.0, problem.bandwidth[:, n])
        for device in np.flatnonzero(problem.device_server == n):
            layer, expert = np.nonzero(new[device] & ~old[device])
            size = problem.expert_bytes[layer]
            reach = held[:, layer, expert] * rate[:, None]
            by_link = reach.max(0) > load_bandwidth[device]
            link += np.bincount(reach.argmax(0)[by_link], size[by_link], servers)
            disk.append(float(size[~by_link].sum() / load_bandwidth[device]))
            total += int(size.sum())
        used = {2 * servers + n: link.sum() / port_in[n]} if link.any() else {}
        for m in np.flatnonzero(link):
            used[servers + int(m)] = link[m] / port_out[m]
            if (int(m), n) in slow:
                used[slow[int(m), n]] = link[m] / rate[m]
        seconds = np.array(list(used.values()), np.float64)
        resource = np.array(list(used), np.int64)
        result.append(Load(total, max(disk), link, float(seconds.max(initial=0.0)), resource, seconds))
    return result


@dataclass(frozen=True, eq=False)
class Weighed:
    """A plan against what is in force.

    Attributes:
        load: what each server takes in, [N].
        transfer_seconds: until the last one has it.
        verdict: what it saves and costs, in seconds of a server.
        objection: why not to migrate, or "".
    """

    load: list[Load]
    transfer_seconds: float
    verdict: Verdict
    objection: str

    @property
    def bytes(self) -> int:
        return sum(part.total_bytes for part in self.load)


def weigh_plan(
    seen: Problem,
    old: np.ndarray,
    new: np.ndarray,
    lengths: np.ndarray,
    rate: np.ndarray,
    compute: Compute,
    replan: Replan,
) -> Weighed:
    """Does a move pay by the runtime's rule (`migration.decide`)? Its unit of serving is a request.

    Args:
        seen: the workload as statistics show it.
        old: bool [D, L, E] in force.
        new: bool [D, L, E], the plan.
        lengths: mean prompt and output tokens, [2].
        rate: requests per second at each server, float64 [N].
        compute: speed of the devices.
        replan: the policy, and how fast weights come from storage.
    """
    load = loads(seen, old, new, replan.load_bandwidth)
    transfer = max(part.disk_seconds + part.link_seconds for part in load)
    share = rate / max(rate.sum(), 1e-300)
    step, planned = (
        sum(part * request_seconds(steps, n, lengths) for n, part in enumerate(share))
        for steps in (Steps.build(seen, resident, compute) for resident in (old, new))
    )
    rounds = int(any(part.total_bytes for part in load))
    verdict = weigh(replan.policy, step, planned, float(rate.mean()), transfer, rounds)
    return Weighed(load, transfer, verdict, objection(replan.policy, verdict, step, planned))


def request_seconds(steps: Steps, server: int, lengths: np.ndarray) -> float:
    """Seconds of one request on an idle cluster; lengths: prompt and output tokens, [2]."""
    prompt, output = float(lengths[0]), float(lengths[1])
    prefill = steps.alone(server, np.array([prompt, 0.0, 0.0]))
    return prefill + (output - 1.0) * steps.alone(server, np.array([0.0, 1.0, 1.0]))
