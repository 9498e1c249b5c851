"""Who hosts a layer for whom, and the rows that move where the host changes. Places no experts.

A layer's host for a source runs attention, KV cache and router of the layer for the sequences that entered there. At home
everywhere is how this project serves; contiguous ranges of layers hosted elsewhere are a pipeline. Where two neighboring
layers have different hosts, a sequence's rows move one way: half an exchange. The last hop brings home the row that
gives the next token, in a prompt as in a decode step.
"""

from dataclasses import dataclass

import numpy as np

from placement.data.problem import VALUE_BYTES, Problem

_BLOCK = 2**24  # numbers of the path search handled at once
_TIE = 1e-9  # of a path's seconds, by which sources that have equally good paths share them


def at_home(problem: Problem) -> np.ndarray:
    """Every source hosts all layers of its own sequences: int64 [N, L]."""
    servers, layers, _ = problem.shape
    return np.repeat(np.arange(servers)[:, None], layers, axis=1)


def seen_from_hosts(serving: np.ndarray, host: np.ndarray | None) -> np.ndarray:
    """Which server serves each source's calls, int64 [N, L, E], where its layers are hosted by `host`, int [N, L].

    Args:
        serving: from `routing.serving_server`, of each server that hosts a layer.
        host: None is at home.
    """
    return serving if host is None else serving[host, np.arange(host.shape[1])]


@dataclass(frozen=True, eq=False)
class Hops:
    """One-way moves of rows between servers, H of them in the order of sources and layers.

    Attributes:
        source: whose sequences, int64 [H].
        start, end: from which server to which, int64 [H].
        home: whether it is the last one, which carries one row of a prompt chunk too, bool [H].
        servers: N.
    """

    source: np.ndarray
    start: np.ndarray
    end: np.ndarray
    home: np.ndarray
    servers: int

    @classmethod
    def of(cls, problem: Problem, host: np.ndarray | None) -> "Hops":
        """Hops of all sources under `host`, int [N, L]; none where that is None."""
        servers = len(problem.names)
        if host is None:
            none = np.zeros(0, np.int64)
            return cls(none, none, none, none.astype(bool), servers)
        own = np.arange(servers)[:, None]
        path = np.concatenate([own, host, own], axis=1)
        source, step = np.nonzero(path[:, 1:] != path[:, :-1])
        return cls(source, path[source, step], path[source, step + 1], step == host.shape[1], servers)

    @property
    def number(self) -> np.ndarray:
        """Hops of one token of each source, int64 [N]."""
        return np.bincount(self.source, minlength=self.servers)

    def waiting(self, problem: Problem) -> np.ndarray:
        """Seconds of one token's hops without its bytes, float64 [N]."""
        return self._sum(hop_seconds(problem)[self.start, self.end])

    def row_seconds(self, problem: Problem, tokens: float = 1.0) -> np.ndarray:
        """Seconds that the rows of a step of so many tokens of one sequence are on their way, float64 [N]."""
        return self._sum(self.rows(tokens) * moved_seconds(problem)[self.start, self.end])

    def rows(self, tokens: float) -> np.ndarray:
        """Rows of each hop in a step of so many tokens of one sequence, float64 [H]."""
        return np.where(self.home, min(tokens, 1.0), tokens)

    def busiest_port(self, problem: Problem, share: np.ndarray) -> float:
        """Seconds that the busiest interface is kept by a token drawn by `share`, [N], in a decode step."""
        seconds = share[self.source] * moved_seconds(problem)[self.start, self.end]
        ends = (np.bincount(end, seconds, self.servers) for end in (self.start, self.end))
        return float(max(end.max() for end in ends))

    def token_bytes(self, problem: Problem, tokens: float = 1.0) -> np.ndarray:
        """Bytes of the hops of a step of so many tokens of one sequence, float64 [N]."""
        return self._sum(self.rows(tokens) * moved_bytes(problem))

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.source, values, self.servers)


def hop_seconds(problem: Problem) -> np.ndarray:
    """Seconds of moving rows from row to column without their bytes, float64 [N, N]: half an exchange, 0 on the diagonal."""
    seconds = problem.latency + problem.workload.exchange_seconds / 2
    return np.where(np.eye(len(seconds), dtype=bool), 0.0, seconds)


def moved_bytes(problem: Problem) -> int:
    """Of one token's row where it goes on to another host: its activations alone."""
    return problem.hidden_size * VALUE_BYTES


def moved_seconds(problem: Problem) -> np.ndarray:
    """Seconds that such a row takes from row to column, float64 [N, N]; 0 on the diagonal."""
    return moved_bytes(problem) / problem.bandwidth


def layer_hosts(problem: Problem, resident: np.ndarray) -> np.ndarray:
    """The hosts by which a token of each source gets through all layers soonest: int64 [N, L].

    A layer can be hosted where all its experts are, else where most of them are. The path of least latency is found layer
    by layer, as Parallax routes requests (arXiv 2509.26182, section 4): hops, one row's bytes on each, and the computing of
    a decoded token by the host's devices together. Of equally good ones a source takes the next servers in ring order.

    Args:
        resident: bool [D, L, E], every expert resident somewhere.
    """
    servers, layers, _ = problem.shape
    part = problem.held(resident).sum(-1)
    can = part == part.max(0)
    hop = hop_seconds(problem) + moved_seconds(problem)
    speed = np.add.reduceat(problem.speed, problem.first_device)
    work = problem.top_k * problem.assignment_seconds[1] / speed[:, None]  # [N, L]
    ring = (np.arange(servers) - np.arange(servers)[:, None]) % servers
    ties = ring * (_TIE / servers / layers * max(float(hop.max()), 1e-9))
    before, cost, back = np.flatnonzero(can[:, 0]), np.zeros(0), []
    cost = hop[:, before] + work[before, 0] + ties[:, before]  # [N, hosts of the layer]
    for layer in range(1, layers):
        here = np.flatnonzero(can[:, layer])
        best = np.empty((servers, len(here)), np.int64)
        step = max(1, _BLOCK // (len(before) * len(here)))
        after = np.empty((servers, len(here)))
        for start in range(0, servers, step):
            rows = slice(start, start + step)
            total = cost[rows, :, None] + hop[np.ix_(before, here)]
            best[rows] = total.argmin(1)
            after[rows] = np.take_along_axis(total, best[rows][:, None], 1)[:, 0]
        back.append((before, best))
        before, cost = here, after + work[here, layer] + ties[:, here]
    chosen = (cost + hop[before].T).argmin(1)
    host = np.empty((servers, layers), np.int64)
    host[:, -1] = before[chosen]
    for layer in range(layers - 1, 0, -1):
        before, best = back[layer - 1]
        chosen = best[np.arange(servers), chosen]
        host[:, layer - 1] = before[chosen]
    return host
