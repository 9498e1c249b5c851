"""Requests from a front door (launch/http) to a host, and their tokens back. The front door owns them: it starts this
process, and gives what is unfinished to the next one if this one ends.

    front door -> here    {submit, cancel, last, ask}    here -> front door    {phase, begun, tokens, ended, beat, ...}

Each way has a connection of its own, so that one thread reads and another writes.
"""

import logging
import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dancemoe_jax.errors import DanceMoEError
from dancemoe_jax.inference.sampling_params import SamplingParams
from dancemoe_jax.text.grammar import Grammars
from launch.cluster.framing import Connection, MessageError, connect
from launch.cluster.jax_runtime import leave_at_once
from launch.engine.host import Host, Stream
from launch.engine.loading import Loaded
from launch.engine.request import Request
from launch.migration.worker import MigrationWorker
from launch.serve.doors import Doors
from launch.serve.front_messages import LONGEST, PURPOSE, SUBMITTED, TO_WORKER
from launch.serve.stats import Stats
from placement import Cluster

log = logging.getLogger(__name__)

_CONNECT_S = 10.0
_BEAT_S = 0.5
_FLUSH_S = 5.0
# After a message, before the next: tokens that come meanwhile go with it, instead of waking three processes for each. As
# long as a screen shows one picture; what somebody waits for, an answer's first token or its end, goes at once.
_TOGETHER_S = 0.016


