"""How often tokens need other servers, from token-level sets where they are known and from frequencies where they are not."""

from dataclasses import dataclass

import numpy as np

from placement.data.problem import Problem, Tokens

_CHUNK = 2**22  # array elements handled at once where a full array would be large


def network_need(problem: Problem, serving: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """How a token of each server depends on other servers, averaged over its tokens and layers.

    With token-level sets this is counted. From counts alone experts are taken to be chosen independently, each with
    p_e = min(1, k f(e) / sum f): P(m needed) = 1 - prod over e served by m of (1 - p_e). Real experts fire together, so
    this overstates both figures.

    Args:
        serving: int [N, L, E] from `serving_server`.

    Returns:
        P(a layer needs the network) for one token, float64 [N]; expected distinct remote servers per token and layer,
        float64 [N]; and what they rest on: "tokens", "counts", or "mixed" where only some servers have tokens.
    """
    need, distinct = _need_from_counts(problem, serving)
    demand = problem.frequency.sum((1, 2)) > 0
    if problem.tokens is None:
        return need, distinct, "counts"
    servers = len(problem.names)
    tokens = np.bincount(problem.tokens.server, minlength=servers)
    counted = _need_from_tokens(problem.tokens, serving)
    need, distinct = (np.where(tokens > 0, c, f) for c, f in zip(counted, (need, distinct), strict=True))
    return need, distinct, "mixed" if (demand & (tokens == 0)).any() else "tokens"


def chosen_probability(problem: Problem) -> np.ndarray:
    """p_e = min(1, k f(e) / sum f): how likely a token chooses each expert, float64 [N, L, E]; 0 without demand."""
    total = problem.frequency.sum(-1, keepdims=True)
    return np.minimum(1.0, problem.top_k * problem.frequency / np.where(total > 0, total, 1.0))


def spared_by_partner(problem: Problem, serving: np.ndarray) -> np.ndarray:
    """log P(a token of n needs nothing from m), experts taken to be chosen independently: float64 [N, L, N]."""
    servers, layers, _ = problem.shape
    with np.errstate(divide="ignore"):  # p = 1 gives log 0 = -inf, and exp(-inf) = 0 is what it means
        spared = np.log1p(-chosen_probability(problem))
    pair = np.arange(servers * layers)[:, None] * servers + serving.reshape(servers * layers, -1)
    log_spared = np.bincount(pair.ravel(), spared.ravel(), minlength=servers * layers * servers)
    log_spared = log_spared.reshape(servers, layers, servers)
    log_spared[np.arange(servers), :, np.arange(servers)] = 0.0
    return log_spared


def _need_from_counts(problem: Problem, serving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_spared = spared_by_partner(problem, serving)
    need = 1.0 - np.exp(log_spared.sum(-1))
    distinct = (1.0 - np.exp(log_spared)).sum(-1)
    return need.mean(-1), distinct.mean(-1)


def _need_from_tokens(tokens: Tokens, serving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    servers, layers, _ = serving.shape
    need, distinct = np.zeros(servers), np.zeros(servers)
    layer = np.arange(layers)[:, None]
    step = max(1, _CHUNK // tokens.ids[0].size) if len(tokens.ids) else 1
    for start in range(0, len(tokens.ids), step):
        rows = slice(start, start + step)
        source = tokens.server[rows].astype(np.int64)
        target = np.sort(serving[source[:, None, None], layer, tokens.ids[rows]], -1)
        met = 1 + (target[..., 1:] != target[..., :-1]).sum(-1)
        away = met - (target == source[:, None, None]).any(-1)
        need += np.bincount(source, (away > 0).mean(-1), minlength=servers)
        distinct += np.bincount(source, away.mean(-1), minlength=servers)
    count = np.maximum(np.bincount(tokens.server, minlength=servers), 1)
    return need / count, distinct / count


# A row that goes unasked is never sent unless a token needs it with this probability, however slow asking is: a row and its
# sum are then at most (1 + p) / 2p = 1.25 times the bytes that were needed.
LEAST_LIKELY = 2 / 3


def likely_links(problem: Problem, serving: np.ndarray) -> np.ndarray:
    """Pairs of servers between which the first row of a layer should go unasked: bool [N, L, N].

    Asking costs a message each time, not asking a row's seconds each time that no token needed it. With probability p of
    need, a message of alpha seconds and a row of r seconds, not asking is cheaper where p alpha > (1 - p) r, that is for
    p > r / (alpha + r). A question is not waited for before the rows go, so alpha is what a message costs beyond its link's
    latency: half an exchange's. Below `LEAST_LIKELY` not asking would send too many bytes.

    Args:
        problem: bandwidth of its links, and how often tokens need whom.
        serving: int [N, L, E] from `serving_server`.
    """
    row, message = problem.row_seconds, problem.workload.exchange_seconds / 2
    worth = row / np.maximum(message + row, np.finfo(float).tiny)
    return traffic(problem, serving).pairs >= np.maximum(worth, LEAST_LIKELY)[:, None]


_CHUNK = 2**22  # array elements handled at once where a full array would be large
_LEVELS = 32  # different exchange times told apart; more are rounded up


@dataclass(frozen=True, eq=False)
class Traffic:
    """How the tokens of each source use the other servers, layer by layer.

    Attributes:
        pairs: probability that a token of row n needs server m, float64 [N, L, N]; 0 for itself.
        levels: seconds of an exchange, ascending, the first 0: float64 [V].
        within: probability that one token's exchanges take at most each level, float64 [N, L, V].
    """

    pairs: np.ndarray
    levels: np.ndarray
    within: np.ndarray


def traffic(problem: Problem, serving: np.ndarray) -> Traffic:
    """Use of the network, counted on token-level sets; a server without them by independent experts.

    Args:
        serving: int [N, L, E] from `serving_server`.
    """
    away = ~np.eye(len(problem.names), dtype=bool)
    levels = np.unique(problem.exchange_seconds[away])
    if len(levels) > _LEVELS:
        levels = np.quantile(levels, np.linspace(0, 1, _LEVELS + 1)[1:], method="higher")
    levels = np.concatenate([[0.0], levels])
    level = np.where(away, np.maximum(np.searchsorted(levels, problem.exchange_seconds), 1), 0)
    pairs, within = _from_counts(problem, serving, level, len(levels))
    if problem.tokens is not None:
        known = np.bincount(problem.tokens.server, minlength=len(problem.names)) > 0
        counted = _from_tokens(problem, serving, level, len(levels))
        pairs[known], within[known] = counted[0][known], counted[1][known]
    return Traffic(pairs, levels, within)


def _from_counts(
    problem: Problem, serving: np.ndarray, level: np.ndarray, levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """P(m spared) = prod over e served by m of (1 - p_e), partners independent."""
    servers, layers, _ = problem.shape
    log_spared = spared_by_partner(problem, serving)
    within = np.empty((servers, layers, levels))
    for v in range(levels):
        within[..., v] = np.exp(np.where(level[:, None] > v, log_spared, 0.0).sum(-1))
    return 1.0 - np.exp(log_spared), within


def _from_tokens(
    problem: Problem, serving: np.ndarray, level: np.ndarray, levels: int
) -> tuple[np.ndarray, np.ndarray]:
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
        place = source[:, None] * layers + layer  # [T, L]
        pairs += np.bincount((place[..., None] * servers + target)[first], minlength=pairs.size).reshape(pairs.shape)
        longest = level[source[:, None, None], target].max(-1)
        slowest += np.bincount((place * levels + longest).ravel(), minlength=slowest.size).reshape(slowest.shape)
    count = np.maximum(np.bincount(tokens.server, minlength=servers), 1)[:, None, None]
    pairs[np.arange(servers), :, np.arange(servers)] = 0.0
    return pairs / count, slowest.cumsum(-1) / count
