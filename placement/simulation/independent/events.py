"""Event-driven simulation of requests on a cluster: how long they take under a placement. Plans nothing itself.

Modelled: every server runs its own loop, as engines do that are not in lock-step, one step after the other: a chunk of the
prompt that waits longest, or a decode step of all its sequences, up to `batch` of them; where both are wanted they take
turns, by the rule of this project's engine (`placement.scheduling`; `simulation.lockstep` simulates it whole). A step is
dense work at home, an exchange with the servers it needs (latency where any token needs one, bytes per token and server),
experts on the devices that hold the copies, and the way back. Servers share each other's devices, the ports out of and
into each server, and links slower than those ports. Sharing is processor sharing in the mean: a step finds at every
resource the other servers' steps with the share of time that they spend there (approximate mean value analysis of a closed
network, Schweitzer 1979, one customer per server), solved again whenever any server starts something else (beyond 16
servers after every N/16 such changes, in between for the changed server alone). Between events rates are constant, so a
decode of many tokens costs one event. Migrations read storage or use links as one more customer, and stall every server
when they take over.

Not modelled: variance between steps of one kind (a step takes its expectation), overlap of exchange and computing,
experts shared by sequences of one decode step, memory of the KV cache, packet loss, and lock-step between servers.
"""

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.data.arrivals import Arrivals
from placement.data.problem import Problem
from placement.migration.decide import Confirmation
from placement.scheduling import Kind, next_kind
from placement.simulation.independent.contention import Customers
from placement.simulation.independent.replan import DECAY, Load, Replan, observe, trade_places, weigh_plan
from placement.simulation.independent.unit_costs import DECODED, PROMPT, STEP, Compute, Steps, ports

_IDLE, _PREFILL, _DECODE = range(3)


