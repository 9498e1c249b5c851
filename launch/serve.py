"""`python -m launch serve`: a model over the servers of a cluster file, one process each, requests as JSON lines.

Every server takes its own users' requests. A line is an object with `prompt` (text) or `messages` (a conversation), and
optionally `id`, `server` and what `SamplingParams` names; the answer is a line with the same `id`.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax

from dancemoe_jax.checkpoint import bundled_model
from dancemoe_jax.config import ModelConfig, ModelError
from dancemoe_jax.sampling import SamplingParams
from dancemoe_jax.tokenizer import TextCodec, TextStream, load_codec
from launch.controller import Policy
from launch.engine import Request
from launch.everywhere import run_everywhere
from launch.hosting import Host, ending, load
from launch.hosting import sizes as model_sizes
from launch.join import coordinator_address, folder_fingerprint, from_environment, join
from launch.local import DTYPES, read_shape
from launch.migrating import migrating, open_state, resumed
from launch.record import read_record
from placement import STRATEGIES, Cluster, InputError, Placement
from placement.units import parse_bytes, parse_rate, parse_seconds

_AT_ONCE = 64  # requests of a server that are read ahead of their turn
_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", required=True, metavar="C.toml", help="the servers")
    add("--server", metavar="NAME", help="be this one (default: start every server of the file that is this machine)")
    add("--model", type=Path, metavar="DIR", help="model directory or store (default: the bundled model)")
    add("--placement", metavar="X.json", help="what is where (default: planned for users who are all alike)")
    add("--requests", default="-", metavar="FILE", help="JSON lines; - for standard input (default)")
    add("--coordinator", metavar="HOST:PORT", help="where the servers meet (default: the first server's host)")
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
    policy = _policy(args)
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


def _policy(args: argparse.Namespace) -> Policy:
    interval = parse_seconds(args.interval, "--interval")
    return Policy(
        strategy=args.strategy, interval=interval, half_life=interval or 60.0,
        horizon=parse_seconds(args.horizon, "--horizon"),
        bandwidth=parse_rate(args.staging_bandwidth, "--staging-bandwidth") if args.staging_bandwidth else None,
        staging_bytes=parse_bytes(args.staging_memory, "--staging-memory"),
    )  # fmt: skip


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
    agree = {
        "model": folder_fingerprint(path),
        "flags": repr((args.sequences, args.chunk, args.dtype, args.int8, config, policy, bool(args.state))),
    }
    if args.placement:
        agree["placement"] = folder_fingerprint(args.placement)
    codec = load_codec(path, config)
    coordinator = args.coordinator or coordinator_address(cluster)
    state = open_state(args.state) if args.state and args.server == cluster.names[0] else None
    record = read_record(state) if state else None
    with join(cluster, args.server, coordinator=coordinator, agree=agree, timeout=args.timeout) as devices:
        begin = time.monotonic()
        sizes = {"dtype": args.dtype, "int8": args.int8, "sequences": args.sequences}
        if args.state:
            placed, epoch = resumed(record, placed, model_sizes(path, config, cluster, **sizes), cluster)
        loaded = load(path, config, cluster, devices, chunk=args.chunk, placed=placed, **sizes)
        host = Host(loaded.engine, cluster.names.index(args.server))
        feeder = Feeder(host, cluster, codec, config)
        print(f"{args.server}: serving after {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(ending(host))
            if args.state:
                limits = record.limits if record else {}
                stack.enter_context(migrating(host, loaded, policy, state, epoch=epoch, limits=limits))
            threading.Thread(target=feeder.feed, args=(lines,), daemon=True).start()
            try:
                host.run()
            except jax.errors.JaxRuntimeError as error:
                _lost(args.server, error)
            feeder.finished.wait(10)


def _lost(server: str, error: Exception) -> NoReturn:
    """Leave because a step has failed. Said at once: JAX may abort this process while it cleans up behind itself."""
    print(
        f"launch serve: server {server}: a step has failed, most likely because another server has ended "
        f"({' '.join(str(error).split())}); see which one and why, then start all again",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    raise SystemExit(1) from None


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


class Feeder:
    """Requests from lines to a host, and their answers to standard output as they end."""

    def __init__(self, host: Host, cluster: Cluster, codec: TextCodec, config: ModelConfig) -> None:
        self.host, self.names, self.codec, self.config = host, cluster.names, codec, config
        self.finished = threading.Event()
        self._print = threading.Lock()

    def feed(self, lines: Any) -> None:
        """Serve all lines that are this server's: those that name it, and its share of those that name none."""
        name = self.names[self.host.server]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            unnamed = 0
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                given = self._parse(line)
                if isinstance(given, dict) and "server" in given:
                    mine = given["server"] == name or (given["server"] not in self.names and self.host.server == 0)
                else:
                    mine, unnamed = unnamed % len(self.names) == self.host.server, unnamed + 1
                if mine:
                    pool.submit(self._answer, number, given)
        self.host.finish()
        self.finished.set()

    def _parse(self, line: str) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            return f"not JSON ({error})"

    def _answer(self, number: int, given: Any) -> None:
        begin = time.monotonic()
        answer: dict[str, Any] = {"id": given.get("id", number) if isinstance(given, dict) else number}
        try:
            request, text = self._request(given)
            answer["server"] = self.names[self.host.server]
            stream = self.host.submit(request)
            for _ in stream:
                pass
            text.finish()
            output = request.output
            if output and output[-1] in request.ends:
                output = output[:-1]
            answer |= {
                "text": text.text, "tokens": output, "prompt_tokens": len(request.prompt), "finish_reason": stream.reason,
                "seconds": round(time.monotonic() - begin, 4),
            }  # fmt: skip
        except (InputError, ModelError) as error:
            answer["error"] = f"line {number}: {' '.join(str(error).split())}"
        with self._print:
            print(json.dumps(answer), flush=True)

    def _request(self, given: Any) -> "tuple[Request, _Text]":
        """A request out of a line, and what gathers its text."""
        if not isinstance(given, dict):
            raise InputError(given if isinstance(given, str) else "must be a JSON object with prompt or messages")
        unknown = set(given) - _FIELDS - {"id", "server", "prompt", "messages"}
        if unknown:
            raise InputError(f"{sorted(unknown)[0]!r} is unknown; known are {', '.join(sorted(_FIELDS))}")
        if "server" in given and given["server"] not in self.names:
            raise InputError(f"server {given['server']!r} is unknown; known are {', '.join(self.names)}")
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key in _FIELDS
        }
        params = SamplingParams(**values)
        if isinstance(given.get("prompt"), str) and "messages" not in given:
            prompt = self.codec.encode(given["prompt"])
        elif isinstance(given.get("messages"), list) and "prompt" not in given:
            prompt = self.codec.encode_chat(given["messages"])
        else:
            raise InputError("must have either a text prompt or a list messages")
        own = set() if self.config.eos_token is None else {self.config.eos_token}
        ends = frozenset(self.codec.eos_tokens | own | set(params.stop_tokens))
        text = _Text(TextStream(self.codec.tokenizer, params.stop, prompt), ends)
        request = Request(
            self.host.server, prompt, params.max_tokens, time.monotonic(), params=params, ends=ends, hear=text.hear
        )
        return request, text


class _Text:
    """An answer's text, from its tokens."""

    def __init__(self, stream: TextStream, ends: frozenset[int]) -> None:
        self.stream, self.ends, self.text = stream, ends, ""

    def hear(self, token: int) -> bool:
        """Take a token; whether a stop text has ended the answer."""
        if token not in self.ends:
            self.text += self.stream.push(token)
        return self.stream.stopped

    def finish(self) -> None:
        self.text += self.stream.finish()
