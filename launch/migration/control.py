"""Questions to a cluster that serves, over a socket in its state folder: a line of JSON each way."""

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from placement import InputError

NAME = "control.sock"
_LONGEST = 2**26
_LONGEST_PATH = 100  # of a socket; the system's limit is 108


class ControlServer:
    """Answers questions until it is closed, each in a thread of its own.

    Args:
        answer: may raise InputError, whose text is the answer then.

    Raises:
        InputError: the folder's path is too long, or another cluster serves with it.
    """

    def __init__(self, state: Path, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._path, self._answer = _path(state), answer
        if self._path.exists():
            if _answers(self._path):
                raise InputError(f"--state {state}: another cluster serves with it; stop it or give another folder")
            self._path.unlink()
        self._listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o077)  # nobody else's business
        try:
            self._listener.bind(str(self._path))
        finally:
            os.umask(before)
        self._listener.listen()
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._reply, args=(connection,), daemon=True).start()

    def _reply(self, connection: socket.socket) -> None:
        with connection, suppress(OSError), connection.makefile("rwb") as stream:
            try:
                asked = json.loads(stream.readline(_LONGEST))
                if not isinstance(asked, dict):
                    raise InputError("not an object")
                reply = self._answer(asked)
            except InputError as error:
                reply = {"error": " ".join(str(error).split())}
            except (ValueError, KeyError, TypeError) as error:
                reply = {"error": f"not a question ({type(error).__name__}: {error})"}
            stream.write(json.dumps(reply).encode() + b"\n")
            stream.flush()


def ask(state: Path, question: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
    """Ask a serving cluster, on the machine of its first server.

    Raises:
        InputError: no cluster serves with this folder, or it refuses.
    """
    path = _path(state)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps(question).encode() + b"\n")
                stream.flush()
                line = stream.readline()
    except TimeoutError:
        raise InputError(f"{path}: no answer within {timeout:g} s") from None
    except OSError as error:
        raise InputError(
            f"--state {state}: no cluster serves with it ({error.strerror}); on the machine of its first server, give the "
            "folder that `serve --state` was given"
        ) from None
    if not line:
        raise InputError(f"{path}: the cluster ended before it answered")
    reply = json.loads(line)
    if "error" in reply:
        raise InputError(reply["error"])
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
        try:
            connection.connect(str(path))
        except OSError:
            return False
        return True
