"""How often tokens need other servers: the one place that counts it, for costs, planners and the simulator.

Token-level sets are counted where a server has them. From counts alone experts are taken to be chosen independently, each
with p_e = min(1, k x demand(e)): P(m needed) = 1 - prod over e served by m of (1 - p_e). Real experts fire together, so
this overstates the need. A server without any statistics wants what the others want (`Problem.demand`).
"""

from dataclasses import dataclass

import numpy as np

from placement.costs.hosting import at_home
from placement.data.problem import Problem

_CHUNK = 2**22  # array elements handled at once where a full array would be large
_LEVELS = 32  # different exchange times told apart; more are rounded up
# A row that goes unasked is never sent unless a token needs it with this probability, however slow asking is: a row and its
# sum, of twice its bytes, are then at most (1 + 2p) / 3p = 1.17 times the bytes that were needed.
LEAST_LIKELY = 2 / 3


@dataclass(frozen=True, eq=False)
class NetworkUse:
    """How the tokens of each source use the other servers, layer by layer.

    Attributes:
        pairs: probability that a token of row n needs server m, float64 [N, L, N]; 0 for the layer's host.
        levels: seconds of an exchange, ascending, the first 0: float64 [V].
        within: probability that one token's exchanges take at most each level, float64 [N, L, V]; at level 0 it needs none.
        counted: whether a server's own recorded tokens were counted, bool [N].
    """

    pairs: np.ndarray
    levels: np.ndarray
    within: np.ndarray
    counted: np.ndarray

    @property
    def need(self) -> np.ndarray:
        """P(a layer needs the network) for one token, float64 [N, L]."""
        return 1.0 - self.within[..., 0]

    @property
    def distinct(self) -> np.ndarray:
        """Expected distinct remote servers of one token, float64 [N, L]."""
        return self.pairs.sum(-1)

    def of(self, server: int) -> "NetworkUse":
        """That of one server alone."""
        own = slice(server, server + 1)
        return NetworkUse(self.pairs[own], self.levels, self.within[own], self.counted[own])

    def waiting(self, share: np.ndarray | None = None, tokens: float = 1.0) -> np.ndarray:
        """E[slowest exchange of so many tokens together] in seconds, float64 [L]; [N, L] of each server without `share`.

        Args:
            share: of each server in the tokens, float64 [N]: each is drawn on its own.
            tokens: how many wait for each other.
        """
        within = self.within if share is None else np.einsum("n,nlv->lv", share, self.within)
        return (self.levels * np.diff(within**tokens, axis=-1, prepend=0.0)).sum(-1)


def network_use(problem: Problem, serving: np.ndarray, host: np.ndarray | None = None) -> NetworkUse:
    """Use of the network under a table of serving servers, by exchanges inside the layers; hops are `costs.hosting`'s.

    Args:
        problem: demand of each server, token-level sets where there are any, and the links.
        serving: int [N, L, E] from `serving_server`, seen from the hosts (`hosting.seen_from_hosts`).
        host: who hosts each source's layers, int [N, L]; None is at home.
    """
    host = at_home(problem) if host is None else host
    away = ~np.eye(len(problem.names), dtype=bool)
    levels = np.unique(problem.exchange_seconds[away])
    if len(levels) > _LEVELS:
        levels = np.quantile(levels, np.linspace(0, 1, _LEVELS + 1)[1:], method="higher")
    levels = np.concatenate([[0.0], levels])
    level = np.where(away, np.maximum(np.searchsorted(levels, problem.exchange_seconds), 1), 0)
    level = level.astype(np.int8)[host]  # [N, L, N]
    pairs, within = _from_demand(problem, serving, host, level, len(levels))
    counted = np.zeros(len(problem.names), bool)
    if problem.tokens is not None:
        counted = np.bincount(problem.tokens.server, minlength=len(problem.names)) > 0
        recorded = _from_tokens(problem, serving, host, level, len(levels))
        pairs[counted], within[counted] = recorded[0][counted], recorded[1][counted]
    return NetworkUse(pairs, levels, within, counted)


