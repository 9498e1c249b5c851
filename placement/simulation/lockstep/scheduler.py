"""Continuous batching of all devices of a cluster by one that knows every request. Knows no clock and no costs.

The rules are those of `placement.scheduling`, which the serving engine follows too. There each process knows the requests
of its own devices alone, and what the others want comes with the steps; here one state holds them all.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from placement.scheduling import Progress, Step, Turn, admit, next_turn, plan_step, wishes


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
        sequences: batch slots of a device; chunks: as in `next_turn`.
    """

    def __init__(self, device_server: Sequence[int], sequences: int, chunks: Sequence[int]) -> None:
        servers = [int(server) for server in device_server]
        self._devices = {server: [d for d, owner in enumerate(servers) if owner == server] for server in servers}
        self._server, self._chunks = servers, tuple(chunks)
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

    def next_step(self) -> tuple[Turn, list[Member]] | None:
        """The next step and its rows, which ends with `finish_step`; None where nothing is to be done."""
        self._admit()
        last, waiting = self._last, [[progress.prompt for _, progress in self._waiting[s]] for s in self._server]
        turn = None if last is None else next_turn(last.kind, last.wishes, self._chunks)
        if turn is None:  # no device wanted anything: what there is now came since then
            turn = next_turn(None, wishes(self._slots, waiting), self._chunks)
        if turn is None:
            return None
        self._last = plan_step(turn, self._slots, waiting)
        return turn, [Member(d, slot, self._request[d][slot], *rows) for d, slot, *rows in self._last.rows]

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
