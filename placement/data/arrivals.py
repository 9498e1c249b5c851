"""Arrivals: when requests come, at which server, and how long they are. Holds no model of how they are served."""

import datetime
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.files import InputError, columns_of, parse_json, read_csv, read_lines, show

COLUMNS = ("t_s", "prompt_tokens", "output_tokens")
_LONGEST = 10**7  # tokens; anything longer is a mistake
_LATEST = 1e9  # seconds, 31 years
_MOST = 10**7  # requests


@dataclass(frozen=True)
class _Trace:
    """A published layout: columns of time, prompt and output; what a unit of its time is; whether failed requests are in it."""

    name: str
    columns: tuple[str, str, str]
    seconds: Callable[[Any, str], float]
    failures: bool = False


@dataclass(frozen=True, eq=False)
class Arrivals:
    """R requests in order of time.

    Attributes:
        seconds: when each arrives, float64 [R], ascending from 0 or later.
        server: index of the server where it enters, int64 [R].
        prompt: tokens of the prompt, int64 [R].
        output: tokens to generate, int64 [R]; prefill gives the first of them.
    """

    seconds: np.ndarray
    server: np.ndarray
    prompt: np.ndarray
    output: np.ndarray

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        servers: Sequence[str],
        *,
        stretch: float = 1.0,
        duration: float = math.inf,
        seed: int = 0,
        notes: list[str] | None = None,
    ) -> "Arrivals":
        """Read requests: our own CSV, or a trace as it was published.

        Our own has a header `t_s,prompt_tokens,output_tokens`, one row per request, and optionally a column `server`. Azure's
        LLM inference traces (TIMESTAMP, ContextTokens, GeneratedTokens; time counts from the first request), BurstGPT
        (Timestamp, Request tokens, Response tokens; requests without a response had failed and are left out) and Mooncake's
        JSON lines (timestamp in milliseconds, input_length, output_length) are known by their columns. Comma, semicolon and tab
        separate.

        Args:
            path: the file.
            servers: names of the servers, [N]. Without a column `server` requests are assigned to them at random.
            stretch: factor on all times: 10 turns one request per second into one in ten seconds.
            duration: requests later than this, after stretching, are left out.
            seed: of the assignment.
            notes: a list that gets what a reader of the result should know, such as how many requests had failed.

        Raises:
            InputError: no such file, other columns, a value that is no number or out of range, times out of order, or no
                request in time.
        """
        trace, rows = _open(path)
        table = [_row(trace, row, where, servers) for where, row in itertools.islice(rows, _MOST + 1)]
        if len(table) > _MOST:
            raise InputError(f"{path}: more than {_MOST} requests; cut the file")
        answered = [row for row in table if row[2] or not trace.failures]
        if notes is not None and len(answered) < len(table):
            notes.append(f"{len(table) - len(answered)} requests without a response are left out")
        table = answered
        if not table:
            raise InputError(f"{path}: no request; add a row of {','.join(trace.columns)}")
        seconds = np.array([row[0] for row in table])
        seconds = (seconds - seconds[0] if trace.seconds is _date else seconds) * stretch
        late = np.flatnonzero(np.diff(seconds) < 0)
        if len(late):
            first, key = int(late[0]) + 1, trace.columns[0]
            found = f"{key} = {table[first][0]:.15g} is earlier than the one before"
            raise InputError(f"{path}: request {first + 1}: {found}; sort by {key}")
        drawn = np.random.default_rng(seed).integers(0, len(servers), len(table))
        server = np.array([d if row[3] is None else row[3] for row, d in zip(table, drawn, strict=True)], np.int64)
        arrivals = cls(seconds, server, *(np.array([row[i] for row in table], np.int64) for i in (1, 2)))
        if seconds[0] > duration:
            raise InputError(f"{path}: the first request comes at {seconds[0]:g} s, after --duration {duration:g}")
        return arrivals[seconds <= duration]

    @classmethod
    def poisson(
        cls, servers: int, gap: float, duration: float, lengths: np.ndarray | Sequence[Sequence[int]], seed: int = 0
    ) -> "Arrivals":
        """Independent Poisson arrivals at every server.

        Args:
            servers: N.
            gap: mean seconds between requests of one server.
            duration: seconds.
            lengths: prompt and output tokens to draw from, int [P, 2]; one pair makes all requests alike.
            seed: the same seed gives the same requests.
        """
        rng = np.random.default_rng(seed)
        count = rng.poisson(duration / gap, servers)
        seconds = rng.uniform(0.0, duration, count.sum())
        order = np.argsort(seconds, kind="stable")
        pick = np.asarray(lengths, np.int64)[rng.integers(0, len(lengths), count.sum())]
        return cls(seconds[order], np.repeat(np.arange(servers), count)[order], pick[:, 0], pick[:, 1])

    def __getitem__(self, keep: np.ndarray) -> "Arrivals":
        """The chosen requests, in the order they are in."""
        return replace(self, **{key: values[keep] for key, values in vars(self).items()})

    def __len__(self) -> int:
        return len(self.seconds)


