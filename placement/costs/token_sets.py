"""Which experts fire together: token-level sets of every source, and how much a growing local set serves of them."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from placement.costs.network_use import chosen_probability
from placement.data.problem import Problem

_ROWS = 2**15  # tokens looked at in all; evenly taken where there are more
_DRAWN = 2**26  # random numbers spent on sets for servers that have none
_LEAST = 1024  # sets drawn for such a server, if it takes no more numbers; more only where more tokens were counted


@dataclass(frozen=True, eq=False)
class TokenSets:
    """Sets of experts that tokens choose.

    Attributes:
        ids: int16 [T, L, k].
        source: server of each token, int64 [T], ascending.
        weight: float64 [T]; every server with demand has the same sum, and all sum to 1.
        recorded: whether a server's sets were recorded rather than drawn, bool [N].
    """

    ids: np.ndarray
    source: np.ndarray
    weight: np.ndarray
    recorded: np.ndarray


@lru_cache(maxsize=4)
def token_sets(problem: Problem, seed: int = 0) -> TokenSets:
    """Recorded sets where the profile has them; for a server with counts alone, sets drawn as if independent.

    Args:
        seed: for the draws.
    """
    servers, layers, experts = problem.shape
    rng = np.random.default_rng(seed)
    demand = np.flatnonzero(problem.active)
    most = max(1, _ROWS // max(1, len(demand)))
    known = max(_LEAST, min(most, problem.counted / max(1, len(demand))))
    drawn = int(np.clip(min(known, _DRAWN // (layers * experts * max(1, len(demand)))), 16, most))
    recorded, parts = np.zeros(servers, bool), []
    for server in demand:
        if problem.tokens is not None:
            rows = np.flatnonzero(problem.tokens.server == server)
            if len(rows):
                recorded[server] = True
                parts.append(problem.tokens.ids[rows[:: -(-len(rows) // most)]].astype(np.int16))
                continue
        chance = problem.demand[server].astype(np.float32)
        ids = np.empty((drawn, layers, problem.top_k), np.int16)
        for layer in range(layers):  # the k least of exponential waits with rates p are a draw without repetition
            with np.errstate(divide="ignore", invalid="ignore"):  # a wait of 0 at rate 0 is NaN, which sorts last too
                wait = rng.standard_exponential((drawn, experts), dtype=np.float32) / chance[layer]
            ids[:, layer] = np.argpartition(wait, problem.top_k - 1, axis=-1)[:, : problem.top_k]
        parts.append(ids)
    if not parts:
        empty = np.zeros((0, layers, problem.top_k), np.int16)
        return TokenSets(empty, np.zeros(0, np.int64), np.zeros(0), recorded)
    lengths = np.array([len(part) for part in parts])
    weight = np.repeat(1.0 / (lengths * len(parts)), lengths)
    return TokenSets(np.concatenate(parts), np.repeat(demand, lengths), weight, recorded)


@dataclass(frozen=True, eq=False)
class Chains:
    """For every server and layer an order of the experts, and what its prefixes serve.

    Attributes:
        order: int64 [N, L, E], most valuable first.
        served: probability that a token finds all its experts in the first s, float64 [N, L, E + 1].
    """

    order: np.ndarray
    served: np.ndarray


def chains(problem: Problem, sets: TokenSets, base: np.ndarray | None = None) -> Chains:
    """Order experts so that prefixes serve whole tokens: from all of them, drop again and again the one that costs least.

    A token is lost with the first of its experts that goes, so the next one to go is the one that fewest tokens still
    need. From counts alone this is the order of frequency, and a prefix A serves prod over e not in A of (1 - p_e).

    Args:
        base: bool [N, L, E], experts that a server holds whatever happens; they come first. Default: none.
    """
    servers, layers, experts = problem.shape
    base = np.zeros(problem.shape, bool) if base is None else base
    chance = chosen_probability(problem)
    order = np.lexsort((-chance, ~base), axis=-1)
    with np.errstate(divide="ignore"):
        spared = np.log1p(-np.take_along_axis(chance, order, -1))
    served = np.ones((servers, layers, experts + 1))
    served[..., :-1] = np.exp(spared[..., ::-1].cumsum(-1)[..., ::-1])
    for server in np.flatnonzero(sets.recorded):
        ids = sets.ids[sets.source == server]
        for layer in range(layers):
            found = _chain(ids[:, layer], base[server, layer], chance[server, layer])
            order[server, layer], served[server, layer] = found
    return Chains(order, served)


def _chain(ids: np.ndarray, base: np.ndarray, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order int64 [E] and served float64 [E + 1] of one server and layer from its sets, int [T, k]."""
    experts = len(base)
    by_expert = np.argsort(ids.ravel(), kind="stable") // ids.shape[1]
    ends = np.cumsum(np.bincount(ids.ravel(), minlength=experts))
    # Ties go to the less frequent expert; experts of the base go last of all.
    need = np.bincount(ids.ravel(), minlength=experts) + 0.5 * chance + base * 2.0 * (len(ids) + 1)
    alive, order, served = np.ones(len(ids), bool), np.empty(experts, np.int64), np.ones(experts + 1)
    for rank in range(experts - 1, -1, -1):
        expert = int(need.argmin())
        rows = by_expert[ends[expert - 1] if expert else 0 : ends[expert]]
        rows = rows[alive[rows]]
        alive[rows] = False
        need -= np.bincount(ids[rows].ravel(), minlength=experts)
        need[expert] = np.inf
        order[rank] = expert
        served[rank] = served[rank + 1] - len(rows) / len(ids)
    return order, served
