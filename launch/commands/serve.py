"""`python -m launch serve`: a model over the servers of a cluster file, one process each, requests as JSON lines.

Every server takes its own users' requests. A line is an object with `prompt` (text) or `messages` (a conversation), and
optionally `id`, `server` and what `SamplingParams` names; the answer is a line with the same `id`.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from dancemoe_jax.checkpoint.reader import bundled_model
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.tokenizer import load_tokenizer_bundle
from launch.cluster.addresses import coordinator_address
from launch.cluster.compile_cache import use_compile_cache
from launch.cluster.fingerprint import folder_fingerprint
from launch.cluster.launchers import from_environment
from launch.cluster.secret import load_secret
from launch.cluster.start_all import run_everywhere
from launch.elastic.process_group import ProcessGroup
from launch.migration.record import open_state, read_record
from launch.model_flags import read_shape
from launch.serve.drain import Drain
from launch.serve.json_lines import Feeder
from launch.serve.lines import open_lines
from launch.serve.requests import RequestMaker
from launch.serve.server import Server
from placement import Cluster, InputError, Placement
from placement.migration.decide import Policy
from placement.units import parse_bytes, parse_rate, parse_seconds

_LARGEST_FLAG = 1e6  # seconds, tokens or sequences
_ANSWER_S = 10.0  # for the last answers to be written, once serving has ended


def run(args: argparse.Namespace) -> int:
    """Serve until all requests of all servers are answered, or until SIGINT or SIGTERM; the exit status.

    Raises:
        InputError, ModelError: the cluster file, the model, the placement or a flag cannot be used.
    """
    for flag in ("sequences", "chunk", "timeout", "drain"):
        if not 0 < getattr(args, flag) <= _LARGEST_FLAG:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be greater than 0, and at most {_LARGEST_FLAG:g}")
    if args.join and not (args.server and args.state):
        raise InputError("--join: give --server, and --state as the others were given it")
    policy = policy_of(args)
    cluster = Cluster.from_toml(args.cluster)
    path = args.model or bundled_model()
    args.devices = 1
    config = read_shape(path, args)
    placed = Placement.load(args.placement) if args.placement else None
    lines = open_lines(args.requests, sys.stdin.buffer)
    found = None if args.server else from_environment(cluster)
    if found:
        args.server, args.coordinator = found
    args.secret = load_secret(args.secret_file)
    if args.server:
        return _serve(args, cluster, path, config, placed, policy, lines)
    return _start_all(args, cluster)


def _start_all(args: argparse.Namespace, cluster: Cluster) -> int:
    """One process for each server of this machine; the exit status."""
    given = sys.argv[2:]
    with contextlib.ExitStack() as stack:
        if args.requests == "-":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-"))
            requests = Path(folder) / "requests.jsonl"
            with open(requests, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            given = [*given, "--requests", str(requests)]
        return run_everywhere("serve", cluster, given, args.coordinator, as_json=args.log_json, drain=args.drain)


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


def _serve(
    args: argparse.Namespace,
    cluster: Cluster,
    path: Path,
    config: ModelConfig,
    placed: Placement | None,
    policy: Policy,
    lines: BinaryIO,
) -> int:
    """Be one server; the exit status."""
    use_compile_cache(args.compile_cache)
    facts = facts_of(args, path, config, policy)
    bundle = load_tokenizer_bundle(path, config)
    state = open_state(args.state) if args.state and args.server == cluster.names[0] else None
    record = read_record(state) if state else None
    feeder = Feeder(RequestMaker(bundle, config), lines, shared=args.requests != "-", shares=not args.join)
    drain = Drain(args.server, args.drain, feeder.close, lambda: feeder.pending)
    server = Server(
        args.server,
        path,
        config,
        {"dtype": args.dtype, "int8": args.int8, "sequences": args.sequences},
        args.chunk,
        args.kernels,
        facts,
        args.secret,
        args.timeout,
        policy if args.state else None,
        state,
        feeder.start,
        feeder.take_in,
        drain,
        feeder.settle,
    )
    if args.join:
        server.join_serving(args.join, cluster)
    else:
        coordinator = args.coordinator or coordinator_address(cluster)
        given = folder_fingerprint(args.placement) if args.placement else "none"
        limits = record.limits if record else {}
        server.serve(ProcessGroup(cluster, coordinator, placed, limits=limits), given, record)
    feeder.settle(_ANSWER_S)
    if feeder.problem:
        return 1
    return 128 + drain.cancelled if drain.cancelled else 0


def facts_of(args: argparse.Namespace, path: Path, config: ModelConfig, policy: Policy) -> dict[str, str]:
    """What every server has to serve with too, fingerprints by what they are of."""
    flags = (args.sequences, args.chunk, args.dtype, args.int8, args.kernels, config, policy, bool(args.state))
    return {"model": folder_fingerprint(path), "flags": repr(flags)}