def _open(path: str | os.PathLike[str]) -> tuple[_Trace, Iterator[tuple[str, Mapping[str, Any]]]]:
    """Which layout a file has, and its rows by column, each with its place for messages."""
    number, line = next(read_lines(path), (0, ""))
    if line.lstrip().startswith("{"):
        first = parse_json(line, f"{path}: line {number}")
        names = [str(name) for name in first]
        rows: Iterator[tuple[str, Mapping[str, Any]]] = (
            (f"{path}: line {i}", _object(text, f"{path}: line {i}")) for i, text in read_lines(path)
        )
    elif not line:
        names, rows = [], iter(())
    else:
        names, cells = read_csv(path)
        rows = ((f"{path}: line {i}", dict(zip(names, row, strict=False))) for i, row in cells)
    for trace in _TRACES:
        if set(trace.columns) <= set(names):
            return trace, rows
    missing = next((name for name in COLUMNS if name not in names), "")
    known = "; ".join(f"{trace.name}: {','.join(trace.columns)}" for trace in _TRACES[1:])
    raise InputError(
        f"{path}: column {missing} is missing; the file has {columns_of(names)}; the header has {','.join(COLUMNS)}, or those "
        f"of {known}"
    )


def _object(line: str, where: str) -> Mapping[str, Any]:
    value = parse_json(line, where)
    if not isinstance(value, dict):
        raise InputError(f"{where}: {show(value)}: must be an object, as the first line is")
    return value


def _number(value: Any, where: str) -> float:
    """A finite number from 0; text of a CSV cell, or a number of JSON."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where} = {show(value)}: must be a number") from None
    if not 0 <= number <= _LATEST:
        raise InputError(f"{where} = {show(value)}: must be a finite number, at least 0 and at most {_LATEST:g}")
    return number


def _milliseconds(value: Any, where: str) -> float:
    return _number(value, where) / 1000


_DATE = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})?"
)


def _date(value: Any, where: str) -> float:
    """Seconds of a date and time, such as 2023-11-16 18:15:46.6805900, since the beginning of 2000."""
    match = _DATE.fullmatch(value) if isinstance(value, str) else None
    try:
        zone = "+00:00" if match is not None and match[4] in (None, "Z") else match and match[4]
        when = datetime.datetime.fromisoformat(f"{match[1]}T{match[2]}{zone}") if match is not None else None
    except ValueError:
        when = None
    if match is None or when is None:
        raise InputError(f"{where} = {show(value)}: must be a date and time, such as 2023-11-16 18:15:46.68")
    return (when - _EPOCH).total_seconds() + float(match[3] or 0)


_EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_TRACES = (
    _Trace("ours", COLUMNS, _number),
    _Trace("Azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _date),
    _Trace("BurstGPT", ("Timestamp", "Request tokens", "Response tokens"), _number, failures=True),
    _Trace("Mooncake", ("timestamp", "input_length", "output_length"), _milliseconds),
)


def _row(
    trace: _Trace, row: Mapping[str, Any], where: str, servers: Sequence[str]
) -> tuple[float, int, int, int | None]:
    """Time, prompt and output tokens, and index of the server where the row names one."""
    time, *lengths = trace.columns
    seconds = trace.seconds(row.get(time), f"{where}: {time}")
    tokens = []
    for name in lengths:
        value, least = _number(row.get(name), f"{where}: {name}"), 0 if trace.failures else 1
        if not (least <= value <= _LONGEST and value == int(value)):
            shown = f"{where}: {name} = {show(row.get(name))}"
            raise InputError(f"{shown}: must be a whole number from {least} to {_LONGEST}")
        tokens.append(int(value))
    server = row.get("server")
    if server is not None and server not in servers:
        raise InputError(f"{where}: server = {show(server)}: no such server; known are {', '.join(servers)}")
    return seconds, tokens[0], tokens[1], None if server is None else list(servers).index(server)
