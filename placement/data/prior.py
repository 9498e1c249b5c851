"""Statistics that know their size: pseudo-tokens from the other servers' users and from no preference at all."""

from dataclasses import replace

import numpy as np

from placement.data.problem import Problem, Tokens
from placement.data.statistics import divergence, divergence_of_chance, shrink

# Tokens without preference that each server's statistics get, and as many of the others' for each of them. Measured on
# DeepSeek-V2-Lite's routing (three unlike domains, `latency`, network time of a decode step on the other half): with 6 tokens
# of history a server 56.7 ms, without a prior 71.8; with 50: 52.0, without 53.2; with 200: 50.6, without 50.7. Eight of them
# and none of the others': 68.1, 52.6 and 50.7. A server without any history, beside two with thousands of tokens: 50.7.
DEFAULT_PRIOR = 32.0
_OTHERS = 0.25
# Users count as alike where their counts differ by at most so many times what chance makes of independent tokens, and where
# chance would not hide a clear difference (bits).
_ALIKE, _HIDDEN = 1.5, 0.05
_KINDS = 32  # of users that are told apart; servers beyond them count alone
# Token-level sets that all servers have together with those of alike users, and one server; and so many of the tokens counted
# are few.
_POOLED, _EACH, _FEW = 2**16, 1024, 0.25


def with_prior(problem: Problem, prior: float) -> Problem:
    """The problem with `prior` pseudo-tokens without preference and a quarter as many of the others' on each server.

    Counts get what these tokens choose in the mean; so do token-level sets, as sets: of the others' recorded tokens some,
    evenly taken, and sets drawn at random. A server without history is then one whose users want what the others' want,
    with little certainty; where nobody has any, all experts are alike. Statistics of thousands of tokens hardly change.
    A server with far fewer token-level sets than counts takes sets of users who cannot be told apart from its own (`kinds`).

    Args:
        problem: as counted; statistics that are exact (`counted` infinite) stay as they are.
        prior: tokens, at least 0; 0 changes nothing.
    """
    if not prior or not np.isfinite(problem.counted):
        return problem
    _, layers, experts = problem.shape
    counts = problem.frequency * (problem.counted * problem.top_k)
    kind = kinds(counts)
    counts = shrink(counts, _OTHERS * prior * problem.top_k) + prior * problem.top_k / experts
    total = counts.sum()
    counted = float(total) / (layers * problem.top_k)
    return replace(problem, frequency=counts * (layers / total), tokens=_sets(problem, prior, kind), counted=counted)


def kinds(counts: np.ndarray) -> np.ndarray:
    """Kinds of users that counts tell apart: int64 [N], the first server of each one's kind; itself where nothing is known.

    A server is of the first kind from whose first server it differs by no more than chance explains.

    Args:
        counts: [N, L, E], as counted.
    """
    kind = np.arange(len(counts))
    first: list[int] = []
    for server in np.flatnonzero(counts.any((1, 2))):
        if first:
            others, own = counts[first], np.broadcast_to(counts[server], (len(first), *counts.shape[1:]))
            chance = divergence_of_chance(own, others).mean(-1)
            apart = np.nan_to_num(divergence(own, others), nan=1.0).mean(-1)
            like = np.flatnonzero((apart <= _ALIKE * chance) & (chance <= _HIDDEN))
            if len(like):
                kind[server] = first[int(like[0])]
                continue
        if len(first) < _KINDS:
            first.append(int(server))
    return kind


def _of_its_kind(problem: Problem, tokens: Tokens, server: int, kind: np.ndarray) -> np.ndarray:
    """Rows of recorded sets of other servers' users who are like this one's, evenly taken; where its own are few."""
    own, counted = (
        int((tokens.server == server).sum()),
        problem.frequency[server].sum() / problem.shape[1] * problem.counted,
    )
    room = min(_EACH, _POOLED // len(kind)) - own
    if own >= _FEW * counted or room <= 0:
        return np.zeros(0, np.int64)
    others = np.flatnonzero((kind[tokens.server] == kind[server]) & (tokens.server != server))
    return others[np.linspace(0, len(others) - 1, min(len(others), room)).astype(np.int64)]


def _sets(problem: Problem, prior: float, kind: np.ndarray) -> Tokens | None:
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
        taken = np.concatenate([taken, _of_its_kind(problem, tokens, int(server), kind)])
        parts += [tokens.ids[taken], flat.astype(tokens.ids.dtype)]
        sources.append(np.full(len(taken) + len(flat), server))
    ids = np.concatenate(parts)
    # Pseudo-tokens belong to sequences of their own.
    sequence = np.concatenate([tokens.sequence, np.full(len(ids) - len(tokens.ids), tokens.sequence.max() + 1)])
    return Tokens(ids, np.concatenate(sources), sequence)
