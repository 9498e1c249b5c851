"""Local search of `latency`: single experts change places for as long as the expected time of token sets falls.

Layers do not depend on each other, so moves that touch different layers add up exactly, and whole batches of them go
together. Within a layer the effect of one more or one less copy is counted on the tokens that it concerns.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from placement.costs.computing import longest_in_server
from placement.costs.routing import copy_preference
from placement.costs.token_sets import TokenSets
from placement.data.problem import Problem
from placement.strategies.latency.moves import Effects, Move, Offer, across_layers, within_one_layer

WORK = 5 * 10**8  # comparisons spent in all, whatever the size
_FIXED = 10**5  # comparisons that take as long as what a layer's measurement needs whatever its size
_ALL_PARTNERS = 8  # up to so many servers, the use that others make of a new copy is counted too
_BUSY = 0.9  # of the busiest server's load: what goes to such a server makes the layer longer
_LEAST = 1e-7  # of the time at the start: smaller improvements are not worth a move


@dataclass(frozen=True, eq=False)
class _Prices:
    """Seconds in one layer: exchange [N, N] and rows [N, N] of a token per server met, and of an assignment at speed 1 in
    the prompt and in the decode steps, [L] each; `longest` is `computing.longest_in_server`, speed [N] that of a server.
    `crowd` is that of `local_search`."""

    exchange: np.ndarray
    rows: np.ndarray
    in_prompt: np.ndarray
    decoded: np.ndarray
    longest: np.ndarray
    speed: np.ndarray
    crowd: int


def local_search(
    problem: Problem,
    sets: TokenSets,
    held: np.ndarray,
    previous: np.ndarray | None = None,
    *,
    crowd: int = 1,
    within_layers: bool = False,
    work: int = WORK,
) -> np.ndarray:
    """Swap copies while the expected time of `problem.workload` falls: bool [N, L, E], covered and as full as `held`.

    A move is a server's copy given up for another; or an only copy handed to a server that gives up one for it, which
    leaves the first one room for what it wants most. All moves found in different layers are made together, then what
    did not shorten its layers is taken back and not tried again.

    Args:
        sets: token sets whose time counts.
        held: bool [N, L, E], every expert covered, within the memory of each server.
        previous: bool [D, L, E], the placement in force; equally good moves go back to it.
        crowd: sequences that meet at the devices in half of the decode steps; at least the active ones do.
        within_layers: leave every server as many experts of each layer as it has.
        work: comparisons of sets spent at most.
    """
    servers, layers, _ = problem.shape
    if servers < 2 or not len(sets.ids):
        return held
    held = held.copy()
    partners = servers if servers <= _ALL_PARTNERS else 1
    cost = sets.ids[0].size * max(sets.ids.shape[2], 2 * servers) * len(sets.ids) * (partners + 1)
    cost += servers * held.size + _FIXED * layers  # of finding each source's copies, and of any work at all
    effects = Effects(*(np.zeros(shape) for shape in (layers, problem.shape, problem.shape, problem.shape)))
    if partners == 1:
        effects.shift = None
    prices = _prices(problem, max(crowd, problem.workload.active))
    tie_break = 0.0 if previous is None else problem.held(previous) * 1e-12
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device)
    tried: set[Move] = set()
    stale, spent, least = np.arange(layers), 0, None
    while True:
        for layer in stale:
            _measure(problem, sets, prices, held, int(layer), effects)
        spent += cost * len(stale) // layers
        least = _LEAST * effects.time.sum() if least is None else least
        room = capacity - held.sum(2) @ problem.expert_bytes
        make = within_one_layer if within_layers else across_layers
        moves = [] if spent > work else _choose(problem, effects, make(problem, effects, tie_break, room), least, tried)
        if not moves:
            return held
        before = effects.time.copy()
        for move in moves:
            _apply(held, move)
        stale = np.unique([layer for move in moves for _, layer, _, _ in move])
        for layer in stale:
            effects.time[layer] = _follow(problem, sets, prices, held, int(layer))[1]
        for move in moves:
            touched = sorted({layer for _, layer, _, _ in move})
            if effects.time[touched].sum() > before[touched].sum() - least / 2:
                _apply(held, tuple((n, layer, e, not added) for n, layer, e, added in move))
                tried.add(move)


def _apply(held: np.ndarray, move: Move) -> None:
    for server, layer, expert, added in move:
        held[server, layer, expert] = added


def _prices(problem: Problem, crowd: int) -> _Prices:
    """What a token's exchange, rows and computing weigh in a chunk and its decode steps."""
    work = problem.workload
    tokens = work.prefill_tokens + work.decode_steps * work.active
    rows = problem.row_seconds + problem.sum_seconds
    speed = np.bincount(problem.device_server, problem.speed)
    in_prompt, decoded = problem.assignment_seconds
    computing = (work.prefill_tokens * in_prompt, work.decode_steps * decoded)
    return _Prices(problem.exchange_seconds, tokens * rows, *computing, longest_in_server(problem), speed, crowd)