class FrontLink:
    """What a worker hears from its front door and says to it; stands where a `Feeder` stands for JSON lines.

    Args:
        path: of the front door's Unix socket; secret: of the cluster; grammars: of the model's answers.

    Attributes:
        problem: why it cannot go on, or "": never; without a front door the process ends at once.
    """

    problem = ""

    def __init__(self, path: str, secret: bytes, grammars: Grammars) -> None:
        self._grammars = grammars
        self._reading = self._open(path, secret, "requests")
        self._writing = self._open(path, secret, "tokens")
        self._host: Host | None = None
        self._streams: dict[int, _Tokens] = {}
        self._left: dict[int, Request] = {}  # what the loop's end has cut off
        self._count, self._last, self._over = threading.Lock(), False, threading.Event()
        self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._stats: Stats | None = None
        self._doors, self._names = Doors(), tuple[str, ...]()
        for name, target in (("front door's requests", self._read), ("tokens", self._write), ("beat", self._beat)):
            threading.Thread(target=target, name=name, daemon=True).start()

    @staticmethod
    def _open(path: str, secret: bytes, role: str) -> Connection:
        connection = connect(path, secret, PURPOSE, _CONNECT_S)
        connection.send({"role": role})
        return connection

    # ---- what `launch.serve.server` calls ----

    def phase(self, name: str) -> None:
        """Say what this process does on its way to serving."""
        self._say("phase", name)

    def start(self, host: Host, cluster: Cluster) -> None:
        """Requests go to a host from now on."""
        self._host = host
        self.take_in(cluster)
        self.phase("serving")

    def take_in(self, cluster: Cluster) -> None:
        """The cluster has other servers from now on."""
        self._names = cluster.names
        self._say("servers", list(cluster.names))

    def watch(self, host: Host, loaded: Loaded, worker: MigrationWorker | None) -> None:
        """Tell the front door what a program does."""
        self._stats = Stats(host, loaded, worker)

    @property
    def pending(self) -> int:
        """Requests without a full answer."""
        return len(self._streams)

    def close(self) -> None:
        """The cluster drains: the front door is to send what it has accepted, and no more."""
        self._say("draining", True)

    def settle(self, seconds: float) -> None:
        """Wait at most so long until all that was said has been sent."""
        sent = threading.Event()
        self._say("sent", sent)
        sent.wait(seconds)

    def end_because(self, problem: str) -> None:
        """Say why this process ends before it has served."""
        self._say("problem", " ".join(problem.split()))
        self.settle(_FLUSH_S)

    def failed_step(self, why: str) -> None:
        """A step has failed: its requests are told so, the others go on in the next process. Does not return."""
        host = self._host
        taken = {id(request) for request in host.engine.taking} if host else set()
        open_here = {number: stream.request for number, stream in list(self._streams.items())}
        ids = [number for number, request in {**open_here, **self._left}.items() if id(request) in taken]
        log.error("a step has failed, and %d requests with it (%s); the worker starts again", len(ids), why)
        self._say("failed", {"ids": ids, "why": why})
        self.settle(_FLUSH_S)
        leave_at_once()

    # ---- from the front door ----

    def _read(self) -> None:
        try:
            while True:
                self._take(self._reading.receive(TO_WORKER, None, LONGEST))
        except MessageError:
            leave_at_once()  # the front door has gone, and with it all that asks

    def _take(self, message: Mapping[str, Any]) -> None:
        for given in message.get("submit", ()):
            self._submit(given)
        for number in message.get("cancel", ()):
            if stream := self._streams.get(number):
                stream.cancel()
        if message.get("last"):
            with self._count:
                self._last = True
            self._finish_if_over()
        self._doors.own = message.get("door", self._doors.own)
        if "ask" in message:
            threading.Thread(target=self._reply, args=(message["ask"],), name="operator", daemon=True).start()

    def _submit(self, given: Mapping[str, Any]) -> None:
        number = given["id"]
        assert self._host is not None
        try:
            fields = {name: given[name] for name in SUBMITTED}
            params: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in fields.pop("params").items()
            }
            request = Request(
                self._host.server,
                fields["prompt"],
                fields["max_tokens"],
                time.monotonic(),
                params=SamplingParams(**params),
                label=fields["label"],
                stop_token_ids=frozenset(fields["stop_token_ids"]),
                output=fields["output"],
                logprobs=fields["logprobs"],
                wants_servers=fields["servers"],
                grammar=self._grammars.start(fields["schema"], fields["output"]) if fields["schema"] else None,
            )
            request.restart()
            request.on_begin = lambda: self._say("begun", number, hurry=False)
            stream = _Tokens(request, number, self)
            with self._count:
                self._streams[number] = stream
            self._host.submit(request, stream)
        except DanceMoEError as error:
            self._streams.pop(number, None)
            self._say("ended", [number, "refused", str(error)])

    def _reply(self, request: Mapping[str, Any]) -> None:
        reply: dict[str, Any] = {"id": request.get("id")}
        try:
            assert self._stats is not None
            reply["reply"] = self._stats.answer(request)
        except Exception as error:  # whatever it is, the operator is told
            reply["error"] = " ".join(str(error).split()) or type(error).__name__
        self._say("reply", reply)

    # ---- to the front door ----

    def given(self, number: int, token: int, *more: Any, first: bool) -> None:
        """A request has been given a token, its first one perhaps; more: its log probabilities and who served it, where they
        are wanted."""
        if more:
            self._say("detailed", [number, token, *more], hurry=first)
        else:
            self._say("tokens", (number, token), hurry=first)

    def _say(self, kind: str, value: Any, *, hurry: bool = True) -> None:
        """Have something sent, from any thread."""
        self._news.put((kind, value))
        if hurry:
            self._hurry.set()

    def ended(self, number: int, request: Request) -> None:
        """A request has ended here."""
        with self._count:
            self._streams.pop(number, None)
        # One that the front door did not cancel goes on in the next process: this one ends.
        if request.reason != "cancelled" or request.cancelled:
            self._say("ended", [number, request.reason, request.error])
        else:
            self._left[number] = request
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        with self._count:
            over = self._last and not self._streams
        if over and self._host is not None:
            self._host.finish()

    def _beat(self) -> None:
        while True:
            host, stats = self._host, self._stats
            beat: dict[str, Any] = {"steps": sum(host.engine.steps.values()) if host else 0}
            if stats is not None:
                with suppress(AttributeError, RuntimeError):  # the program is on its way to the next one
                    beat["stats"] = stats.report()
            if host is not None and self._names:
                beat["doors"] = self._doors.look(host.channel, self._names[host.server], self._names)
            self._say("beat", beat)
            time.sleep(_BEAT_S)

    def _write(self) -> None:
        try:
            while True:
                first = self._news.get()
                self._hurry.clear()
                self._send_all(first)
                self._hurry.wait(_TOGETHER_S)
        except MessageError:
            leave_at_once()

    def _send_all(self, first: tuple[str, Any]) -> None:
        """One message with all that there is to say now."""
        message: dict[str, Any] = {}
        sent: list[threading.Event] = []
        tokens: dict[int, list[int]] = {}
        for kind, value in _waiting(first, self._news):
            if kind == "tokens":
                number, token = value
                tokens.setdefault(number, [number]).append(token)
            elif kind == "sent":
                sent.append(value)
            elif kind in ("begun", "detailed", "ended", "phase", "reply"):
                message.setdefault(kind, []).append(value)
            else:
                message[kind] = value
        if tokens:
            message["tokens"] = list(tokens.values())
        if message:
            self._writing.send(message)
        for event in sent:
            event.set()


def _waiting(first: tuple[str, Any], news: "queue.SimpleQueue[tuple[str, Any]]") -> list[tuple[str, Any]]:
    found = [first]
    while True:
        try:
            found.append(news.get_nowait())
        except queue.Empty:
            return found


class _Tokens(Stream):
    """A request of the front door: its tokens go there."""

    def __init__(self, request: Request, number: int, link: FrontLink) -> None:
        super().__init__(request)
        self._number, self._link = number, link
        self._detailed = request.logprobs is not None or request.wants_servers

    def _take(self, token: int) -> bool:
        request, more = self.request, ()
        if self._detailed:
            logprobs = request.last_logprobs if request.logprobs is not None else None
            more = (logprobs, request.served_by) if request.wants_servers else (logprobs,)
        self._link.given(self._number, token, *more, first=len(request.output) == request.kept + 1)
        return False

    def close(self) -> None:
        self._link.ended(self._number, self.request)
