"""Requests of a trace, served step by step with the trace's routing in place of the router's. Runs no model itself.

It decides what each step holds, hands the rows and their routing to a function that takes the step, and keeps the
books: when the first and the last token came, and how much of a request's time was computing, network and waiting.
Prompt chunks and decode steps take turns, as the engine's do. The clock is the replay's own: it advances by what steps
took and jumps over the time in which nobody wants anything, so that a replay of an hour lasts as long as its work.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from launch.bench.harness.trace import ReplayRequest


class Spent(NamedTuple):
    """What a step took, in seconds: computing, and what the network added."""

    compute_s: float
    network_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Rows:
    """The tokens of one step, R rows on each of D devices: a chunk of one prompt each, or one token of each sequence.

    Attributes:
        prefill: whether it is a chunk of prompts (R = chunk) rather than a decode step (R = sequences).
        ids: experts, int32 [D, R, layers, k]; weights: float32 of the same shape. Zero in rows that are not active.
        sequence: the place on the device of the sequence that a row belongs to, int32 [D, R].
        position: of the token in its sequence, int32 [D, R].
        active: rows that hold a token, bool [D, R]; the first ones of a chunk.
    """

    prefill: bool
    ids: np.ndarray
    weights: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    active: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """Position of the first row of each device, int32 [D]."""
        return self.position[:, 0]

    @property
    def length(self) -> np.ndarray:
        """Active rows of each device, int32 [D]."""
        return self.active.sum(1, dtype=np.int32)


class Replay:
    """Continuous batching of a trace's requests over all devices of a cluster.

    Deterministic: what steps are said to take decides what the next one holds. Processes that replay together must hence
    hear the same numbers, those of the slowest, say.

    Args:
        requests: in order of arrival.
        device_server: the server of each device, [D].
        sequences: sequences that a device serves at once; chunk: prompt tokens a step takes from one of them.

    Attributes:
        now_s: the clock. idle_s: how much of it was jumped over.
        steps: prefill and decode steps taken.
    """

    def __init__(
        self, requests: Sequence[ReplayRequest], device_server: Sequence[int], sequences: int = 8, chunk: int = 64
    ):
        self.requests, self.chunk = list(requests), chunk
        self.now_s = self.idle_s = 0.0
        self.steps = {"prefill": 0, "decode": 0}
        self._servers = [int(server) for server in device_server]
        self._coming = deque(self.requests)
        self._waiting: dict[int, deque[ReplayRequest]] = {server: deque() for server in self._servers}
        self._running: list[list[ReplayRequest | None]] = [[None] * sequences for _ in self._servers]
        self._decode_next = False
        self._members: list[tuple[int, int, ReplayRequest, int]] = []  # device, place, request, its rows in this step

    @property
    def in_flight(self) -> list[ReplayRequest]:
        """Requests that have a place on a device."""
        return [request for row in self._running for request in row if request is not None]

    def run(self, step: Callable[[Rows], Spent]) -> None:
        """Serve all requests. `step` takes a step with the given rows and says what it took."""
        while (rows := self.next_rows()) is not None:
            self.record(step(rows))

    def next_rows(self) -> Rows | None:
        """What the next step holds, at the time when there is one; None when all requests have been served."""
        self._admit()
        if not self.in_flight:
            if not self._coming:
                return None
            self.idle_s += self._coming[0].arrival_s - self.now_s
            self.now_s = self._coming[0].arrival_s
            self._admit()
        prefilling = any(request.done < request.prompt for request in self.in_flight)
        decoding = any(request.done >= request.prompt for request in self.in_flight)
        decode = decoding and (self._decode_next or not prefilling)
        self._decode_next = not decode
        self._members = self._decoding() if decode else self._prefilling()
        return self._rows(not decode)

    def record(self, spent: Spent) -> list[ReplayRequest]:
        """Book the step that `next_rows` gave; the requests that it finished."""
        self.pause(sum(spent))
        finished = []
        for device, place, request, count in self._members:
            request.done += count
            request.compute_s += spent.compute_s
            request.network_s += spent.network_s
            if request.done >= request.prompt and request.first_token_s is None:
                request.first_token_s = self.now_s
            if request.done >= len(request.ids) - 1 and request.first_token_s is not None:
                request.finished_s = self.now_s
                self._running[device][place] = None
                finished.append(request)
        self._members = []
        return finished

    def pause(self, seconds: float) -> None:
        """Let time pass for all, as the commit of a migration does."""
        if not (0 <= seconds < math.inf):
            raise ValueError(f"a step took {seconds} seconds; must be finite and at least 0")
        self.now_s += seconds

    def _admit(self) -> None:
        while self._coming and self._coming[0].arrival_s <= self.now_s:
            request = self._coming.popleft()
            self._waiting[request.server].append(request)
        for server, queue in self._waiting.items():
            devices = [device for device, owner in enumerate(self._servers) if owner == server]
            while queue:
                device = max(devices, key=lambda d: self._running[d].count(None))
                if None not in self._running[device]:
                    break
                self._running[device][self._running[device].index(None)] = queue.popleft()

    def _prefilling(self) -> list[tuple[int, int, ReplayRequest, int]]:
        """On each device the earliest prompt that is not through, with the tokens of its next chunk."""
        members = []
        for device, row in enumerate(self._running):
            due = [(place, r) for place, r in enumerate(row) if r is not None and r.done < r.prompt]
            if due:
                place, request = min(due, key=lambda item: item[1].arrival_s)
                members.append((device, place, request, min(self.chunk, request.prompt - request.done)))
        return members

    def _decoding(self) -> list[tuple[int, int, ReplayRequest, int]]:
        return [
            (device, place, request, 1)
            for device, row in enumerate(self._running)
            for place, request in enumerate(row)
            if request is not None and request.done >= request.prompt
        ]

    def _rows(self, prefill: bool) -> Rows:
        _, _, first, _ = self._members[0]
        shape = (len(self._running), self.chunk if prefill else len(self._running[0]))
        ids = np.zeros((*shape, *first.ids.shape[1:]), np.int32)
        weights = np.zeros(ids.shape, np.float32)
        sequence, position = np.zeros((2, *shape), np.int32)
        active = np.zeros(shape, bool)
        for device, place, request, count in self._members:
            rows = slice(0, count) if prefill else slice(place, place + 1)
            tokens = slice(request.done, request.done + count)
            ids[device, rows], weights[device, rows] = request.ids[tokens], request.weights[tokens]
            sequence[device, rows], active[device, rows] = place, True
            position[device, rows] = np.arange(request.done, request.done + count)
        self.steps["prefill" if prefill else "decode"] += 1
        return Rows(prefill, ids, weights, sequence, position, active)


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
