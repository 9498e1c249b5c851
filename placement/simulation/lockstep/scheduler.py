"""Continuous batching of all devices of a cluster by one that knows every request. Knows no clock and no costs.

The rules are those of `placement.scheduling`, which the serving engine follows too. There each process knows the requests
of its own devices alone, and what the others want comes with the steps; here one state holds them all.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from placement.scheduling import Kind, Progress, Step, admit, next_kind, plan_step


class Member(NamedTuple):
    """Rows of a step: of request `request`, in batch slot `slot` of `device`, from token `start` on, `count` of them."""

    device: int
    slot: int
    request: int
    start: int
    count: int


class Scheduler:
    """Gives requests batch slots, and steps their rows.

    Args:
        device_server: server of each device, [D].
        sequences: batch slots of a device; chunk: prompt tokens that a step takes from one sequence.
    """

    def __init__(self, device_server: Sequence[int], sequences: int, chunk: int) -> None:
        servers = [int(server) for server in device_server]
        self._devices = {server: [d for d, owner in enumerate(servers) if owner == server] for server in servers}
        self._server, self._chunk = servers, chunk
        self._slots: list[list[Progress | None]] = [[None] * sequences for _ in servers]
        self._request = [[-1] * sequences for _ in servers]  # in each slot
        self._waiting: dict[int, deque[tuple[int, Progress]]] = {server: deque() for server in servers}
        self._last: Step | None = None

    @property
    def in_flight(self) -> list[int]:
        """Requests that have a batch slot."""
        return [request for row in self._request for request in row if request >= 0]

    def submit(self, request: int, server: int, arrival: float, prompt: int, output: int) -> None:
        """Queue a request at its server; it is announced with the next step.

        Args:
            request: its number, from 0.
            arrival: orders the prompts of a device; any unit.
            prompt, output: tokens, at least 1 each.
        """
        self._waiting[server].append((request, Progress(arrival, prompt, 0, output)))

    def next_step(self) -> tuple[Kind, list[Member]] | None:
        """Kind and rows of the next step, which ends with `finish_step`; None where nothing is to be done."""
        self._admit()
        last = self._last
        kind = None if last is None else next_kind(last.kind, any(last.prefill), any(last.decode))
        if kind is None:
            if not self.in_flight:
                return None
            kind = "prefill"  # no device wanted anything: these requests came since then
        self._last = plan_step(kind, self._slots, [bool(self._waiting[s]) for s in self._server], self._chunk)
        return kind, [Member(d, slot, self._request[d][slot], *rows) for d, slot, *rows in self._last.rows]

    def finish_step(self) -> list[int]:
        """Advance by the step that `next_step` gave; the requests that ended with it, whose slots are free."""
        assert self._last is not None
        ended = []
        for device, slot, _, count in self._last.rows:
            progress = self._slots[device][slot]
            assert progress is not None
            self._slots[device][slot] = progress = progress.after(count)
            if progress.ended:
                ended.append(self._request[device][slot])
                self._slots[device][slot], self._request[device][slot] = None, -1
        return ended

    def _admit(self) -> None:
        for server, queue in self._waiting.items():
            if queue:
                devices = self._devices[server]
                free = [[slot for slot, p in enumerate(self._slots[device]) if p is None] for device in devices]
                for own, slot in admit(free, len(queue)):
                    device = devices[own]
                    self._request[device][slot], self._slots[device][slot] = queue.popleft()
