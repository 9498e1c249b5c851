"""The paper's simulation grid: GPUs x bandwidth x gap between requests, every strategy. Serves no other cluster."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from placement.data.arrivals import Arrivals
from placement.data.cluster import Cluster
from placement.data.prior import DEFAULT_PRIOR
from placement.data.problem import Problem
from placement.data.profile import Profile
from placement.files import InputError
from placement.planner import plan
from placement.registry import STRATEGIES
from placement.simulation.independent.events import simulate
from placement.simulation.independent.unit_costs import Compute, Steps

BLOCK = (1, 1, 2)  # GPUs of the paper's three servers; larger clusters repeat them, the last block cut short
COPIES = 1.3  # of all experts that four GPUs have room for, as in the paper's DeepSeek-V2-Lite setting
_TOKENS = 2**16  # recorded tokens that all servers of a cluster share
PLANNED_AT = 500.0  # Mbit/s
Cell = tuple[str, int, float, float]  # strategy, GPUs, Mbit/s, gap


@dataclass(frozen=True)
class Grid:
    """What is simulated.

    Attributes:
        gpus: sizes of the cluster.
        bandwidths: Mbit/s between servers.
        gaps: mean seconds between requests of one server.
        strategies: names of strategies.
        lengths: prompt and output tokens to draw from, [P, 2].
        requests: simulated per cell, in the mean; servers get at least `duration` seconds each.
        duration: seconds.
        chunk: prompt tokens of a step.
        seed: of arrivals and of strategies that draw.
        prior: of plans, see `placement.plan`.
        groups: whether `latency` plans large clusters in groups of servers.
    """

    gpus: tuple[int, ...] = (4, 16, 64, 256)
    bandwidths: tuple[float, ...] = (100.0, 250.0, 500.0, 1000.0)
    gaps: tuple[float, ...] = (8.0, 10.0, 15.0)
    strategies: tuple[str, ...] = field(default_factory=lambda: tuple(STRATEGIES))
    lengths: tuple[tuple[int, int], ...] = ((128, 64),)
    requests: int = 1500
    duration: float = 120.0
    chunk: int = 64
    seed: int = 0
    prior: float = DEFAULT_PRIOR
    groups: bool = True


def grid_cluster(profile: Profile, gpus: int, bandwidth: float) -> Cluster:
    """Servers of 1, 1 and 2 GPUs, repeated; every GPU has the memory of which four hold `COPIES` of all experts.

    Args:
        profile: gives the sizes.
        gpus: how many; a multiple of 4 gives whole blocks.
        bandwidth: Mbit/s of every port.

    Raises:
        InputError: the profile reserves memory per device, which other devices cannot take over.
    """
    reserved = profile.reserved_bytes
    if not isinstance(reserved, int):
        raise InputError(f"{profile.source}: meta.reserved_bytes: one per device; --grid needs one number for all")
    sizes = np.broadcast_to(np.asarray(profile.expert_bytes, np.int64), profile.counts.shape[1:2])
    memory = int(sizes.sum()) * profile.counts.shape[2] * COPIES / sum(BLOCK)
    servers, left = [], gpus
    while left:
        devices = min(BLOCK[len(servers) % len(BLOCK)], left)
        servers.append({"name": f"server-{len(servers)}", "devices": [{"memory": int(memory) + reserved}] * devices})
        left -= devices
    network = {"bandwidth": f"{bandwidth:g}Mbps", "latency": "0.2ms"}
    return Cluster.from_dict({"server": servers, "network": network}, source=f"{gpus} GPUs")


def spread_profile(profile: Profile, servers: Sequence[str]) -> Profile:
    """A profile for other servers: server i has the workload of row i mod N of the profile.

    Counts are the row's own. Its recorded tokens go to its servers in turn, at most as many as keep
    all servers together within 65,536; so servers of one workload are alike, not the same.

    Args:
        profile: N rows.
        servers: names of the servers to make a profile for.
    """
    rows = np.arange(len(servers)) % len(profile.servers)
    tokens: dict[str, Any] = {"ids": None, "server": None, "sequence": None}
    if profile.ids is not None and profile.server is not None and profile.sequence is not None:
        most = max(1, _TOKENS // len(servers))
        parts = []
        for i, row in enumerate(rows):
            alike = int((rows == row).sum())
            mine = np.flatnonzero(profile.server == row)[i // len(profile.servers) :: alike]
            keep = mine[np.linspace(0, len(mine) - 1, min(most, len(mine))).astype(np.int64)]
            parts.append((keep, np.full(len(keep), i)))
        keep, server = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        tokens = {"ids": profile.ids[keep], "server": server, "sequence": profile.sequence[keep]}
    return replace(profile, counts=profile.counts[rows], servers=tuple(servers), **tokens)


def run_grid(
    grid: Grid, profile: Profile, evaluation: Profile | None = None, jobs: int | None = None
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Simulate every cell; yields its strategy, GPUs, bandwidth and gap, and its figures, as they are done.

    A plan is made once per strategy and cluster size, at 500 Mbit/s. All strategies and bandwidths get the same
    requests. Results do not depend on `jobs`.

    Args:
        grid: what to simulate.
        profile: to plan on.
        evaluation: what the servers' users do then; None for the same.
        jobs: processes; None takes one per core.
    """
    work = [(grid, profile, evaluation or profile, s, g) for g in sorted(grid.gpus)[::-1] for s in grid.strategies]
    jobs = jobs or os.cpu_count() or 1
    if jobs == 1:
        for task in work:
            yield from _column(task)
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(min(jobs, len(work))) as pool:
        for cells in pool.imap_unordered(_column, work):
            yield from cells