def chosen_probability(problem: Problem) -> np.ndarray:
    """p_e = min(1, k x demand(e)): how likely a token chooses each expert, float64 [N, L, E]."""
    return np.minimum(1.0, problem.top_k * problem.demand)


def likely_links(problem: Problem, serving: np.ndarray) -> np.ndarray:
    """Pairs of servers between which the first row of a layer should go unasked: bool [N, L, N].

    Asking costs a message each time, not asking a row's seconds each time that no token needed it. With probability p of
    need, a message of alpha seconds and a row of r seconds, not asking is cheaper where p alpha > (1 - p) r, that is for
    p > r / (alpha + r). A question is not waited for before the rows go, so alpha is what a message costs beyond its link's
    latency: half an exchange's. Below `LEAST_LIKELY` not asking would send too many bytes. A server without statistics of
    its own asks.

    Args:
        problem: bandwidth of its links, and how often tokens need whom.
        serving: int [N, L, E] from `serving_server`.
    """
    row, message = problem.row_seconds, problem.workload.exchange_seconds / 2
    worth = row / np.maximum(message + row, np.finfo(float).tiny)
    known = problem.frequency.sum(-1, keepdims=True) > 0
    return known & (network_use(problem, serving).pairs >= np.maximum(worth, LEAST_LIKELY)[:, None])


def _from_demand(
    problem: Problem, serving: np.ndarray, host: np.ndarray, level: np.ndarray, levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """P(m spared) = prod over e served by m of (1 - p_e), partners independent: pairs [N, L, N], within [N, L, V]."""
    servers, layers, _ = problem.shape
    with np.errstate(divide="ignore"):  # p = 1 gives log 0 = -inf, and exp(-inf) = 0 is what it means
        spared = np.log1p(-chosen_probability(problem))
    pair = np.arange(servers * layers)[:, None] * servers + serving.reshape(servers * layers, -1)
    log_spared = np.bincount(pair.ravel(), spared.ravel(), minlength=servers * layers * servers)
    log_spared = log_spared.reshape(servers, layers, servers)
    np.put_along_axis(log_spared, host[..., None], 0.0, -1)
    within = np.empty((servers, layers, levels))
    for v in range(levels):
        within[..., v] = np.exp(np.where(level > v, log_spared, 0.0).sum(-1))
    return 1.0 - np.exp(log_spared), within


def _from_tokens(
    problem: Problem, serving: np.ndarray, host: np.ndarray, level: np.ndarray, levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same, counted on recorded tokens; 0 for a server without any."""
    assert problem.tokens is not None
    tokens, (servers, layers, _) = problem.tokens, problem.shape
    pairs, slowest = np.zeros((servers, layers, servers)), np.zeros((servers, layers, levels))
    layer = np.arange(layers)
    step = max(1, _CHUNK // tokens.ids[0].size) if len(tokens.ids) else 1
    for start in range(0, len(tokens.ids), step):
        rows = slice(start, start + step)
        source = tokens.server[rows]
        target = np.sort(serving[source[:, None, None], layer[:, None], tokens.ids[rows]], -1)
        first = np.ones(target.shape, bool)
        first[..., 1:] = target[..., 1:] != target[..., :-1]
        row = source[:, None] * layers + layer  # [T, L]
        pairs += np.bincount((row[..., None] * servers + target)[first], minlength=pairs.size).reshape(pairs.shape)
        longest = level[source[:, None, None], layer[:, None], target].max(-1)
        slowest += np.bincount((row * levels + longest).ravel(), minlength=slowest.size).reshape(slowest.shape)
    count = np.maximum(np.bincount(tokens.server, minlength=servers), 1)[:, None, None]
    np.put_along_axis(pairs, host[..., None], 0.0, -1)
    return pairs / count, slowest.cumsum(-1) / count
