"""`python -m launch bench migrate`: what running requests notice of migrations, on the demo's cluster, in one process or in
one for each server.

The same load runs with migrations and without, by turns: the longest gap between two tokens of any request, what staging
reads a second against reading alone, and the memory that it holds.
"""

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.expert_parallel.pool import read_ahead
from dancemoe_jax.inference.steps import decode_step, prefill
from launch.arguments import DTYPES
from launch.bench.load import forget
from launch.cluster.channel import Channel
from launch.cluster.devices import cluster_devices
from launch.cluster.example import demo_cluster
from launch.cluster.join import join
from launch.cluster.start_all import of_first, run_everywhere
from launch.engine.host import Host
from launch.engine.loading import Loaded, load
from launch.engine.memory import reserved_bytes
from launch.engine.request import Request
from launch.migration.worker import MigrationWorker
from launch.model_flags import read_shape
from placement import InputError, Placement
from placement.files import parse_json
from placement.text_table import print_table, print_text
from placement.units import parse_bytes, parse_rate

SEQUENCES, CHUNK, PROMPT, ANSWER = 2, 32, 24, 40
_ROUNDS = 2
_WAIT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--migrations", type=int, default=10, metavar="N", help="in each of the two runs with migrations (10)")
    add("--staging-memory", default="5MB", metavar="SIZE", help="host memory for experts on their way (5MB)")
    add("--staging-bandwidth", metavar="RATE", help="at which they are read at most, such as 50MB/s (no limit)")
    add("--model", type=Path, metavar="DIR", help="model directory or store (default: the bundled model)")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations (float32)")
    add(
        "--cold",
        action="store_true",
        help="read the model from the disk itself, not from the page cache",
    )
    add(
        "--think",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds from an answer to the next request in its batch slot (0)",
    )
    add("--processes", action="store_true", help="one process for each server (default: one for all)")
    add("--server", metavar="NAME", help=argparse.SUPPRESS)  # be this one's process
    add("--coordinator", metavar="HOST:PORT", help=argparse.SUPPRESS)
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Serve, migrate, measure.

    Raises:
        InputError: a flag is out of range.
    """
    if args.migrations < 1:
        raise InputError(f"--migrations {args.migrations}: must be at least 1")
    staging = parse_bytes(args.staging_memory, "--staging-memory")
    most = parse_rate(args.staging_bandwidth, "--staging-bandwidth") if args.staging_bandwidth else None
    if not args.think >= 0:
        raise InputError(f"--think {args.think}: must be at least 0")
    args.context, args.devices = 128, 4
    path = args.model or bundled_model()
    config = read_shape(path, args)
    itemsize = jnp.dtype(args.dtype).itemsize
    cluster = demo_cluster(config, reserved_bytes(config, SEQUENCES, itemsize), itemsize=itemsize)
    if args.processes and not args.server:
        return run_everywhere("bench", cluster, sys.argv[2:], None, of_first(cluster))
    with contextlib.ExitStack() as stack:
        if args.server:
            index = cluster.names.index(args.server)
            devices = stack.enter_context(join(cluster, args.server, coordinator=args.coordinator))
        else:
            index, devices = 0, list(cluster_devices(len(cluster.devices)))[: len(cluster.devices)]
        loaded = load(path, config, cluster, devices, dtype=args.dtype, sequences=SEQUENCES, chunk=CHUNK, wide=False)
        result = _serve(args, loaded, index, staging, most, lambda: forget(path) if args.cold else None)
    if result is not None:
        print(json.dumps(result)) if args.json else _print(result)
    return 0


def _serve(
    args: argparse.Namespace, loaded: Loaded, index: int, staging: int, most: float | None, before: Callable[[], None]
) -> dict[str, Any] | None:
    """Be one server, or all; what was measured on all of them, in the first process."""
    host = Host(loaded.engine, index)
    worker = MigrationWorker(loaded, host.channel, host.wake, staging_bytes=staging, bandwidth=most)
    worker.start()
    host.between = worker.between
    loop = threading.Thread(target=host.run, daemon=True)
    loop.start()
    rng = np.random.default_rng([args.seed, index])
    phases = _Phases(host.channel, _Load(host, rng, loaded.engine.config.vocab_size, args.think), index == 0)
    moves: list[dict[str, float]] = []
    phases.take(lambda: time.sleep(3))  # compiles
    compiled = _compiled()
    calm, moving, seconds = _Gaps(), _Gaps(), 0.0
    for _ in range(_ROUNDS):
        begin = time.monotonic()
        moving += phases.take(lambda: moves.extend(_migrations(worker, loaded, rng, args.migrations, before)))
        seconds = time.monotonic() - begin
        calm += phases.take(lambda seconds=seconds: time.sleep(seconds))
    own = {
        "calm": calm,
        "moving": moving,
        "compilations": _compiled() - compiled,
        "peak": worker.peak_bytes,
        "stall": max(stall for result in worker.results for stall in result.stalls_s),
    }
    reports = phases.exchange(index, own)
    alone = 0.0
    for _ in range(_ROUNDS):
        before()
        phases.exchange(index, {})  # all begin at once
        alone = max(alone, _read_alone(loaded, rng))
    alone = min(alone, most or np.inf)
    host.finish()
    loop.join()
    worker.end()
    if index:
        return None
    calm, moving = ([gap for one in reports for gap in one[key]] for key in ("calm", "moving"))
    return {
        "processes": len(reports),
        "migrations": len(moves),
        "copies_moved_share": min(m["share"] for m in moves),
        "longest_gap_s": max(calm),
        "longest_gap_migrating_s": max(moving),
        "p99_gap_s": float(np.quantile(calm, 0.99)),
        "p99_gap_migrating_s": float(np.quantile(moving, 0.99)),
        "longest_stall_s": max(one["stall"] for one in reports),
        "migration_s": statistics.median(m["seconds"] for m in moves),
        "rounds": statistics.median(m["rounds"] for m in moves),
        "staged_bytes_per_s": statistics.median(m["bytes"] / m["stage_s"] for m in moves),
        "read_alone_bytes_per_s": alone,
        "staging_bytes": staging,
        "peak_staged_bytes": max(one["peak"] for one in reports),
        "compilations": sum(one["compilations"] for one in reports),
    }


_Gaps = list[float]


class _Load:
    """Requests that keep every batch slot of this process's devices busy, with the times of their tokens."""

    def __init__(self, host: Host, rng: np.random.Generator, vocabulary: int, think_s: float) -> None:
        self.host, self.rng, self.vocabulary, self.think_s = host, rng, vocabulary, think_s
        servers = host.engine.device_server[list(host.engine.own)]
        self.slots = [int(server) for server in servers for _ in range(SEQUENCES)]

    def during(self, what: Callable[[], Any]) -> _Gaps:
        """Do something while requests run: seconds between tokens of the same request."""
        ends, gaps = threading.Event(), _Gaps()
        prompts = [self.rng.integers(0, self.vocabulary, PROMPT).tolist() for _ in self.slots]

        def keep_asking(server: int, prompt: list[int]) -> None:
            while not ends.is_set():
                before = 0.0
                for _ in self.host.submit(Request(server, prompt, ANSWER, time.monotonic())):
                    now = time.monotonic()
                    if before:
                        gaps.append(now - before)
                    before = now
                ends.wait(self.think_s)

        threads = [threading.Thread(target=keep_asking, args=job) for job in zip(self.slots, prompts, strict=True)]
        for thread in threads:
            thread.start()
        what()
        ends.set()
        for thread in threads:
            thread.join()
        return gaps


