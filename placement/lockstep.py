"""Requests on servers that step together, as the runtime serves them: how long they take. Plans nothing itself.

Modelled: one step at a time for the whole cluster. Where both are wanted, prefill and decode steps take turns. A prefill
step takes up to `chunk` tokens of the earliest prompt on every device, a decode step one token of every sequence; a
device has places for `sequences` of them, and a request goes to the device of its server with most places free. A step
takes its computing, linear in busy devices and rows and measured beforehand (`StepCosts`), and its messages
(exchange_time.py). What its tokens are routed to comes from the profile: a request takes tokens that follow each other
in recorded sequences of its server, drawn at random; where only counts are known, sets drawn as if independent.

Not modelled: variance of steps that hold the same, devices of unequal speed, migrations, memory of the KV cache, and
what lies between two steps.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from placement.arrivals import Arrivals
from placement.exchange_time import Exchange
from placement.files import InputError, show
from placement.problem import Problem
from placement.token_sets import token_sets

_MESSAGES = ("message_seconds", "row_seconds", "crowding")
_OVERHEADS = ("prefill_overhead", "decode_overhead")


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step all of whose experts are at home: (a step, and for each busy device, and for each row).

    Attributes:
        prefill, decode: the three of each kind of step.
        message_seconds: of a device, to send a message.
        row_seconds: of a row in a message, each way, beside its bytes, half at either end.
        crowding: by how much longer these and overheads take for each device beyond two that takes part in a layer, where
            devices share cores.
        prefill_overhead, decode_overhead: seconds of a device in each layer in which it takes part, beside messages.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    message_seconds: float = 0.0
    row_seconds: float = 0.0
    crowding: float = 0.0
    prefill_overhead: float = 0.0
    decode_overhead: float = 0.0

    @property
    def messages(self) -> dict[str, float]:
        """What `Exchange.build` takes of it."""
        return {key: getattr(self, key) for key in _MESSAGES}

    @classmethod
    def from_dict(cls, parsed: Any, source: str = "costs") -> "StepCosts":
        """From JSON with `prefill` and `decode`, three numbers each, and optionally those of messages.

        Raises:
            InputError: something is missing, unknown, or no number from 0.
        """
        optional = _MESSAGES + _OVERHEADS
        if not isinstance(parsed, Mapping) or not {"prefill", "decode"} <= set(parsed) <= {*vars(cls(_FREE, _FREE))}:
            raise InputError(
                f"{source}: must have prefill and decode, optionally {', '.join(optional)}, and nothing else"
            )
        found = {}
        for key, count in (("prefill", 3), ("decode", 3), *((key, 1) for key in optional)):
            values = parsed.get(key, 0.0)
            values = values if isinstance(values, list | tuple) else [values]
            plain = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < np.inf for v in values)
            if len(values) != count or not plain:
                raise InputError(f"{source}: {key} = {show(values)}: must be {count} finite seconds from 0")
            found[key] = tuple(map(float, values)) if count > 1 else float(values[0])
        return cls(**found)

    def seconds(self, prefill: bool, rows: Sequence[int]) -> float:
        """A step with so many rows on each device."""
        step, device, row = self.prefill if prefill else self.decode
        return step + device * sum(count > 0 for count in rows) + row * sum(rows)

    def overhead(self, prefill: bool) -> float:
        """Of a device and a layer, in a step of a kind."""
        return self.prefill_overhead if prefill else self.decode_overhead


_FREE = (0.0, 0.0, 0.0)


class Member(NamedTuple):
    """Rows of a step: of request `request`, on `device`, from token `start` on, `count` of them."""

    device: int
    request: int
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class Served:
    """What happened to R requests, float64 [R] seconds each; `steps` and their kinds in all.

    Attributes:
        latency: from arrival to the last token; first_token: to the first.
        compute, network: of the steps that a request took part in; the rest of its latency it waited.
        steps: prefill and decode steps.
    """

    latency: np.ndarray
    first_token: np.ndarray
    compute: np.ndarray
    network: np.ndarray
    steps: dict[str, int]

    @property
    def waiting(self) -> np.ndarray:
        """Seconds in no step, float64 [R]."""
        return self.latency - self.compute - self.network

    def summary(self) -> dict[str, Any]:
        """Figures as JSON takes them; seconds, means unless they say otherwise."""
        p50, p95, p99 = np.percentile(self.latency, [50, 95, 99]).tolist()
        parts = {key: float(getattr(self, key).mean()) for key in ("first_token", "compute", "network", "waiting")}
        latency = {"mean": float(self.latency.mean()), "p50": p50, "p95": p95, "p99": p99}
        return {"requests": len(self.latency), "latency": latency, **parts, "steps": self.steps}


def serve(
    arrivals: Arrivals,
    device_server: Sequence[int],
    step: Callable[[bool, list[Member]], tuple[float, float]],
    *,
    sequences: int = 4,
    chunk: int = 64,
) -> Served:
    """Serve all requests; `step` says what a step with these rows takes, computing and network.

    Args:
        device_server: server of each device, [D]; every server of `arrivals` has one.
        step: (whether it is a prefill step, its rows) -> seconds of computing, seconds of network.
    """
    arrival, home = arrivals.seconds.tolist(), arrivals.server.tolist()
    prompt, output = arrivals.prompt.tolist(), arrivals.output.tolist()
    done, places = [0] * len(arrivals), [[-1] * sequences for _ in device_server]
    waiting: dict[int, deque[int]] = {int(server): deque() for server in device_server}
    first, finished, compute, network = np.full((4, len(arrivals)), np.nan)
    compute[:], network[:] = 0.0, 0.0
    coming, now, decode_next, steps = 0, 0.0, False, {"prefill": 0, "decode": 0}

    def admit(coming: int) -> int:
        while coming < len(arrival) and arrival[coming] <= now:
            waiting[home[coming]].append(coming)
            coming += 1
        for server, queue in waiting.items():
            own = [device for device, owner in enumerate(device_server) if owner == server]
            while queue:
                device = max(own, key=lambda d: places[d].count(-1))
                if -1 not in places[device]:
                    break
                places[device][places[device].index(-1)] = queue.popleft()
        return coming

    while True:
        coming = admit(coming)
        if all(request < 0 for row in places for request in row):
            if coming == len(arrival):
                break
            now = arrival[coming]
            coming = admit(coming)
        chunks, tokens = [], []
        for device, row in enumerate(places):
            due = [request for request in row if request >= 0 and done[request] < prompt[request]]
            if due:
                request = min(due, key=lambda r: (arrival[r], row.index(r)))
                chunks.append(Member(device, request, done[request], min(chunk, prompt[request] - done[request])))
            tokens += [Member(device, r, done[r], 1) for r in row if r >= 0 and done[r] >= prompt[r]]
        decode = bool(tokens) and (decode_next or not chunks)
        decode_next = not decode
        members = tokens if decode else chunks
        steps["decode" if decode else "prefill"] += 1
        spent = step(not decode, members)
        now += sum(spent)
        for device, request, _, count in members:
            done[request] += count
            compute[request] += spent[0]
            network[request] += spent[1]
            if done[request] >= prompt[request] and np.isnan(first[request]):
                first[request] = now
            if done[request] >= prompt[request] + output[request] - 1 and not np.isnan(first[request]):
                finished[request] = now
                places[device][places[device].index(request)] = -1
    return Served(finished - arrivals.seconds, first - arrivals.seconds, compute, network, steps)


def lock_step(
    problem: Problem,
    resident: np.ndarray,
    arrivals: Arrivals,
    costs: StepCosts,
    *,
    sequences: int = 4,
    chunk: int = 64,
    serving: np.ndarray | None = None,
    likely: np.ndarray | None = None,
    seed: int = 0,
) -> Served:
    """Serve all requests under a placement; deterministic.

    Args:
        problem: the cluster, with measured links, and the workload that runs on it.
        resident: bool [D, L, E], every expert resident somewhere.
        costs: of a step at home.
        sequences: places of a device; chunk: prompt tokens that a step takes of one prompt.
        serving, likely: see `Exchange.build`; as the runtime was given them.
        seed: of the tokens drawn; the same for all placements that are to be compared.
    """
    exchange = Exchange.build(problem, resident, **costs.messages, serving=serving, likely=likely)
    routing = _draw(problem, arrivals, seed)
    devices = len(problem.device_server)
    none = routing[0][:0] if routing else np.zeros((0, problem.shape[1], problem.top_k), np.int64)

    def step(prefill: bool, members: list[Member]) -> tuple[float, float]:
        rows: list[list[np.ndarray]] = [[] for _ in range(devices)]
        for device, request, start, count in members:
            rows[device].append(routing[request][start : start + count])
        ids = [np.concatenate(own) if own else none for own in rows]
        compute = costs.seconds(prefill, [len(own) for own in ids])
        return compute, exchange.seconds(ids, compute, costs.overhead(prefill)) - compute

    return serve(arrivals, problem.device_server.tolist(), step, sequences=sequences, chunk=chunk)


def _draw(problem: Problem, arrivals: Arrivals, seed: int) -> list[np.ndarray]:
    """Routing of every request's tokens, int [R][tokens, L, k]: whole recorded sequences of its server, one after another."""
    rng, sets = np.random.default_rng(seed), token_sets(problem, seed)
    texts: dict[int, list[np.ndarray]] = {}
    for server in np.unique(arrivals.server).tolist():
        if problem.tokens is not None and sets.recorded[server]:
            own = problem.tokens.server == server
            ids, sequence = problem.tokens.ids[own], problem.tokens.sequence[own]
            order = np.argsort(sequence, kind="stable")
            starts = np.flatnonzero(np.diff(sequence[order])) + 1
            texts[server] = np.split(ids[order].astype(np.int64), starts)
        else:
            drawn = sets.ids[sets.source == server] if (sets.source == server).any() else sets.ids
            if not len(drawn):
                raise InputError(f"{problem.names[server]}: requests come here, but the profile counts none anywhere")
            texts[server] = [drawn[i : i + 1].astype(np.int64) for i in range(len(drawn))]
    routing = []
    for server, length in zip(arrivals.server.tolist(), (arrivals.prompt + arrivals.output).tolist(), strict=True):
        parts, found = [], 0
        while found < length:
            parts.append(texts[server][rng.integers(len(texts[server]))])
            found += len(parts[-1])
        routing.append(np.concatenate(parts)[:length])
    return routing
