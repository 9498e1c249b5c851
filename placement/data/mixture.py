"""Profiles of servers from profiles of tasks: what users activate follows from how often they bring which task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from placement.data.profile import Profile
from placement.data.statistics import distribution
from placement.files import InputError, show

Rates = Mapping[str, Mapping[str, float]]


def mixed(tasks: Profile, rates: Rates, servers: Sequence[str], source: str = "rates") -> Profile:
    """A profile of servers from one whose rows are tasks, mixed by the rates at which each server gets requests of each.

        p_n = sum_t w_nt p_t,   w_nt = rate_nt tokens_t / sum_t rate_nt tokens_t

    with tokens_t the mean tokens of a request, where the profile has sequences; else rates are of tokens. A mixture counts for
    as many tokens as it rests on, 1 / sum_t (w_nt^2 / counted_t), so that planning on it knows how thin it is; all servers
    together keep that number, shared by how many tokens they bring. Token-level sets are taken evenly from each task's.

    Args:
        tasks: profile whose `servers` are names of tasks.
        rates: of requests by server and task, in one unit for all; what is not named has none.
        servers: names of the servers of the result, [N].
        source: where the rates are from, for messages.

    Raises:
        InputError: an unknown server or task, a rate that is no number from 0, no rate above 0, or a task without counts.

    >>> tasks = Profile(np.array([[[8, 0]], [[0, 8]]]), ("law", "code"), "toy", top_k=1, hidden_size=64, expert_bytes=1)
    >>> mixed(tasks, {"a": {"law": 3, "code": 1}}, ["a"]).counts.round(2).tolist()  # rests on 1 / (9/16/8 + 1/16/8) tokens
    [[[9.6, 3.2]]]
    """
    rate = _table(tasks, rates, servers, source)
    counted = tasks.counts.sum((1, 2), dtype=np.float64) / (tasks.counts.shape[1] * tasks.top_k)
    for task in np.flatnonzero(rate.any(0) & (counted == 0)):
        name = tasks.servers[task]
        raise InputError(
            f"{source}: {name}: {tasks.source} has no counts of this task; record it, or leave its rate out"
        )
    tokens = rate * _tokens_of_a_request(tasks)
    share = distribution(tokens)
    spread = (share**2 / np.maximum(counted, 1e-300)).sum(1)
    known = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    worth = known.sum() * tokens.sum(1) / tokens.sum()
    counts = np.einsum("nt,tle->nle", share * worth[:, None], distribution(tasks.counts)) * tasks.top_k
    level = _sets(tasks, share, known)
    return replace(tasks, counts=counts, servers=tuple(servers), source=f"{tasks.source} by {source}", **level)


def _table(tasks: Profile, rates: Rates, servers: Sequence[str], source: str) -> np.ndarray:
    """Rates of requests, float64 [N, tasks], checked."""
    table = np.zeros((len(servers), len(tasks.servers)))
    index = {name: i for i, name in enumerate(tasks.servers)}
    for server, own in rates.items():
        if server not in servers:
            raise InputError(f"{source}: {show(server)}: no such server; known are {show(', '.join(servers), 200)}")
        if not isinstance(own, Mapping):
            raise InputError(f"{source}: {server} = {show(own)}: must be a table of tasks and rates")
        for task, value in own.items():
            where = f"{source}: {server}.{show(task)}"
            if task not in index:
                raise InputError(f"{where}: no such task; {tasks.source} has {show(', '.join(index), 200)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
                raise InputError(f"{where} = {show(value)}: must be a number of requests from 0, in one unit for all")
            table[list(servers).index(server), index[task]] = value
    if not table.any():
        raise InputError(f"{source}: no rate above 0; say how often each server gets requests of each task")
    return table


def _tokens_of_a_request(tasks: Profile) -> np.ndarray:
    """Mean tokens of a sequence of each task, float64 [tasks]; 1 unless every task has sequences."""
    number = len(tasks.servers)
    if tasks.server is None or tasks.sequence is None:
        return np.ones(number)
    sequences = np.unique(np.stack([tasks.server, tasks.sequence]), axis=1)[0]
    many = np.bincount(sequences, minlength=number)
    return np.bincount(tasks.server, minlength=number) / many if many.all() else np.ones(number)


def _sets(tasks: Profile, share: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """Token-level sets of each server, as many as its mixture rests on; a server with a task that has none gets none."""
    if tasks.ids is None or tasks.server is None or tasks.sequence is None:
        return {}
    own = [np.flatnonzero(tasks.server == task) for task in range(len(tasks.servers))]
    rows, server = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for n, weights in enumerate(share):
        used = np.flatnonzero(weights)
        if not all(len(own[task]) for task in used):
            continue
        wanted = np.diff(np.round(weights[used].cumsum() * round(known[n])), prepend=0.0).astype(np.int64)
        for task, number in zip(used, wanted, strict=True):
            rows.append(own[task][np.linspace(0, len(own[task]) - 1, number).astype(np.int64)])
            server.append(np.full(number, n))
    taken = np.concatenate(rows)
    return {"ids": tasks.ids[taken], "server": np.concatenate(server), "sequence": tasks.sequence[taken]}
