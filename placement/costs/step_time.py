"""What a placement costs in seconds: exchanges, bytes and computing of a decode step and of a prompt. Decides nothing.

A layer that is served at home needs no exchange; one call to another server pays a whole one. A token's activations
travel once to each server it needs and come back as one sum, however many of its experts live there. Where a layer is
hosted elsewhere its rows move once each way to that host and on.
"""

from typing import Any

import numpy as np

from placement.costs.computing import longest_alone
from placement.costs.hosting import Hops, seen_from_hosts
from placement.costs.network_use import network_use
from placement.costs.routing import device_load, serving_server
from placement.data.problem import Problem


def predict(problem: Problem, resident: np.ndarray, host: np.ndarray | None = None) -> dict[str, Any]:
    """Expected seconds and bytes of `problem.workload`, means over the servers that have demand.

    With a active sequences at servers of their own drawing, a layer waits for the slowest exchange of any of them:
    P(at most v) = (mean_n P_n(at most v))^a. Its rows wait for the busiest interface, there and back, and its
    assignments for the busiest device, that of a token alone or, if that is longer, that of all of them in the mean:

        step = hops + sum_l E[max alpha] + busiest interface(beta x expected token-server pairs) + busiest device's computing

    A prompt chunk enters at one server; its exchanges are near certain wherever it leaves at all.

    Args:
        resident: bool [D, L, E], every expert resident somewhere.
        host: who hosts each source's layers, int [N, L]; None is at home.

    Returns:
        `decode_network_seconds`, `decode_seconds` (with computing) of one step; `prefill_bytes` sent and returned,
        `prefill_network_seconds`, `prefill_seconds` of one chunk; `step_seconds` = chunk + decode_steps x step;
        `decode_network_seconds_by_server`, each server active alone.
    """
    work = problem.workload
    serving = seen_from_hosts(serving_server(problem, problem.held(resident)), host)
    use, hops = network_use(problem, serving, host), Hops.of(problem, host)
    share = problem.active / problem.active.sum()
    load = device_load(problem, resident, host)
    total = load.sum(0)
    busiest = problem.top_k * (load / problem.speed[:, None]).max(0) / np.where(total > 0, total, 1.0)
    longest = np.maximum(share @ longest_alone(problem, resident, serving), work.active * busiest)
    in_prompt, decoded = problem.assignment_seconds

    waiting, moving = hops.waiting(problem), hops.row_seconds(problem)
    rows = _rows(problem, use.pairs, share, work.active, host).sum()
    rows += max(share @ moving, work.active * hops.busiest_port(problem, share))
    decode_network = use.waiting(share, work.active).sum() + rows + _slowest(waiting, share, work.active)
    rows = work.prefill_tokens * _rows(problem, use.pairs, share, 1, host).sum()
    rows += share @ hops.row_seconds(problem, work.prefill_tokens)
    prefill_network = (share @ use.waiting(tokens=work.prefill_tokens)).sum() + rows
    prefill_network += share @ waiting if work.prefill_tokens else 0.0
    alone = waiting + moving + use.waiting().sum(-1)
    both_ways = _seen_from(problem.row_seconds + problem.sum_seconds, host, use.pairs)
    alone += np.einsum("nlm,nlm->n", use.pairs, both_ways)
    decode = decode_network + longest @ decoded
    prefill = prefill_network + work.prefill_tokens * (busiest @ in_prompt)
    crossings = np.einsum("n,nlm->", share, use.pairs)
    sent = work.prefill_tokens * crossings * (problem.row_bytes + problem.sum_bytes)
    return {
        "decode_network_seconds": float(decode_network),
        "decode_network_seconds_by_server": dict(zip(problem.names, map(float, alone), strict=True)),
        "decode_seconds": float(decode),
        "prefill_bytes": float(sent + share @ hops.token_bytes(problem, work.prefill_tokens)),
        "prefill_network_seconds": float(prefill_network),
        "prefill_seconds": float(prefill),
        "step_seconds": float(prefill + work.decode_steps * decode),
    }


def _slowest(seconds: np.ndarray, share: np.ndarray, number: int) -> float:
    """E[the longest of so many], each drawn by `share` from `seconds`, both [N]."""
    order = np.argsort(seconds, kind="stable")
    within = np.minimum(share[order].cumsum(), 1.0) ** number
    return float(seconds[order] @ np.diff(within, prepend=0.0))


def _rows(problem: Problem, pairs: np.ndarray, share: np.ndarray, active: int, host: np.ndarray | None) -> np.ndarray:
    """Seconds the busiest interface needs for the rows of `active` tokens, there and back: float64 [L].

    One token keeps its host's interface busy; many meet at the interfaces of all, and the busiest one counts.
    """
    seconds, layer = np.zeros(pairs.shape[1]), np.arange(pairs.shape[1])
    for beta in (problem.row_seconds, problem.sum_seconds):
        spent = pairs * _seen_from(beta, host, pairs)  # [N, L, N]
        weighted = spent * share[:, None, None]
        out = weighted.sum(2)
        if host is not None:
            source, out = out, np.zeros_like(out)
            np.add.at(out, (host, layer), source)
        meet = np.maximum(out.max(0), weighted.sum(0).max(-1))
        seconds += np.maximum(weighted.sum((0, 2)), active * meet)
    return seconds


def _seen_from(links: np.ndarray, host: np.ndarray | None, pairs: np.ndarray) -> np.ndarray:
    """Rows of `links`, [N, N], of the host of each source's layers: float64, as `pairs`, [N, L, N]."""
    return np.broadcast_to(links[:, None], pairs.shape) if host is None else links[host]
