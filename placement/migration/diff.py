"""From one placement to another: what moves, from where, in which order, how long it takes and whether it pays.

Plans a migration; moves nothing.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.files import InputError, show


@dataclass(frozen=True)
class Move:
    """One expert that a device gets.

    Attributes:
        layer, expert: which one.
        device: index of the device that gets it.
        source: index of the device it is read from, or None for the storage of the receiving server.
        bytes: its size.
        seconds: on idle links and disks.
    """

    layer: int
    expert: int
    device: int
    source: int | None
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Round:
    """Changes that wait for each other: first the drops, then all moves at once, each on the links and disks it uses.

    Attributes:
        drops: (layer, expert, device) of copies that are given up, each while there is another one.
        moves: experts that devices get.
        staged: devices have no room beside what only they hold: moves wait in host memory until all are there, then
            copies are given up and written at one step boundary.
        seconds: until the last transfer is done.
    """

    drops: tuple[tuple[int, int, int], ...]
    moves: tuple[Move, ...]
    staged: bool
    seconds: float


@dataclass(frozen=True, eq=False)
class Diff:
    """A migration.

    Attributes:
        rounds: the order; after each round every expert is covered and every device within its memory, and in it too.
        link_bytes: weights sent from row to column, int64 [N, N].
        disk_bytes: weights that each device reads from its server's storage, int64 [D].
        load_seconds: sum over moves of bytes / load bandwidth of the device that gets them: T_mig of the paper's rule.
    """

    rounds: tuple[Round, ...]
    link_bytes: np.ndarray
    disk_bytes: np.ndarray
    load_seconds: float

    @property
    def moves(self) -> tuple[Move, ...]:
        """All moves in order."""
        return tuple(move for step in self.rounds for move in step.moves)

    @property
    def drops(self) -> tuple[tuple[int, int, int], ...]:
        """All (layer, expert, device) that are given up, in order."""
        return tuple(drop for step in self.rounds for drop in step.drops)

    @property
    def bytes(self) -> int:
        """Bytes of all moves."""
        return sum(move.bytes for move in self.moves)

    @property
    def seconds(self) -> float:
        """Until the last transfer of the last round is done."""
        return sum(step.seconds for step in self.rounds)

    @property
    def host_bytes(self) -> int:
        """Most that waits in host memory in any round, over all servers; 0 where devices have room."""
        return max((sum(move.bytes for move in step.moves) for step in self.rounds if step.staged), default=0)


def diff(old: Placement, new: Placement, cluster: Cluster, *, staging_bytes: int | None = None) -> Diff:
    """What has to move from one placement to another, and in which order.

    Each move reads from the quickest of the devices that hold the expert and the receiving server's storage; of equally
    quick links the one with least to carry. A copy is given up only while there is another, and only when its room is
    needed or all else is done, so that transfers have sources and tokens are served at home for as long as possible.

    Args:
        old: the placement in force.
        new: the placement to reach.
        cluster: what both are for.
        staging_bytes: what each server takes in at most in one round; a round that must be `staged` takes one expert a
            device in any case, or a few where their sizes differ.

    Raises:
        InputError: placements of different models, or one that is not valid on the cluster.

    >>> from placement import Cluster, Placement
    >>> cluster = Cluster.from_dict({"server": [{"name": n, "devices": [{"memory": "1GB"}]} for n in "ab"]})
    >>> model = {"name": "toy", "layers": 1, "experts": 2, "top_k": 1, "expert_bytes": 10**9}
    >>> old, new = (
    ...     Placement(np.array(held)[:, None] > 0, cluster.device_names, "mine", model)
    ...     for held in ([[1, 0], [0, 1]], [[0, 1], [1, 0]])
    ... )
    >>> found = diff(old, new, cluster)
    >>> found.bytes, len(found.moves), found.seconds
    (2000000000, 2, 1.0)
    """
    for placement in (old, new):
        placement.validate(cluster)
    for key in ("name", "layers", "experts", "expert_bytes"):
        mine, theirs = (np.asarray(p.model[key]) if key != "expert_bytes" else p.expert_bytes for p in (old, new))
        if mine.shape != theirs.shape or (mine != theirs).any():
            found = f"{show(new.model[key])}, but {old.source} has {show(old.model[key])}"
            raise InputError(f"{new.source}: model.{key} = {found}; use placements of the same model")
    reserved = [np.asarray(placement.model.get("reserved_bytes", 0)) for placement in (old, new)]
    most = np.iinfo(np.int64).max if staging_bytes is None else max(staging_bytes, int(old.expert_bytes.max()))
    state = _State(cluster, old.resident.copy(), new.resident, old.expert_bytes, np.minimum(*reserved), most)
    rounds = []
    while state.adds or state.drops:
        rounds.append(state.next_round())
    return Diff(tuple(rounds), state.link_bytes, state.disk_bytes, state.load_seconds)


Item = tuple[int, int, int]  # layer, expert, device


@dataclass(eq=False)
class _State:
    """A migration as far as it has been planned."""

    cluster: Cluster
    resident: np.ndarray
    goal: np.ndarray
    size: np.ndarray
    reserved: np.ndarray
    most: int  # bytes that a server takes in during one round
    load_seconds: float = 0.0
    adds: list[Item] = field(init=False)
    drops: list[Item] = field(init=False)

    def __post_init__(self) -> None:
        servers = len(self.cluster.servers)
        self.server = self.cluster.device_server
        self.load_bandwidth = self.cluster.load_bandwidth
        self.room = self.cluster.memory - self.reserved - self.resident.sum(2, dtype=np.int64) @ self.size
        self.copies = self.resident.sum(0)
        self.link_bytes = np.zeros((servers, servers), np.int64)
        self.disk_bytes = np.zeros(len(self.room), np.int64)
        self.adds = _items(self.goal & ~self.resident)
        self.drops = _items(self.resident & ~self.goal)
        self.adds.sort(key=lambda item: (-self.size[item[0]], item))

    def next_round(self) -> Round:
        """Plan one more round and take it as done."""
        drops = self._make_room()
        for item in drops:
            self._drop(item)
        moves, waiting = [], []
        left = np.full(len(self.cluster.servers), self.most)
        # What has to come here before it can be given up elsewhere goes first: its room is the next round's.
        awaited = {item[:2] for item in set(self.drops).difference(drops)}
        for item in sorted(self.adds, key=lambda item: item[:2] not in awaited):
            layer, _, device = item
            size, server = self.size[layer], self.server[device]
            if self.room[device] >= size and left[server] >= size:
                self.room[device] -= size
                left[server] -= size
                moves.append(item)
            else:
                waiting.append(item)
        if moves:
            drops = self._without_spare_room(drops)
        staged = not moves and not drops
        if staged:
            moves, drops = self._cycle()
            waiting = [item for item in self.adds if item not in set(moves)]
        made = tuple(self._move(item) for item in moves)
        seconds = self._seconds(made)
        for layer, expert, device in moves:
            self.resident[device, layer, expert] = True
            self.copies[layer, expert] += 1
            self.room[device] -= self.size[layer] if staged else 0
        if staged:
            for item in drops:
                self._drop(item)
        gone = set(drops)
        self.adds, self.drops = waiting, [item for item in self.drops if item not in gone]
        return Round(tuple(drops), made, staged, seconds)

    def _drop(self, item: Item) -> None:
        layer, expert, device = item
        self.resident[device, layer, expert] = False
        self.copies[layer, expert] -= 1
        self.room[device] += self.size[layer]

    def _without_spare_room(self, drops: list[Item]) -> list[Item]:
        """Those of the drops whose room the moves took; the others are taken back."""
        kept = []
        for item in reversed(drops):
            layer, expert, device = item
            if self.room[device] >= self.size[layer]:
                self.resident[device, layer, expert] = True
                self.copies[layer, expert] += 1
                self.room[device] -= self.size[layer]
            else:
                kept.append(item)
        return kept[::-1]

    def _make_room(self) -> list[Item]:
        """Copies to give up now: others exist, and their device needs the room; without anything to add, all."""
        needed = np.zeros(len(self.room), np.int64)
        for layer, _, device in self.adds:
            needed[device] += self.size[layer]
        wanted = {(layer, expert) for layer, expert, _ in self.adds}
        spare, room, chosen = self.copies.copy(), self.room.copy(), []
        # What nobody waits for goes first: it is no source of a move.
        for item in sorted(self.drops, key=lambda item: (item[:2] in wanted, item)):
            layer, expert, device = item
            if spare[layer, expert] > 1 and (not self.adds or room[device] < needed[device]):
                spare[layer, expert] -= 1
                room[device] += self.size[layer]
                chosen.append(item)
        return chosen

    def _cycle(self) -> tuple[list[Item], list[Item]]:
        """A least set of moves and drops that fit if they happen at once, when every device waits for another.

        From one move: its device gives up enough only copies, whose experts must go where they are wanted, and so on.
        """
        by_expert: dict[tuple[int, int], list[Item]] = {}
        by_device: dict[int, list[Item]] = {}
        for item in self.adds:
            by_expert.setdefault(item[:2], []).append(item)
        for item in self.drops:
            by_device.setdefault(item[2], []).append(item)
        moves, drops, queue = [self.adds[0]], [], [self.adds[0]]
        room, covered = self.room.copy(), {self.adds[0][:2]}
        while queue:
            layer, _, device = queue.pop()
            room[device] -= self.size[layer]
            while room[device] < 0:
                # An expert that moves in this round anyway asks for nothing more.
                options = by_device[device]
                options.sort(key=lambda item: (item[:2] not in covered, item), reverse=True)
                item = options.pop()
                drops.append(item)
                room[device] += self.size[item[0]]
                if item[:2] not in covered:
                    covered.add(item[:2])
                    follow = by_expert[item[:2]][0]
                    moves.append(follow)
                    queue.append(follow)
        return moves, drops

    def _move(self, item: Item) -> Move:
        layer, expert, device = item
        size, to = int(self.size[layer]), int(self.server[device])
        from_storage = size / float(self.load_bandwidth[device])
        self.load_seconds += from_storage
        best, source = (from_storage, 0, -1), None
        for holder in np.flatnonzero(self.resident[:, layer, expert]).tolist():
            start = int(self.server[holder])
            seconds = self.cluster.latency[start, to] + size / self.cluster.bandwidth[start, to]
            # Links are tried in the order of what they carry already.
            key = (float(seconds), int(self.link_bytes[start, to]), holder)
            if key < best:
                best, source = key, holder
        if source is None:
            self.disk_bytes[device] += size
        elif self.server[source] != to:
            self.link_bytes[self.server[source], to] += size
        return Move(layer, expert, device, source, size, best[0])

    def _seconds(self, moves: tuple[Move, ...]) -> float:
        """Until all are done: each link and each disk takes its own one after the other."""
        busy: dict[Any, float] = {}
        latency: dict[Any, float] = {}
        for move in moves:
            to = int(self.server[move.device])
            if move.source is None:
                key, seconds = move.device, move.seconds
            else:
                start = int(self.server[move.source])
                key, seconds = (start, to), float(move.bytes / self.cluster.bandwidth[start, to])
                latency[key] = float(self.cluster.latency[start, to])
            busy[key] = busy.get(key, 0.0) + seconds
        return max((seconds + latency.get(key, 0.0) for key, seconds in busy.items()), default=0.0)


def _items(changes: np.ndarray) -> list[Item]:
    """(layer, expert, device) of every true entry of bool [D, L, E]."""
    return [(int(layer), int(expert), int(device)) for device, layer, expert in np.argwhere(changes)]