@dataclass(frozen=True, eq=False)
class _Calls:
    """Where the tokens of the sets go in one layer, and what that costs; T tokens of k experts.

    Attributes:
        ids: int64 [T, k]; row: source of each token, int64 [T, 1]; weight: float64 [T, 1].
        rank: order in which a source turns to the servers, int64 [N, N].
        distance: rank of each holder, N where it has no copy, int64 [source, holder, E].
        first: whose copy a source uses, int64 [N, E]; target: of each assignment, int64 [T, k].
        waits: seconds of its exchange, float64 [T, k]; longest: of the token's, float64 [T].
        rows: seconds of its row, float64 [T, k]; computing: of an assignment at each server, float64 [N].
        alone: seconds of an expert of a token for which its device computes longest; count: its experts at each server,
            int64 [T, N].
        slow: weight of a token's exchange in a chunk and its steps.
        prices: of the problem.
    """

    ids: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    rank: np.ndarray
    distance: np.ndarray
    first: np.ndarray
    target: np.ndarray
    waits: np.ndarray
    longest: np.ndarray
    rows: np.ndarray
    computing: np.ndarray
    alone: float
    count: np.ndarray
    slow: float
    prices: _Prices

    def change(self, new: np.ndarray) -> np.ndarray:
        """Weighted seconds that it makes if each assignment alone went to server `new`, broadcastable to [T, k]."""
        new = np.broadcast_to(new, self.ids.shape)
        met = np.zeros(self.ids.shape, bool)
        for i in range(self.ids.shape[1]):
            met |= new == self.target[:, i : i + 1]
        after = np.where(met, 0.0, self.prices.rows[self.row, new]) + self.computing[new]
        after += self.slow * np.maximum(self._others, self.prices.exchange[self.row, new])
        if self.alone:
            rest, now = self._computing
            there = self.prices.longest[new, self.count[np.arange(len(new))[:, None], new] + (new != self.target)]
            after += self.alone * np.where(new == self.target, 0.0, np.maximum(rest, there) - now)
        return (after - self._saved) * self.weight

    @cached_property
    def _computing(self) -> tuple[np.ndarray, np.ndarray]:
        """Longest computing of a token: if an assignment leaves its server, beside where it goes, [T, k]; now, [T, 1]."""
        servers, token = np.arange(self.count.shape[1]), np.arange(len(self.ids))[:, None]
        value = self.prices.longest[servers, self.count]
        order = np.sort(value, -1)
        here = value[token, self.target]
        now, second = order[:, -1:], order[:, -2:-1]
        left = self.prices.longest[self.target, self.count[token, self.target] - 1]
        return np.maximum(np.where(here == now, second, now), left), now

    @cached_property
    def _others(self) -> np.ndarray:
        """The longest exchange of a token's other assignments, float64 [T, k]."""
        top = np.sort(self.waits, -1)
        second = top[:, -2:-1] if self.ids.shape[1] > 1 else 0.0
        return np.where(self.waits == top[:, -1:], second, top[:, -1:])

    @cached_property
    def _saved(self) -> np.ndarray:
        """Seconds that an assignment costs where it goes now, float64 [T, k]."""
        repeated = np.zeros(self.ids.shape, np.int64)  # other experts of the token at the same server
        for i in range(self.ids.shape[1]):
            repeated[:, i] = (self.target == self.target[:, i : i + 1]).sum(-1) - 1
        return np.where(repeated == 0, self.rows, 0.0) + self.computing[self.target] + self.slow * self.longest[:, None]


