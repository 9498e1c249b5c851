"""The requests of one process: those that wait at its servers, and those in the batch slots of its devices.

What goes where is decided by `placement.scheduling`; here it is carried out, as far as pages allow. Takes no step and
touches no device.
"""

import itertools
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from launch.engine.pages import Pages
from launch.engine.request import Request
from placement.scheduling import Progress, SlotRows, Step, Turn, Wish, admit, plan_step, wishes

Member = tuple[SlotRows, Request]  # rows of a step, and whose they are


class Batch:
    """Queues by server and batch slots by device; devices of other processes stay empty.

    Args:
        device_server: the server of each device, [D]; own: devices of this process.
        sequences: batch slots of a device.
        context: longest sequence, in tokens.
        share: whether prompts that begin alike share pages.

    Attributes:
        waiting: requests without a slot, by server; running: those in each slot, [D][sequences].
        pages: of each own device; the engine sets them.
        preempted: how often a request had to give its pages back and begin anew.
    """

    def __init__(
        self, device_server: Sequence[int], own: Collection[int], sequences: int, context: int, share: bool = True
    ) -> None:
        self.waiting: list[deque[Request]] = [deque() for _ in range(max(device_server) + 1)]
        self.running: list[list[Request | None]] = [[None] * sequences for _ in device_server]
        self._server, self._context, self._share = list(device_server), context, share
        self.pages: Mapping[int, Pages] = {}
        self.preempted = 0
        self._devices = [[d for d in sorted(own) if device_server[d] == server] for server in range(len(self.waiting))]
        self._full = [False] * len(self.waiting)  # servers whose next request has to wait for pages
        self._short = set[int]()  # devices whose pages were not enough for the last plan
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

    def let_in(self) -> list[Request]:
        """Take out all requests that have been cancelled, and give free slots to those that wait; those that left."""
        dropped = self._drop_cancelled()
        self.admit()
        return dropped

    def _drop_cancelled(self) -> list[Request]:
        dropped = []
        for device, row in enumerate(self.running):
            for slot, request in enumerate(row):
                if request is not None and request.cancelled:
                    self._leave(device, slot)
                    dropped.append(request)
        with self._lock:
            for server, queue in enumerate(self.waiting):
                dropped += [request for request in queue if request.cancelled]
                self.waiting[server] = deque(request for request in queue if not request.cancelled)
        for request in dropped:
            request.reason = "cancelled"
        return dropped

    def admit(self) -> None:
        """Give free batch slots to requests that wait, as long as there are pages for their prompts."""
        with self._lock:
            for server, (devices, queue) in enumerate(zip(self._devices, self.waiting, strict=True)):
                free = [[slot for slot, r in enumerate(self.running[device]) if r is None] for device in devices]
                while queue and any(free):
                    ((index, slot),) = admit(free, 1)
                    if self._begin(queue[0], devices[index], slot):
                        queue.popleft()
                        free[index].remove(slot)
                    else:
                        free[index] = []
                self._full[server] = bool(queue) and any(r is None for d in devices for r in self.running[d])

    def _begin(self, request: Request, device: int, slot: int) -> bool:
        # What a penalty looks at is gathered as tokens go through steps, so all of them have to.
        share = self._share and request.params.repetition_penalty == 1
        found = self.pages[device].begin(slot, request.tokens, request.prompt_tokens, share)
        if found is None:
            return False
        request.done = request.found = found
        self.running[device][slot] = request
        if request.on_begin is not None:
            request.on_begin()
        return True

    def _leave(self, device: int, slot: int) -> None:
        self.running[device][slot] = None
        self.pages[device].end(slot)

    def foreseeable(self, turn: Turn) -> bool:
        """Whether a step can be planned before the tokens of the step under way are known."""
        slots = [p for row in self._slots() for p in row if p is not None]
        return (
            turn.kind == "decode"  # a prompt may be given the slot of one that ends
            and all(request.grammar is None for request in self.in_flight)  # else what may follow is not known
            and any(progress.prefilled and not progress.ended for progress in slots)
        )

    def plan(self, turn: Turn) -> tuple[Step, list[Member]]:
        """What a step holds of the requests here. Where pages run out, those that came last begin anew later."""
        while (planned := self.plan_ahead(turn)) is None:
            for device in self._short:
                self._preempt(device)
        return planned

    def plan_ahead(self, turn: Turn) -> tuple[Step, list[Member]] | None:
        """As `plan` while a step is under way, so that nobody can begin anew: None where pages run out."""
        step = plan_step(turn, self._slots(), self._coming())
        self._short = {r.device for r in step.rows if not self.pages[r.device].extend(r.slot, r.start, r.count)}
        if self._short:
            return None
        members: list[Member] = []
        for rows in step.rows:
            request = self.running[rows.device][rows.slot]
            assert request is not None
            members.append((rows, request))
        return step, members

    def _preempt(self, device: int) -> None:
        """Take the request that came last out of its slot, to begin anew with the tokens that it has as soon as it can."""
        running = [(r.arrival_s, slot, r) for slot, r in enumerate(self.running[device]) if r is not None]
        *_, slot, request = max(running, key=lambda own: own[:2])
        self._leave(device, slot)
        request.restart()
        self.preempted += 1
        with self._lock:
            self.waiting[request.server].appendleft(request)

    def wishes(self) -> tuple[Wish, ...]:
        """What each device wants now, [D]; nothing those of other processes."""
        return wishes(self._slots(), self._coming())

    @property
    def tokens_waiting(self) -> int:
        """Tokens of the prompts that wait at a server here, the one with most of them. From any thread."""
        with self._lock:
            return max(sum(request.prompt_tokens for request in queue) for queue in self.waiting)

    def _slots(self) -> list[list[Progress | None]]:
        return [
            [None if r is None else r.progress(self._context) for r in row] if device in self.pages else []
            for device, row in enumerate(self.running)
        ]

    def _coming(self) -> list[list[int]]:
        """Tokens of the prompts that may have a slot of each device next, as many as it has slots."""
        with self._lock:
            most = len(self.running[0])
            queues = [[r.prompt_tokens for r in itertools.islice(queue, most)] for queue in self.waiting]
        return [[] if self._full[server] else queues[server] for server in self._server]

    def fail(self, rows: SlotRows, error: str) -> None:
        """End the request of a slot, which is free then, with an error."""
        request = self.running[rows.device][rows.slot]
        assert request is not None
        request.reason, request.error = "error", error
        self._leave(rows.device, rows.slot)

    def holds(self, member: Member) -> bool:
        """Whether a request still has the slot that it had when a step began."""
        rows, request = member
        return self.running[rows.device][rows.slot] is request

    def note(self, members: Sequence[Member]) -> None:
        """The rows of these members are in the cache now."""
        for rows, request in members:
            self.pages[rows.device].note(rows.slot, request.tokens, rows.start + rows.count)

    def give(self, members: Sequence[Member], tokens: Sequence[int], eos: int | None) -> list[Request]:
        """Give requests their next tokens; those that have ended with it, whose slots are free.

        Args:
            tokens: of each member.
            eos: ends any request; None: nothing does.
        """
        finished = []
        for (rows, request), token in zip(members, tokens, strict=True):
            if request.take(token, eos, self._context):
                self._leave(rows.device, rows.slot)
                finished.append(request)
        return finished
