"""Which server holds which item, to optimality: prices by coordinate descent, then shortest exchange paths.

    maximise sum w_{n,i} x_{n,i}   subject to   sum_i x_{n,i} = C_n,  sum_n x_{n,i} >= 1,  x in {0, 1}

A transportation problem: its constraint matrix is totally unimodular, so the linear programme has integral optima. Knows
nothing of layers, devices or bytes.
"""

import itertools

import numpy as np

_FAR = np.int64(2**61)
LARGEST = 2**53  # of a weight: sums along a path stay below _FAR, and float64 holds every weight


def transport(weight: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Solve the problem above in integer arithmetic.

    Prices are brought close to the optimum first. The assignment that is best at these prices covers every item but
    fills some servers too much and others too little; each unit too much then leaves along a cheapest exchange path of
    the residual graph, so that no cycle of exchanges gains anything at any time (successive shortest paths).

    Args:
        weight: int64 [N, I], magnitudes up to `LARGEST`.
        capacity: int64 [N], from 0 to I, summing to at least I.

    Returns:
        bool [N, I].
    """
    held = best_response(weight, np.rint(prices(weight, np.ones(weight.shape[1]), capacity)).astype(np.int64))
    return _Exchange(weight, capacity, held).run()


def best_response(weight: np.ndarray, price: np.ndarray) -> np.ndarray:
    """What is held at given prices: wherever w_{n,i} > price_n, and each item at least where w - price is largest.

    Args:
        weight: [N, I].
        price: [N], or [N, I] where items differ in size.

    Returns:
        bool [N, I].
    """
    score = weight - (price[:, None] if price.ndim == 1 else price)
    held = score > 0
    held[score.argmax(0), np.arange(score.shape[1])] = True
    return held


def prices(weight: np.ndarray, size: np.ndarray, capacity: np.ndarray, sweeps: int = 30) -> np.ndarray:
    """Server prices close to the minimum of the dual, per unit of size.

        D(p) = sum_n C_n p_n + sum_i max over non-empty sets S of servers of sum_{n in S} (w_{n,i} - s_i p_n)

    Exact minimisation over one price after the other stalls where D has kinks, so prices overshoot by a step that
    shrinks geometrically, and a common shift of all prices is searched for every few sweeps.

    Args:
        weight: [N, I].
        size: float64 [I], greater than 0.
        capacity: [N].
        sweeps: passes over the servers.

    Returns:
        float64 [N], of any sign.
    """
    weight, capacity = weight.astype(np.float64), capacity.astype(np.float64)
    density, equal = weight / size, bool((size == size[0]).all())
    price = np.array([_break(row, size, room, equal) for row, room in zip(density, capacity, strict=True)])
    if len(price) == 1:
        return price  # the server holds everything
    step = density.max() / 8
    for sweep in range(sweeps):
        if sweep % 5 == 0:
            price += _common_shift(density - price[:, None], size, capacity.sum())
        before = price.copy()
        score = density - price[:, None]
        later = np.maximum.accumulate(score[::-1], axis=0)[::-1]
        others = np.full(weight.shape[1], -np.inf)
        for n in range(len(price)):
            best_other = np.maximum(others, later[n + 1]) if n + 1 < len(price) else others
            # The server keeps an item up to this price: while it gains, or while nobody else would lose less.
            limit = density[n] - np.minimum(0.0, best_other)
            found = _break(limit, size, capacity[n], equal)
            price[n] = found + step if found > price[n] else found
            others = np.maximum(others, density[n] - price[n])
        step *= 0.3
        if step < 0.5 and (before == price).all():
            break
    return price


def _break(limit: np.ndarray, size: np.ndarray, room: float, equal: bool) -> float:
    """The price at which items with price limits [I] just fill the room: between the last that fits and the next."""
    if equal:
        fit = int(room // size[0])
        if fit >= len(limit):
            return float(limit.min()) - 1.0
        if fit == 0:
            return float(limit.max()) + 1.0
        part = np.partition(limit, [len(limit) - fit - 1, len(limit) - fit])
        return float(part[len(limit) - fit - 1] + part[len(limit) - fit]) / 2
    order = np.argsort(-limit, kind="stable")
    fit = int(np.searchsorted(np.cumsum(size[order]), room, side="right"))
    if fit >= len(limit):
        return 0.0
    return float(limit[order[fit]])


def _common_shift(score: np.ndarray, size: np.ndarray, room: float) -> float:
    """The amount by which all prices rise so that what is held at them takes `room` over all servers; by bisection."""
    best, low, high = score.max(0), float(score.min()) - 1, float(score.max())
    resolution = 1e-9 * (high - low)
    while high - low > resolution and low < (middle := (low + high) / 2) < high:
        copies = np.maximum(np.count_nonzero(score > middle, axis=0), best <= middle)
        low, high = (middle, high) if (copies * size).sum() > room else (low, middle)
    return high


class _Exchange:
    """Residual graph over servers: arc n -> m costs the cheapest item to move there, to and from node N none moves in.

    Node N stands for copies beyond an item's first: an arc n -> N drops the cheapest duplicate of n, an arc N -> m adds
    the most valuable item that m lacks. Each server has a fixed range of slots, as many as it ever fills.
    """

    def __init__(self, weight: np.ndarray, capacity: np.ndarray, held: np.ndarray) -> None:
        self.weight, self.by_item = weight, np.ascontiguousarray(weight.T)
        self.held, self.excess = np.ascontiguousarray(held.T), held.sum(1) - capacity
        self.copies = held.sum(0)
        width = np.maximum(np.maximum(held.sum(1), capacity), 1)
        self.first = np.cumsum(width) - width
        self.owner = np.repeat(np.arange(len(width)), width)
        self.item = np.full(width.sum(), -1)
        server, item = np.nonzero(held)
        self.item[self.first[server] + np.arange(len(item)) - np.searchsorted(server, server)] = item
        self.value = np.where(self.item >= 0, weight[self.owner, self.item], _FAR)
        self.cost = np.full((len(width) + 1,) * 2, _FAR)
        for n in range(len(width)):
            self._leave(n)
            self._add(n)
        self._drop()

    def run(self) -> np.ndarray:
        """Move units along cheapest paths until every server is exactly full: bool [N, I]."""
        nowhere = len(self.excess)
        while self.excess.any():
            over = np.flatnonzero(self.excess > 0)
            path = self._path(int(over[0]) if len(over) else nowhere)
            moves = [(a, b, self._choose(a, b)) for a, b in itertools.pairwise(path)]
            for a, b, item in moves:
                if a < nowhere:
                    self.held[item, a] = False
                    self.excess[a] -= 1
                    slots = slice(self.first[a], self.first[a + 1] if a + 1 < nowhere else None)
                    self._put(int(self.first[a] + (self.item[slots] == item).argmax()), -1)
                self.copies[item] += (b < nowhere) - (a < nowhere)
            for _, b, item in moves:
                if b < nowhere:
                    self.held[item, b] = True
                    self.excess[b] += 1
                    slots = slice(self.first[b], self.first[b + 1] if b + 1 < nowhere else None)
                    self._put(int(self.first[b] + (self.item[slots] < 0).argmax()), item)
            touched = [node for node in path if node < nowhere]
            for n in touched:
                self._leave(n)
                self._add(n)
            for n in touched:
                self._enter(n)
            self._drop()
        return np.ascontiguousarray(self.held.T)

    def _put(self, slot: int, item: int) -> None:
        self.item[slot] = item
        self.value[slot] = self.weight[self.owner[slot], item] if item >= 0 else _FAR

    def _path(self, source: int) -> list[int]:
        """Cheapest path from an overfull server to one with room or to N, or from N to one with room (Bellman-Ford)."""
        nowhere = len(self.excess)
        distance, parent = np.full(nowhere + 1, _FAR), np.full(nowhere + 1, -1)
        distance[source] = 0
        for _ in range(nowhere + 1):
            through = distance[:, None] + self.cost
            through[(distance >= _FAR // 2)[:, None] | (self.cost >= _FAR // 2)] = _FAR
            nearest = through.min(0)
            better = nearest < distance
            if not better.any():
                break
            parent[better] = through[:, better].argmin(0)
            distance[better] = nearest[better]
        sink = np.append(self.excess < 0, source != nowhere)
        node = int(np.where(sink, distance, _FAR).argmin())
        path = [node]
        while node != source:
            node = int(parent[node])
            path.append(node)
        path.reverse()
        # Node N takes whatever arrives: a path that would go on from there ends there.
        return path[: path.index(nowhere, 1) + 1] if nowhere in path[1:] else path

    def _choose(self, a: int, b: int) -> int:
        """The item that the arc from a to b moves."""
        nowhere = len(self.excess)
        if a == nowhere:
            return int(np.where(self.held[:, b], -_FAR, self.weight[b]).argmax())
        items = np.flatnonzero(self.held[:, a])
        if b == nowhere:
            items = items[self.copies[items] > 1]
            return int(items[self.weight[a, items].argmin()])
        items = items[~self.held[items, b]]
        return int(items[(self.weight[a, items] - self.weight[b, items]).argmin()])

    def _leave(self, n: int) -> None:
        """Arcs from server n to the others."""
        items = np.flatnonzero(self.held[:, n])
        if len(items):
            cost = self.by_item[items, n][:, None] - self.by_item[items]
            cost[self.held[items]] = _FAR
            self.cost[n, :-1] = cost.min(0)
        else:
            self.cost[n, :-1] = _FAR

    def _enter(self, m: int) -> None:
        """Arcs from the other servers to m."""
        cost = self.value - self.weight[m, self.item]
        cost[(self.item < 0) | self.held[self.item, m]] = _FAR
        self.cost[:-1, m] = np.minimum.reduceat(cost, self.first)

    def _add(self, m: int) -> None:
        """Arc from N to m."""
        self.cost[-1, m] = -np.where(self.held[:, m], -_FAR, self.weight[m]).max()

    def _drop(self) -> None:
        """Arcs to N."""
        value = np.where(self.copies[self.item] > 1, self.value, _FAR)
        self.cost[:-1, -1] = np.minimum.reduceat(value, self.first)
