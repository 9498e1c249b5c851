"""Arrivals: when requests come, at which server, and how long they are. Holds no model of how they are served."""

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placement.files import InputError, read_bytes, show

COLUMNS = ("t_s", "prompt_tokens", "output_tokens")
_LONGEST = 10**7  # tokens; anything longer is a mistake


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
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        servers: Sequence[str],
        *,
        stretch: float = 1.0,
        duration: float = math.inf,
        seed: int = 0,
    ) -> "Arrivals":
        """Read `t_s,prompt_tokens,output_tokens`, one row per request, optionally with a column `server`.

        Args:
            path: the file, with a header.
            servers: names of the servers, [N]. Without a column `server` requests are dealt to them at random.
            stretch: factor on all times: 10 turns one request per second into one in ten seconds.
            duration: requests later than this, after stretching, are left out.
            seed: of the dealing.

        Raises:
            InputError: no such file, a column missing, a value that is no number or out of range, times out of order,
                or no request in time.
        """
        try:
            text = read_bytes(path).decode()
        except UnicodeDecodeError:
            raise InputError(f"{path}: not text; write a CSV file with {','.join(COLUMNS)}") from None
        rows = csv.DictReader(io.StringIO(text, newline=""))
        try:
            names = rows.fieldnames or []
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                raise InputError(f"{path}: column {missing[0]} is missing; the header has {','.join(COLUMNS)}")
            table = [_row(row, f"{path}: line {rows.line_num}", servers) for row in rows]
        except csv.Error as error:
            raise InputError(f"{path}: line {rows.line_num}: not valid CSV: {error}") from None
        if not table:
            raise InputError(f"{path}: no request; add a row of {','.join(COLUMNS)}")
        seconds = np.array([row[0] for row in table]) * stretch
        late = np.flatnonzero(np.diff(seconds) < 0)
        if len(late):
            first = int(late[0]) + 1
            raise InputError(
                f"{path}: request {first + 1}: t_s = {table[first][0]:g} is earlier than the one before; sort by t_s"
            )
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


def _row(row: dict[str, str], where: str, servers: Sequence[str]) -> tuple[float, int, int, int | None]:
    values = []
    for name in COLUMNS:
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            raise InputError(f"{where}: {name} = {show(row[name])}: must be a number") from None
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{where}: {name} = {show(row[name])}: must be a finite number, at least 0")
        if name != "t_s" and not (1 <= value <= _LONGEST and value == int(value)):
            raise InputError(f"{where}: {name} = {show(row[name])}: must be a whole number from 1 to {_LONGEST}")
        values.append(value)
    server = row.get("server")
    if server is not None and server not in servers:
        raise InputError(f"{where}: server = {show(server)}: no such server; known are {', '.join(servers)}")
    return values[0], int(values[1]), int(values[2]), None if server is None else list(servers).index(server)
