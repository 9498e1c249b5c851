"""What a placement costs in seconds: exchanges, bytes and computing of a decode step and of a prompt. Decides nothing.

A layer that is served at home needs no exchange; one call to another server pays a whole one. A token's activations
travel once to each server it needs and come back as one sum, however many of its experts live there.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.cost import device_load, serving_server, spared_by_partner
from placement.problem import VALUE_BYTES, Problem

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


def predict(problem: Problem, resident: np.ndarray) -> dict[str, Any]:
    """Expected seconds and bytes of `problem.workload`, means over the servers that have demand.

    With a active sequences at servers of their own drawing, a layer waits for the slowest exchange of any of them:
    P(at most v) = (mean_n P_n(at most v))^a. Its rows wait for the busiest interface, there and back, and its
    assignments for the busiest device:

        step = sum_l E[max alpha] + busiest interface(beta x expected token-server pairs) + busiest device's computing

    A prompt chunk enters at one server; its exchanges are near certain wherever it leaves at all.

    Args:
        resident: bool [D, L, E], every expert resident somewhere.

    Returns:
        `decode_network_seconds`, `decode_seconds` (with computing) of one step; `prefill_bytes` sent and returned,
        `prefill_network_seconds`, `prefill_seconds` of one chunk; `step_seconds` = chunk + decode_steps x step;
        `decode_network_seconds_by_server`, each server active alone.
    """
    work = problem.workload
    use = traffic(problem, serving_server(problem, problem.held(resident)))
    demand = problem.frequency.sum((1, 2)) > 0
    share = demand / max(1, demand.sum())
    load = device_load(problem, resident)
    total = load.sum(0)
    busiest = ((load / problem.speed[:, None]).max(0) / np.where(total > 0, total, 1.0)).sum()
    compute = problem.top_k * work.assignment_seconds * busiest

    exchanges = _expected(use.levels, np.einsum("n,nlv->lv", share, use.within) ** work.active).sum()
    decode_network = exchanges + _rows(problem, use.pairs, share, work.active).sum()
    chunk = _expected(use.levels, np.einsum("n,nlv->lv", share, use.within**work.prefill_tokens)).sum()
    prefill_network = chunk + work.prefill_tokens * _rows(problem, use.pairs, share, 1).sum()
    alone = [
        _expected(use.levels, use.within[n]).sum() + _rows(problem, use.pairs, np.eye(len(share))[n], 1).sum()
        for n in range(len(share))
    ]
    decode, prefill = decode_network + work.active * compute, prefill_network + work.prefill_tokens * compute
    crossings = np.einsum("n,nlm->", share, use.pairs)
    return {
        "decode_network_seconds": float(decode_network),
        "decode_network_seconds_by_server": dict(zip(problem.names, map(float, alone), strict=True)),
        "decode_seconds": float(decode),
        "prefill_bytes": float(work.prefill_tokens * crossings * 2 * VALUE_BYTES * problem.hidden_size),
        "prefill_network_seconds": float(prefill_network),
        "prefill_seconds": float(prefill),
        "step_seconds": float(prefill + work.decode_steps * decode),
    }


def _expected(levels: np.ndarray, within: np.ndarray) -> np.ndarray:
    """E[v] of a distribution over the last axis given by P(at most v)."""
    return (levels * np.diff(within, axis=-1, prepend=0.0)).sum(-1)


def _rows(problem: Problem, pairs: np.ndarray, share: np.ndarray, active: int) -> np.ndarray:
    """Seconds the busiest interface needs for the rows of `active` tokens, there and back: float64 [L].

    One token keeps its own server's interface busy; many meet at the interfaces of all, and the busiest one counts.
    """
    seconds = np.zeros(pairs.shape[1])
    for beta in (problem.row_seconds, problem.row_seconds.T):
        spent = pairs * beta[:, None]  # [N, L, N]
        weighted = spent * share[:, None, None]
        meet = np.maximum(weighted.sum(2).max(0), weighted.sum(0).max(-1))
        seconds += np.maximum(weighted.sum((0, 2)), active * meet)
    return seconds