@dataclass(frozen=True, eq=False)
class Simulation:
    """What happened to R requests.

    Attributes:
        latency: from arrival to the last token, float64 [R] seconds.
        first_token: from arrival to the first token, float64 [R] seconds.
        seconds: from time 0 to the last event.
        link_bytes: sent from row to column, activations and migrated weights, float64 [N, N].
        link_utilisation: share of the time for which the link's bytes keep it busy, float64 [N, N].
        port_utilisation: the same for all bytes out of and into a server, float64 [2, N].
        device_utilisation: share of the time in which each device computes, float64 [D].
        migrations: per revision `seconds` (when), `adopted`, `why` (not), `bytes`, `transfer_seconds`, `gain_seconds`.
        events: events handled.
    """

    latency: np.ndarray
    first_token: np.ndarray
    seconds: float
    link_bytes: np.ndarray
    link_utilisation: np.ndarray
    port_utilisation: np.ndarray
    device_utilisation: np.ndarray
    migrations: list[dict[str, Any]]
    events: int

    def summary(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Figures as JSON takes them; names of the servers, [N]."""
        p50, p95, p99 = np.percentile(self.latency, [50, 95, 99]).tolist()
        pairs = [(n, m) for n in range(len(names)) for m in range(len(names)) if n != m]
        return {
            "requests": len(self.latency),
            "latency": {"mean": float(self.latency.mean()), "p50": p50, "p95": p95, "p99": p99},
            "first_token": float(self.first_token.mean()),
            "seconds": self.seconds,
            "bytes": float(self.link_bytes.sum()),
            "link_bytes": {f"{names[n]} -> {names[m]}": float(self.link_bytes[n, m]) for n, m in pairs},
            "link_utilisation": {f"{names[n]} -> {names[m]}": float(self.link_utilisation[n, m]) for n, m in pairs},
            "port_utilisation": float(self.port_utilisation.max()),
            "device_utilisation": self.device_utilisation.tolist(),
            "migrations": self.migrations,
        }


def simulate(
    problem: Problem,
    resident: np.ndarray,
    arrivals: Arrivals,
    compute: Compute | None = None,
    *,
    batch: int = 32,
    chunk: int | None = None,
    shift: float | None = None,
    replan: Replan | None = None,
    steps: Steps | None = None,
    host: np.ndarray | None = None,
) -> Simulation:
    """Serve all requests; deterministic.

    Args:
        problem: the cluster and the workload that runs on it.
        resident: the placement to begin with, bool [D, L, E], every expert resident somewhere.
        arrivals: R requests.
        compute: speed of the devices; None takes `Compute.roofline`.
        batch: sequences that a server decodes together at most; further requests wait.
        chunk: prompt tokens of a step at most; None: the whole prompt.
        shift: seconds after which the servers' workloads trade places.
        replan: revise the placement while serving.
        steps: `Steps.build(problem, resident, compute, host)`, where the caller has it already.
        host: who hosts each source's layers, int [N, L], now and after migrations; None is at home.
    """
    compute = compute or Compute.roofline(problem)
    steps = steps or Steps.build(problem, resident, compute, host)
    run = _Run(problem, resident, arrivals, compute, (batch, chunk or 2**62), shift, replan, steps, host)
    run.serve()
    elapsed = max(run.now, 1e-12)
    rate = np.where(np.eye(len(problem.names), dtype=bool), np.inf, problem.bandwidth)
    out, into = run.link_bytes.sum(1) / run.port_out, run.link_bytes.sum(0) / run.port_in
    return Simulation(
        latency=run.finished - arrivals.seconds,
        first_token=run.first - arrivals.seconds,
        seconds=run.now,
        link_bytes=run.link_bytes,
        link_utilisation=run.link_bytes / rate / elapsed,
        port_utilisation=np.stack([out, into]) / elapsed,
        device_utilisation=run.device_busy / elapsed,
        migrations=run.migrations,
        events=run.events,
    )


class _Run:
    """State of one simulation. Rows 0..N-1 are the servers' loops, rows N..2N-1 what they load while migrating."""

    def __init__(
        self,
        problem: Problem,
        resident: np.ndarray,
        arrivals: Arrivals,
        compute: Compute,
        most: tuple[int, int],
        shift: float | None,
        replan: Replan | None,
        steps: Steps,
        host: np.ndarray | None,
    ) -> None:
        servers = self.servers = len(problem.names)
        self.arrivals, self.compute, self.replan, self.host = arrivals, compute, replan, host
        self.batch, self.chunk = most  # sequences of a server, prompt tokens of a step
        self.workloads, self.current, self.resident = [problem], 0, resident
        self.port_out, self.port_in, _ = ports(problem)
        self.now, self.resume, self.events = 0.0, 0.0, 0
        self.shift = np.inf if shift is None else shift
        self.revise = np.inf if replan is None else replan.policy.interval
        self.plan: np.ndarray | None = None  # on its way
        self.waiting: Confirmation[np.ndarray] = Confirmation()
        self.left = np.full(2 * servers, np.inf)  # units until a row's next event
        self.amount = np.zeros((servers, 3))  # units of work in one unit of a row
        self.doing = [_IDLE] * servers
        self.last: list[Kind | None] = [None] * servers  # kind of the step before
        self.request = [-1] * servers  # being prefilled, with tokens of its prompt that have not been through a step
        self.prompt_left = [0] * servers
        self.steps_done = np.zeros(servers)
        self.queue: list[deque[int]] = [deque() for _ in range(servers)]
        self.decoding: list[list[tuple[float, int]]] = [[] for _ in range(servers)]  # (last step, request)
        self.first, self.finished = (np.zeros(len(arrivals)) for _ in range(2))
        self.work = np.zeros((servers, 3))  # units done since the last `_account`
        self.seen, self.since_revision = np.zeros((2, servers)), np.zeros((2, servers))
        self.link_bytes, self.device_busy = np.zeros((servers, servers)), np.zeros(len(resident))
        self.migrations: list[dict[str, Any]] = []
        self.load: list[Load] = []
        self._use(steps)

    def serve(self) -> None:
        """Handle events until every request is finished."""
        arrivals, servers = self.arrivals, self.servers
        times, entry = [*arrivals.seconds.tolist(), np.inf], arrivals.server.tolist()
        coming, unfinished = 0, len(arrivals)
        while unfinished:
            row, due = self._next_row()
            at = min(due, times[coming], self.shift, self.revise, self.resume if self.resume > self.now else np.inf)
            self._advance(at - self.now)
            self.now = at
            self.events += 1
            if at == self.shift:
                self._shift()
            elif at == self.revise:
                self._revise()
            elif at == times[coming]:
                server = entry[coming]
                self.queue[server].append(coming)
                coming += 1
                if self.doing[server] == _IDLE:
                    self._next_step(server)
                elif self.doing[server] == _DECODE:  # after the step that it is in
                    done = self.steps_done[server]
                    self.left[server] = min(self.left[server], max(0.0, np.ceil(done - 1e-6) - done))
                    self.stale = True
            elif at < due:
                self.stale = True  # the stall is over
            elif row >= servers:
                self._loaded(row)
            else:
                unfinished -= self._finish_step(row)
        self._account()

    def _next_row(self) -> tuple[int, float]:
        """The row whose step ends first, and when."""
        if self.stale:
            self.seconds = self.customers.refresh()
            self.stale = False
        remaining = self.left * np.where(self.left < np.inf, self.seconds, 1.0)
        if self.resume > self.now:
            remaining[: self.servers] = np.inf
        row = int(remaining.argmin())
        return row, self.now + max(float(remaining[row]), 0.0)

    def _advance(self, seconds: float) -> None:
        busy = self.left < np.inf
        if self.resume > self.now:
            busy[: self.servers] = False
        units = np.where(busy, seconds / np.where(busy, np.maximum(self.seconds, 1e-300), 1.0), 0.0)
        units = np.minimum(units, np.where(busy, np.maximum(self.left, 0.0), 0.0))
        self.left -= units
        units = units[: self.servers]
        self.work += units[:, None] * self.amount
        self.steps_done += units * self.amount[:, STEP]

    def _next_step(self, server: int) -> None:
        """Let a server begin what is next for it: a chunk of the oldest prompt, or decode steps of all its sequences."""
        amount, decoding = np.zeros(3), self.decoding[server]
        if self.request[server] < 0 and self.queue[server] and len(decoding) < self.batch:
            self.request[server] = self.queue[server].popleft()
            self.prompt_left[server] = int(self.arrivals.prompt[self.request[server]])
        prompt = self.request[server] >= 0
        kind = self.last[server] = next_kind(self.last[server], prompt, bool(decoding))
        if kind == "prefill":
            self.doing[server], self.left[server] = _PREFILL, 1.0
            amount[PROMPT] = min(self.chunk, self.prompt_left[server])
        elif kind == "decode":  # one step where a prompt waits for its turn, else until a sequence ends
            left = decoding[0][0] - self.steps_done[server]
            self.doing[server], self.left[server] = _DECODE, min(left, 1.0) if prompt else left
            amount[DECODED], amount[STEP] = len(decoding), 1.0
        else:
            self.doing[server], self.left[server] = _IDLE, np.inf
        self.amount[server] = amount
        self.customers.set_row(server, amount, self._waiting(server, amount))
        self.stale = True

    def _waiting(self, server: int, amount: np.ndarray) -> float:
        key = (server, int(amount[PROMPT] + amount[DECODED]))
        if key not in self.latencies:
            self.latencies[key] = self.steps.waiting(*key) if key[1] else 0.0
        return self.latencies[key]

    def _finish_step(self, server: int) -> int:
        """A prefill or the last step of a sequence is done; returns how many requests that finishes."""
        finished = []
        if self.doing[server] == _PREFILL:
            request = self.request[server]
            self.prompt_left[server] -= int(self.amount[server, PROMPT])
            if not self.prompt_left[server]:
                self.request[server] = -1
                self.first[request] = self.now
                if more := int(self.arrivals.output[request]) - 1:
                    heapq.heappush(self.decoding[server], (self.steps_done[server] + more, request))
                else:
                    finished.append(request)
        else:
            self.steps_done[server] = round(self.steps_done[server])
            while self.decoding[server] and self.decoding[server][0][0] <= self.steps_done[server] + 1e-6:
                finished.append(heapq.heappop(self.decoding[server])[1])
            if not self.decoding[server]:
                self.steps_done[server] = 0.0
        self.finished[finished] = self.now
        self._next_step(server)
        return len(finished)

    def _use(self, steps: Steps) -> None:
        """Put unit costs in force, for the steps in progress too."""
        self.steps = steps
        self.latencies: dict[tuple[int, int], float] = {}
        loading = [(n, load) for n, load in enumerate(self.load) if self.left[self.servers + n] < np.inf]
        self.customers = Customers.of(steps, loading)
        for server in range(self.servers):
            self.customers.set_row(server, self.amount[server], self._waiting(server, self.amount[server]))
        self.seconds = self.customers.seconds
        self.stale = True

    def _account(self) -> None:
        """Book the work done under the unit costs in force."""
        self.link_bytes += self.steps.link_bytes(self.work[:, [PROMPT, DECODED]])
        self.device_busy += np.einsum("nu,und->d", self.work, self.steps.device_seconds)
        tokens = self.work[:, PROMPT] + self.work[:, DECODED]
        self.seen[self.current] += tokens
        self.since_revision[self.current] += tokens
        self.work[:] = 0.0

    def _shift(self) -> None:
        self._account()
        self.shift = np.inf
        self.workloads.append(trade_places(self.workloads[0]))
        self.current = 1
        self._use(Steps.build(self.workloads[1], self.resident, self.compute, self.host))

    def _revise(self) -> None:
        """Plan on what has been seen; if the plan pays, start loading its weights."""
        self._account()
        replan = self.replan
        assert replan is not None
        self.revise += replan.policy.interval
        if self.plan is not None or not self.since_revision.any():
            return
        known = slice(len(self.workloads))
        lengths = np.array([self.arrivals.prompt.mean(), self.arrivals.output.mean()])
        rate = self.since_revision.sum(0) / (lengths.sum() - 1.0) / replan.policy.interval
        proven = False
        if self.waiting.plan is not None:
            latest = observe(self.workloads, self.since_revision[known])
            tried = weigh_plan(latest, self.resident, self.waiting.plan, lengths, rate, self.compute, replan)
            proven = self.waiting.proven(replan.policy, tried.objection)
        observed = observe(self.workloads, self.seen[known])
        waited = self.waiting.plan if proven else None
        plan = replan.planner(observed, self.resident) if waited is None else waited
        found = weigh_plan(observed, self.resident, plan, lengths, rate, self.compute, replan)
        why = found.objection or self.waiting.objection(replan.policy, plan, proven)
        adopted = found.bytes > 0 and (not why or replan.always)
        record = {"seconds": self.now, "adopted": adopted, "bytes": found.bytes, "why": why}
        gain = found.verdict.saving_seconds - found.verdict.cost_seconds
        self.migrations.append({**record, "transfer_seconds": found.transfer_seconds, "gain_seconds": gain})
        self.seen *= DECAY
        self.since_revision[:] = 0.0
        if proven or adopted:
            self.waiting.plan = None
        if adopted:
            self.plan, self.load = plan, found.load
            for n, part in enumerate(found.load):
                self.left[self.servers + n] = 1.0 if part.total_bytes else np.inf
            self._use(self.steps)

    def _loaded(self, row: int) -> None:
        """One server has its weights; when all have, the plan takes over."""
        self.left[row] = np.inf
        server = row - self.servers
        self.customers.clear_load(server)
        self.link_bytes[:, server] += self.load[server].link_bytes
        self.stale = True
        if np.isinf(self.left[self.servers :]).all():
            assert self.plan is not None
            assert self.replan is not None
            self._account()
            self.resident, self.plan, self.load = self.plan, None, []
            self.resume = self.now + self.replan.policy.stall
            self._use(Steps.build(self.workloads[self.current], self.resident, self.compute, self.host))
