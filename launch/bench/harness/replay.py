"""Requests of a trace, served step by step with the trace's routing in place of the router's. Runs no model itself.

What each step holds is decided by the rules that the engine follows (`placement.scheduling`). A function that is given
takes the step with these rows and their routing. Recorded are when the first and the last token came, and how much of a
request's time was computing, network and waiting. The clock is the replay's own: it advances by what steps
took and jumps over the time in which there is nothing to do, so that a replay of an hour lasts as long as its work.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from launch.bench.harness.trace import ReplayRequest
from placement.scheduling import PROMPTS, Kind
from placement.simulation.lockstep.scheduler import Member, Scheduler


class Spent(NamedTuple):
    """What a step took, in seconds: computing, and what the network added."""

    compute_s: float
    network_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Rows:
    """The tokens of one step, R rows on each of D devices: chunks of prompts, or one token of each sequence.

    Attributes:
        prefill: whether it takes chunks of prompts (R = chunk) rather than a decode step (R = sequences).
        ids: experts, int32 [D, R, layers, k]; weights: float32 of the same shape. Zero in rows that are not active.
        sequence: the batch slot of the sequence that a row belongs to, int32 [D, R].
        position: of the token in its sequence, int32 [D, R].
        active: rows that hold a token, bool [D, R]; the first ones of a prefill step, those of a sequence together.
        pieces: of a prefill step, int32 [D, PROMPTS, 3]: sequence, start and length of each chunk, in the rows' order.
    """

    prefill: bool
    ids: np.ndarray
    weights: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    active: np.ndarray
    pieces: np.ndarray


class Replay:
    """Continuous batching of a trace's requests over all devices of a cluster.

    Deterministic: what steps are reported to take decides what the next one holds. Processes that replay together must
    hence be given the same numbers, those of the slowest, say.

    Args:
        requests: in order of arrival.
        device_server: the server of each device, [D].
        sequences: batch slots of a device; chunk: prompt tokens that a step takes on a device.

    Attributes:
        now_s: the clock. idle_s: how much of it was jumped over.
        steps: prefill and decode steps taken.
    """

    def __init__(
        self, requests: Sequence[ReplayRequest], device_server: Sequence[int], sequences: int = 8, chunk: int = 64
    ):
        self.requests = list(requests)
        self.now_s = self.idle_s = 0.0
        self.steps = {"prefill": 0, "decode": 0}
        self._coming = 0  # the next request to arrive
        self._scheduler = Scheduler(device_server, sequences, (chunk,))
        self._rows = {"prefill": (len(device_server), chunk), "decode": (len(device_server), sequences)}
        self._members: list[Member] = []  # of the step that is being taken

    @property
    def in_flight(self) -> list[ReplayRequest]:
        """Requests that have a batch slot."""
        return [self.requests[number] for number in self._scheduler.in_flight]

    def run(self, step: Callable[[Rows], Spent]) -> None:
        """Serve all requests. `step` takes a step with the given rows and returns what it took."""
        while (rows := self.next_rows()) is not None:
            self.record(step(rows))

    def next_rows(self) -> Rows | None:
        """What the next step holds, at the time when there is one; None when all requests have been served."""
        self._arrive()
        planned = self._scheduler.next_step()
        if planned is None:
            if self._coming == len(self.requests):
                return None
            following = self.requests[self._coming].arrival_s
            self.idle_s, self.now_s = self.idle_s + following - self.now_s, following
            return self.next_rows()
        turn, self._members = planned
        self.steps[turn.kind] += 1
        return self._fill(turn.kind)

    def record(self, spent: Spent) -> list[ReplayRequest]:
        """Book the step that `next_rows` gave; the requests that it finished."""
        self.pause(sum(spent))
        for member in self._members:
            request = self.requests[member.request]
            request.done += member.count
            request.compute_s += spent.compute_s
            request.network_s += spent.network_s
            if request.done >= request.prompt and request.first_token_s is None:
                request.first_token_s = self.now_s
        finished = [self.requests[number] for number in self._scheduler.finish_step()]
        for request in finished:
            request.finished_s = self.now_s
        self._members = []
        return finished

    def pause(self, seconds: float) -> None:
        """Let time pass for all, as the commit of a migration does."""
        if not (0 <= seconds < math.inf):
            raise ValueError(f"a step took {seconds} seconds; must be finite and at least 0")
        self.now_s += seconds

    def _arrive(self) -> None:
        while self._coming < len(self.requests) and self.requests[self._coming].arrival_s <= self.now_s:
            request = self.requests[self._coming]
            self._scheduler.submit(self._coming, request.server, request.arrival_s, request.prompt, request.output)
            self._coming += 1

    def _fill(self, kind: Kind) -> Rows:
        prefill, shape = kind == "prefill", self._rows[kind]
        routing = self.requests[self._members[0].request].ids.shape[1:]
        ids = np.zeros((*shape, *routing), np.int32)
        weights = np.zeros(ids.shape, np.float32)
        sequence, position = np.zeros((2, *shape), np.int32)
        active, pieces = np.zeros(shape, bool), np.zeros((shape[0], PROMPTS, 3), np.int32)
        taken, chunks = [0] * shape[0], [0] * shape[0]
        for device, slot, number, start, count in self._members:
            rows = slice(taken[device], taken[device] + count) if prefill else slice(slot, slot + 1)
            if prefill:
                pieces[device, chunks[device]] = slot, start, count
                taken[device], chunks[device] = taken[device] + count, chunks[device] + 1
            tokens, request = slice(start, start + count), self.requests[number]
            ids[device, rows], weights[device, rows] = request.ids[tokens], request.weights[tokens]
            sequence[device, rows], active[device, rows] = slot, True
            position[device, rows] = np.arange(start, start + count)
        return Rows(prefill, ids, weights, sequence, position, active, pieces)


def summary(requests: Sequence[ReplayRequest], names: Sequence[str]) -> dict[str, Any]:
    """Figures of the requests that have finished, as JSON takes them; seconds, means unless they say otherwise.

    Args:
        requests: what has been replayed.
        names: of the servers.
    """
    return {
        "requests": len(requests),
        **_figures(requests),
        "servers": {name: _figures([r for r in requests if r.server == n]) for n, name in enumerate(names)},
    }


def _figures(requests: Sequence[ReplayRequest]) -> dict[str, Any]:
    done = [request for request in requests if request.finished_s is not None]
    if not done:
        return {"finished": 0}
    latency = np.array([request.latency_s for request in done])
    first = np.array([request.first_token_s or math.nan for request in done])
    gaps = sum(request.output - 1 for request in done)
    decoding = latency.sum() - (first - [request.arrival_s for request in done]).sum()
    p50, p95, p99 = np.percentile(latency, [50, 95, 99]).tolist()
    return {
        "finished": len(done),
        "latency": {"mean": float(latency.mean()), "p50": p50, "p95": p95, "p99": p99},
        "first_token": float(np.mean(first - [request.arrival_s for request in done])),
        "per_output_token": float(decoding / gaps) if gaps else 0.0,
        **{part: float(np.mean([getattr(r, f"{part}_s") for r in done])) for part in ("compute", "network", "waiting")},
        "prompt_tokens": sum(request.prompt for request in done),
        "output_tokens": sum(request.output for request in done),
    }
