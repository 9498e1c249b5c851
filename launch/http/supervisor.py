"""Starts the worker that serves, sees whether it does, and starts another one when it has ended or does nothing any more.

The worker is `python -m launch serve` with the flags that this process was given; it speaks through `launch.serve.front_link`.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.cluster.async_framing import AsyncConnection, listen_at
from launch.cluster.framing import MessageError
from launch.cluster.processes import following
from launch.http.book import Book, Refused
from launch.serve.front_messages import PURPOSE, ROLE, TO_FRONT, TO_WORKER

log = logging.getLogger(__name__)

_LOOK_S = 0.25
_ROLE_S = 10.0
_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0)  # before the next worker, by how many have ended since one served
_SILENT_S = 60.0  # without a word from a worker that does not serve yet; compiling does not silence it
_ASK_S = 600.0


class Worker:
    """A worker from its start to its end. Times are on the monotonic clock.

    Attributes:
        phase: what it does, in its own words; served: whether it has been "serving".
        steps: that it has taken; moved_at: when it last took one, or had nothing to do.
        spoke_at: when it last said anything.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process, self.phase, self.served = process, "starting", False
        self.steps = 0
        self.moved_at = self.spoke_at = time.monotonic()
        self.requests: AsyncConnection | None = None

    @property
    def serving(self) -> bool:
        return self.phase == "serving"

    def kill(self) -> None:
        """End it and its own children now."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor:
    """Keeps a worker serving what is in the book.

    Args:
        command: of the worker, without its socket.
        folder: for sockets, this user's alone.
        stuck: seconds without a step, while requests wait, after which a worker is replaced.
        hold: seconds that requests wait while none serves.
        deadline: seconds for a request to be answered.
        alone: there is no other server.

    Attributes:
        worker: the present one, or None between two.
        restarts: workers that have been replaced.
        servers: names of the cluster's servers, as the worker says.
        problem: what the last worker ended with before it served, or "".
        drained: called when the cluster drains.
        door: where other front doors find this one, or ""; doors: where they are, by server.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        secret: bytes,
        book: Book,
        *,
        stuck: float,
        hold: float,
        deadline: float,
        alone: bool = True,
    ) -> None:
        self._command, self._folder, self._secret, self._book = list(command), folder, secret, book
        self.stuck, self._hold, self._deadline = stuck, hold, deadline
        self.drained: Callable[[], None] = lambda: None
        self.worker: Worker | None = None
        self.restarts, self.served = 0, False
        self.servers: tuple[str, ...] = ()
        self.problem = ""
        self.door, self.doors = "", dict[str, str]()
        self.lost_at = time.monotonic()
        self._alone, self._joining, self._ending, self._last = alone, False, False, False
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ask_number = 0
        self._stats: dict[str, Any] | None = None

    @property
    def serving(self) -> bool:
        return self.worker is not None and self.worker.serving

    async def run(self) -> int:
        """Until `finish` has been called and the worker has ended; the exit status that follows from its own."""
        watching = asyncio.create_task(self._watch())
        fruitless = number = 0
        try:
            while True:
                number += 1
                status, served = await self._one(number)
                if self._ending or (served and status == 0):
                    return 0
                if not self.served and self._final(status):
                    return status
                fruitless = 0 if served else fruitless + 1
                self.restarts += 1
                await asyncio.sleep(_PAUSES_S[min(fruitless, len(_PAUSES_S) - 1)])
                if self._ending:
                    return 0
        finally:
            watching.cancel()
            if self.worker is not None:
                self.worker.kill()

    def _final(self, status: int) -> bool:
        """Whether a first worker's end is for good: what it was given cannot be served."""
        return (status == 2 and not self._joining) or (status > 0 and self._alone)

    async def _one(self, number: int) -> tuple[int, bool]:
        """One worker's life: its exit status, and whether it served."""
        path = str(self._folder / f"worker-{number}.sock")
        self._joining = False
        listening = await listen_at(path, self._secret, PURPOSE, self._take)
        async with listening:
            process = await asyncio.create_subprocess_exec(
                *following([*self._command, "--front-door", path]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                start_new_session=True,  # a process group of its own; uvloop knows no other way
            )
            worker = self.worker = Worker(process)
            try:
                status = await process.wait()
            finally:
                worker.kill()  # what it may have left behind
                Path(path).unlink(missing_ok=True)
        served, self.worker = worker.served, None
        if served:
            self.lost_at = time.monotonic()
        self._forget_questions()
        if not self._ending and not (served and status == 0):
            how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
            log.warning("the worker has ended (%s); %d requests wait for the next one", how, len(self._book))
        self._book.lost_worker(serving=served)
        return status, served

    @property
    def stats(self) -> dict[str, Any] | None:
        """What the worker last told of itself (`launch.serve.stats`), the last one's until the next one has any."""
        return self._stats

    # ---- what the worker says ----

    async def _take(self, connection: AsyncConnection) -> None:
        worker = self.worker
        role = (await connection.receive(ROLE, _ROLE_S))["role"]
        if worker is None:
            return
        if role == "requests":
            worker.requests = connection
            self.flush()
            await connection.receive(TO_WORKER)  # says nothing; ends with the worker
        while role == "tokens":
            self._received(worker, await connection.receive(TO_FRONT))

    def _received(self, worker: Worker, message: dict[str, Any]) -> None:
        worker.spoke_at = now = time.monotonic()
        for number in message.get("begun", ()):
            self._book.begun(number)
        for number, *tokens in message.get("tokens", ()):
            self._book.take(number, tokens)
        for number, token, *more in message.get("detailed", ()):
            self._book.take(number, [token], *more)
        for number, reason, error in message.get("ended", ()):
            # One that ended well is closed already: the book counts as the worker does.
            self._book.fail(number, 400 if reason == "refused" else 500, error or f"the worker ended it ({reason})")
        if failed := message.get("failed"):
            for number in failed["ids"]:
                self._book.fail(number, 500, f"the step that served this request has failed: {failed['why']}")
        if "tokens" in message or "detailed" in message:
            worker.moved_at = now
        if beat := message.get("beat"):
            if beat["steps"] != worker.steps:
                worker.moved_at = now
            worker.steps = beat["steps"]
            self._stats = beat.get("stats", self._stats)
            self.doors = beat.get("doors", {})
        if "servers" in message:
            self.servers = tuple(message["servers"])
        for reply in message.get("reply", ()):
            if (future := self._asked.pop(reply["id"], None)) and not future.done():
                future.set_result(reply)
        if "problem" in message:
            self.problem = message["problem"]
        for phase in message.get("phase", ()):
            self._enter(worker, phase)
        if message.get("draining"):
            self.drained()

    def _enter(self, worker: Worker, phase: str) -> None:
        worker.phase, worker.moved_at = phase, time.monotonic()
        if phase.startswith(("joining", "waiting")):
            self._joining = True
        if phase == "loading the model":
            self._joining = False
        if phase.startswith("ending: "):
            self.problem = phase.removeprefix("ending: ")
        if worker.serving:
            self.served, self.problem = True, ""
            worker.served = True
            if self.door:
                self._send({"door": self.door})
            self.flush()

    # ---- what it is told ----

    def check_hope(self) -> None:
        """Raises Refused where no worker has served for so long that requests do not wait any more."""
        if not self.serving and time.monotonic() - self.lost_at > self._hold:
            raise Refused(503, f"no worker has served for {self._hold:g} s: {self.state}", retry_after=5)

    def flush(self) -> None:
        """Send the worker what it does not have yet."""
        worker = self.worker
        if worker is None or not worker.serving or worker.requests is None:
            return
        if not any(accepted.sent for accepted in self._book):
            worker.moved_at = time.monotonic()  # it had nothing to do
        if found := self._book.unsent():
            self._send({"submit": found})
        if self._last:
            self._send({"last": True})

    def cancel(self, number: int) -> None:
        """Have the worker stop serving a request."""
        self._send({"cancel": [number]})

    def finish(self) -> None:
        """There is nothing more to come: the worker ends when all is answered."""
        self._ending = self._last = True
        if self.serving:
            self._send({"last": True})
        elif self.worker is not None:
            self.worker.kill()

    def end(self) -> None:
        """End the worker now."""
        self._ending = True
        if self.worker is not None:
            self.worker.kill()

    def drain(self) -> None:
        """Have all servers of the cluster drain."""
        if self.worker is not None and self.worker.serving:
            with suppress(ProcessLookupError):
                self.worker.process.send_signal(signal.SIGTERM)

    async def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """What the worker answers to an operator.

        Raises:
            MessageError: it does not serve, or has ended meanwhile; the text says which.
        """
        if not self.serving:
            raise MessageError("no worker serves at the moment")
        self._ask_number += 1
        future = self._asked[self._ask_number] = asyncio.get_running_loop().create_future()
        self._send({"ask": {"id": self._ask_number, "what": what, **fields}})
        return await asyncio.wait_for(future, _ASK_S)

    def _forget_questions(self) -> None:
        for future in self._asked.values():
            if not future.done():
                future.set_exception(MessageError("the worker has ended"))
        self._asked.clear()

    def _send(self, message: dict[str, Any]) -> None:
        worker = self.worker
        if worker is not None and worker.requests is not None:
            try:
                worker.requests.send(message)
            except MessageError as error:
                log.debug("the worker %s", error)
                worker.kill()  # its requests go to the next one

    # ---- how it goes ----

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            self._look_at_worker(now)
            self.flush()
            for accepted in self._book:
                if now - accepted.accepted_at > self._deadline:
                    self._book.fail(accepted.number, 504, f"not answered within {self._deadline:g} s (--deadline)")
                elif not self.serving and now - max(accepted.accepted_at, self.lost_at) > self._hold:
                    self._book.fail(accepted.number, 503, f"no worker has served for {self._hold:g} s: {self.state}")

    def _look_at_worker(self, now: float) -> None:
        worker = self.worker
        if worker is None:
            return
        if worker.serving and not any(accepted.sent for accepted in self._book):
            worker.moved_at = max(worker.moved_at, worker.spoke_at)
        if worker.serving and self.stuck_for(now) > self.stuck:
            log.warning("no step has ended for %.1f s while requests wait; the worker is replaced", self.stuck_for(now))
            worker.kill()
        elif worker.serving and now - worker.spoke_at > self.stuck:
            log.warning("the worker has said nothing for %.0f s; it is replaced", now - worker.spoke_at)
            worker.kill()
        elif not worker.serving and now - worker.spoke_at > max(self.stuck, _SILENT_S):
            log.warning(
                "the worker has said nothing for %.0f s (%s); it is replaced", now - worker.spoke_at, worker.phase
            )
            worker.kill()

    def stuck_for(self, now: float) -> float:
        """Seconds since the worker last took a step, or had nothing to do."""
        worker = self.worker
        return now - worker.moved_at if worker is not None and worker.serving else 0.0

    @property
    def state(self) -> str:
        """What the worker does, in words."""
        if self.worker is None:
            return "the worker has ended, and the next one is about to start"
        return "serving" if self.worker.serving else f"the worker is {self.worker.phase}"
