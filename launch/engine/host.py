"""The serving loop of a process: it steps the engine with the others, sleeps when no server has work, and streams tokens."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from launch.cluster.channel import open_channel
from launch.engine.engine import Engine
from launch.engine.request import Request
from placement.scheduling import Wish

_SLEEP_S = 0.2  # how often a sleeping server looks whether it is to end


class Stream:
    """The tokens of one request as they come.

    Iterating waits for each; `cancel` ends it from any thread. `reason` tells why it has ended: "stop", "length",
    "cancelled" or "error" (`request.error` says which); it is "" until then.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._on_token, request.on_token = request.on_token, self._take

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            yield token
        self.close()  # a second iteration finds the end

    @property
    def reason(self) -> str:
        return self.request.reason

    def cancel(self) -> None:
        self.request.cancelled = True

    def close(self) -> None:
        """Mark the end of the tokens; the loop calls it."""
        self._tokens.put(None)

    def _take(self, token: int) -> bool:
        self._tokens.put(token)
        return bool(self._on_token and self._on_token(token))


class Host:
    """A server's engine and the loop that steps it together with the others.

    Args:
        server: index of this server, or of the one whose requests enter here.
        name: goes before all names on its channel; hosts that follow each other need names of their own.

    Attributes:
        channel: to the other servers.
        between: called by the loop between two steps, and now and then while it sleeps; true asks for another call
            soon.
    """

    def __init__(self, engine: Engine, server: int, name: str = "") -> None:
        self.engine, self.server, self._name = engine, server, name
        self.channel = open_channel(name)
        self.between: Callable[[], bool] = lambda: False
        self._sleep_number = 0
        self._streams: dict[int, Stream] = {}
        self._lock = threading.Lock()
        self._looping = self._over = False  # whether it takes steps; whether it never will again

    def submit(self, request: Request, stream: Stream | None = None) -> Stream:
        """Queue a request, from any thread; one that comes after the loop has ended for good is cancelled.

        Args:
            stream: takes its tokens; default: one that is made here.

        Raises:
            RequestError: its prompt does not fit the model.
        """
        stream = stream or Stream(request)
        with self._lock:
            if self._over:
                request.reason = "cancelled"
                stream.close()
                return stream
            self.engine.submit(request)
            self._streams[id(request)] = stream
        self.wake()
        return stream

    def finish(self) -> None:
        """Accept no more requests here; once that is so on all servers, and all are answered, the loop ends."""
        self.engine.done = True
        self.wake()

    def stop(self) -> None:
        """End the loop everywhere after the next step, whatever is running."""
        self.engine.stop = True

    def run(self) -> bool:
        """Take steps together with the others until all agree to end (false), or to leave for another program (true), in
        which `move` goes on."""
        engine, moves = self.engine, False
        self._looping = True
        try:
            while not engine.leaving:
                for request in engine.step():
                    request.finished_s = time.monotonic()
                    self._forget(request)
                self.between()
                if engine.asleep and not engine.leaving:
                    self._sleep()
            moves = not engine.ended
        finally:
            with self._lock:
                self._looping = False
            if not moves:
                self.close()
        return moves

    def close(self) -> None:
        """Serve no more: requests without a full answer are cancelled."""
        with self._lock:
            self._over, left = True, list(self._streams.values())
        for stream in left:
            stream.request.reason = stream.request.reason or "cancelled"
            self._forget(stream.request)

    def move(self, engine: Engine) -> None:
        """Go on with an engine of another program: unfinished requests begin anew there, with the tokens that they have."""
        with self._lock:
            engine.done, engine.stop = self.engine.done, self.engine.stop
            for stream in self._streams.values():
                stream.request.restart()
                engine.submit(stream.request)
            self.engine, self.channel, self._sleep_number = engine, open_channel(self._name), 0
            self.between = lambda: False

    def _sleep(self) -> None:
        while True:
            more = self.between()
            if self._wanted():
                self._wake_all()
            woken = self.channel.get(f"sleep/{self._sleep_number}", 0.0 if more else _SLEEP_S)
            if woken is not None:
                break
        # All have received the one before the last, or they could not sleep again.
        if jax.process_index() == 0:
            self.channel.drop(f"sleep/{self._sleep_number - 2}")
        self._sleep_number += 1
        self.engine.wake(Wish(int(woken), False))

    def _wanted(self) -> bool:
        """Whether there is something to do, or something that the others do not know yet."""
        engine, sent, own = self.engine, self.engine.received, self.engine.own[0]
        progress = (sent.command[own], sent.stage[own], sent.given_up[own])
        news = (
            (engine.done and not sent.done[own])
            or engine.reform > sent.reform[own]
            or engine.migration_progress != progress
        )
        return not engine.idle or engine.stop or bool(news)

    def wake(self) -> None:
        """Have the loop look for what has changed, if it sleeps; from any thread."""
        with self._lock:
            if self._looping and self.engine.asleep:
                self._wake_all()

    def _wake_all(self) -> None:
        """What ends the sleep says how many tokens wait, so that all give the first step the same size."""
        self.channel.offer(f"sleep/{self._sleep_number}", b"%d" % max(1, self.engine.batch.tokens_waiting))

    def _forget(self, request: Request) -> None:
        with self._lock:
            stream = self._streams.pop(id(request), None)
        if stream:
            stream.close()


@contextmanager
def ending(host: Host) -> Iterator[None]:
    """Inside the block the first SIGINT or SIGTERM ends the loop everywhere, in step; a second one ends this process."""

    def handle(number: int, frame: Any) -> None:
        if host.engine.stop:
            raise KeyboardInterrupt
        host.stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
