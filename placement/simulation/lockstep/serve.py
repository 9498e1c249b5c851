"""Serving requests step by step on a clock of its own, by what a given function makes steps take. Knows no costs itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.data.arrivals import Arrivals
from placement.simulation.lockstep.scheduler import Member, Scheduler


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
    chunks: Sequence[int] = (64,),
) -> Served:
    """Serve all requests; deterministic where `step` is.

    Args:
        device_server: server of each device, [D]; every server of `arrivals` has one.
        step: (whether it is a prefill step, its rows) -> seconds of computing, seconds of network.
        sequences: batch slots of a device; chunks: prompt tokens that a step may take of a prompt (scheduling.next_turn).
    """
    arrival, prompt = arrivals.seconds.tolist(), arrivals.prompt.tolist()
    each = list(zip(arrivals.server.tolist(), arrival, prompt, arrivals.output.tolist(), strict=True))
    scheduler = Scheduler(device_server, sequences, chunks)
    first, finished, compute, network = np.full((4, len(arrivals)), np.nan)
    compute[:], network[:] = 0.0, 0.0
    coming, now, steps = 0, 0.0, {"prefill": 0, "decode": 0}
    while True:
        while coming < len(arrival) and arrival[coming] <= now:
            scheduler.submit(coming, *each[coming])
            coming += 1
        planned = scheduler.next_step()
        if planned is None:
            if coming == len(arrival):
                break
            now = arrival[coming]
            continue
        turn, members = planned
        steps[turn.kind] += 1
        spent = step(turn.kind == "prefill", members)
        now += sum(spent)
        for _, _, request, start, count in members:
            compute[request] += spent[0]
            network[request] += spent[1]
            if start < prompt[request] <= start + count:
                first[request] = now
        finished[scheduler.finish_step()] = now
    return Served(finished - arrivals.seconds, first - arrivals.seconds, compute, network, steps)
