"""What a placement costs: remote share, need of the network, bytes, balance. Decides nothing."""

from typing import Any

import numpy as np

from placement.problem import VALUE_BYTES, Problem, Tokens

_CHUNK = 2**22  # array elements handled at once where a full array would be large


def remote_share(frequency: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Share of each server's assignments that go to an expert it does not hold (paper section 3, objective per server).

    remote_n = sum_l sum_e f_n^l(e) [e of layer l is not on n] / sum_l sum_e f_n^l(e)

    Args:
        frequency: [N, L, E], any scale.
        held: bool [N, L, E].

    Returns:
        float64 [N]; 0 for a server without demand.
    """
    total = frequency.sum((1, 2))
    remote = np.where(held, 0.0, frequency).sum((1, 2))
    return np.divide(remote, total, out=np.zeros_like(remote), where=total > 0)


def pair_price(problem: Problem, alone: np.ndarray | float = 1.0) -> np.ndarray:
    """Seconds of a chunk and its decode steps that one layer costs if every token of n needs m, float64 [..., N, N].

    price_nm = steps a alone alpha_nm + (prompt + steps a) (beta_nm + beta_mn), with `problem.workload`

    Args:
        alone: probability that no other active sequence waits for an exchange in the layer anyway, [...].
    """
    work = problem.workload
    steps = np.asarray(work.decode_steps * work.active * alone)
    tokens = work.prefill_tokens + work.decode_steps * work.active
    return steps[..., None, None] * problem.exchange_seconds + tokens * (problem.row_seconds + problem.row_seconds.T)


def copy_preference(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Order in which a source turns to the servers for the experts of a layer: int64 [N, L, N], 0 for itself, no ties.

    The one rule for copies: in each layer a source prefers the partner that holds most of the experts it lacks, per
    price of the link to it (`pair_price`). What a token needs then comes from as few servers as possible, over cheap
    links. Equally good partners come in ring order from the source, so that sources share them. Statistics play no
    part, so that who runs a placement can apply the rule as well.

    Args:
        held: bool [N, L, E], or of fewer layers.
    """
    servers = len(problem.names)
    lacking = (~held).transpose(1, 0, 2).astype(np.float64)
    number = (lacking @ held.transpose(1, 2, 0).astype(np.float64)).transpose(1, 0, 2)  # [N, L, N]
    price = pair_price(problem)
    np.fill_diagonal(price, 1.0)
    score = number / price[:, None]
    score[np.arange(servers), :, np.arange(servers)] = np.inf
    ring = (np.arange(servers) - np.arange(servers)[:, None]) % servers
    ties = [np.broadcast_to(key[:, None], score.shape) for key in (ring, price)]
    order = np.lexsort([*ties, -score], axis=-1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(servers), order.shape), axis=-1)
    return rank


def serving_server(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Which server serves each server's calls: its own copy, else the copy first in its `copy_preference`.

    Args:
        held: bool [N, L, E], every expert held by at least one server.

    Returns:
        int64 [N, L, E], index of the serving server.
    """
    servers, layers, experts = problem.shape
    rank = copy_preference(problem, held)
    by_rank = np.argsort(rank, axis=-1)
    expert, holder = np.nonzero(held.reshape(servers, -1).T)  # ordered by expert: each one's holders are a segment
    segments = np.searchsorted(expert, np.arange(layers * experts))
    serving = np.empty(problem.shape, np.int64)
    for source in range(servers):
        best = np.minimum.reduceat(rank[source, expert // experts, holder], segments).reshape(layers, experts)
        serving[source] = np.take_along_axis(by_rank[source], best, axis=-1)
    return serving


def server_load(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Demand that arrives at each server's copies from all sources, float64 [N, L, E] in the units of `frequency`."""
    servers, layers, experts = problem.shape
    target = serving_server(problem, held).reshape(servers, -1) * (layers * experts) + np.arange(layers * experts)
    load = np.bincount(target.ravel(), problem.frequency.ravel(), minlength=problem.frequency.size)
    return load.reshape(problem.shape)


def device_load(problem: Problem, resident: np.ndarray) -> np.ndarray:
    """Demand that each device computes, float64 [D, L]; copies within a server share evenly.

    Args:
        resident: bool [D, L, E].
    """
    load = server_load(problem, problem.held(resident))
    copies = np.add.reduceat(resident.astype(np.int64), problem.first_device, axis=0)
    per_copy = load / np.maximum(copies, 1)
    return np.stack([(resident[d] * per_copy[n]).sum(-1) for d, n in enumerate(problem.device_server)])


def balance(problem: Problem, resident: np.ndarray) -> float:
    """Busiest device over the mean: max_d w_d / mean_d w_d with w = load / speed; 1 is even, and 1 without any load."""
    work = device_load(problem, resident).sum(-1) / problem.speed
    return float(work.max() / work.mean()) if work.any() else 1.0


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


def summary(problem: Problem, resident: np.ndarray) -> dict[str, Any]:
    """Everything above for one placement, as JSON takes it.

    A mean is over the servers that have demand, each counting alike, so that a busy server does not hide a quiet one.

    Args:
        resident: bool [D, L, E], every expert resident somewhere.

    Returns:
        `remote_share`, `network_probability`, `distinct_remote_servers`: means, and the same with `_by_server`;
        `basis` of the latter two; `bytes_per_token` sent and returned over all layers; `balance`; `used_bytes` and
        `budget_bytes` per device.
    """
    held = problem.held(resident)
    active = problem.frequency.sum((1, 2)) > 0
    need, distinct, basis = network_need(problem, serving_server(problem, held))
    result: dict[str, Any] = {}
    for key, values in (
        ("remote_share", remote_share(problem.frequency, held)),
        ("network_probability", need),
        ("distinct_remote_servers", distinct),
    ):
        result[key] = float(values[active].mean()) if active.any() else 0.0
        result[f"{key}_by_server"] = dict(zip(problem.names, values.tolist(), strict=True))
    result["basis"] = basis
    round_trip_bytes = 2 * VALUE_BYTES * problem.hidden_size * problem.shape[1]
    result["bytes_per_token"] = result["distinct_remote_servers"] * round_trip_bytes
    result["balance"] = balance(problem, resident)
    result["used_bytes"] = problem.used_bytes(resident).tolist()
    result["budget_bytes"] = problem.budget.tolist()
    return result
