"""The requests of one process: those that wait at its servers, and those in the batch slots of its devices.

What goes where is decided by `placement.scheduling`; here it is carried out. Takes no step and touches no device.
"""

import itertools
import threading
from collections import deque
from collections.abc import Collection, Sequence

from launch.engine.request import Request
from placement.scheduling import Progress, SlotRows, Step, Turn, Wish, admit, plan_step, wishes

Member = tuple[SlotRows, Request]  # rows of a step, and whose they are


class Batch:
    """Queues by server and batch slots by device; devices of other processes stay empty.

    Args:
        device_server: the server of each device, [D]; own: devices of this process.
        sequences: batch slots of a device.
        context: longest sequence, in tokens.

    Attributes:
        waiting: requests without a slot, by server; running: those in each slot, [D][sequences].
    """

    def __init__(self, device_server: Sequence[int], own: Collection[int], sequences: int, context: int) -> None:
        self.waiting: list[deque[Request]] = [deque() for _ in range(max(device_server) + 1)]
        self.running: list[list[Request | None]] = [[None] * sequences for _ in device_server]
        self._server, self._own, self._context = list(device_server), frozenset(own), context
        self._devices = [[d for d in sorted(own) if device_server[d] == server] for server in range(len(self.waiting))]
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> list[Request]:
        """Requests that have a batch slot."""
        return [request for row in self.running for request in row if request is not None]

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs here."""
        return not any(self.waiting) and not self.in_flight

    def submit(self, request: Request) -> None:
        """Queue a request at its server, from any thread."""
        with self._lock:
            self.waiting[request.server].append(request)

    def drop_cancelled(self) -> list[Request]:
        """Take out all requests that have been cancelled; those requests."""
        dropped = []
        for row in self.running:
            for slot, request in enumerate(row):
                if request is not None and request.cancelled:
                    row[slot] = None
                    dropped.append(request)
        with self._lock:
            for server, queue in enumerate(self.waiting):
                dropped += [request for request in queue if request.cancelled]
                self.waiting[server] = deque(request for request in queue if not request.cancelled)
        for request in dropped:
            request.reason = "cancelled"
        return dropped

    def admit(self) -> None:
        """Give free batch slots to requests that wait."""
        with self._lock:
            for devices, queue in zip(self._devices, self.waiting, strict=True):
                if queue:
                    free = [[slot for slot, r in enumerate(self.running[device]) if r is None] for device in devices]
                    for index, slot in admit(free, len(queue)):
                        self.running[devices[index]][slot] = queue.popleft()

    def plan(self, turn: Turn) -> tuple[Step, list[Member]]:
        """What a step holds of the requests here."""
        step = plan_step(turn, self._slots(), self._coming())
        members: list[Member] = []
        for rows in step.rows:
            request = self.running[rows.device][rows.slot]
            assert request is not None
            members.append((rows, request))
        return step, members

    def wishes(self) -> tuple[Wish, ...]:
        """What each device wants now, [D]; nothing those of other processes."""
        return wishes(self._slots(), self._coming())

    @property
    def first_prompt(self) -> int:
        """Tokens of a prompt that waits at a server here; 0: none does. From any thread."""
        with self._lock:
            return max((queue[0].prompt_tokens for queue in self.waiting if queue), default=0)

    def _slots(self) -> list[list[Progress | None]]:
        return [
            [None if r is None else r.progress(self._context) for r in row] if device in self._own else []
            for device, row in enumerate(self.running)
        ]

    def _coming(self) -> list[list[int]]:
        """Tokens of the prompts that wait at the server of each device, as many as it has slots."""
        with self._lock:
            most = len(self.running[0])
            queues = [[r.prompt_tokens for r in itertools.islice(queue, most)] for queue in self.waiting]
        return [queues[server] for server in self._server]

    def fail(self, rows: SlotRows, error: str) -> None:
        """End the request of a slot, which is free then, with an error."""
        request = self.running[rows.device][rows.slot]
        assert request is not None
        request.reason, request.error = "error", error
        self.running[rows.device][rows.slot] = None

    def give(self, members: Sequence[Member], tokens: Sequence[int], eos: int | None) -> list[Request]:
        """Give requests their next tokens; those that have ended with it, whose slots are free.

        Args:
            tokens: of each member.
            eos: ends any request; None: nothing does.
        """
        finished = []
        for (rows, request), token in zip(members, tokens, strict=True):
            if request.take(token, eos, self._context):
                self.running[rows.device][rows.slot] = None
                finished.append(request)
        return finished
