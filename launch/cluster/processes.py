"""One process for each server: started together, ended together, the reason given when one of them fails.

What a server's process prints reaches the caller line by line. No process outlives its parent, however that ends. What
the processes run is not known here, nor where they meet (`launch.cluster.join`).
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from launch.cluster.signals import Interrupts
from placement import InputError

Output = Callable[[str, str, str], None]
"""Takes name of the server, "stdout" or "stderr", and a line without its end; called by one thread at a time."""

_TAIL_LINES = 12
# Asks the kernel (PR_SET_PDEATHSIG) to kill this process when its parent dies, then becomes the command. A program of
# its own, because the parent may hold threads, after whose fork Python code must not run.
_FOLLOW_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: cannot be started: {error.strerror}")
"""


class ServerFailed(RuntimeError):
    """A server's process ended when it should not have.

    Attributes:
        server: its name.
        status: its exit status, or minus the signal that ended it.
        stderr: the last lines that it wrote there.
    """

    def __init__(self, server: str, status: int, stderr: Sequence[str]) -> None:
        self.server, self.status, self.stderr = server, status, tuple(stderr)
        how = f"exit status {status}" if status >= 0 else f"signal {_signal_name(-status)}"
        last = f": {self.stderr[-1].strip()}" if self.stderr else ""
        super().__init__(f"server {server} ended with {how}{last}")


def prefixed(stdout: TextIO | None = None, stderr: TextIO | None = None) -> Output:
    """Output that writes every line after its server's name, to this process's own streams unless others are given."""

    def write(server: str, stream: str, line: str) -> None:
        target = (stdout or sys.stdout) if stream == "stdout" else (stderr or sys.stderr)
        print(f"[{server}] {line}", file=target, flush=True)

    return write


def to_files(folder: str | os.PathLike[str]) -> Output:
    """Output that collects what a server prints in `folder/NAME.log`, both streams in the order they came.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from None

    def write(server: str, stream: str, line: str) -> None:
        with open(Path(folder) / f"{server.replace(os.sep, '_')}.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return write


class Processes:
    """The running processes of a cluster's servers; a `with` block ends them all, see `start`."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._tails: dict[str, deque[str]] = {}
        self._readers: dict[str, list[threading.Thread]] = {}
        self._awaited: set[str] = set()
        self._ended: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._first: tuple[str, int] | None = None  # of those that failed, and its status
        self._interrupts = Interrupts()
        self._writing = threading.Lock()

    @property
    def pids(self) -> dict[str, int]:
        """Process id by server."""
        return {server: process.pid for server, process in self._running.items()}

    def __enter__(self) -> "Processes":
        self._interrupts.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            self._interrupts.__exit__(None, None, None)

    def wait(self, timeout: float | None = None, grace: float = 5.0) -> bool:
        """Wait until all have ended well; False if some still run after `timeout` seconds.

        Raises:
            ServerFailed: one ended otherwise; the others have been ended too.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._awaited:
            try:
                server, status = self._ended.get(
                    timeout=None if deadline is None else max(0, deadline - time.monotonic())
                )
            except queue.Empty:
                return False
            self._awaited.discard(server)
            if status:
                self.stop(grace)
                # The others may end because of it, and be through with what they print before it is.
                server, status = self._first or (server, status)
                raise ServerFailed(server, status, self._tails[server])
        return True

    def signal(self, number: int) -> None:
        """Send a signal to all that still run."""
        for process in list(self._running.values()):
            if process.poll() is None:
                _signal_group(process, number)

    def stop(self, grace: float = 5.0) -> None:
        """End all that still run: SIGTERM, and after `grace` seconds SIGKILL, to each with its own children."""
        left = [process for process in self._running.values() if process.poll() is None]
        self._awaited.clear()
        try:
            for process in left:
                _signal_group(process, signal.SIGTERM)
            deadline = time.monotonic() + grace
            for process in left:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, deadline - time.monotonic()))
        finally:
            for process in self._running.values():
                _signal_group(process, signal.SIGKILL)  # what a server started and left behind, too
            for process in left:
                process.wait()
            for server in self._running:
                self._finish_reading(server)

    def _start(self, server: str, command: Sequence[str], env: Mapping[str, str] | None, output: Output) -> None:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
        self._running[server], self._tails[server] = process, deque(maxlen=_TAIL_LINES)
        assert process.stdout is not None
        assert process.stderr is not None
        read = [(process.stdout, "stdout"), (process.stderr, "stderr")]
        self._readers[server] = [_thread(self._read, server, *pair, output) for pair in read]
        self._awaited.add(server)
        _thread(self._report_end, server, process)

    def _read(self, server: str, stream: TextIO, name: str, output: Output) -> None:
        with stream:
            for line in stream:
                line = line.rstrip("\r\n")
                with self._writing:
                    if name == "stderr":
                        self._tails[server].append(line)
                    with suppress(OSError):  # nobody reads it any more; the server must not stop for that
                        output(server, name, line)

    def _report_end(self, server: str, process: "subprocess.Popen[str]") -> None:
        status = process.wait()
        if status and self._first is None:
            self._first = server, status
        self._finish_reading(server)
        self._ended.put((server, status))

    def _finish_reading(self, server: str) -> None:
        for reader in self._readers[server]:
            reader.join(1.0)  # a child that it left running may hold its streams open


def start(
    commands: Mapping[str, Sequence[str]],
    *,
    prefix: Mapping[str, Sequence[str]] | None = None,
    env: Mapping[str, str] | None = None,
    output: Output | None = None,
) -> Processes:
    """Start one process per server; to be used as `with start(…) as processes: processes.wait()`.

    Inside the block SIGTERM and SIGHUP raise SystemExit, so that the processes end before their parent. If it is
    killed outright, the kernel (Linux) kills them. Each is the head of a process group of its own, so Ctrl-C in a
    terminal reaches the parent alone, which ends them in order. Call it from the main thread: for the kernel it is the
    thread that started a process whose end counts.

    Args:
        commands: program and arguments by server name.
        prefix: by server, what to put before its command, to run it inside a network namespace, say.
        env: environment of all, on top of this process's own.
        output: where their lines go; default: after their name, to this process's own streams.

    Raises:
        InputError: a program cannot be started; those started before it have been ended.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    processes = Processes()
    try:
        for server, command in commands.items():
            within = [] if prefix is None else prefix[server]
            processes._start(server, following([*within, *command]), environment, output or prefixed())
    except OSError as error:
        processes.stop(0)
        raise InputError(f"server {server}: {command[0]}: cannot be started: {error.strerror or error}") from None
    except BaseException:
        processes.stop(0)
        raise
    return processes


def following(command: Sequence[str]) -> list[str]:
    """A command whose process the kernel (Linux) kills when the thread that starts it ends."""
    follow = [sys.executable, "-I", "-S", "-c", _FOLLOW_PARENT, str(os.getpid())] if sys.platform == "linux" else []
    return [*follow, *command]


def _thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _signal_group(process: "subprocess.Popen[str]", number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
