"""`python -m launch serve`: a model over the servers of a cluster file, one process each.

Requests come as JSON lines, or over HTTP (`--http`, launch/http). Every server takes its own users' requests. A line is an
object with `prompt` (text) or `messages` (a conversation), and optionally `id`, `server` and what `SamplingParams` names;
the answer is a line with the same `id`. Loads no JAX: what needs it is in processes of its own, or loaded when they serve.
"""

import argparse
import contextlib
import importlib
import shutil
import sys
import tempfile
from pathlib import Path

from dancemoe_jax.checkpoint.bundled import bundled_model
from launch.cluster.launchers import from_environment
from launch.cluster.secret import load_secret
from launch.cluster.start_all import run_everywhere
from launch.http.addresses import listening_at, one_each
from launch.http.run import serve_http
from launch.model_flags import read_shape
from launch.serve.lines import open_lines
from placement import Cluster, InputError, Placement
from placement.migration.decide import Policy
from placement.units import parse_bytes, parse_rate, parse_seconds

_LARGEST_FLAG = 1e6  # seconds, tokens or sequences


def run(args: argparse.Namespace) -> int:
    """Serve until all requests of all servers are answered, or until SIGINT or SIGTERM; the exit status.

    Raises:
        InputError, ModelError: the cluster file, the model, the placement or a flag cannot be used.
    """
    for flag in ("sequences", "max-step-tokens", "timeout", "drain"):
        given = getattr(args, flag.replace("-", "_"))
        if not 0 < given <= _LARGEST_FLAG:
            raise InputError(f"--{flag} {given}: must be greater than 0, and at most {_LARGEST_FLAG:g}")
    if args.join and not (args.server and args.state):
        raise InputError("--join: give --server, and --state as the others were given it")
    if not args.cluster and (args.server or args.join):
        raise InputError("--server, --join: give --cluster too; without it this machine serves alone")
    policy = policy_of(args)
    args.kv_cache = parse_bytes(args.kv_cache, "--kv-cache") if args.kv_cache else None
    cluster = Cluster.from_toml(args.cluster) if args.cluster else None
    path = args.model or bundled_model()
    args.devices = 1
    config = read_shape(path, args)
    placed = Placement.load(args.placement) if args.placement else None
    if args.http is not None:
        listening_at(args.http)
    found = None if args.server or cluster is None else from_environment(cluster)
    if found:
        args.server, args.coordinator = found
    starts_others = cluster is not None and not args.server
    # Beside HTTP lines come only where they are asked for; a worker has neither.
    wanted = args.requests is not None if args.http is not None else True
    lines = open_lines(args.requests or "-") if wanted and not args.front_door and not starts_others else None
    if starts_others and args.requests not in (None, "-"):
        open_lines(args.requests).close()  # what is wrong with it is said once, not by every server
    args.secret = load_secret(args.secret_file)
    if cluster is not None and starts_others:
        return _start_all(args, cluster)
    if args.http is not None and not args.front_door:
        return serve_http(args, cluster, path, config, lines)
    return importlib.import_module("launch.serve.process").serve(args, cluster, path, config, placed, policy, lines)


def _start_all(args: argparse.Namespace, cluster: Cluster) -> int:
    """One process for each server of this machine; the exit status."""
    given = sys.argv[2:]
    with contextlib.ExitStack() as stack:
        if args.requests == "-" or (args.http is None and args.requests is None):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-"))
            requests = Path(folder) / "requests.jsonl"
            with open(requests, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            given = [*given, "--requests", str(requests)]
        return run_everywhere(
            "serve",
            cluster,
            given,
            args.coordinator,
            as_json=args.log_json,
            drain=args.drain,
            own=one_each(args.http) if args.http is not None else None,
        )


def policy_of(args: argparse.Namespace) -> Policy:
    """When and how experts migrate, by the flags."""
    interval = parse_seconds(args.interval, "--interval")
    half_life = parse_seconds(args.half_life, "--half-life") if args.half_life else interval or 60.0
    if not half_life > 0:
        raise InputError(f"--half-life {args.half_life}: must be greater than 0s")
    return Policy(
        strategy=args.strategy,
        interval=interval,
        half_life=half_life,
        horizon=parse_seconds(args.horizon, "--horizon"),
        bandwidth=parse_rate(args.staging_bandwidth, "--staging-bandwidth") if args.staging_bandwidth else None,
        staging_bytes=parse_bytes(args.staging_memory, "--staging-memory"),
    )
