"""The demo's figures, from what its servers report at the cuts between phases. Holds no engine and no clock."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import placement
from dancemoe_jax.model.config import ModelConfig
from launch.demo.server import FULL, unpacked
from launch.demo.words import plural
from launch.engine.memory import model_profile
from launch.engine.request import Request
from placement import Cluster, Placement, Profile, Workload

CHECKED_PER_PHASE = 24
ITEMSIZE = 4  # float32 throughout
CHUNK = 64  # prompt tokens of one step
LOAD = 0.5  # of what the machine holds
LEAST_RATE = 0.3  # requests a second at each server, so that every phase has some


class Figures:
    """Gathers what `launch.demo.result.demo_result` puts together.

    Args:
        capacity: slots of each device; reserved: bytes of each device for all that is not an expert.
        decode: tokens -> text.
        show: called with the figures of each phase; say: with each line.

    Attributes:
        to_check: requests to compare with the dense model.
        zero: `time.monotonic()` at which the first phase began.
        rate: requests a second at each server.
        holds: requests a second that all servers together can answer; None where it was not measured.
    """

    def __init__(
        self,
        config: ModelConfig,
        cluster: Cluster,
        model_name: str,
        seed: int,
        *,
        capacity: Sequence[int],
        reserved: int,
        uniform: Placement,
        decode: Callable[[list[int]], str],
        show: Callable,
        say: Callable,
        loading_s: float,
    ) -> None:
        self.config, self.cluster, self.model_name, self.seed = config, cluster, model_name, seed
        self.capacity, self.reserved, self.uniform, self.loading_s = capacity, reserved, uniform, loading_s
        self.expert_bytes = config.expert_bytes(ITEMSIZE)
        self._decode, self._show, self._say = decode, show, say
        self.parts: dict[str, list[Any]] = {
            name: []
            for name in (
                "phases",
                "migrations",
                "events",
                "timeline",
                "requests",
                "activation",
                "placements",
                "samples",
            )
        }
        self.zero, self.rate = 0.0, 0.0
        self.holds: float | None = None
        self.to_check: list[Request] = []
        self.within_budget, self.compilations, self.peak_memory = True, 0, 0

    def load(self, given: float, full_s: Sequence[float | None]) -> float:
        """Requests a second at each server: those given, else half of what the machine was seen to answer, 0.3 at least.

        Args:
            given: 0 where nothing was given.
            full_s: of each process, the seconds in which `FULL` requests at every server were answered.
        """
        servers, slowest = len(self.cluster.names), max((s for s in full_s if s), default=0.0)
        self.rate = given
        if not given:
            self.holds = FULL * servers / slowest
            self.rate = max(LOAD * self.holds / servers, LEAST_RATE)
            self._say(f"this machine answers {self.holds:.1f} requests a second; {self.rate:.2f} arrive at each server")
        return self.rate

    def profile(self, counts: np.ndarray) -> Profile:
        return model_profile(
            self.config, self.cluster, counts, name=self.model_name, reserved=self.reserved, itemsize=ITEMSIZE
        )

    def event(self, at: float, label: str) -> None:
        self.parts["events"].append({"at_s": at, "label": label})

    def tick(self, at: float, ratios: dict[str, float | None]) -> None:
        self.parts["timeline"].append({"t_s": at, "local_ratio": ratios})

    def activated(self, label: str, domains: Sequence[str], counts: np.ndarray) -> None:
        rounded = np.rint(counts).astype(int).tolist()
        self.parts["activation"].append({"label": label, "workload": self._workload(domains), "counts": rounded})

    def placed(self, label: str, at: float, plan: Placement, reports: list[Any]) -> None:
        """What is where, and what that takes, as measured on the devices' arrays."""
        resident, budget = _sum(reports, "resident"), self.cluster.memory - self.reserved
        self.within_budget &= bool((resident <= budget).all())
        devices = [
            {
                "server": server,
                "device": device,
                "experts": [np.flatnonzero(row).tolist() for row in layers],
                "resident_bytes": int(held),
                "budget_bytes": int(most),
            }
            for (server, device), layers, held, most in zip(
                self.cluster.device_names, plan.resident, resident, budget, strict=True
            )
        ]
        self.parts["placements"].append({"label": label, "at_s": at, "devices": devices})

    def phase(
        self, name: str, plan: Placement, domains: Sequence[str], times: tuple[float, float], begin: Any, end: Any
    ) -> None:
        """A phase between two cuts."""
        served = self._finished(end)
        latency = [r.finished_s - r.arrival_s for r in served if r.finished_s is not None]
        total = {key: _sum(end, key) - _sum(begin, key) for key in ("counts", "local", "remote", "crossings", "rows")}
        ratios = local_ratios(self.cluster, total["local"], total["remote"])
        crossed = _crossed(end)
        hidden = self.config.hidden_size * ITEMSIZE
        # One way a row carries its weights and slots too, int32 and float32 for each of k assignments.
        row, parcel = 2 * hidden, 8 * self.config.top_k
        tokens = sum(len(r.output) for r in served)
        known = [ratio for ratio in ratios.values() if ratio is not None]
        network = [self._network_seconds(total["counts"], p, served) for p in (plan, self.uniform)]
        figures = {
            "name": name,
            "placement": plan.strategy,
            "workload": self._workload(domains),
            "start_s": times[0],
            "end_s": times[1],
            "requests": len(served),
            "tokens": tokens,
            "steps": len(crossed),
            "local_ratio": ratios,
            "local_ratio_mean": float(np.mean(known)) if known else None,
            "remote_calls": int(total["remote"].sum()),
            "remote_share_uniform": self._remote_share(total["counts"], self.uniform),
            "remote_share": self._remote_share(total["counts"], plan),
            "network_layers": float(np.mean(list(crossed.values()))) if crossed else None,
            "latency_p50_s": float(np.quantile(latency, 0.5)) if latency else None,
            "latency_p95_s": float(np.quantile(latency, 0.95)) if latency else None,
            "network_request_s": network[0],
            "network_request_uniform_s": network[1],
            "tokens_per_s": tokens / (times[1] - times[0]),
            "bytes_exchanged": int(total["rows"].sum()) * (row + parcel),
            "bytes_needed": int(total["crossings"].sum()) * row,
            "counts": total["counts"].tolist(),
        }
        self.parts["phases"].append(figures)
        self._pick(name, domains, served)
        self._show(figures, len(self.parts["phases"]) == 1)

    def migrated(
        self,
        label: str,
        at: float,
        planned: float,
        plans: tuple[Placement, Placement],
        outcomes: list[Any],
        before: list[Any],
        after: list[Any],
    ) -> None:
        """A migration, between the cuts before and after it."""
        old, new = plans
        counts = _sum(before, "counts")
        added, dropped = int((new.resident & ~old.resident).sum()), int((old.resident & ~new.resident).sum())
        m = {
            "at_s": at,
            "phase": len(self.parts["phases"]),
            "from": old.strategy,
            "to": new.strategy,
            "label": label,
            "copies_added": added,
            "copies_dropped": dropped,
            "bytes_moved": sum(o["bytes"] for o in outcomes),
            "plan_s": planned,
            "stage_s": max(o["stage_s"] for o in outcomes),
            "seconds": max(o["seconds"] for o in outcomes),
            "commit_s": max(o["stall_s"] for o in outcomes),
            "requests_in_flight": sum(one["across"] for one in after),
        }
        seen = np.asarray(self.parts["activation"][-1]["counts"]) if self.parts["activation"] else counts
        m |= {f"remote_share_{k}": self._remote_share(seen, p) for k, p in (("before", old), ("after", new))}
        self.parts["migrations"].append(m)
        self.placed(label, at, new, after)
        # What finished meanwhile belongs to no phase's latency, but is checked all the same.
        self.to_check += self._finished(after)
        self._say(
            f"   migration to {label!r} at {at:.1f} s: {added} copies, {m['bytes_moved'] / 1e6:.1f} MB "
            f"in {m['seconds']:.2f} s;\n   planned in {planned:.2f} s, {plural(m['requests_in_flight'], 'request')} running, "
            f"longest stall {1e3 * m['commit_s']:.0f} ms"
        )

    def take_rest(self, reports: list[Any]) -> None:
        """What ended after the last phase, and the totals of all processes."""
        self.to_check += [r for r in self._finished(reports) if len(r.epochs) > 1]
        self.compilations = sum(one["compilations"] for one in reports)
        self.peak_memory = sum(one["peak_memory_bytes"] for one in reports[1:])

    def _workload(self, domains: Sequence[str]) -> dict[str, str]:
        return dict(zip(self.cluster.names, domains, strict=True))

    def _remote_share(self, counts: np.ndarray, plan: Placement) -> float:
        return placement.evaluate(self.profile(counts), self.cluster, plan)["remote_share"]

    def _network_seconds(self, counts: np.ndarray, plan: Placement, served: list[Request]) -> float | None:
        """Seconds that a request of the phase's mean length would wait for the cluster's links, served alone.

        The demo's servers share one machine, so there are no links to measure: this is what `placement.evaluate` makes
        of the phase's calls, the links' latency and their bandwidth.
        """
        if not served:
            return None
        prompt, output = (
            np.mean([len(tokens) for tokens in texts])
            for texts in zip(*((r.prompt, r.output) for r in served), strict=True)
        )
        chunks = -(-prompt // CHUNK)
        work = Workload(prefill_tokens=round(prompt / chunks), decode_steps=round(output), exchange_seconds=0.0)
        costs = placement.evaluate(self.profile(counts), self.cluster, plan, workload=work)
        return float(chunks * costs["prefill_network_seconds"] + output * costs["decode_network_seconds"])

    @property
    def slowest_link(self) -> dict[str, float | None]:
        between = ~np.eye(len(self.cluster.names), dtype=bool)
        return {
            "latency_s": float(self.cluster.latency[between].max()) if between.any() else None,
            "bandwidth_bytes_per_s": float(self.cluster.bandwidth[between].min()) if between.any() else None,
        }

    def _finished(self, reports: list[Any]) -> list[Request]:
        found = [unpacked(r) for one in reports for r in one["finished"]]
        found.sort(key=lambda r: r.finished_s or 0.0)
        self.parts["requests"] += [
            {
                "server": self.cluster.names[r.server],
                "domain": r.label,
                "arrival_s": r.arrival_s - self.zero,
                "finished_s": r.finished_s - self.zero,
                "tokens": len(r.output),
            }
            for r in found
            if r.finished_s is not None
        ]
        return found

    def _pick(self, phase: str, domains: Sequence[str], served: list[Request]) -> None:
        """Requests of the phase to check: some, and all that ran across a migration; one of each server to show."""
        rng = np.random.default_rng([self.seed, len(self.parts["phases"])])
        some = set(rng.permutation(len(served))[:CHECKED_PER_PHASE].tolist())
        self.to_check += [r for i, r in enumerate(served) if i in some or len(r.epochs) > 1]
        for server, name in enumerate(self.cluster.names):
            # Where requests queue, some that finish now arrived before the workloads traded places: they are not shown.
            now = (r for r in reversed(served) if r.server == server and r.label == domains[server] and r.output)
            request = next(now, None)
            if request is not None:
                self.parts["samples"].append(
                    {
                        "phase": phase,
                        "server": name,
                        "domain": request.label,
                        "prompt": self._decode(request.prompt),
                        "output": self._decode(request.output),
                    }
                )


def local_ratios(cluster: Cluster, local: np.ndarray, remote: np.ndarray) -> dict[str, float | None]:
    """Local ratio of each server from [devices, layers] sums; None where nothing was activated."""
    result: dict[str, float | None] = {}
    for index, name in enumerate(cluster.names):
        mine = cluster.device_server == index
        total = local[mine].sum() + remote[mine].sum()
        result[name] = float(local[mine].sum() / total) if total else None
    return result


def _sum(reports: list[Any], name: str) -> np.ndarray:
    return np.sum([np.asarray(one[name], np.int64) for one in reports], axis=0)


def _crossed(reports: list[Any]) -> dict[int, np.ndarray]:
    """By step, bool [layers]: whether a token of any server had to leave it. Processes count the same steps alike."""
    steps: dict[int, np.ndarray] = {}
    for one in reports:
        for step, layers in one["crossed"]:
            mine = np.asarray(layers, bool)
            steps[step] = steps[step] | mine if step in steps else mine
    return steps