def _follow(problem: Problem, sets: TokenSets, prices: _Prices, held: np.ndarray, layer: int) -> tuple[_Calls, float]:
    """The calls of one layer, and its expected seconds in a chunk and its steps."""
    work, row = problem.workload, sets.source[:, None]
    ids = sets.ids[:, layer].astype(np.int64)
    rank = copy_preference(problem, held[:, layer : layer + 1])[:, 0]
    distance = np.where(held[:, layer], rank[:, :, None], len(problem.names))
    first = distance.argmin(1)
    target = first[row, ids]
    waits, rows = prices.exchange[row, target], prices.rows[row, target]
    # A layer waits for its busiest server: only what goes there costs time to compute. A decoded token alone waits for that
    # of its own few experts.
    servers = len(prices.speed)
    spent = np.bincount(target.ravel(), np.repeat(sets.weight, ids.shape[1]), servers) / prices.speed
    token = np.arange(len(ids))[:, None] * servers
    count = np.bincount((token + target).ravel(), minlength=len(ids) * servers).reshape(-1, servers)
    longest = float(sets.weight @ prices.longest[np.arange(servers), count].max(-1))
    alone, shared = 0.0, float(prices.in_prompt[layer])
    busiest = shared * float(spent.max())
    for number in (work.active, prices.crowd):  # as often idle as busy
        seconds, together = float(prices.decoded[layer]) / 2, number * float(spent.max())
        busiest += seconds * max(longest, together)
        if longest > together:
            alone += seconds
        else:
            shared += number * seconds
    computing = np.where(spent >= _BUSY * spent.max(), shared / prices.speed, 0.0)
    slowest = waits.max(-1)
    # Of a sequences at once the slowest counts: a token's exchange matters as far as the others need none.
    need = float(sets.weight @ (slowest > 0))
    slow = work.decode_steps * work.active * (1 - need) ** (work.active - 1)
    exchange = float(sets.weight @ slowest)
    earlier = np.zeros(ids.shape, bool)  # an expert of the token before this one goes to the same server
    for i in range(ids.shape[1]):
        earlier[:, i] = (target == target[:, i : i + 1])[:, :i].any(-1)
    time = float(sets.weight @ (np.where(earlier, 0.0, rows).sum(-1))) + busiest
    any_waits = (1 - (1 - need) ** work.active) / need if need > 0 else 0.0
    weight = sets.weight[:, None]
    own = (waits, slowest, rows, computing, alone, count, slow, prices)
    calls = _Calls(ids, row, weight, rank, distance, first, target, *own)
    return calls, time + work.decode_steps * exchange * any_waits


def _measure(
    problem: Problem, sets: TokenSets, prices: _Prices, held: np.ndarray, layer: int, effects: Effects
) -> None:
    """Update one layer of `effects`."""
    servers, _, experts = problem.shape
    here = held[:, layer]
    calls, effects.time[layer] = _follow(problem, sets, prices, held, layer)
    ids, row, target, copies = calls.ids, calls.row, calls.target, here.sum(0)
    np.put_along_axis(calls.distance, calls.first[:, None], servers, 1)
    second = calls.distance.argmin(1)
    lost = np.bincount((target * experts + ids).ravel(), calls.change(second[row, ids]).ravel(), minlength=here.size)
    effects.drop[:, layer] = np.where(here & (copies > 1), lost.reshape(here.shape), np.inf)
    if effects.shift is None:
        moved = np.where(target == row, 0.0, calls.change(row))
        won = np.bincount((row * experts + ids).ravel(), moved.ravel(), minlength=here.size).reshape(here.shape)
        effects.add[:, layer] = np.where(here, np.inf, won)
        return
    for server in range(servers):
        moved = calls.change(np.array(server))
        nearer = calls.rank[row, server] < calls.rank[row, target]
        won = np.bincount(ids[nearer], moved[nearer], minlength=experts)
        effects.add[server, layer] = np.where(here[server], np.inf, won)
        handed = np.bincount(ids.ravel(), moved.ravel(), minlength=experts)
        effects.shift[server, layer] = np.where(~here[server] & (copies == 1), handed, np.inf)


def _choose(problem: Problem, effects: Effects, offers: list[Offer], least: float, tried: set[Move]) -> list[Move]:
    """Moves that shorten the time, the most useful first, no two of them in one layer."""
    _, layers, _ = problem.shape
    every = np.concatenate([value.ravel() for value, _ in offers])
    good = np.flatnonzero(every < -least)
    starts = [0, *accumulate(value.size for value, _ in offers)]
    moves: list[Move] = []
    used, busy = set[int](), set[int]()  # layers, servers
    equal = bool((problem.expert_bytes == problem.expert_bytes[0]).all())
    for index in good[np.argsort(every[good], kind="stable")].tolist():
        kind = bisect_right(starts, index) - 1
        value, make = offers[kind]
        changes = make(*np.unravel_index(index - starts[kind], value.shape))
        move = tuple((int(n), int(layer), int(expert), added) for n, layer, expert, added in changes)
        at, by = {layer for _, layer, _, _ in move}, {n for n, _, _, _ in move}
        # With unequal sizes, or into free room, a second move of a server might not fit any more.
        if not used.isdisjoint(at) or move in tried or ((not equal or len(move) == 1) and not busy.isdisjoint(by)):
            continue
        moves.append(move)
        used |= at
        busy |= by
        if len(used) == layers:
            break
    return moves
