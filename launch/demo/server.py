"""One server's part of the demo: its users' requests in real time, and reports of what it has counted.

The same whether a process holds one server or all of them. Commands come over the channel, numbered, from the
conductor (`launch.demo.conductor`), which runs in the first process; reports go back over it.
"""

import dataclasses
import json
import resource
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dancemoe_jax.expert_parallel.pool import resident_bytes
from launch.cluster.channel import Channel
from launch.demo.arrivals import PoissonWorkload
from launch.demo.checks import CompilationCounter
from launch.engine.host import Host
from launch.engine.loading import Loaded
from launch.engine.request import Request
from launch.migration.worker import MigrationWorker
from placement.files import parse_json

TICK_S = 1.0
FULL = 8  # requests at each server with which the demo measures what its machine holds
_LOOK_S = 0.5  # how often a thread that waits looks whether all is over
_OUTCOME_S = 60.0
_TRAFFIC = ("local", "remote", "crossings", "rows")


class DemoServer:
    """Serves the arrivals of this process's servers and counts what they do.

    `between` has to be called between two steps, by the thread that takes them.

    Args:
        servers: indices of the servers whose requests enter here.
        workload: arrivals at all servers; every process draws the same ones.
    """

    def __init__(
        self, host: Host, loaded: Loaded, worker: MigrationWorker, servers: Sequence[int], workload: PoissonWorkload
    ) -> None:
        self.host, self.loaded, self.worker, self.servers, self.workload = host, loaded, worker, servers, workload
        self.ended = threading.Event()
        engine = host.engine
        shape = (len(engine.device_server), engine.config.num_moe_layers)
        self._sums = {name: np.zeros(shape, np.int64) for name in _TRAFFIC}
        self._crossed: list[tuple[int, list[int]]] = []
        self._epoch, self._across = engine.epoch, set[int]()
        self._submitted: list[Request] = []
        self._lock = threading.Lock()
        self._cuts: list[tuple[int, int]] = []
        self._tick_at, self._news = float("inf"), threading.Event()
        self._reports: dict[str, dict[str, Any]] = {}
        self._compilations = CompilationCounter()
        self._arriving = threading.Event()

    def start(self, prompt: list[int]) -> None:
        """Have both steps compiled by answers to a prompt, then listen to the conductor."""
        for job, *given in ((self._follow, prompt), (self._report,)):
            threading.Thread(target=job, args=given, name=f"demo {job.__name__}", daemon=True).start()

    def end(self) -> None:
        self.ended.set()
        self._news.set()

    # ---- the thread that takes steps ----

    def between(self) -> bool:
        """Migrate what is due, then take down what the last step did."""
        more = self.worker.between()
        engine = self.host.engine
        if engine.epoch != self._epoch:
            self._epoch = engine.epoch
            self._across |= {id(request) for request in engine.in_flight}
        counters = engine.take_counters()
        if counters.steps:
            for name, total in self._sums.items():
                total += getattr(counters, name)
            self._crossed.append((sum(engine.steps.values()), (counters.crossings.sum(0) > 0).astype(int).tolist()))
        # A cut comes after the change of tables at the same boundary, so no phase mixes two placements.
        while self._cuts:
            number, order = self._cuts.pop(0)
            self._put(f"cut/{number}", self._cut(order))
        now = time.monotonic()
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            self._put("now", self._totals())
        return more

    def last(self, channel: Channel) -> None:
        """Report the rest, after the loop has ended."""
        self._send(channel, "cut/last", self._cut(0))

    def _totals(self) -> dict[str, Any]:
        sums = {name: total.tolist() for name, total in self._sums.items()}
        return {"counts": self.host.engine.counts().tolist(), **sums, "steps": sum(self.host.engine.steps.values())}

    def _cut(self, order: int) -> dict[str, Any]:
        """Totals, and what has happened since the last cut."""
        with self._lock:
            finished = [request for request in self._submitted if request.reason]
            self._submitted = [request for request in self._submitted if not request.reason]
        crossed, self._crossed = self._crossed, []
        report = self._totals() | {
            "crossed": crossed,
            "finished": [_packed(request) for request in finished],
            "across": len(self._across),
            "resident": resident_bytes(self.host.engine.weights.pool, self.host.engine.mesh).tolist(),
            "compilations": self._compilations.count,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        self._across = set()
        if order:
            outcome = self.worker.results[order - 1]
            report["outcome"] = {
                "failed": outcome.failed,
                "moved": outcome.moved,
                "bytes": outcome.bytes,
                "stage_s": outcome.stage_s,
                "seconds": outcome.seconds,
                "stall_s": max(outcome.stalls_s, default=0.0),
            }
        return report

    def _put(self, name: str, report: dict[str, Any]) -> None:
        with self._lock:
            self._reports[name] = report
        self._news.set()

    # ---- threads beside it ----

    def _report(self) -> None:
        while not self.ended.is_set():
            self._news.wait()
            self._news.clear()
            with self._lock:
                reports, self._reports = self._reports, {}
            for name, report in reports.items():
                self._send(self.host.channel, name, report)

    def _send(self, channel: Channel, name: str, report: dict[str, Any]) -> None:
        channel.put(f"demo/{name}/{jax.process_index()}", json.dumps(report).encode())

    def _follow(self, prompt: list[int]) -> None:
        for stream in [self.host.submit(Request(s, prompt, 2, time.monotonic())) for s in self.servers]:
            for _ in stream:
                pass
        full_s = None if self.workload.rate else self._full_seconds()
        self._send(self.host.channel, "warm", {"full_s": full_s})
        number = 0
        while not self.ended.is_set():
            data = self.host.channel.get(f"demo/command/{number}", _LOOK_S)
            if data is None:
                continue
            self._obey(number, parse_json(data, "command"))
            number += 1

    def _full_seconds(self) -> float:
        """Seconds in which `FULL` requests that come at once at every server are answered: what this machine holds."""
        begin, workload = time.monotonic(), self.workload
        tokens = sum(workload.output_tokens) // 2
        prompts = [(s, prompt) for s in self.servers for prompt in workload.prompts[workload.domains[s]][:FULL]]
        for stream in [self.host.submit(Request(s, prompt, tokens, begin)) for s, prompt in prompts]:
            for _ in stream:
                pass
        return time.monotonic() - begin

    def _obey(self, number: int, command: dict[str, Any]) -> None:
        if command.get("order"):
            self.worker.wait(command["order"], _OUTCOME_S)
        if command.get("start"):
            self._compilations.start()
            self.workload = dataclasses.replace(self.workload, rate=command["rate"])
            self._tick_at = time.monotonic() + TICK_S
            self._arriving.set()
            threading.Thread(target=self._arrive, name="arrivals", daemon=True).start()
        if command.get("domains"):
            self.workload.domains = command["domains"]
        if command.get("finish"):
            self._arriving.clear()
            self.host.finish()
        else:
            self._cuts.append((number, command.get("order", 0)))

    def _arrive(self) -> None:
        """Submit this process's arrivals when they are due."""
        zero = time.monotonic()
        while self._arriving.is_set() and not self.ended.is_set():
            for request in self.workload.due(time.monotonic() - zero):
                if request.server in self.servers:
                    request.arrival_s += zero
                    with self._lock:
                        self._submitted.append(request)
                    self.host.submit(request)
            time.sleep(min(max(self.workload.next_s - (time.monotonic() - zero), 0.0005), 0.02))


def _packed(request: Request) -> dict[str, Any]:
    """A request as it travels; `unpacked` reads it."""
    return {
        "server": request.server,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "label": request.label,
        "arrival_s": request.arrival_s,
        "output": request.output,
        "finished_s": request.finished_s,
        "epochs": sorted(request.epochs),
    }


def unpacked(packed: dict[str, Any]) -> Request:
    return Request(**{**packed, "epochs": set(packed["epochs"])})
