"""`python -m launch serve --http`: the front door of one server, from start to end. Loads no JAX; its worker does."""

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import uvicorn
import uvloop
from starlette.applications import Starlette

from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.tokenizer import load_tokenizer_bundle
from launch.cluster.addresses import join_address, listen
from launch.cluster.example import ALONE
from launch.http.access import Access
from launch.http.addresses import listening_at
from launch.http.app import make_app
from launch.http.book import Book
from launch.http.health import Health
from launch.http.lines import LineClient
from launch.http.metrics import Metrics
from launch.http.operators import Operators
from launch.http.pace import Pace
from launch.http.protocol import LimitedProtocol
from launch.http.route import Router
from launch.http.service import Service
from launch.http.supervisor import Supervisor
from launch.http.traces import open_traces
from launch.serve.lines import LineShare
from placement import Cluster, InputError
from placement.units import parse_seconds

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 30
_LARGEST_HEAD = 2**16  # bytes
_LATER_S = 10.0  # for the worker to end, once the cluster has drained


def serve_http(
    args: argparse.Namespace, cluster: Cluster | None, path: Path, config: ModelConfig, lines: BinaryIO | None
) -> int:
    """Be the front door of a server until it is told to end; the exit status.

    Args:
        lines: requests beside those that come over HTTP.

    Raises:
        InputError, ModelError: the address, the model's tokenizer or a flag cannot be used.
    """
    for flag in ("queue", "hold", "stuck", "deadline"):
        if not getattr(args, flag) > 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be greater than 0")
    if args.tls_key and not args.tls_cert:
        raise InputError("--tls-key: give --tls-cert too")
    names = cluster.names if cluster else (ALONE,)
    server = args.server or ALONE
    if server not in names:
        raise InputError(f"server {server}: not in {args.cluster}; known are {', '.join(names)}")
    access = Access(args.tokens, args.operator_token)
    traces = open_traces(args.traces, server, path.resolve().name) if args.traces else None
    host, port = listening_at(args.http)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(host, port, "--http"))
        listening.listen(2048)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="front-door-")))
        service = _service(args, cluster, path, config, folder)
        metrics = Metrics(server, service.book, service.supervisor)
        service.book.ended.append(metrics.ended)
        if traces is not None:
            service.book.ended.append(traces.ended)
            stack.callback(traces.close)
        health = Health(server, service.book, service.supervisor)
        operators = Operators(service, health, metrics, args.state if server == names[0] else None, args.secret)
        share = LineShare(names, names.index(server), args.requests not in (None, "-"), not args.join)
        client = LineClient(service, lines, share) if lines is not None else None
        router = Router(cluster, service, args.secret) if args.route and cluster else None
        door = _Door(service, make_app(service, health, metrics, operators, access), args, client, router)
        where = join_address(*listening.getsockname()[:2])
        log.info("%s: %s://%s", server, "https" if args.tls_cert else "http", where)
        if access.open_to_all and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
            log.warning("%s: anyone who reaches %s can ask; give --tokens FILE to have them show one", server, where)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(door.run(listening))


def _service(
    args: argparse.Namespace, cluster: Cluster | None, path: Path, config: ModelConfig, folder: Path
) -> Service:
    """What owns requests and keeps a worker; folder: for sockets."""
    names = cluster.names if cluster else (ALONE,)
    own = names.index(args.server or ALONE)
    slots = args.sequences * (len(cluster.servers[own].devices) if cluster else 1)
    longest = None if args.wait == "auto" else parse_seconds(args.wait, "--wait") if args.wait else args.deadline
    pace = Pace(slots, longest)
    book = Book(args.queue, config.max_position, config.eos_token, pace)
    supervisor = Supervisor(
        _command(),
        folder,
        args.secret,
        book,
        stuck=args.stuck,
        hold=args.hold,
        deadline=args.deadline,
        alone=len(names) == 1,
    )
    book.cancel_in_worker = supervisor.cancel
    bundle = load_tokenizer_bundle(path, config)
    return Service(bundle, config, (path.resolve().name,), own, book, supervisor)


def _command() -> list[str]:
    """The worker's command: this one's own, without a front door; `Supervisor` adds the socket."""
    return [sys.executable, "-m", "launch", *sys.argv[1:]]


class _Door:
    """Serves HTTP and keeps a worker, until signals say that it is to end: the first drains, the second ends at once."""

    def __init__(
        self,
        service: Service,
        app: Starlette,
        args: argparse.Namespace,
        lines: LineClient | None,
        router: Router | None,
    ) -> None:
        self._service, self._drain_s, self._lines, self._router = service, args.drain, lines, router
        self._server = _Server(
            uvicorn.Config(
                app,
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=2,
                h11_max_incomplete_event_size=_LARGEST_HEAD,
                ssl_certfile=args.tls_cert,
                ssl_keyfile=args.tls_key,
            )
        )
        try:
            self._server.config.load()
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"--tls-cert {args.tls_cert}, --tls-key {args.tls_key}: cannot be used ({error})"
            ) from None
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # app.py says what fails, in a line
        self._came: list[int] = []
        self._draining: asyncio.Task[None] | None = None

    async def run(self, listening: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signal, number)
        self._service.supervisor.drained = self._begin_drain
        if self._router is not None:
            await self._router.open()
        worker = asyncio.create_task(self._service.supervisor.run())
        serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        if self._lines is not None:
            self._lines.start()
        status = await worker
        for accepted in self._service.book:
            self._service.book.fail(accepted.number, 503, "the server has ended")
        self._service.book.refusing = (503, "the server has ended")
        self._service.book.changed.set()
        if self._lines is not None:
            await self._lines.settle()
        self._server.should_exit = True
        await serving
        return 128 + self._came[1] if len(self._came) > 1 else status

    def _signal(self, number: int) -> None:
        self._came.append(number)
        if len(self._came) > 1:
            self._service.supervisor.end()
            return
        self._service.supervisor.drain()
        self._begin_drain()

    def _begin_drain(self) -> None:
        if self._draining is None:
            book = self._service.book
            book.refusing = (503, "the server is draining: it takes no more requests")
            book.changed.set()
            if self._lines is not None:
                self._lines.close()
            log.info("draining: %d requests run on, at most %g s; no more are taken", len(book), self._drain_s)
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        book, supervisor = self._service.book, self._service.supervisor
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while len(book):
                    await asyncio.sleep(0.05)
        for accepted in book:
            book.fail(accepted.number, 503, f"not answered within {self._drain_s:g} s of the server's draining")
        supervisor.finish()
        await asyncio.sleep(self._drain_s + _LATER_S)  # the other servers have as long for their own
        supervisor.end()


class _Server(uvicorn.Server):
    """Leaves signals to the front door."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
