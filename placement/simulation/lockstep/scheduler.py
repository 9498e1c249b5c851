"""What the next step of servers that step together holds, and serving by it. Knows no costs."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from placement.data.arrivals import Arrivals


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
