"""The requests that a front door has accepted: each is answered once, whatever becomes of the worker that serves it.

Knows no HTTP and no worker: tokens come in by number, and those who wait for an answer take what has come.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple

from launch.engine.request import Logprobs, Request
from launch.http.pace import Pace
from launch.serve.requests import Text

_SUSPECT = 2  # workers that ended so before a request is tried alone
_CALM_S = 10.0  # after a request that would have waited too long, until all counts as usual again
_FRUITLESS = 3  # workers that a request may outlive without a token in between: it may be what ends them


class Ending(NamedTuple):
    """Why a request ended: "stop" or "length"; otherwise no answer could be given, and `status` is HTTP's for it."""

    reason: str
    status: int = 200
    message: str = ""


class Token(NamedTuple):
    """A token of an answer; its log probabilities and its calls of experts by the server that served them, where they are
    wanted; and for those with either, where the text ended before it."""

    id: int
    logprobs: Logprobs | None = None
    start: int = 0
    served_by: list[int] | None = None


class Refused(Exception):
    """A request that cannot be accepted, or answered. Attributes: status of HTTP, and the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after


class Accepted:
    """One accepted request. Times are on the monotonic clock.

    Attributes:
        request: its prompt, parameters and tokens so far; text: that of these tokens.
        schema: the JSON schema that its answer has to fit, as text; None: it may be anything.
        tokens: of the answer; ending: why it ended, None until it has.
        sent: whether the present worker has it; running: whether that has given it a batch slot, slot_at when; begun_at: when
            it first had one.
        usual: it came when nobody was refused, in no bunch, and one worker answered it.
        away: ends its serving by another front door; None: it is served here, or by nobody yet.
        parent: the trace that it is part of, as its client says (`traceparent`), or "".
    """

    def __init__(
        self, number: int, request: Request, text: Text, logprobs: int | None, label: str, schema: str | None
    ) -> None:
        self.number, self.request, self.text, self.logprobs, self.label = number, request, text, logprobs, label
        self.schema = schema
        self.tokens: list[Token] = []
        self.ending: Ending | None = None
        self.sent = False
        self.accepted_at = time.monotonic()
        self.begun_at = self.slot_at = self.first_at = self.last_at = 0.0
        self.running, self.usual, self.parent = False, True, ""
        self.away: Callable[[], object] | None = None
        self.fruitless, self.had = 0, 0
        self._news, self._over = asyncio.Event(), asyncio.Event()

    async def changes(self) -> AsyncIterator[None]:
        """Gives control whenever there is more, at the end for the last time."""
        while True:
            self._news.clear()
            yield
            if self.ending is not None and not self._news.is_set():
                return
            await self._news.wait()

    async def end(self) -> Ending:
        """Wait for the end."""
        await self._over.wait()
        assert self.ending is not None
        return self.ending

    def tell(self) -> None:
        """Have those who wait look at what has changed."""
        self._news.set()
        if self.ending is not None:
            self._over.set()


class Book:
    """All that is accepted and not yet answered, in the order it came.

    Args:
        most: requests that may be under way at once; pace: how long a newcomer may wait for its turn, None as long as it takes.
        context: longest sequence; eos: token that ends an answer.
        cancel: called with the number of a request whose worker is to stop.

    Attributes:
        refusing: why no more are accepted, as HTTP's status and a text, or None.
        handed, returned: requests that were given to other front doors, and those that came back unanswered.
        ended: called with every request that has ended; changed: set when one has, for those who wait for room.
    """

    def __init__(
        self,
        most: int,
        context: int,
        eos: int | None,
        pace: Pace | None = None,
        cancel: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.most = most
        self.ended: list[Callable[[Accepted], None]] = []
        self.cancel_in_worker = cancel
        self.refusing: tuple[int, str] | None = None
        self._context, self._eos = context, eos
        self._open: dict[int, Accepted] = {}
        self._number = 0
        self._pace = pace
        self.handed = self.returned = 0
        self.changed = asyncio.Event()
        self._refused_at = -math.inf
        self._bunched = False  # whether the last that was asked for would wait longer than at other times
        self._flowing = False  # whether the present worker serves what it is sent

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Accepted]:
        return iter(list(self._open.values()))

    def get(self, number: int) -> Accepted | None:
        return self._open.get(number)

    def check_room(self, count: int) -> None:
        """Raises Refused where so many more cannot be accepted now."""
        if self.refusing is not None:
            raise Refused(*self.refusing, retry_after=5)
        if count > self.most:
            raise Refused(400, f"{count} answers in one request; at most {self.most} can be under way (--queue)")
        if len(self._open) + count > self.most:
            raise Refused(429, f"{len(self._open)} requests are under way, and no more fit; try again", retry_after=1)
        wait, longest = self.wait()
        self._bunched = self._pace is not None and wait > self._pace.longest(False)
        if wait > longest:
            self._refused_at = time.monotonic()
            message = (
                f"a request would wait {wait:.2g} s for its turn, longer than the {longest:.2g} s of --wait; try again"
            )
            raise Refused(429, message, retry_after=max(1, math.ceil(wait - longest)))

    def wait(self) -> tuple[float, float]:
        """Seconds that a newcomer would wait for its turn, and how many it may. While no worker serves, all wait for one."""
        if self._pace is None or not self._flowing:
            return 0.0, math.inf
        everyone = [accepted for accepted in self._open.values() if accepted.away is None]
        running = sum(accepted.running for accepted in everyone)
        first = next((accepted.accepted_at for accepted in everyone if not accepted.running), math.inf)
        oldest = max(0.0, time.monotonic() - first)
        return self._pace.wait(len(everyone) - running, running, oldest), self._pace.longest(self._calm)

    @property
    def _calm(self) -> bool:
        """Whether nobody has been refused for a while."""
        return time.monotonic() - self._refused_at > _CALM_S

    def accept(
        self, request: Request, text: Text, logprobs: int | None = None, label: str = "", schema: str | None = None
    ) -> Accepted:
        """Own a request from now on. `check_room` has to be asked first."""
        self._number += 1
        accepted = Accepted(self._number, request, text, logprobs, label, schema)
        accepted.usual = self._calm and not self._bunched
        self._open[self._number] = accepted
        return accepted

    def begun(self, number: int, *, here: bool = True) -> None:
        """A worker, the one here or another server's, has given a request a batch slot."""
        self._flowing |= here
        if (accepted := self._open.get(number)) and not accepted.running:
            accepted.running, accepted.slot_at = here, time.monotonic()
            accepted.begun_at = accepted.begun_at or accepted.slot_at

    def take(
        self, number: int, tokens: Sequence[int], logprobs: Any = None, served_by: list[int] | None = None
    ) -> None:
        """A worker has given a request its next tokens; a single one where there is more to say of it."""
        accepted = self._open.get(number)
        if accepted is None:
            return
        accepted.last_at = time.monotonic()
        accepted.first_at, accepted.fruitless = accepted.first_at or accepted.last_at, 0
        start = len(accepted.text.text) if logprobs is not None or served_by is not None else 0
        found = None if logprobs is None else (logprobs[0], [(int(i), value) for i, value in logprobs[1]])
        for token in tokens:
            ended = accepted.request.take(token, self._eos, self._context)
            accepted.tokens.append(Token(token, found, start, served_by))
            if ended:
                accepted.text.finish()
                by_worker = token in accepted.request.stop_token_ids
                return self._end(accepted, Ending(accepted.request.reason), by_worker=by_worker)
        accepted.tell()

    def fail(self, number: int, status: int, message: str) -> None:
        """Answer a request with an error; one that is not open any more is left alone."""
        if accepted := self._open.get(number):
            self._end(accepted, Ending("error", status, message), by_worker=False)

    def _end(self, accepted: Accepted, ending: Ending, *, by_worker: bool) -> None:
        if accepted.ending is None:
            accepted.ending = ending
            del self._open[accepted.number]
            if accepted.away is not None:
                accepted.away()
            if accepted.sent and not by_worker and ending.reason != "length":
                self.cancel_in_worker(accepted.number)
            accepted.tell()
            if self._pace is not None and ending.status == 200 and accepted.running:
                now = time.monotonic()
                self._pace.served(now - accepted.slot_at, now - accepted.accepted_at if accepted.usual else None)
            for listener in self.ended:
                listener(accepted)
            self.changed.set()

    def lost_worker(self, *, serving: bool) -> None:
        """The worker has ended: what it had goes to the next one. serving: it had begun to serve."""
        self._flowing = False
        for accepted in self:
            if accepted.sent and serving:
                gained = len(accepted.tokens) > accepted.had
                accepted.fruitless = 0 if gained else accepted.fruitless + 1
                accepted.had = len(accepted.tokens)
            if accepted.away is None:
                accepted.sent = accepted.running = accepted.usual = False
            if accepted.fruitless >= _FRUITLESS:
                self.fail(accepted.number, 500, f"{_FRUITLESS} workers have ended while they served this request")

    def unsent(self) -> list[dict[str, Any]]:
        """Requests that the present worker does not have and is to have now, as it takes them; they count as sent from now on.

        Where workers have ended one after another, those that they served are tried one at a time, until each has a token:
        the one that ends workers does not take the others with it.
        """
        everyone = [accepted for accepted in self._open.values() if accepted.away is None]
        suspects = [accepted for accepted in everyone if accepted.fruitless >= _SUSPECT]
        if suspects:
            chosen = [] if any(accepted.sent for accepted in everyone) else suspects[:1]
        else:
            chosen = [accepted for accepted in everyone if not accepted.sent]
        for accepted in chosen:
            accepted.sent = True
        return [described(accepted) for accepted in chosen]


def described(accepted: Accepted) -> dict[str, Any]:
    """A request as a worker takes it (`launch.serve.front_messages.SUBMITTED`)."""
    request = accepted.request
    # Stop texts and the text itself are the front door's to watch.
    params = {name: getattr(request.params, name) for name in _PARAMS}
    return {
        "id": accepted.number,
        "prompt": request.prompt,
        "output": request.output,
        "max_tokens": request.max_tokens,
        "params": params,
        "stop_token_ids": sorted(request.stop_token_ids),
        "logprobs": accepted.logprobs,
        "schema": accepted.schema,
        "servers": request.wants_servers,
        "label": accepted.label,
    }


_PARAMS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
