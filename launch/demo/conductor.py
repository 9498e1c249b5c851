"""The demo's conductor, in the first process: phases, plans, commands to migrate, and what all servers counted meanwhile.

It runs beside the loop that takes steps and reaches every server, its own included, by the channel alone.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import placement
from launch.demo.figures import Figures, local_ratios
from launch.demo.server import TICK_S, DemoServer
from placement import DecayingCounts, Placement
from placement.files import parse_json

_LOOK_S = 0.25
_ANSWER_S = 120.0  # until a server has answered, a migration included
_WARM_S = 900.0  # until all have compiled, on a busy machine
_FRESH_TOKENS = 4


class DemoEnded(RuntimeError):
    """The demo cannot go on: a server did not do something in time, or a migration failed."""


class DemoStopped(DemoEnded):
    """The servers have been asked to end before the demo was through."""

    def __init__(self) -> None:
        super().__init__("the servers were asked to end")


class Conductor:
    """Leads the phases and hands what was counted to the figures.

    Attributes:
        error: what ended it early, or None.
        finished: whether all phases have been led.
    """

    def __init__(self, server: DemoServer, figures: Figures, length: float, say: Callable) -> None:
        self.server, self.figures, self.length, self.say = server, figures, length, say
        self.error: BaseException | None = None
        self.finished = False
        self._number, self._order = 0, 0
        self._thread = threading.Thread(target=self._lead, name="conductor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def collect(self) -> None:
        """Take in what the servers report after their loops have ended."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        if not self.finished:
            raise DemoStopped
        self.figures.take_rest(self._gather("cut/last"))

    def _lead(self) -> None:
        try:
            self._phases()
            self.finished = True
        except BaseException as error:
            self.error = error
            self.server.host.stop()
            self.server.host.wake()

    def _phases(self) -> None:
        figures, server = self.figures, self.server
        begin = time.monotonic()
        warm = self._gather("warm", _WARM_S)
        self.say(f"compiled and warm after {time.monotonic() - begin + figures.loading_s:.1f} s; serving")
        domains = list(server.workload.domains)
        rate = figures.load(server.workload.rate, [one["full_s"] for one in warm])
        self.zero = figures.zero = time.monotonic()
        cut = self._cut(start=True, rate=rate)
        self.window = DecayingCounts(self.length / 4, _total(cut, "counts"), 0.0)
        self._last_tick = cut
        figures.placed("uniform", 0.0, server.worker.placement, cut)
        cut = self._phase("uniform", domains, cut)
        cut = self._migrate("dance", "before the first migration", domains, cut)
        cut = self._phase("dance", domains, cut, domains[1:] + domains[:1])
        domains = domains[1:] + domains[:1]
        figures.event(self._now(), "workloads trade places")
        self.say("   the servers' workloads trade places")
        cut = self._phase("dance, other workloads", domains, cut)
        cut = self._migrate("dance again", "after the workloads traded places", domains, cut)
        self._phase("dance again", domains, cut)
        self._command_all(finish=True)

    def _now(self) -> float:
        return time.monotonic() - self.zero

    def _phase(self, name: str, domains: list[str], begin: Any, following: list[str] | None = None) -> list[Any]:
        """Let the servers serve for the length of a phase; the cut at its end, with which other workloads may begin."""
        start = self._now()
        self._watch(start + self.length)
        end = self._cut(domains=following) if following else self._cut()
        self._observe(end)
        self.figures.phase(name, self.server.worker.placement, domains, (start, self._now()), begin, end)
        return end

    def _watch(self, until: float) -> None:
        """Observe what the servers report now and then."""
        while (left := until - self._now()) > 0:
            if self.server.ended.wait(min(left, TICK_S)):
                raise DemoStopped
            if left > TICK_S:
                reports = [self._get(f"now/{i}", 0.001) for i in range(jax.process_count())]
                # A server that has reported nothing since is taken as in its last report.
                self._observe(
                    [
                        new if new is not None and new["steps"] >= old["steps"] else old
                        for new, old in zip(reports, self._last_tick, strict=True)
                    ]
                )

    def _observe(self, reports: list[Any]) -> None:
        now = self._now()
        self.window = self.window.observe(_total(reports, "counts"), now)
        local, remote = (_total(reports, name) - _total(self._last_tick, name) for name in ("local", "remote"))
        self.figures.tick(now, local_ratios(self.figures.cluster, local, remote))
        self._last_tick = reports

    def _migrate(self, label: str, activation: str, domains: list[str], before: list[Any]) -> list[Any]:
        """Plan from the window, have all servers move there while they serve; the cut after it."""
        server, counts = self.server, self.window.counts
        loaded, old = server.loaded, server.worker.placement
        begin = time.monotonic()
        self.figures.activated(activation, domains, counts)
        profile = self.figures.profile(counts)
        plan: Placement = placement.plan(profile, loaded.cluster, "dance", previous=old)
        likely = loaded.likely(plan.resident, profile)
        planned = time.monotonic() - begin
        # Some request should be in the middle of its answer when the experts move.
        self._wait_for(lambda: any(len(r.output) <= _FRESH_TOKENS for r in server.host.engine.in_flight))
        self._order, at = server.worker.send(plan, likely, label), self._now()
        server.host.wake()
        cut = self._cut(order=self._order)
        outcomes = [report["outcome"] for report in cut]
        failed = next((o["failed"] for o in outcomes if o["failed"]), None)
        if failed:
            raise DemoEnded(f"the migration to {label!r} failed: {failed}")
        self.figures.migrated(label, at, planned, (old, plan), outcomes, before, cut)
        return cut

    # ---- to and from the servers ----

    def _command_all(self, **what: Any) -> int:
        number, self._number = self._number, self._number + 1
        self.server.host.channel.put(f"demo/command/{number}", json.dumps(what).encode())
        return number

    def _cut(self, **what: Any) -> list[Any]:
        """Have all servers report what they have done so far, at about the same time."""
        return self._gather(f"cut/{self._command_all(**what)}")

    def _gather(self, name: str, seconds: float = _ANSWER_S) -> list[Any]:
        found = []
        for index in range(jax.process_count()):
            deadline = time.monotonic() + seconds
            while (report := self._get(f"{name}/{index}", _LOOK_S)) is None:
                if self.server.ended.is_set() and name != "cut/last":
                    raise DemoStopped
                if time.monotonic() > deadline:
                    raise DemoEnded(f"server {self.figures.cluster.names[index]} has not sent its figures ({name})")
            self.server.host.channel.drop(f"demo/{name}/{index}")
            found.append(report)
        return found

    def _get(self, name: str, seconds: float) -> Any:
        data = self.server.host.channel.get(f"demo/{name}", seconds)
        return None if data is None else parse_json(data, name)

    def _wait_for(self, until: Callable[[], bool]) -> None:
        while not until():
            if self.server.ended.wait(0.001):
                raise DemoStopped


def _total(reports: list[Any], name: str) -> np.ndarray:
    return np.sum([np.asarray(one[name], np.int64) for one in reports], axis=0)
