"""What a server has done since it began to serve, for its front door: counts, pace, who served its calls, what it holds.

Everything is this server's own: of its users' tokens, on its devices.
"""

import base64
import dataclasses
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dancemoe_jax.expert_parallel.pool import resident_bytes
from launch.engine.host import Host
from launch.engine.loading import Loaded
from launch.engine.request import Request
from launch.migration.controller import CONTROLLER
from launch.migration.worker import MigrationWorker
from launch.serve.fits import Fits
from launch.serve.pair_traffic import PairTraffic
from placement import InputError, Placement

_PERIOD_S = 1.0
_HOTTEST = 10  # experts that are told by themselves
_GROUPS = 8  # of layers, at most


class Stats:
    """Totals of one program; `between` has to be called between two steps.

    Args:
        worker: of migrations, where experts migrate.
    """

    def __init__(self, host: Host, loaded: Loaded, worker: MigrationWorker | None) -> None:
        self._host, self._loaded, self._worker = host, loaded, worker
        shape = loaded.profile.counts.shape
        self._counts: np.ndarray = np.zeros(shape[1:], np.int64)
        self._calls = np.zeros((shape[1], shape[0]), np.int64)  # by layer and the server that served them
        self._rows, self._crossings, self._layer_steps, self._crossing = 0, 0, 0, 0
        self._taking = threading.Lock()  # a report shows one moment
        self._kinds: dict[str, int] = dict(host.engine.steps)
        self._tokens: dict[str, int] = dict(host.engine.tokens_processed)
        self._due, self._steps = 0.0, -1
        self._recorded: tuple[np.ndarray, float] | None = None
        self._stopped: tuple[np.ndarray, float] | None = None
        self._controller = next((thread for thread in threading.enumerate() if thread.name == CONTROLLER), None)
        self._fits = Fits(*shape[1:])
        self._pairs = PairTraffic(host.server, shape[0], self._serving)
        self._served: tuple[Placement, np.ndarray] | None = None
        if shape[0] > 1:
            host.engine.on_routed = self._routed
        self._before, host.between = host.between, self.between

    def between(self) -> bool:
        """Take the totals if it is time, or if nothing is left to do."""
        now, engine = time.monotonic(), self._host.engine
        steps = sum(engine.steps.values())
        if steps != self._steps and (now >= self._due or engine.asleep):
            self._due, self._steps = now + _PERIOD_S, steps
            with self._taking:
                self._take()
        return self._before()

    def _take(self) -> None:
        counts = self._host.engine.counts()[self._host.server]
        new, self._counts = counts - self._counts, counts
        serving = self._serving()
        for server in range(self._calls.shape[1]):
            self._calls[:, server] += np.where(serving == server, new, 0).sum(1)
        self._kinds, self._tokens = dict(self._host.engine.steps), dict(self._host.engine.tokens_processed)
        counters = self._host.engine.take_counters()
        self._rows += int(counters.rows.sum())
        self._layer_steps += counters.layer_steps
        self._crossing += counters.layer_steps_crossing

    @property
    def placement(self) -> Placement:
        """In force now."""
        return self._worker.placement if self._worker is not None else self._loaded.placement

    def _routed(self, step: Sequence[tuple[Request, np.ndarray]]) -> None:
        self._pairs.add(step)
        self._fits.add(step)

    def _serving(self) -> np.ndarray:
        """Who serves each expert's calls from here now, int [layers, experts]."""
        return self._all_serving()[self._host.server]

    def _all_serving(self) -> np.ndarray:
        """Who serves each expert's calls from each server now, int [servers, layers, experts]."""
        placement = self.placement
        if self._served is None or self._served[0] is not placement:
            self._served = placement, self._loaded.serving(placement.resident)
        return self._served[1]

    def report(self) -> dict[str, Any]:
        """As JSON."""
        with self._taking:
            return self._report()

    def _report(self) -> dict[str, Any]:
        engine, config, names = self._host.engine, self._loaded.engine.config, self._loaded.cluster.names
        groups = np.array_split(np.arange(len(self._calls)), min(_GROUPS, len(self._calls)))
        hottest = np.argsort(self._counts, axis=None)[::-1][:_HOTTEST]
        resident, own = self.placement.resident, self._host.server
        # There in the activations' type, back as a float32 sum.
        row = config.hidden_size * (engine.weights.decoder.embedding[...].dtype.itemsize + 4)
        return {
            "steps": self._kinds,
            "tokens": self._tokens,
            "calls": {name: int(self._calls[:, i].sum()) for i, name in enumerate(names)},
            "groups": [
                {
                    "layers": f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]),
                    "local": int(self._calls[g, own].sum()),
                    "all": int(self._calls[g].sum()),
                }
                for g in groups
            ],
            "rows_sent": self._rows,
            "bytes_exchanged": self._rows * row,
            "pairs": {
                name: {"bytes": int(rows) * row, "exchanges": int(exchanges)}
                for name, rows, exchanges in zip(names, self._pairs.rows, self._pairs.exchanges, strict=True)
            },
            "fits": self._fits.report(self._all_serving(), config.top_k),
            "layer_steps": self._layer_steps,
            "layer_steps_crossing": self._crossing,
            "hottest": [
                [*divmod(int(i), config.num_experts), int(self._counts.flat[i])]
                for i in hottest
                if self._counts.flat[i]
            ],
            "epoch": self._worker.epoch if self._worker is not None else 0,
            "covered": float(resident.any(0).mean()),
            "copies": {name: resident[self._devices(i)].sum((0, 1, 2)).item() for i, name in enumerate(names)},
            "resident_bytes": self._resident_bytes(),
            "cache": self._cache(),
            "migrations": self._migrations(),
            "controller": None if self._controller is None else self._controller.is_alive(),
        }

    def _devices(self, server: int) -> np.ndarray:
        return np.asarray(self._loaded.cluster.device_server) == server

    def _resident_bytes(self) -> dict[str, int]:
        engine = self._host.engine
        found = resident_bytes(engine.weights.pool, engine.mesh)
        own = [int(found[device]) for device in engine.own]
        return {str(number): size for number, size in enumerate(own)}

    def _cache(self) -> dict[str, int]:
        batch = self._host.engine.batch
        pages = list(batch.pages.values())
        return {
            "pages": sum(own.count for own in pages),
            "used": sum(own.used for own in pages),
            "found": sum(own.found for own in pages),
            "preempted": batch.preempted,
        }

    def _migrations(self) -> list[dict[str, Any]]:
        results = self._worker.results if self._worker is not None else []
        return [
            {"failed": r.failed, "seconds": r.seconds, "bytes": r.bytes, "copies": r.moved, "rounds": r.rounds}
            for r in list(results)
        ]

    # ---- what operators ask for ----

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Raises InputError where it cannot be."""
        what = request["what"]
        if what == "placement":
            return {"epoch": self.report()["epoch"], "placement": self.placement.to_dict()}
        if what == "profile":
            return self._profile(request["action"])
        raise InputError(f"{what!r} is unknown")

    def _profile(self, action: str) -> dict[str, Any]:
        now = (self._counts.copy(), time.time())
        if action == "start":
            self._recorded, self._stopped = now, None
            return {"recording": True}
        if self._recorded is None:
            raise InputError("profile: nothing is recorded; start first")
        if action == "stop":
            self._stopped = now
            return {"recording": False}
        end = self._stopped or now
        counts = np.zeros_like(self._loaded.profile.counts)
        counts[self._host.server] = end[0] - self._recorded[0]
        window = {"from": self._recorded[1], "to": end[1]}
        profile = dataclasses.replace(self._loaded.profile, counts=counts, window=window)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "profile.npz"
            profile.save(file)
            return {"npz": base64.b64encode(file.read_bytes()).decode()}
