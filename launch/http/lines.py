"""Requests as JSON lines beside HTTP: one more client of the same queue, which comes to its turn when nobody else waits."""

import asyncio
import json
import logging
import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, BinaryIO

from dancemoe_jax.errors import DanceMoEError
from launch.http.book import Refused
from launch.http.service import Service
from launch.log import discard_output
from launch.serve.lines import Line, LineShare, answer_fields, check_server, read_lines, why_unanswered
from launch.serve.requests import identity
from placement import InputError

log = logging.getLogger(__name__)

_AT_ONCE = 64  # lines that are read ahead of their turn
_SETTLE_S = 5.0  # for the last answers to be written


class LineClient:
    """Reads lines, has them answered, and writes the answers to standard output as they end.

    Args:
        stream: of lines; share: which of them are answered here.
    """

    def __init__(self, service: Service, stream: BinaryIO, share: LineShare) -> None:
        self._service, self._stream, self._share = service, stream, share
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Read from now on, in the loop that runs."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="lines", daemon=True).start()

    def close(self) -> None:
        """Read no more lines; those that were read are answered."""
        self._closed = True

    async def settle(self) -> None:
        """Wait until all lines that were read are answered: nothing is served any more."""
        self.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while self._tasks:
                    await asyncio.wait(self._tasks)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: a line may be long in coming."""
        count = 0
        try:
            for line in read_lines(self._stream):
                if self._closed:
                    return
                if self._share.takes(line):
                    count += 1
                    asyncio.run_coroutine_threadsafe(self._begin(line), loop).result()
        except (RuntimeError, CancelledError):
            return  # the loop has ended
        except Exception as error:  # the reader does not end without a word
            words = " ".join(str(error).split())
            log.error("lines cannot be read any more (%s: %s); HTTP goes on", type(error).__name__, words)
        log.info("all lines have been read: %d are answered here", count)

    async def _begin(self, line: Line) -> None:
        await self._room.acquire()
        task = asyncio.create_task(self._answer(line))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _answer(self, line: Line) -> None:
        answer: dict[str, Any] = {"id": line.number}
        try:
            if line.given is None:
                raise InputError(line.problem)
            answer["id"] = identity(line.given, line.number)
            answer |= await self._served(line.given, time.monotonic())
        except Exception as error:  # whatever it is, the line is answered
            answer["error"] = why_unanswered(line, error)
        self._print(answer)

    async def _served(self, given: dict[str, Any], begin: float) -> dict[str, Any]:
        check_server(given, self._share.names, self._share.server)
        try:
            accepted = await self._service.accept_line(given)
        except Refused as error:
            raise DanceMoEError(error.message) from None
        ending = await accepted.end()
        if ending.status != 200:
            raise DanceMoEError(ending.message)
        own = self._share.names[self._share.server]
        return answer_fields(own, accepted.request, accepted.text.messages, ending.reason, time.monotonic() - begin)

    def _print(self, answer: dict[str, Any]) -> None:
        try:
            print(json.dumps(answer), flush=True)
        except OSError as error:
            if not self._closed:
                log.error("answers to lines cannot be written any more (%s); HTTP goes on", error.strerror or error)
            self.close()
            with suppress(OSError):
                discard_output()
