"""One server of the shift experiment: the real serving loop on real links and the wall clock, with routing from a trace.

    python -m launch.bench.harness.shift_server JOB.json SERVER COORDINATOR

Started by `launch.bench.shift`, once for each server. Prints one line of JSON for each run of the job. Experts are too
small to matter, but reading one while serving takes as long as reading one of the traced model.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dancemoe_jax import fill_pool, make_mesh, place_decoder
from dancemoe_jax.checkpoint.arena import Arena
from dancemoe_jax.expert_parallel.pool import pool_layout
from dancemoe_jax.expert_parallel.tables import assign_slots
from dancemoe_jax.inference.steps import Weights
from dancemoe_jax.model.experts import ExpertWeights
from launch.bench.harness.replay_server import VOCABULARY, WIRE, replay_config, small_decoder, small_expert
from launch.bench.harness.trace import ReplayRequest, Trace
from launch.cluster.join import join
from launch.engine.engine import Engine
from launch.engine.host import Host
from launch.engine.loading import Loaded
from launch.engine.request import Request
from launch.migration.journal import DECISIONS
from launch.serve.attach_migration import Start, migrating
from placement import Cluster, Placement, Profile
from placement.data.arrivals import Arrivals
from placement.files import read_json, read_json_lines
from placement.migration.adapt import fitted
from placement.migration.decide import Policy

_WAIT_S = 300.0  # for the others, once this server is ready
_HEAD_START_S = 1.0  # from everybody ready to the first second of a run


class Storage:
    """Reads experts as slowly as the traced model's are read from a server's storage, however many threads ask."""

    def __init__(self, read: Callable[..., ExpertWeights], seconds_each: float) -> None:
        self._read, self._each = read, seconds_each
        self._lock, self._free = threading.Lock(), 0.0

    def __call__(self, layer: int, expert: int, arena: Arena | None = None) -> ExpertWeights:
        with self._lock:
            self._free = max(self._free, time.monotonic()) + self._each
            until = self._free
        weights = self._read(layer, expert, arena)
        time.sleep(max(0.0, until - time.monotonic()))
        return weights


def shifted(trace: Trace, arrivals: Arrivals, at_s: float) -> list[ReplayRequest]:
    """Requests of a trace's later halves: until `at_s` of each server's own domain, from then on of the next one's."""
    count = len(trace.domains)
    domain = np.where(arrivals.seconds < at_s, arrivals.server, (arrivals.server + 1) % count)
    requests = trace.requests(dataclasses.replace(arrivals, server=domain))
    return [
        dataclasses.replace(request, server=int(server))
        for request, server in zip(requests, arrivals.server, strict=True)
    ]


@dataclasses.dataclass(eq=False)
class Served:
    """A request on its way, with the times of its tokens."""

    request: Request
    arrival_s: float
    tokens_s: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, replayed: ReplayRequest, start_s: float) -> "Served":
        """Made from a trace's request, for a run that starts at `start_s` of the machine's clock."""
        prompt = [(7 * position) % VOCABULARY for position in range(replayed.prompt)]
        request = Request(
            replayed.server,
            prompt,
            replayed.output,
            start_s + replayed.arrival_s,
            label=replayed.label,
            routed=(replayed.ids, replayed.weights),
        )
        served = cls(request, replayed.arrival_s)
        request.on_token = served._on_token
        return served

    def _on_token(self, token: int) -> bool:
        self.tokens_s.append(time.monotonic())
        return False

    def figures(self) -> list[float]:
        """Server, arrival, latency, and the longest wait between two tokens; seconds."""
        assert self.request.finished_s is not None
        gaps = np.diff(self.tokens_s)
        latency = self.request.finished_s - self.request.arrival_s
        return [self.request.server, self.arrival_s, latency, float(gaps.max(initial=0.0))]


