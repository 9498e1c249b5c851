"""By how much servers' steps delay each other at devices, ports and links that they share. Holds no clock and no request."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement.simulation.independent.replan import Load
from placement.simulation.independent.unit_costs import DENSE, Steps

_TOLERANCE, _ROUNDS = 1e-3, 30  # of the fixed point


@dataclass(eq=False)
class Customers:
    """Steps in progress: one row per server, then one per server that takes weights in, 2 N in all.

    A closed network in which every row circulates by itself; approximate mean value analysis (Schweitzer 1979) with
    one customer per class. Entries and groups are those of `Steps`, followed by the loading rows' own.

    Attributes:
        steps: unit costs of the servers' rows.
        value: seconds for which each entry uses its resource now, float64 [entries].
        base: seconds of each group now, undelayed, float64 [groups].
        waiting: seconds that each row waits for no resource, float64 [2 N].
        resource, row: of each entry, int64 [entries].
        own: number of the row and resource that an entry shares with the row's other entries there, int64 [entries].
        start: first entry of each group, int64 [groups]; serial: whether its entries follow each other, bool [groups].
        group_row: row of each group, int64 [groups].
        bound: first entry of each row, int64 [2 N + 1].
        present: share of the time each entry's work is at its resource, float64 [entries].
        seconds: per unit of each row, float64 [2 N].
        met: sum of `present` at each resource, float64 [resources].
        age: rows set since the network was last solved.
    """

    steps: Steps
    value: np.ndarray
    base: np.ndarray
    waiting: np.ndarray
    resource: np.ndarray
    row: np.ndarray
    own: np.ndarray
    start: np.ndarray
    serial: np.ndarray
    group_row: np.ndarray
    bound: np.ndarray
    present: np.ndarray
    seconds: np.ndarray
    met: np.ndarray
    age: int

    @classmethod
    def of(cls, steps: Steps, loading: Sequence[tuple[int, Load]] = ()) -> "Customers":
        """Servers' rows without work yet, and rows of weights on their way: servers and what each takes in."""
        servers = steps.base.shape[1] // 4
        row, group, resource = steps.group // 4, steps.group, steps.resource
        value, base, waiting = [np.zeros(len(row))], [np.zeros(4 * servers)], np.zeros(2 * servers)
        rows, groups, resources, group_row = [row], [group], [resource], [np.repeat(np.arange(servers), 4)]
        for server, load in loading:
            waiting[servers + server] = load.disk_seconds
            rows.append(np.full(len(load.resource), servers + server))
            groups.append(np.full(len(load.resource), 4 * servers + len(groups)))
            resources.append(load.resource)
            value.append(load.resource_seconds)
            if len(load.resource):
                base.append(np.array([load.link_seconds]))
                group_row.append(np.array([servers + server]))
        row, group, resource = (np.concatenate(arrays) for arrays in (rows, groups, resources))
        # A server's dense work and its own experts use the same devices, one after the other: they do not delay each other.
        _, own = np.unique(row * steps.resources + resource, return_inverse=True)
        start = np.flatnonzero(np.diff(group, prepend=-1))
        return cls(
            steps=steps,
            value=np.concatenate(value),
            base=np.concatenate(base),
            waiting=waiting,
            resource=resource,
            row=row,
            own=own,
            start=start,
            serial=(group[start] % 4 == DENSE) & (group[start] < 4 * servers),
            group_row=np.concatenate(group_row),
            bound=np.searchsorted(row, np.arange(2 * servers + 1)),
            present=np.zeros(len(row)),
            seconds=np.zeros(2 * servers),
            met=np.zeros(steps.resources),
            age=10**9,
        )

    def set_row(self, server: int, amount: np.ndarray, waiting: float) -> None:
        """Give a server another step: units of work in it, float64 [3], and the latency it waits for.

        Until the network is solved again only the row itself is brought up to date, against the others as they were.
        """
        entries = slice(self.bound[server], self.bound[server + 1])
        resource, old = self.resource[entries], self.present[entries]
        value = self.value[entries] = amount @ self.steps.unit[:, entries]
        base = self.base[4 * server : 4 * server + 4] = amount @ self.steps.base[:, 4 * server : 4 * server + 4]
        self.waiting[server] = waiting
        np.subtract.at(self.met, resource, old)
        delayed = value * (1.0 + self.met[resource])
        groups = slice(4 * server, 4 * server + 4)
        first, serial = self.start[groups] - entries.start, self.serial[groups]
        alone, worst = _in_groups(value, first, serial), _in_groups(delayed, first, serial)
        seconds = waiting + float((base * np.divide(worst, alone, out=np.ones(4), where=alone > 0)).sum())
        self.present[entries] = new = np.minimum(delayed / max(seconds, 1e-300), 1.0)
        np.add.at(self.met, resource, new)
        self.seconds[server] = seconds
        self.age += 1

    def clear_load(self, server: int) -> None:
        """The weights of a server have arrived."""
        row = len(self.waiting) // 2 + server
        self.value[self.bound[row] : self.bound[row + 1]] = 0.0
        self.present[self.bound[row] : self.bound[row + 1]] = 0.0
        self.base[self.group_row == row] = 0.0
        self.waiting[row] = 0.0
        self.age = 10**9

    def refresh(self) -> np.ndarray:
        """Seconds per unit of every row, float64 [2 N]; solves the network where a sixteenth of the servers is new."""
        if self.age > len(self.waiting) // 32:
            self.solve()
        return self.seconds

    def solve(self) -> None:
        """Bring all rows up to date: their seconds are the fixed point of

        T_i = waiting_i + sum_g base_g max_r x_r / max_r value_r, over the groups g of row i and their entries r
        (sums in place of both maxima where a group is serial),
        x_r = value_r (1 + sum of present_q over other rows' entries q at the same resource),
        present_r = x_r / T_i.
        """
        alone = _in_groups(self.value, self.start, self.serial)
        scale = np.divide(self.base, alone, out=np.zeros_like(self.base), where=alone > 0)
        fixed = np.where(alone > 0, 0.0, self.base)
        rows, resources = len(self.waiting), self.steps.resources
        present, before = self.present, self.seconds
        for _ in range(_ROUNDS):
            met = np.bincount(self.resource, present, resources)[self.resource]
            delayed = self.value * (1.0 + met - np.bincount(self.own, present)[self.own])
            group = scale * _in_groups(delayed, self.start, self.serial) + fixed
            seconds = self.waiting + np.bincount(self.group_row, group, rows)
            present = np.minimum(delayed / np.where(seconds > 0, seconds, 1.0)[self.row], 1.0)
            if (np.abs(seconds - before) <= _TOLERANCE * seconds).all():
                break
            before = seconds
        self.present, self.seconds = present, seconds
        self.met = np.bincount(self.resource, self.present, resources)
        self.age = 0


def _in_groups(value: np.ndarray, start: np.ndarray, serial: np.ndarray) -> np.ndarray:
    """The largest value of each group, their sum where its entries follow each other: float64 [groups]."""
    return np.where(serial, np.add.reduceat(value, start), np.maximum.reduceat(value, start))
