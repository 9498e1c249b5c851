"""How long planning takes and how much memory, strategy by strategy, and how both grow with layers x experts."""

import argparse
import json
import math
import multiprocessing
import time
from typing import Any

import numpy as np

from placement.commands.inputs import STRATEGIES_HELP, add_json, whole_number
from placement.data.cluster import Cluster
from placement.data.problem import Problem
from placement.data.profile import Profile
from placement.files import InputError, show
from placement.registry import STRATEGIES, strategy_named, strategy_names
from placement.strategies.exact.optimum import certificate
from placement.text_table import print_table, print_text

SIZES = "58x64x64x4,58x128x64x4,58x256x64x4"
_MOST = 2**26  # servers x layers x experts, and devices x layers x experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strategies", default=",".join(STRATEGIES), metavar="A,B", help=STRATEGIES_HELP)
    what = "layers x experts x servers x devices per server"
    parser.add_argument("--sizes", default=SIZES, metavar="LxExNxG,...", help=f"{what} (default: {SIZES})")
    parser.add_argument("--copies", type=float, default=1.3, help="memory, in copies of all experts (default: 1.3)")
    parser.add_argument("--seed", type=whole_number, default=0, help="of the activations drawn (default: 0)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Plan with every strategy at every size, each in a process of its own, so that its peak memory is its own.

    Raises:
        InputError: a flag cannot be used.
    """
    names = strategy_names(arguments.strategies)
    sizes = [_size(text) for text in arguments.sizes.split(",")]
    if not 1 <= arguments.copies <= 1000:
        raise InputError(f"--copies = {arguments.copies:g}: must be from 1 to 1000 to hold every expert")
    context = multiprocessing.get_context("spawn")
    results = []
    for name in names:
        before = None
        for size in sizes:
            with context.Pool(1) as pool:
                row = pool.apply(measure, (name, size, arguments.copies, arguments.seed))
            row["growth"] = None if before is None else _growth(before, row)
            before = row
            results.append(row)
    if arguments.json:
        print(json.dumps({"copies": arguments.copies, "seed": arguments.seed, "results": results}))
        return
    rows = [
        [
            row["strategy"],
            "x".join(map(str, row["size"])),
            f"{row['cpu_seconds']:.2f} s",
            f"{row['seconds']:.2f} s",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB",
            "-" if row["growth"] is None else f"{row['growth']:.2f}",
            f"{row['remote_share']:.3f}",
            "-" if row["gap"] is None else f"{row['gap']:.1e}",
        ]
        for row in results
    ]
    print_table(["strategy", "LxExNxG", "CPU", "wall", "peak", "growth", "remote", "certified gap"], rows)
    print_text(
        "peak: resident memory of the whole process. growth: exponent of CPU time in layers x experts.",
        "certified gap: of `exact`, from its dual prices; their verification is within its times.",
    )


def measure(name: str, size: tuple[int, int, int, int], copies: float, seed: int) -> dict[str, Any]:
    """Plan for a synthetic problem, the fastest of a few runs where they are short; `exact` with its certificate.

    Returns:
        strategy, size, seconds, cpu_seconds (of all threads), peak_bytes of this process (None where the system does
        not say), remote_share over all calls, gap (of `exact`).
    """
    problem = synthetic(*size, copies=copies, seed=seed)
    runs: list[tuple[float, float]] = []
    while True:
        cpu, wall = time.process_time(), time.perf_counter()
        resident = strategy_named(name)(problem, previous=None, seed=seed)
        proof = certificate(problem, resident) if name == "exact" else None
        runs.append((time.process_time() - cpu, time.perf_counter() - wall))
        if len(runs) == 5 or sum(wall for _, wall in runs) > 1:
            break
    cpu, wall = min(runs)
    remote = problem.frequency[~problem.held(resident)].sum() / problem.frequency.sum()
    row = {"strategy": name, "size": list(size), "seconds": wall, "cpu_seconds": cpu, "peak_bytes": _peak_bytes()}
    return {**row, "remote_share": float(remote), "gap": None if proof is None else proof.gap}


def synthetic(layers: int, experts: int, servers: int, devices: int, *, copies: float, seed: int) -> Problem:
    """A problem with activations skewed like real ones: some experts busy everywhere, others on some servers only.

    Devices differ in memory by up to four times; together they hold `copies` copies of every expert, rounded up to
    whole experts on each device.
    """
    rng = np.random.default_rng(seed)
    mean = rng.gamma(1.0, 1.0, (1, layers, experts)) * rng.gamma(0.5, 200.0, (servers, layers, experts))
    memory = rng.uniform(1.0, 4.0, servers * devices)
    slots = np.ceil(memory / memory.sum() * copies * layers * experts).astype(np.int64)
    names = tuple(f"s{n}" for n in range(servers))
    tables = [
        {"name": name, "devices": [{"memory": int(slot)} for slot in row]}
        for name, row in zip(names, slots.reshape(servers, devices), strict=True)
    ]
    profile = Profile(rng.poisson(mean), names, "synthetic", min(8, experts), 2048, 1)
    return Problem.build(profile, Cluster.from_dict({"server": tables}))


def _size(text: str) -> tuple[int, int, int, int]:
    parts = text.strip().split("x")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 7 and int(part) for part in parts):
        raise InputError(f"--sizes: {show(text)}: must be LxExNxG, four whole numbers above 0, such as 58x256x64x4")
    layers, experts, servers, devices = (int(part) for part in parts)
    if layers * experts * servers * devices > _MOST:
        raise InputError(f"--sizes: {show(text)}: more than {_MOST} experts times devices; choose a smaller one")
    return layers, experts, servers, devices


def _growth(before: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Exponent of CPU time in layers x experts between two sizes with as many servers and devices; else None."""
    one, two = (math.prod(r["size"][:2]) for r in (before, row))
    if one == two or before["size"][2:] != row["size"][2:] or min(before["cpu_seconds"], row["cpu_seconds"]) <= 0:
        return None
    return math.log(row["cpu_seconds"] / before["cpu_seconds"]) / math.log(two / one)


def _peak_bytes() -> int | None:
    try:
        import resource
        import sys
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
