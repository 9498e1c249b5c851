"""Statistics that know their size: pseudo-tokens from the other servers' users and from no preference at all."""

from dataclasses import replace

import numpy as np

from placement.data.problem import Problem, Tokens
from placement.data.statistics import shrink

# Tokens without preference that each server's statistics get, and as many of the others' for each of them. Measured on
# DeepSeek-V2-Lite's routing (three unlike domains, `latency`, network time of a decode step on the other half): with 6 tokens
# of history a server 56.7 ms, without a prior 71.8; with 50: 52.0, without 53.2; with 200: 50.6, without 50.7. Eight of them
# and none of the others': 68.1, 52.6 and 50.7. A server without any history, beside two with thousands of tokens: 50.7.
DEFAULT_PRIOR = 32.0
_OTHERS = 0.25


def with_prior(problem: Problem, prior: float) -> Problem:
    """The problem with `prior` pseudo-tokens without preference and a quarter as many of the others' on each server.

    Counts get what these tokens choose in the mean; so do token-level sets, as sets: of the others' recorded tokens some,
    evenly taken, and sets drawn at random. A server without history is then one whose users want what the others' want,
    with little certainty; where nobody has any, all experts are alike. Statistics of thousands of tokens hardly change.

    Args:
        problem: as counted; statistics that are exact (`counted` infinite) stay as they are.
        prior: tokens, at least 0; 0 changes nothing.
    """
    if not prior or not np.isfinite(problem.counted):
        return problem
    servers, layers, experts = problem.shape
    counts = problem.frequency * (problem.counted * problem.top_k)
    counts = shrink(counts, _OTHERS * prior * problem.top_k) + prior * problem.top_k / experts
    total = counts.sum()
    counted = float(total) / (layers * problem.top_k)
    return replace(problem, frequency=counts * (layers / total), tokens=_sets(problem, prior), counted=counted)


def _sets(problem: Problem, prior: float) -> Tokens | None:
    """Token-level sets with pseudo-sets; a server that has counts alone keeps to them."""
    tokens, (servers, layers, experts) = problem.tokens, problem.shape
    if tokens is None or not len(tokens.ids):
        return tokens
    recorded = np.bincount(tokens.server, minlength=servers) > 0
    parts, sources = [tokens.ids], [tokens.server]
    for server in np.flatnonzero(recorded | (problem.frequency.sum((1, 2)) == 0)):
        others = np.flatnonzero(tokens.server != server)
        taken = others[np.linspace(0, len(others) - 1, min(len(others), round(_OTHERS * prior))).astype(np.int64)]
        chance = np.random.default_rng(int(server)).random((round(prior), layers, experts), np.float32)
        flat = np.argpartition(chance, problem.top_k - 1, axis=-1)[..., : problem.top_k]
        parts += [tokens.ids[taken], flat.astype(tokens.ids.dtype)]
        sources.append(np.full(len(taken) + len(flat), server))
    ids = np.concatenate(parts)
    # Pseudo-tokens belong to sequences of their own.
    sequence = np.concatenate([tokens.sequence, np.full(len(ids) - len(tokens.ids), tokens.sequence.max() + 1)])
    return Tokens(ids, np.concatenate(sources), sequence)
