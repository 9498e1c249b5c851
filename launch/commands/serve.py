"""`python -m launch serve`: a model over the servers of a cluster file, one process each, requests as JSON lines.

Every server takes its own users' requests. A line is an object with `prompt` (text) or `messages` (a conversation), and
optionally `id`, `server` and what `SamplingParams` names; the answer is a line with the same `id`.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from dancemoe_jax.checkpoint.reader import bundled_model
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.tokenizer import load_tokenizer_bundle
from launch.cluster.addresses import coordinator_address
from launch.cluster.fingerprint import folder_fingerprint
from launch.cluster.jax_runtime import from_environment
from launch.cluster.start_all import run_everywhere
from launch.elastic.process_group import ProcessGroup
from launch.migration.record import open_state, read_record
from launch.model_flags import DTYPES, read_shape
from launch.serve.json_lines import Feeder
from launch.serve.server import Server
from placement import STRATEGIES, Cluster, InputError, Placement
from placement.migration.decide import Policy
from placement.units import parse_bytes, parse_rate, parse_seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", required=True, metavar="C.toml", help="the servers")
    add("--server", metavar="NAME", help="be this one (default: start every server of the file that is this machine)")
    add("--model", type=Path, metavar="DIR", help="model directory or store (default: the bundled model)")
    add("--placement", metavar="X.json", help="what is where (default: planned for users who are all alike)")
    add("--requests", default="-", metavar="FILE", help="JSON lines; - for standard input (default)")
    add("--coordinator", metavar="HOST:PORT", help="where the servers meet (default: the first server's host)")
    add(
        "--join",
        metavar="HOST:PORT",
        help="come to a cluster that serves, where its `migrate --add` waits for this server",
    )
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for the other servers (60)")
    add("--sequences", type=int, default=8, metavar="N", help="sequences a device serves at once (8)")
    add("--chunk", type=int, default=64, metavar="N", help="prompt tokens of a step (64)")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations (float32)")
    add("--int8", action="store_true", help="hold routed experts as int8")
    add(
        "--state",
        type=Path,
        metavar="DIR",
        help="folder for the record of the placement in force; lets experts migrate",
    )
    add("--interval", default="60s", metavar="T", help="between revisions of the placement (60s); 0s for none")
    add("--half-life", metavar="T", help="after which an activation counts half (the interval, or 60s)")
    add("--horizon", default="300s", metavar="T", help="over which a migration has to pay (300s)")
    add("--strategy", default="latency", choices=sorted(STRATEGIES), help="of revised placements (latency)")
    add(
        "--staging-memory", default="1GB", metavar="SIZE", help="host memory of a server for experts on their way (1GB)"
    )
    add("--staging-bandwidth", metavar="RATE", help="at which a server reads them at most, such as 200MB/s (no limit)")
    add("--context", type=int, metavar="N", help="longest sequence (the model's, at most 4096)")


def run(args: argparse.Namespace) -> int:
    """Serve until all requests of all servers are answered, or until SIGINT or SIGTERM.

    Raises:
        InputError, ModelError: the cluster file, the model, the placement or a flag cannot be used.
    """
    for flag in ("sequences", "chunk", "timeout"):
        if not getattr(args, flag) > 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be greater than 0")
    if args.join and not (args.server and args.state):
        raise InputError("--join: give --server, and --state as the others were given it")
    policy = policy_of(args)
    cluster = Cluster.from_toml(args.cluster)
    path = args.model or bundled_model()
    args.devices = 1
    config = read_shape(path, args)
    placed = Placement.load(args.placement) if args.placement else None
    lines = _read(args.requests)
    found = None if args.server else from_environment(cluster, args.timeout)
    if found:
        args.server, args.coordinator = found
    if args.server:
        _serve(args, cluster, path, config, placed, policy, lines)
        return 0
    return _start_all(args, cluster)


def _start_all(args: argparse.Namespace, cluster: Cluster) -> int:
    """One process for each server of this machine; the exit status."""
    given = sys.argv[2:]
    with contextlib.ExitStack() as stack:
        if args.requests == "-":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-"))
            requests = Path(folder) / "requests.jsonl"
            requests.write_text(sys.stdin.read(), encoding="utf-8")
            given = [*given, "--requests", str(requests)]
        return run_everywhere("serve", cluster, given, args.coordinator)


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
    lines: Any,
) -> None:
    """Be one server."""
    facts = facts_of(args, path, config, policy)
    bundle = load_tokenizer_bundle(path, config)
    state = open_state(args.state) if args.state and args.server == cluster.names[0] else None
    record = read_record(state) if state else None
    feeder = Feeder(bundle, config, lines, shares=not args.join)
    server = Server(
        args.server,
        path,
        config,
        {"dtype": args.dtype, "int8": args.int8, "sequences": args.sequences},
        args.chunk,
        facts,
        args.timeout,
        policy if args.state else None,
        state,
        feeder.start,
        feeder.take_in,
    )
    if args.join:
        server.join_serving(args.join, cluster)
    else:
        coordinator = args.coordinator or coordinator_address(cluster)
        given = folder_fingerprint(args.placement) if args.placement else "none"
        limits = record.limits if record else {}
        server.serve(ProcessGroup(cluster, coordinator, placed, limits=limits), given, record)
    feeder.finished.wait(10)


def _read(file: str) -> Any:
    """Lines of a file, or of standard input as they come.

    Raises:
        InputError: the file cannot be read.
    """
    if file == "-":
        return sys.stdin
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"--requests {file}: cannot be read ({error.strerror})") from None


def facts_of(args: argparse.Namespace, path: Path, config: ModelConfig, policy: Policy) -> dict[str, str]:
    """What every server has to serve with too, fingerprints by what they are of."""
    flags = (args.sequences, args.chunk, args.dtype, args.int8, config, policy, bool(args.state))
    return {"model": folder_fingerprint(path), "flags": repr(flags)}