def _column(task: tuple[Grid, Profile, Profile, str, int]) -> list[tuple[Cell, dict[str, Any]]]:
    """All cells of one strategy and one number of GPUs."""
    grid, profile, evaluation, strategy, gpus = task
    cluster = grid_cluster(profile, gpus, PLANNED_AT)
    names = cluster.names
    groups = None if grid.groups or strategy != "latency" else [list(names)]
    planned = plan(spread_profile(profile, names), cluster, strategy, seed=grid.seed, prior=grid.prior, groups=groups)
    result = []
    for bandwidth in grid.bandwidths:
        problem = Problem.build(spread_profile(evaluation, names), grid_cluster(profile, gpus, bandwidth))
        compute = Compute.roofline(problem)
        steps = Steps.build(problem, planned.resident, compute, planned.host)
        for gap in grid.gaps:
            duration = max(grid.duration, grid.requests * gap / len(names))
            arrivals = Arrivals.poisson(len(names), gap, duration, grid.lengths, grid.seed)
            options = {"chunk": grid.chunk, "steps": steps, "host": planned.host}
            done = simulate(problem, planned.resident, arrivals, compute, **options)
            p50, p95, p99 = np.percentile(done.latency, [50, 95, 99]).tolist()
            figures = {"mean": float(done.latency.mean()), "p50": p50, "p95": p95, "p99": p99}
            figures["port_utilisation"] = float(done.port_utilisation.max())
            figures["only_copies"] = planned.predicted["only_copies"]
            figures |= {
                "requests": len(arrivals),
                "backlog": _piles_up(arrivals.seconds, arrivals.seconds + done.latency),
            }
            result.append(((strategy, gpus, bandwidth, gap), figures))
    return result


def _piles_up(arrived: np.ndarray, finished: np.ndarray) -> bool:
    """Are there at least 1.4 times as many requests in the system in the last quarter of arrivals as in the second?"""
    times = np.linspace(arrived[-1] / 4, arrived[-1], 301)
    inside = np.searchsorted(arrived, times, "right") - np.searchsorted(np.sort(finished), times, "right")
    return bool(inside[200:].mean() >= 1.4 * inside[:100].mean() and inside[-1] > 1)


def trends(cells: Mapping[Cell, Mapping[str, Any]], grid: Grid) -> dict[str, dict[str, tuple[float, float] | None]]:
    """The paper's trends, per strategy: least and largest cut of mean time over the other axes, as shares.

    Cells in which requests pile up (`backlog`) are left out: their means say how long was simulated.

    Returns:
        `gpus`: from the smallest cluster to the largest, over bandwidths and gaps; `bandwidth_small` and
        `bandwidth_large`: from the lowest bandwidth to the highest at either size, over gaps. None where nothing is
        left.
    """
    small, large = min(grid.gpus), max(grid.gpus)
    low, high = min(grid.bandwidths), max(grid.bandwidths)

    def cuts(strategy: str, ends: list[tuple[tuple[int, float], tuple[int, float]]]) -> tuple[float, float] | None:
        found = []
        for start, end in ends:
            for gap in grid.gaps:
                before, after = cells[strategy, *start, gap], cells[strategy, *end, gap]
                if not (before["backlog"] or after["backlog"]):
                    found.append(1.0 - after["mean"] / before["mean"])
        return (min(found), max(found)) if found else None

    return {
        s: {
            "gpus": cuts(s, [((small, b), (large, b)) for b in grid.bandwidths]),
            "bandwidth_small": cuts(s, [((small, low), (small, high))]),
            "bandwidth_large": cuts(s, [((large, low), (large, high))]),
        }
        for s in grid.strategies
    }
