"""Requests as JSON lines in, answers as JSON lines out: every line that is read gets exactly one answer."""

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from dancemoe_jax.errors import DanceMoEError
from launch.engine.host import Host
from launch.log import discard_output
from launch.serve.lines import Line, LineShare, answer_fields, check_server, read_lines, why_unanswered
from launch.serve.requests import RequestMaker, identity
from placement import Cluster, InputError

log = logging.getLogger(__name__)

_AT_ONCE = 64  # requests of a server that are read ahead of their turn


class Feeder:
    """Requests from lines to a host, and their answers to standard output as they end.

    Args:
        shared: every server reads the same lines, and answers those that name it and its share of those that name none;
            otherwise all lines are for this server.
        shares: takes a share of the lines that name no server; one that has come later does not.

    Attributes:
        finished: set once all lines that were read are answered and no more are read.
        problem: why not every line was read or answered, or "".
    """

    host: Host

    def __init__(self, maker: RequestMaker, stream: BinaryIO, shared: bool, shares: bool = True) -> None:
        self.finished, self.problem = threading.Event(), ""
        self._maker, self._stream, self._shared, self._shares = maker, stream, shared, shares
        self._printing = threading.Lock()
        self._room = threading.Semaphore(_AT_ONCE)
        self._count, self._open, self._started, self._closed = threading.Lock(), 0, False, False
        self._share: LineShare | None = None
        self._pool = ThreadPoolExecutor(_AT_ONCE, "answer")

    def start(self, host: Host, cluster: Cluster) -> None:
        """Feed a host from now on."""
        self.host, self._started = host, True
        self.take_in(cluster)
        if self._closed:
            self._finish()
            return
        share = LineShare(self.names, host.server, self._shared, self._shares)
        self._share = share
        threading.Thread(target=self._feed, args=(share,), name="requests", daemon=True).start()

    def take_in(self, cluster: Cluster) -> None:
        """The cluster has other servers from now on."""
        self.names = cluster.names
        if self._share is not None:
            self._share.names = cluster.names

    @property
    def pending(self) -> int:
        """Lines that have been read and not yet answered."""
        return self._open

    def close(self) -> None:
        """Read no more lines; what has been read is answered, and then the host has no more requests to come."""
        with self._count:
            self._closed = True
            over = not self._open
        if over:
            self._finish()

    def settle(self, seconds: float) -> None:
        """Read no more lines, and wait at most so long until all that were read are answered."""
        self.close()
        self.finished.wait(seconds)

    def _feed(self, share: LineShare) -> None:
        """Read all lines and have those that are this server's answered."""
        try:
            for line in read_lines(self._stream):
                if share.takes(line):
                    begin = time.monotonic()
                    self._room.acquire()
                    with self._count:
                        self._open += 1
                    self._pool.submit(self._answer, line, begin)
                if self._closed:
                    break
        except Exception as error:  # the reader does not end without a word
            self._fail(f"requests cannot be read any more ({type(error).__name__}: {' '.join(str(error).split())})")
        self.close()

    def _answer(self, line: Line, begin: float) -> None:
        answer: dict[str, Any] = {"id": line.number}
        try:
            try:
                if line.given is None:
                    raise InputError(line.problem)
                answer["id"] = identity(line.given, line.number)
                answer |= self._served(line.given, begin)
            except Exception as error:  # whatever it is, the line is answered
                answer["error"] = why_unanswered(line, error)
            self._print(answer)
        finally:
            self._answered()

    def _served(self, given: dict[str, Any], begin: float) -> dict[str, Any]:
        """What is answered. Raises InputError, DanceMoEError where nothing can be."""
        check_server(given, self.names, self.host.server)
        request, text = self._maker.make(given, self.host.server, begin)
        stream = self.host.submit(request)
        for _ in stream:
            pass
        text.finish()
        if stream.reason == "error":
            raise DanceMoEError(request.error)
        own = self.names[self.host.server]
        return answer_fields(own, request, text.messages, stream.reason, time.monotonic() - begin)

    def _print(self, answer: dict[str, Any]) -> None:
        with self._printing:
            try:
                print(json.dumps(answer), flush=True)
            except OSError as error:
                discard_output()
                self._fail(f"answers cannot be written any more ({error.strerror or error})")

    def _answered(self) -> None:
        self._room.release()
        with self._count:
            self._open -= 1
            over = self._closed and not self._open
        if over:
            self._finish()

    def _finish(self) -> None:
        self.finished.set()
        if self._started:
            self.host.finish()

    def _fail(self, problem: str) -> None:
        if not self.problem:
            self.problem = problem
            log.error("server %s: %s; it ends", self.names[self.host.server], problem)
            self._closed = True
            self.host.stop()
