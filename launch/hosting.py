"""One server's part of a cluster that serves a model: what it loads, and the loop in which it takes its steps.

Requests come in through `Host.submit` from any thread, and go out as streams of tokens; who asks is not known here.
"""

import dataclasses
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import placement
from dancemoe_jax.checkpoint import ExpertFile
from dancemoe_jax.config import ModelConfig
from dancemoe_jax.generate import Weights, place_decoder, place_tables
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.pool import fill_pool, pool_layout
from dancemoe_jax.tables import assign_slots, routing_tables
from launch.bell import Bell, ClusterBell, OwnBell
from launch.cluster import model_profile, reserved_bytes, slots_per_device
from launch.engine import DONE, Engine, Request
from launch.links import likely_links
from placement import Cluster, InputError, Placement
from placement.cost import serving_server
from placement.problem import Problem

_NAP_S = 0.2  # how often a sleeping server looks whether it is to end


class Stream:
    """The tokens of one request as they come.

    Iterating waits for each; `cancel` ends it from any thread. `reason` tells why it has ended: "stop", "length" or
    "cancelled"; it is "" until then.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._hear, request.hear = request.hear, self._take

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            yield token

    @property
    def reason(self) -> str:
        return self.request.reason

    def cancel(self) -> None:
        self.request.cancelled = True

    def close(self) -> None:
        """There are no more tokens; the loop says so."""
        self._tokens.put(None)

    def _take(self, token: int) -> bool:
        self._tokens.put(token)
        return bool(self._hear and self._hear(token))


class Host:
    """A server's engine and the loop that steps it together with the others.

    Args:
        server: index of this server, or of the one whose requests enter here.
    """

    def __init__(self, engine: Engine, server: int) -> None:
        self.engine, self.server = engine, server
        self._bell: Bell = ClusterBell() if jax.process_count() > 1 else OwnBell()
        self._nap = 0
        self._streams: dict[int, Stream] = {}
        self._lock = threading.Lock()

    def submit(self, request: Request) -> Stream:
        """Queue a request, from any thread.

        Raises:
            ModelError: its prompt does not fit the model.
        """
        stream = Stream(request)
        with self._lock:
            self._streams[id(request)] = stream
        try:
            self.engine.submit(request)
        except Exception:
            self._forget(request)
            raise
        self._ring()
        return stream

    def finish(self) -> None:
        """No more requests will come in here; once that is so everywhere, and all are answered, the loop ends."""
        self.engine.done = True
        self._ring()

    def stop(self) -> None:
        """End the loop everywhere after the next step, whatever is running."""
        self.engine.stop = True

    def run(self) -> None:
        """Take steps together with the others until all agree to end."""
        engine = self.engine
        try:
            while not engine.leaving:
                for request in engine.step():
                    request.finished_s = time.monotonic()
                    self._forget(request)
                if engine.asleep and not engine.leaving:
                    self._sleep()
        finally:
            for stream in list(self._streams.values()):
                stream.request.reason = stream.request.reason or "cancelled"
                self._forget(stream.request)

    def _sleep(self) -> None:
        while True:
            if self._wanted():
                self._bell.ring(self._nap)
            if self._bell.wait(self._nap, _NAP_S):
                break
        self._nap += 1
        self.engine.wake()

    def _wanted(self) -> bool:
        """Whether there is something to tell the others."""
        engine = self.engine
        told = bool(engine.heard[engine.own[0], DONE])
        return not engine.idle or engine.stop or (engine.done and not told)

    def _ring(self) -> None:
        if self.engine.asleep:
            self._bell.ring(self._nap)

    def _forget(self, request: Request) -> None:
        with self._lock:
            stream = self._streams.pop(id(request), None)
        if stream:
            stream.close()


@contextmanager
def ending(host: Host) -> Iterator[None]:
    """Inside the block the first SIGINT or SIGTERM ends the loop everywhere, in step; a second one ends this process."""

    def asked(number: int, frame: Any) -> None:
        if host.engine.stop:
            raise KeyboardInterrupt
        host.stop()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_engine(
    path: Path,
    config: ModelConfig,
    cluster: Cluster,
    devices: list[Any],
    *,
    dtype: str = "float32",
    int8: bool = False,
    sequences: int = 8,
    chunk: int = 64,
    placed: Placement | None = None,
) -> Engine:
    """Load this process's share of a model onto its devices. All processes call it with the same arguments.

    Args:
        devices: all devices of the cluster in mesh order.
        placed: what is where; default: planned for users who are all alike.

    Raises:
        InputError: a device has room for no expert, or the placement is for another model or cluster.
        ModelError: the checkpoint cannot be used.
    """
    file = ExpertFile(path, jnp.dtype(dtype), int8)
    itemsize = jnp.dtype(dtype).itemsize
    reserved = reserved_bytes(config, sequences, itemsize)
    expert_bytes = config.expert_bytes(itemsize, int8)
    layout = pool_layout(slots_per_device(cluster, reserved, expert_bytes), cluster.device_server)
    shape = (len(cluster.names), config.num_moe_layers, config.num_experts)
    alike = np.ones(shape, np.int64)
    profile = model_profile(config, cluster, alike, name=path.name, reserved=reserved, itemsize=itemsize)
    profile = dataclasses.replace(profile, expert_bytes=expert_bytes)
    if placed is None:
        placed = placement.plan(profile, cluster, "uniform")
    expected = (len(devices), *shape[1:])
    if placed.resident.shape != expected:
        raise InputError(
            f"placement of {' x '.join(map(str, placed.resident.shape))} devices, layers and experts; {path.name} on "
            f"{cluster.source} has {' x '.join(map(str, expected))}: plan it for this model and cluster"
        )
    placed.validate(cluster, reserved)
    problem = Problem.build(profile, cluster)
    mesh = make_mesh(devices)
    slots = assign_slots(layout, placed.resident)
    serving = serving_server(problem, problem.held(placed.resident))
    tables = routing_tables(layout, slots, serving=serving, likely=likely_links(problem, serving))
    pool = fill_pool(mesh, layout, slots, file.read)
    weights = Weights(place_decoder(file.decoder(), mesh), pool, place_tables(tables, mesh))
    return Engine(config, layout, mesh, weights, cluster.device_server, sequences, chunk)
