"""Lines of requests: a newline alone splits them, each has a number and a bounded length, and none of them is lost.

What a line holds becomes a request in `launch.serve.requests`.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from dancemoe_jax.errors import DanceMoEError
from dancemoe_jax.text.harmony import Messages
from launch.engine.request import Request
from placement import InputError
from placement.files import parse_json

log = logging.getLogger(__name__)

LONGEST = 8 * 2**20  # bytes of a line


class Line(NamedTuple):
    """A line that was read.

    Attributes:
        number: from 1; given: the JSON object on it, or None; problem: why there is none, or "".
    """

    number: int
    given: dict[str, Any] | None
    problem: str = ""


def why_unanswered(line: Line, error: Exception) -> str:
    """What is said in place of an answer: what is known to happen in its own words, anything else with its name."""
    words = " ".join(str(error).split())
    if not isinstance(error, InputError | DanceMoEError):
        log.debug("line %d", line.number, exc_info=error)
        words = f"cannot be served ({type(error).__name__}: {words[:500]})"
    return f"line {line.number}: {words}"


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """All lines of a stream that hold something, as they come. A byte order mark before the first is none of it."""
    number = 0
    while data := stream.readline(LONGEST + 1):
        number += 1
        whole = data.endswith(b"\n") or len(data) <= LONGEST
        while not whole and (more := stream.readline(LONGEST)):
            whole = more.endswith(b"\n")
        if len(data) > LONGEST and not data.endswith(b"\n"):
            yield Line(number, None, f"longer than {LONGEST} bytes; send a shorter one")
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.strip():
            yield _parse(number, data)


def _parse(number: int, data: bytes) -> Line:
    try:
        given = parse_json(data.decode("utf-8"), "it", any_number=True)
    except UnicodeDecodeError as error:
        return Line(number, None, f"not UTF-8 (byte {error.start + 1}); send UTF-8")
    except InputError as error:
        problem = str(error).removeprefix("it: ")
        reason = problem.removeprefix("not valid JSON, perhaps truncated: ")
        return Line(number, None, problem if reason == problem else f"not JSON ({reason})")
    if not isinstance(given, dict):
        return Line(number, None, "must be a JSON object with prompt or messages")
    return Line(number, given)


@dataclass
class LineShare:
    """Which lines a server answers.

    Attributes:
        names: of all servers; server: index of this one.
        shared: every server reads the same lines, and answers those that name it and its share of those that name none;
            otherwise all lines are for this server.
        shares: takes a share of the lines that name no server; one that has come later does not.
        servers: how many share those lines.
    """

    names: Sequence[str]
    server: int
    shared: bool
    shares: bool = True
    servers: int = field(init=False)
    _unnamed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.servers = len(self.names)

    def takes(self, line: Line) -> bool:
        """Whether this server answers the next line; to be asked once for each, in order."""
        named = None if line.given is None else line.given.get("server")
        turn = self._unnamed
        self._unnamed += named is None
        if not self.shared:
            return True
        if named is None:
            return self.shares and turn % self.servers == self.server
        return named == self.names[self.server] or (named not in self.names and self.server == 0)


def check_server(given: Mapping[str, Any], names: Sequence[str], server: int) -> None:
    """Raises InputError where a line names another server than this one."""
    named, own = given.get("server"), names[server]
    if named is not None and named != own:
        if named in names:
            raise InputError(f"server {named!r} is another than {own}, whose lines these are; send it there")
        raise InputError(f"server {str(named)[:100]!r} is unknown; known are {', '.join(names)}")


def answer_fields(server: str, request: Request, said: Messages, reason: str, seconds: float) -> dict[str, Any]:
    """What an answer has beside its line's identity."""
    output = request.output
    if output and output[-1] in request.stop_token_ids:
        output = output[:-1]
    return {
        "server": server,
        "text": said.content,
        **({"reasoning": said.reasoning} if said.reasoning else {}),
        "tokens": output,
        "prompt_tokens": len(request.prompt),
        "finish_reason": reason,
        "seconds": round(seconds, 4),
    }


def open_lines(file: str) -> BinaryIO:
    """What the lines are read from; "-" is standard input.

    That is opened anew: Python closes `sys.stdin` when it ends, and aborts where a thread waits in it for a line.

    Raises:
        InputError: the file cannot be read.
    """
    if file == "-":
        return open(os.dup(sys.stdin.fileno()), "rb")
    try:
        return open(file, "rb")
    except OSError as error:
        raise InputError(f"--requests {file}: cannot be read ({error.strerror})") from None
