"""A bound that no plan goes below: how often tokens need the network at least, whatever is placed where.

    maximise  mean over servers n with users and layers l of P(all experts of a token of n are at n)
    subject to  the experts at n within its memory (price lambda_n a byte), every expert somewhere (price mu_le)

With prices in place of both conditions every server and layer is a problem of its own, solved exactly: with token-level
sets a minimum cut (a token pays if all its experts are bought), from counts alone a scan, since experts taken to be chosen
independently leave at best in the order of price per -log(1 - p_e). Any prices give a bound; a subgradient method looks for
good ones.
"""

from dataclasses import dataclass

import numpy as np

from placement.costs.network_use import chosen_probability
from placement.data.problem import Problem

_SCALE = 10**6  # of shares as whole numbers, which flows are computed in; rounded so that the bound stays one


@dataclass(frozen=True, eq=False)
class _Sets:
    """Different sets of experts of one server and layer, int64 [S, k], and the share of tokens of each, float64 [S]."""

    ids: np.ndarray
    share: np.ndarray


def network_bound(problem: Problem, known: float, rounds: int = 20) -> float:
    """Least P(a layer needs the network), mean over the servers with users and layers, of any plan on these statistics.

    Args:
        problem: what is placed where; memory is counted by server, in whole experts of equal sizes.
        known: what a plan reaches, as a target for the prices; a wrong one makes the bound loose, never wrong.
        rounds: of prices tried; each solves N x L problems.

    Returns:
        A share between 0 and `known`.
    """
    servers, layers, experts = problem.shape
    active = np.flatnonzero(problem.active)
    weight = 1.0 / (len(active) * layers)
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device).astype(np.float64)
    size = problem.expert_bytes.astype(np.float64)
    sets = _all_sets(problem)
    spared = -np.log1p(-np.minimum(chosen_probability(problem), 1 - 1e-12))
    byte_price = np.full(servers, weight * layers / (size.sum() * experts))
    coverage = np.full((layers, experts), weight / experts / servers)
    best, scale = 1.0, capacity.mean()
    for _ in range(rounds):
        held, value = np.zeros(problem.shape, bool), float(byte_price @ capacity - coverage.sum())
        for server in range(servers):
            for layer in range(layers):
                price = byte_price[server] * size[layer] - coverage[layer]
                if server not in active:
                    found, gain = price < 0, -np.minimum(price, 0).sum()
                elif (server, layer) in sets:
                    found, gain = _by_cut(sets[server, layer], price, weight)
                else:
                    found, gain = _by_scan(spared[server, layer], price, weight)
                held[server, layer] = found
                value += gain
        best = min(best, value)
        # Subgradients, both in shares of what there is; the step aims at what a plan reaches (Polyak).
        memory = (capacity - held.sum(2) @ size) / scale
        copies = held.sum(0) - 1.0
        length = float((memory**2).sum() + (copies**2).sum())
        if value - (1 - known) < 1e-9 or length == 0:
            break
        step = (value - (1 - known)) / length
        byte_price = np.maximum(byte_price - step * memory / scale, 0.0)
        coverage = np.maximum(coverage - step * copies, 0.0)
    return float(np.clip(1.0 - best, 0.0, known))


def _all_sets(problem: Problem) -> dict[tuple[int, int], _Sets]:
    """Sets of every server with recorded tokens, and layer."""
    found: dict[tuple[int, int], _Sets] = {}
    if problem.tokens is None:
        return found
    for server in np.unique(problem.tokens.server).tolist():
        ids = np.sort(problem.tokens.ids[problem.tokens.server == server].astype(np.int64), -1)
        for layer in range(ids.shape[1]):
            different, number = np.unique(ids[:, layer], axis=0, return_counts=True)
            found[server, layer] = _Sets(different, number / len(ids))
    return found


def _by_scan(spared: np.ndarray, price: np.ndarray, weight: float) -> tuple[np.ndarray, float]:
    """Experts to buy, bool [E], and the gain: max over S of weight exp(-sum outside S of spared) - sum in S of price."""
    order = np.argsort(price / np.maximum(spared, 1e-300), kind="stable")[::-1]  # the first to be left out
    left = np.concatenate([[0.0], spared[order].cumsum()])
    paid = price.sum() - np.concatenate([[0.0], price[order].cumsum()])
    gain = weight * np.exp(-left) - paid
    number = int(gain.argmax())
    bought = np.ones(len(price), bool)
    bought[order[:number]] = False
    return bought, float(gain[number])


def _by_cut(sets: _Sets, price: np.ndarray, weight: float) -> tuple[np.ndarray, float]:
    """The same on token sets: a set pays its share if all its experts are bought; experts below 0 are bought anyway."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    experts, number = len(price), len(sets.ids)
    cost = np.floor(np.maximum(price, 0.0) / weight * _SCALE).astype(np.int64)
    cost = np.minimum(cost, 2 * _SCALE)
    profit = np.ceil(sets.share * _SCALE).astype(np.int64)
    # Nodes: source, sets, experts, sink.
    source, sink = 0, number + experts + 1
    token, expert = np.arange(number) + 1, np.arange(experts) + number + 1
    rows = np.concatenate([np.zeros(number, np.int64), np.repeat(token, sets.ids.shape[1]), expert])
    columns = np.concatenate([token, expert[sets.ids.ravel()], np.full(experts, sink)])
    capacity = np.concatenate([profit, np.repeat(profit, sets.ids.shape[1]), cost]).astype(np.int32)
    graph = csr_array((capacity, (rows, columns)), shape=(sink + 1, sink + 1))
    result = maximum_flow(graph, source, sink)
    rest = graph - result.flow
    rest.data = np.maximum(rest.data, 0)
    rest.eliminate_zeros()
    reached = breadth_first_order(rest, source, return_predecessors=False)
    bought = np.zeros(experts, bool)
    bought[reached[(reached > number) & (reached < sink)] - number - 1] = True
    bought |= price < 0
    gain = (profit.sum() - result.flow_value) / _SCALE * weight - np.minimum(price, 0.0).sum()
    return bought, float(gain)