class Server:
    """This process's part of the experiment."""

    def __init__(self, job: dict[str, Any], name: str, devices: list[Any]) -> None:
        self.job, self.cluster = job, Cluster.from_dict(job["cluster"], source="testbed")
        self.index = self.cluster.names.index(name)
        self.trace, self.mesh = Trace.load(job["trace"]), make_mesh(devices)
        self.config = replay_config(self.trace, job["hidden_size"])
        self.layout = pool_layout(job["slots"], self.cluster.device_server)
        self.plans = dict(np.load(job["plans"], allow_pickle=False))
        shape = (len(self.cluster.names), self.config.num_moe_layers, self.config.num_experts)
        self.profile = Profile(
            np.ones(shape, np.int64),
            self.cluster.names,
            model=self.trace.model,
            top_k=self.config.top_k,
            hidden_size=job["hidden_size"],
            expert_bytes=job["expert_bytes"],
        )
        arrivals = Arrivals(*(np.array(column) for column in job["arrivals"]))
        self.requests = [r for r in shifted(self.trace, arrivals, job["shift_s"]) if r.server == self.index]

    def _read(self, layer: int, expert: int) -> ExpertWeights:
        return small_expert(self.config, layer, expert)

    def _load(self) -> Loaded:
        """The model as planned, with nothing served yet."""
        strategy = self.job["strategy"]
        resident, likely = self.plans[f"resident_{strategy}"], self.plans[f"likely_{strategy}"]
        model = {
            "name": self.trace.model,
            "layers": resident.shape[1],
            "experts": resident.shape[2],
            "top_k": self.config.top_k,
            "expert_bytes": self.profile.expert_bytes,
            "reserved_bytes": 0,
        }
        placed = fitted(Placement(resident, self.cluster.device_names, strategy, model), self.profile, self.cluster)
        slots = assign_slots(self.layout, resident)
        pool = fill_pool(self.mesh, self.layout, slots, self._read)
        decoder = place_decoder(small_decoder(self.config), self.mesh)
        weights = Weights(decoder, pool, None)  # pyright: ignore[reportArgumentType]
        engine = Engine(
            self.config,
            self.layout,
            self.mesh,
            weights,
            self.cluster.device_server,
            self.job["sequences"],
            self.job["chunk"],
            replays=True,
            wire_dtype=WIRE,
        )
        rate = self.cluster.load_bandwidth[self.cluster.device_server == self.index].sum()
        storage = Storage(self._read, self.job["expert_bytes"] / rate)
        loaded = Loaded(engine, self.cluster, placed, slots, self.profile, storage)
        engine.weights = weights._replace(tables=loaded.tables(slots, likely))
        return loaded

    def serve(self, number: int, run: dict[str, Any]) -> dict[str, Any]:
        """One run: figures of this server's requests, and of its devices' assignments by window of time."""
        loaded = self._load()
        host = Host(loaded.engine, self.index, f"run{number}/")
        feeder = Feeder(host, self, f"run{number}", run["until"])
        with contextlib.ExitStack() as stack:
            state = None
            if run["policy"]:
                if self.index == 0:
                    state = Path(stack.enter_context(_folder()))
                stack.enter_context(migrating(host, loaded, Policy(**run["policy"]), state, Start()))
            feeder.watch(self.job["window_s"])
            thread = threading.Thread(target=feeder.feed, daemon=True)
            thread.start()
            host.run()
            thread.join()
            if not feeder.served_all:
                raise RuntimeError(f"run {number + 1} ended before all requests were served")
            decisions = _decisions(state, feeder.start_s)
        return {
            "requests": [served.figures() for served in feeder.served],
            "windows": [[window, *counts] for window, counts in sorted(feeder.windows.items())],
            "decisions": decisions,
            "steps": dict(loaded.engine.steps),
        }


class Feeder:
    """Requests to a host at the times when they arrive, and what its devices do meanwhile.

    Attributes:
        start_s: the run's first second on the machine's clock, which all servers share; inf before.
        windows: local and remote assignments by window.
        served_all: whether all requests have been submitted.
    """

    def __init__(self, host: Host, server: Server, name: str, until_s: float) -> None:
        self.host, self.server, self.name = host, server, name
        self.requests = [request for request in server.requests if request.arrival_s < until_s]
        self.start_s, self.served = float("inf"), list[Served]()
        self.windows: dict[int, list[int]] = {}
        self.served_all = False

    def watch(self, window_s: float) -> None:
        """Count assignments by window from now on."""
        before, engine = self.host.between, self.host.engine

        def between() -> bool:
            counters, now = engine.take_counters(), time.monotonic() - self.start_s
            if now >= 0 and counters.steps:
                counts = self.windows.setdefault(int(now // window_s), [0, 0])
                counts[0] += int(counters.local.sum())
                counts[1] += int(counters.remote.sum())
            return before()

        self.host.between = between

    def feed(self) -> None:
        """Serve all requests; the loop ends once all servers have."""
        try:
            self._warm()
            self.start_s = self._agree()
            for replayed in self.requests:
                time.sleep(max(0.0, self.start_s + replayed.arrival_s - time.monotonic()))
                served = Served.of(replayed, self.start_s)
                self.served.append(served)
                self.host.submit(served.request)
        except BaseException:
            self.host.stop()
            raise
        self.served_all = True
        self.host.finish()

    def _warm(self) -> None:
        """One request of another half of the trace, after which all kinds of steps have been compiled."""
        trace, index = self.server.trace, self.server.index
        one = Arrivals(np.zeros(1), np.array([index]), np.ones(1, np.int64), np.ones(1, np.int64))
        served = Served.of(trace.requests(one, later=False)[0], time.monotonic())
        for _ in self.host.submit(served.request):
            pass

    def _agree(self) -> float:
        """When the run starts, on the machine's clock; the first server decides it once all are ready."""
        channel, names = self.host.channel, self.server.cluster.names
        channel.put(f"{self.name}/ready/{self.server.index}", b"ready")
        if self.server.index == 0:
            for index in range(len(names)):
                if channel.get(f"{self.name}/ready/{index}", _WAIT_S) is None:
                    raise RuntimeError(f"server {names[index]} is not ready within {_WAIT_S:g} s")
            channel.put(f"{self.name}/start", repr(time.monotonic() + _HEAD_START_S).encode())
        start = channel.get(f"{self.name}/start", _WAIT_S)
        if start is None:
            raise RuntimeError(f"server {names[0]} has not started the run within {_WAIT_S:g} s")
        return float(start)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="shift-", ignore_cleanup_errors=True) as folder:
        yield folder


def _decisions(state: Path | None, start_s: float) -> list[dict[str, Any]]:
    """What the controller decided, with times from the start of the run."""
    if state is None or not (state / DECISIONS).exists():
        return []
    offset = time.time() - time.monotonic() + start_s
    return [{**found, "at": found["at"] - offset} for _, found in read_json_lines(state / DECISIONS)]


def main(path: str, name: str, coordinator: str) -> None:
    job = read_json(path)
    cluster = Cluster.from_dict(job["cluster"], source="testbed")
    with join(cluster, name, coordinator=coordinator, timeout=120) as devices:
        server = Server(job, name, devices)
        for number, run in enumerate(job["runs"]):
            print(json.dumps({"run": number, **server.serve(number, run)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
