"""Requests as they arrive: Poisson arrivals at every server, prompts of the domain that the server's users work in."""

import dataclasses
import heapq
import math
from collections.abc import Sequence

import numpy as np

from launch.engine.request import Request


@dataclasses.dataclass
class PoissonWorkload:
    """Independent Poisson arrivals at each server.

    Attributes:
        prompts: token ids by domain, taken in turn.
        domains: the domain of each server's users; assign to it to change the workload from the next arrival on.
        rate: requests a second at each server; 0: none arrive until `dataclasses.replace` gives it another.
        output_tokens: least and most tokens of an answer, drawn evenly.
    """

    prompts: dict[str, list[list[int]]]
    domains: Sequence[str]
    rate: float
    output_tokens: tuple[int, int]
    seed: int

    def __post_init__(self):
        self._rng = np.random.default_rng(self.seed)
        self._taken = dict.fromkeys(self.prompts, 0)
        self._next = [(self._gap(), server) for server in range(len(self.domains))]
        heapq.heapify(self._next)

    @property
    def next_s(self) -> float:
        """When the next request arrives."""
        return self._next[0][0]

    def due(self, now_s: float) -> list[Request]:
        """Requests that have arrived by `now_s`, in order."""
        arrived = []
        while self._next[0][0] <= now_s:
            at, server = self._next[0]
            domain = self.domains[server]
            prompt = self.prompts[domain][self._taken[domain] % len(self.prompts[domain])]
            self._taken[domain] += 1
            low, high = self.output_tokens
            wanted = int(self._rng.integers(low, high + 1))
            arrived.append(Request(server, list(prompt), wanted, at, label=domain))
            heapq.heapreplace(self._next, (at + self._gap(), server))
        return arrived

    def _gap(self) -> float:
        return float(self._rng.exponential(1 / self.rate)) if self.rate else math.inf
