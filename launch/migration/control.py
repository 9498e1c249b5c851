"""Requests to a cluster that serves, over a socket in its state folder: a message each way (`launch.cluster.framing`)."""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.cluster.framing import Connection, Listener, MessageError, connect
from placement import InputError

NAME = "control.sock"
PURPOSE = "control"
LONGEST = 2**26  # bytes of a message: placements of large models travel in it
_READ_S = 30.0
_LONGEST_PATH = 100  # of a socket; the system's limit is 108
_CONNECT_S = 5.0
_OPTIONAL = {"dry?": bool, "source?": str}
REQUESTS = {
    "status": {},
    "plan": _OPTIONAL,
    "abort": {},
    "to": {"placement": dict, **_OPTIONAL},
    "memory": {"memory": dict, **_OPTIONAL},
    "add": {"cluster": dict, **_OPTIONAL},
}
_ALL = {f"{name.removesuffix('?')}?": kind for fields in REQUESTS.values() for name, kind in fields.items()}


class ControlServer:
    """Answers requests until it is closed, each in a thread of its own.

    Args:
        secret: of the cluster.
        answer: may raise InputError, whose text is the answer then.

    Raises:
        InputError: the folder's path is too long, or another cluster serves with it.
    """

    def __init__(self, state: Path, secret: bytes, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._path, self._answer = _path(state), answer
        if self._path.exists():
            if _answers(self._path):
                raise InputError(f"--state {state}: another cluster serves with it; stop it or give another folder")
            self._path.unlink()
        listening = socket.socket(socket.AF_UNIX)
        before = os.umask(0o077)  # nobody else's business
        try:
            listening.bind(str(self._path))
        finally:
            os.umask(before)
        listening.listen()
        self._listener = Listener(listening, secret, PURPOSE, self._reply)

    def close(self) -> None:
        """Answer no more."""
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _reply(self, connection: Connection) -> None:
        with connection:
            try:
                reply = self._answer(checked(connection.receive({"what": str, **_ALL}, _READ_S, LONGEST)))
            except (InputError, MessageError) as error:
                reply = {"error": " ".join(str(error).split())}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                reply = {"error": f"not a request ({type(error).__name__}: {' '.join(str(error).split())})"}
            connection.send(reply)


def checked(message: dict[str, Any]) -> dict[str, Any]:
    """A request that has the fields of what it asks for.

    Raises:
        InputError: it asks for nothing that is known, or lacks a field.
    """
    fields = REQUESTS.get(message["what"])
    if fields is None:
        raise InputError(f"{message['what']!r} is unknown; known are {', '.join(REQUESTS)}")
    for name in fields:
        if not name.endswith("?") and name not in message:
            raise InputError(f"request {message['what']}: field {name!r} is missing")
    return message


def ask(state: Path, request: Mapping[str, Any], secret: bytes, timeout: float = 600.0) -> dict[str, Any]:
    """Ask a serving cluster, on the machine of its first server.

    Raises:
        InputError: no cluster serves with this folder, or it refuses.
    """
    path = _path(state)
    try:
        connection = connect(str(path), secret, PURPOSE, _CONNECT_S)
    except MessageError as error:
        raise InputError(f"--state {state}: {error}") from None
    except OSError as error:
        raise InputError(
            f"--state {state}: no cluster serves with it ({error.strerror or error}); on the machine of its first server, "
            "give the folder that `serve --state` was given"
        ) from None
    with connection:
        try:
            connection.send(request)
            reply = connection.receive(None, timeout, LONGEST)
        except MessageError as error:
            raise InputError(f"{error}; see what the cluster says") from None
    if "error" in reply:
        raise InputError(str(reply["error"]))
    return reply


def _path(state: Path) -> Path:
    path = Path(os.path.abspath(state)) / NAME
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise InputError(
            f"--state {state}: its path is longer than {_LONGEST_PATH - len(NAME) - 1} bytes; give a shorter one"
        )
    return path


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_CONNECT_S)
        with suppress(OSError):
            connection.connect(str(path))
            return True
    return False