class _Phases:
    """Times in which all processes have the same load; what happens in them is up to the first one."""

    def __init__(self, channel: Channel, load: _Load, first: bool) -> None:
        self.channel, self.load, self.first, self.number = channel, load, first, 0

    def take(self, what: Callable[[], Any]) -> _Gaps:
        """The next phase: seconds between tokens of this process's requests. `what` is done by the first process."""
        number, self.number = self.number, self.number + 1
        if not self.first:
            self._receive(f"begin/{number}")
            return self.load.during(lambda: self._receive(f"over/{number}"))

        def conducted() -> None:
            what()
            self.channel.put(f"bench/over/{number}", b"over")

        self.channel.put(f"bench/begin/{number}", b"begin")
        return self.load.during(conducted)

    def exchange(self, process: int, own: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process reports, by process."""
        number, self.number = self.number, self.number + 1
        self.channel.put(f"bench/report/{number}/{process}", json.dumps(own).encode())
        names = [f"report/{number}/{other}" for other in range(jax.process_count())]
        return [parse_json(self._receive(name), name) for name in names]

    def _receive(self, name: str) -> bytes:
        data = self.channel.get(f"bench/{name}", _WAIT_S)
        if data is None:
            raise RuntimeError(f"bench migrate: {name} has not come from the other servers within {_WAIT_S:g} s")
        return data


def _migrations(
    worker: MigrationWorker, loaded: Loaded, rng: np.random.Generator, number: int, prepare: Callable[[], None]
) -> list[dict[str, float]]:
    """Migrations one after the other, each to a placement that is drawn at random; figures of each."""
    done = []
    for _ in range(number):
        before, target = worker.placement, _scattered(worker.placement, loaded, rng)
        share = (target.resident & ~before.resident).sum() / before.resident.sum()
        likely = np.zeros((len(loaded.cluster.names), target.resident.shape[1], len(loaded.cluster.names)), bool)
        prepare()
        outcome = worker.wait(worker.send(target, likely, "bench"), 600)
        if outcome is None or outcome.failed:
            raise RuntimeError(f"a migration failed: {outcome.failed if outcome else 'no end within 600 s'}")
        done.append(
            {
                "share": float(share),
                "bytes": outcome.staged,
                "stage_s": outcome.stage_s,
                "rounds": outcome.rounds,
                "seconds": outcome.seconds,
            }
        )
        time.sleep(0.2)
    return done


def _scattered(present: Placement, loaded: Loaded, rng: np.random.Generator) -> Placement:
    """Every expert once, on a random device, then copies until every device is full."""
    layout = loaded.engine.shapes["layout"]
    resident = np.zeros_like(present.resident)
    grid = np.argwhere(np.ones(resident.shape[1:], bool))
    for layer, expert in rng.permutation(grid):
        room = [d for d, most in enumerate(layout.capacity) if resident[d].sum() < most]
        resident[rng.choice(room), layer, expert] = True
    for device, most in enumerate(layout.capacity):
        free = rng.permutation(np.argwhere(~resident[device]))[: most - int(resident[device].sum())]
        resident[device][tuple(free.T)] = True
    return Placement(resident, present.devices, "random", present.model)


def _read_alone(loaded: Loaded, rng: np.random.Generator) -> float:
    """Bytes a second that reading experts through the page cache gives while nothing else runs."""
    grid = np.argwhere(np.ones(loaded.profile.counts.shape[1:], bool))
    experts = [(int(layer), int(expert)) for layer, expert in rng.permutation(grid)]
    begin, total = time.monotonic(), 0
    for weights in read_ahead(loaded.read, experts, threads=2):
        total += sum(part.nbytes for part in jax.tree.leaves(weights))
    return total / (time.monotonic() - begin)


def _compiled() -> int:
    steps: list[Any] = [decode_step, prefill]
    return sum(step._cache_size() for step in steps)


def _print(result: dict[str, Any]) -> None:
    title = (
        f"{result['migrations']} migrations of at least {100 * result['copies_moved_share']:.0f} % of all copies, "
        f"{result['processes']} {'process' if result['processes'] == 1 else 'processes'}"
    )
    rows: list[list[str]] = []
    for name, key in (("longest gap between two tokens", "longest_gap"), ("99th percentile", "p99_gap")):
        calm, moving = 1e3 * result[f"{key}_s"], 1e3 * result[f"{key}_migrating_s"]
        rows.append([name, f"{calm:.1f} ms", f"{moving:.1f} ms", f"{moving / calm:.2f}"])
    alone, staged = result["read_alone_bytes_per_s"], result["staged_bytes_per_s"]
    rows.append(["reading experts", f"{alone / 1e6:.0f} MB/s", f"{staged / 1e6:.0f} MB/s", f"{staged / alone:.2f}"])
    print_table(("", "without", "with", "ratio"), rows, title=title)
    print_text(
        f"a migration: {result['rounds']:.0f} rounds, {result['migration_s']:.2f} s; longest stall between two steps "
        f"{1e3 * result['longest_stall_s']:.1f} ms; staged at once {result['peak_staged_bytes'] / 1e6:.2f} MB in a process, "
        f"each server may {result['staging_bytes'] / 1e6:.2f} MB; compilations {result['compilations']}",
    )
