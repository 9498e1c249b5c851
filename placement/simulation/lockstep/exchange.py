"""Seconds that the messages of one step take, layer by layer, as the runtime sends them. Serves no request itself.

Modelled: rows go *across*, from a device to its gateway on each other server, then *within* that server to the device
that holds the expert, and their sums come back the same two ways. Pairs of devices take turns in fixed rounds. A pair
that the placement lets carry rows of a busy device announces how many come, whatever they are; with a likely pair the
first row goes along. Other rows follow in one message for each digit of their number in base 8. A sender packs its rows,
hands the message over and goes on; the bytes take the link's bandwidth, one message after the other through each port of a
server, and its latency; the receiver waits for them and unpacks. Devices meet in messages alone, so one that has none in a
layer runs ahead of the others. Where devices share cores, more of them in a layer make all of its work slower.

Not modelled: packets and headers, and computing that moves to another device with its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement.costs.hosting import moved_bytes
from placement.costs.network_use import likely_links
from placement.costs.routing import serving_server
from placement.data.problem import Problem

RADIX = 8  # of the number of rows, one message a digit
COUNT_BYTES = 4
Rounds = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Who may send what to whom under a placement; D devices, N servers, L layers.

    Attributes:
        server: of each device, int64 [D].
        device: whose copy each source device uses, int64 [D, L, E].
        across, within: rounds of (source, target).
        needs: whether a pair may carry rows of a device's tokens, bool [L, D, D, D]: source, target, device.
        eager: pairs whose first row goes with the count, bool [L, D, D].
        latency: seconds of a message on its way, float64 [D, D], 0 within a server; byte_seconds: of a byte, alike.
        row_bytes, sum_bytes, moved_bytes: of a row on its way out and back, and to another host of its next layer.
        message_seconds: of a sender, for each message; row_seconds: of a row each way, half at either end: packed, copied,
            added up.
        contention: by how much longer these take for each device beyond two that takes part in a layer, as a share.
        carrier: the device that has a device's rows in each layer, int64 [D, L]; None where each keeps its own.
    """

    server: np.ndarray
    device: np.ndarray
    across: Rounds
    within: Rounds
    needs: np.ndarray
    eager: np.ndarray
    latency: np.ndarray
    byte_seconds: np.ndarray
    row_bytes: int
    sum_bytes: int
    moved_bytes: int
    message_seconds: float = 0.0
    row_seconds: float = 0.0
    contention: float = 0.0
    carrier: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        problem: Problem,
        resident: np.ndarray,
        *,
        message_seconds: float = 0.0,
        row_seconds: float = 0.0,
        contention: float = 0.0,
        serving: np.ndarray | None = None,
        likely: np.ndarray | None = None,
        host: np.ndarray | None = None,
    ) -> "Exchange":
        """Tables of a placement.

        Args:
            problem: with the latency of its links.
            resident: bool [D, L, E], every expert resident somewhere.
            message_seconds, row_seconds, contention: as attributes.
            serving: whose copies serve each server, int [N, L, E]; default: `serving_server`.
            likely: servers that a token of another is nearly sure to need, bool [N, L, N]; default: by the problem's
                own statistics.
            host: who hosts each server's layers, int [N, L]; None is at home. A row goes to the device of the host that has
                its own device's number, counted round.
        """
        server = problem.device_server
        serving = serving_server(problem, problem.held(resident)) if serving is None else serving
        likely = likely_links(problem, serving) if likely is None else likely
        device = _copies(resident, serving, server)
        across, within = rounds(server.tolist())
        eager = (server[:, None] == server) | likely[server][:, :, server].transpose(1, 0, 2)
        latency = np.where(server[:, None] == server, 0.0, problem.latency[np.ix_(server, server)])
        return cls(
            server=server,
            device=device,
            across=across,
            within=within,
            needs=_needs(server, device, across, within),
            eager=eager,
            latency=latency,
            byte_seconds=(1.0 / problem.bandwidth)[np.ix_(server, server)],
            row_bytes=problem.row_bytes,
            sum_bytes=problem.sum_bytes,
            moved_bytes=moved_bytes(problem),
            message_seconds=message_seconds,
            row_seconds=row_seconds,
            contention=contention,
            carrier=None if host is None else _carriers(server, host),
        )

    def seconds(
        self, ids: Sequence[np.ndarray], compute: float, overhead: float = 0.0, ends: Sequence[int] | None = None
    ) -> float:
        """A whole step.

        Args:
            ids: experts of the tokens of each device, int [D][rows, L, k].
            compute: seconds of the step without any message, spread evenly over the layers.
            overhead: seconds of a device in each layer in which it takes part, sending or receiving, beside its messages.
            ends: rows of each device that give a next token, which a host elsewhere sends home; None: all.
        """
        layers, devices, rows = self.device.shape[1], len(self.server), [len(own) for own in ids]
        busy = np.array([len(own) > 0 for own in ids])
        at = np.repeat(np.arange(devices)[:, None], layers, 1) if self.carrier is None else self.carrier
        carries = np.zeros((layers, devices), bool)  # whether a device has rows in a layer
        carries[np.arange(layers), at[busy]] = True
        live = np.logical_or.reduce(self.needs & carries[:, None, None], axis=-1)
        meets = [bool(np.any(own)) for own in live]
        if not any(meets) and self.carrier is None:
            return compute
        wants = [self._wants(at[source], own) for source, own in enumerate(ids)]
        clock, ports = [0.0] * devices, {}
        for layer in range(layers):
            self._hop(at[:, layer - 1] if layer else np.arange(devices), at[:, layer], rows, clock, ports)
            clock = [time + compute / layers for time in clock]
            if meets[layer]:
                part = [bool(live[layer][device].any() or live[layer][:, device].any()) for device in range(devices)]
                crowd = 1 + self.contention * max(0, sum(part) - 2)
                clock = [time + crowd * overhead * own for time, own in zip(clock, part, strict=True)]
                here = [np.concatenate([np.zeros((0, devices), bool), *own]) for own in _by(at[:, layer], wants, layer)]
                self._layer(layer, live[layer], here, crowd, clock, ports)
        self._hop(at[:, -1], np.arange(devices), rows if ends is None else ends, clock, ports)
        return max(clock)

    def _wants(self, carrier: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Devices that each token needs, bool [rows, L, D]; its rows are on `carrier`, [L]."""
        layers, devices = self.device.shape[1], len(self.server)
        wants = np.zeros((len(ids), layers, devices), bool)
        row, layer = np.arange(len(ids))[:, None, None], np.arange(layers)[:, None]
        wants[row, layer, self.device[carrier[:, None], layer, ids]] = True
        return wants

    def _hop(
        self,
        before: np.ndarray,
        after: np.ndarray,
        rows: Sequence[int],
        clock: list[float],
        ports: dict[tuple[str, int], float],
    ) -> None:
        """Rows go on to the device that hosts the next layer, int [D] each: one message a device, whose number is known."""
        for device, (source, target) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            if source != target and rows[device]:
                self._message(source, target, rows[device] * self.moved_bytes, rows[device], 1.0, clock, ports)

    def _layer(
        self,
        layer: int,
        live: np.ndarray,
        wants: list[np.ndarray],
        crowd: float,
        clock: list[float],
        ports: dict[tuple[str, int], float],
    ) -> None:
        """Let the devices' clocks run through the exchange of one layer, its work `crowd` times as slow as of two devices;
        wants: bool [D][rows, D]."""
        rows: dict[tuple[int, int], int] = {}
        here = {device: [(device, own)] for device, own in enumerate(wants)}  # rows that a device has, by their source
        for source, gateway in (pair for turn in self.across for pair in turn):
            if not live[source, gateway]:
                continue
            sent = wants[source][wants[source][:, self.server == self.server[gateway]].any(1)]
            rows[source, gateway] = len(sent)
            here[gateway].append((source, sent))
        for holder, sibling in (pair for turn in self.within for pair in turn):
            if live[holder, sibling]:
                rows[holder, sibling] = sum(int(own[:, sibling].sum()) for _, own in here[holder])
        for hop in (self.across, self.within):
            pairs = [pair for turn in hop for pair in turn if live[pair]]
            for pair in pairs:
                first = int(self.eager[layer][pair])
                self._message(*pair, COUNT_BYTES + first * self.row_bytes, first, crowd, clock, ports)
            for pair in pairs:
                for count in digits(rows[pair] - bool(self.eager[layer][pair])):
                    self._message(*pair, count * self.row_bytes, count, crowd, clock, ports)
        for hop in (self.within, self.across):
            for source, target in (pair for turn in hop for pair in turn if live[pair]):
                for count in digits(rows[source, target]):
                    self._message(target, source, count * self.sum_bytes, count, crowd, clock, ports)

    def _message(
        self,
        source: int,
        target: int,
        size: int,
        rows: int,
        crowd: float,
        clock: list[float],
        ports: dict[tuple[str, int], float],
    ) -> None:
        end = crowd * rows * self.row_seconds / 2
        clock[source] += crowd * self.message_seconds + end
        begin, sending = clock[source], size * float(self.byte_seconds[source, target])
        if sending:
            out, into = ("out", int(self.server[source])), ("in", int(self.server[target]))
            begin = max(begin, ports.get(out, 0.0), ports.get(into, 0.0))
            ports[out] = ports[into] = begin + sending
        arrival = begin + sending + float(self.latency[source, target])
        clock[target] = max(clock[target], arrival) + end


def _by(carrier: np.ndarray, wants: list[np.ndarray], layer: int) -> list[list[np.ndarray]]:
    """What the rows of one layer want, bool [rows, D] each, by the device that has them."""
    found: list[list[np.ndarray]] = [[] for _ in wants]
    for device, want in zip(carrier.tolist(), wants, strict=True):
        found[device].append(want[:, layer])
    return found


def _carriers(server: np.ndarray, host: np.ndarray) -> np.ndarray:
    """The device that has each device's rows in each layer, int64 [D, L]; its own where the host is its own server."""
    members = [np.flatnonzero(server == n) for n in range(len(host))]
    number = np.concatenate([np.arange(len(own)) for own in members])
    return np.array([[members[h][number[d] % len(members[h])] for h in host[n]] for d, n in enumerate(server.tolist())])


def digits(count: int) -> list[int]:
    """Rows of each message for so many rows, largest first.

    >>> digits(74)
    [64, 8, 2]
    """
    parts, unit = [], 1
    while count > 0:
        count, digit = divmod(count, RADIX)
        parts += [digit * unit] if digit else []
        unit *= RADIX
    return parts[::-1]


def rounds(server: Sequence[int]) -> tuple[Rounds, Rounds]:
    """Pairs across and within servers in the rounds that the runtime takes them in; server of each device, [D]."""
    members = {s: [d for d, other in enumerate(server) if other == s] for s in sorted(set(server))}
    across, within = [], []
    for source, home in enumerate(server):
        turn = members[home].index(source) + home
        across += [(source, own[turn % len(own)]) for other, own in members.items() if other != home]
        within += [(source, sibling) for sibling in members[home] if sibling != source]
    return _first_fit(across, len(server)), _first_fit(within, len(server))


def _first_fit(pairs: list[tuple[int, int]], devices: int) -> Rounds:
    found: list[list[tuple[int, int]]] = []
    for pair in sorted(pairs, key=lambda p: ((p[1] - p[0]) % devices, p)):
        free = (turn for turn in found if not any(set(pair) & set(other) for other in turn))
        chosen = next(free, None)
        if chosen is None:
            found.append(chosen := [])
        chosen.append(pair)
    return tuple(tuple(sorted(turn)) for turn in found)


def _copies(resident: np.ndarray, serving: np.ndarray, server: np.ndarray) -> np.ndarray:
    """The device whose copy each source uses: its own, one on its server, one on the server that serves it."""
    devices, layers, experts = resident.shape
    turns = np.arange(layers)[:, None] + np.arange(experts)
    chosen = np.empty(resident.shape, np.int64)
    for source, home in enumerate(server):
        rank = np.where(server[:, None, None] == serving[home], 2, 3)
        rank[server == home] = 1
        rank[source] = 0
        rank = np.where(resident, rank, 4)
        best = rank == rank.min(0)
        turn = (turns + source) % best.sum(0)
        chosen[source] = (best & (best.cumsum(0) - 1 == turn)).argmax(0)
    return chosen


def _needs(server: np.ndarray, device: np.ndarray, across: Rounds, within: Rounds) -> np.ndarray:
    devices, layers, _ = device.shape
    uses = (device[..., None] == np.arange(devices)).any(2).transpose(1, 0, 2)
    needs = np.zeros((layers, devices, devices, devices), bool)
    for source, gateway in (pair for turn in across for pair in turn):
        there = server == server[gateway]
        needs[:, source, gateway, source] = uses[:, source][:, there].any(1)
        for sibling in np.flatnonzero(there & (np.arange(devices) != gateway)):
            needs[:, gateway, sibling, source] |= uses[:, source, sibling]
    for source, sibling in (pair for turn in within for pair in turn):
        needs[:, source, sibling, source] |= uses[:, source, sibling]
    return needs
