"""What a placement costs: remote share, need of the network, bytes, balance. Decides nothing."""

from typing import Any

import numpy as np

from placement.costs.hosting import Hops, seen_from_hosts
from placement.costs.network_use import network_use
from placement.costs.routing import device_load, serving_server
from placement.data.problem import Problem


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


def balance(problem: Problem, resident: np.ndarray, host: np.ndarray | None = None) -> float:
    """Busiest device over the mean: max_d w_d / mean_d w_d with w = load / speed; 1 is even, and 1 without any load."""
    work = device_load(problem, resident, host).sum(-1) / problem.speed
    return float(work.max() / work.mean()) if work.any() else 1.0


def summary(problem: Problem, resident: np.ndarray, host: np.ndarray | None = None) -> dict[str, Any]:
    """Everything above for one placement, as JSON takes it.

    A mean is over the servers that have demand, each counting alike, so that a busy server does not hide a quiet one.

    Args:
        resident: bool [D, L, E], every expert resident somewhere.
        host: who hosts each source's layers, int [N, L]; None is at home. What is remote is then remote from the host.

    Returns:
        `remote_share`, `network_probability`, `distinct_remote_servers`: means, and the same with `_by_server`;
        `hops`: of a token from host to host, a mean; `basis` of those of the network; `bytes_per_token` sent and returned
        over all layers; `only_copies`: share of all remote calls that go to experts with one copy in the cluster;
        `balance`; `used_bytes` and `budget_bytes` per device.
    """
    held = problem.held(resident)
    active = problem.frequency.sum((1, 2)) > 0
    use = network_use(problem, seen_from_hosts(serving_server(problem, held), host), host)
    here = held if host is None else held[host, np.arange(host.shape[1])]
    hops = Hops.of(problem, host)
    result: dict[str, Any] = {}
    for key, values in (
        ("remote_share", remote_share(problem.frequency, here)),
        ("network_probability", use.need.mean(-1)),
        ("distinct_remote_servers", use.distinct.mean(-1)),
    ):
        result[key] = float(values[active].mean()) if active.any() else 0.0
        result[f"{key}_by_server"] = dict(zip(problem.names, values.tolist(), strict=True))
    result["basis"] = _basis(active, use.counted)
    round_trip_bytes = (problem.row_bytes + problem.sum_bytes) * problem.shape[1]
    result["bytes_per_token"] = result["distinct_remote_servers"] * round_trip_bytes
    result["hops"] = float(hops.number[active].mean()) if active.any() else 0.0
    if active.any():
        result["bytes_per_token"] += float(hops.token_bytes(problem)[active].mean())
    away = np.where(here, 0.0, problem.frequency)
    result["only_copies"] = float(away[:, held.sum(0) == 1].sum() / away.sum()) if away.any() else 0.0
    result["balance"] = balance(problem, resident, host)
    result["used_bytes"] = problem.used_bytes(resident).tolist()
    result["budget_bytes"] = problem.budget.tolist()
    return result


def _basis(active: np.ndarray, counted: np.ndarray) -> str:
    """What the need of the network rests on: "tokens", "counts", or "mixed" where only some servers have tokens."""
    if not counted.any():
        return "counts"
    return "mixed" if (active & ~counted).any() else "tokens"
