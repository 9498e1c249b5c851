"""`python -m launch demo`: unequal servers, real text, placement from observed routing, migration while serving.

Four phases on one running cluster: a uniform placement; the `dance` plan made from what phase one activated; the same
placement after the servers' workloads traded places; the plan made from a window that has forgotten the old workloads.
Both migrations happen under load. Every figure is measured; sampled requests are checked token by token.
"""

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import placement
from dancemoe_jax.checkpoint import bundled_model, load_model
from dancemoe_jax.config import ModelConfig
from dancemoe_jax.experts import ExpertWeights
from dancemoe_jax.generate import Weights, place_decoder, place_tables
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.migrate import commit, rewrite, stage
from dancemoe_jax.pool import fill_pool, pool_layout, resident_bytes
from dancemoe_jax.tables import assign_slots, routing_tables
from launch import report
from launch.cluster import cluster_devices, demo_cluster, model_profile, reserved_bytes, slots_per_device
from launch.corpus import DOMAINS, load_domains, prompts
from launch.engine import Engine, Request, Tally
from launch.reference import CompilationCounter, check_requests
from launch.tables import phase_table, summary_lines
from launch.workload import PoissonWorkload
from placement import Cluster, InputError
from placement.cost import serving_server
from placement.files import write_bytes

SEQUENCES, CHUNK = 8, 64
PROMPT_TOKENS, OUTPUT_TOKENS = 96, (24, 64)
TICK_S = 1.0
CHECKED_PER_PHASE = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster.toml (default: three servers of its own)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory (default: the bundled model)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, prompts and lengths (default: 0)")
    parser.add_argument(
        "--phase-seconds", type=float, default=12.0, metavar="S", help="length of each phase (default: 12)"
    )
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second at each server (default: 1.5)")
    parser.add_argument("--report", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 where a check fails."""
    started = time.monotonic()
    if arguments.phase_seconds < 1 or arguments.rate <= 0 or arguments.seed < 0:
        raise InputError("--phase-seconds must be at least 1, --rate above 0 and --seed not negative")
    for flag, path in (("--report", arguments.report), ("--json", arguments.json)):
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise InputError(f"{flag} {path}: cannot be written there; name a file in a directory that exists")
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    console.print("DanceMoE demo: four phases of serving and two live migrations, about a minute and a half on 2 cores")
    demo = Demo(arguments, console)
    result = demo.run()
    result["wall_s"] = time.monotonic() - started
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report.write(result, arguments.report)
    if arguments.json:
        write_bytes(arguments.json, json.dumps(result, indent=1).encode())
    for line in summary_lines(result, arguments.report):
        console.print(line, markup=False, soft_wrap=True)
    return 0 if demo.passed(result) else 1


@dataclasses.dataclass
class Phase:
    """What is being measured of the phase under way."""

    name: str
    placement: str
    workload: dict[str, str]
    start_s: float
    counts_before: np.ndarray
    tallies: list[Tally] = dataclasses.field(default_factory=list)
    finished: list[Request] = dataclasses.field(default_factory=list)


class Demo:
    """One cluster, one model, one clock."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self.arguments, self.console, self.seed = arguments, console, arguments.seed
        path = arguments.model or bundled_model()
        self.config, self.model_name = ModelConfig.from_hf(path), path.name
        config = self.config
        self.itemsize = 4  # float32 throughout
        self.expert_bytes = config.expert_bytes(self.itemsize)
        self.reserved = reserved_bytes(config, SEQUENCES, self.itemsize)
        self.cluster = (
            Cluster.from_toml(arguments.cluster) if arguments.cluster else demo_cluster(config, self.reserved)
        )
        nothing = np.zeros((len(self.cluster.names), config.num_moe_layers, config.num_experts), np.int64)
        # Planned before anything is put on a device: a cluster that cannot hold one copy is refused here.
        self.placement = placement.plan(self._profile(nothing), self.cluster, "uniform")
        self.uniform = self.placement
        self.problem = placement.Problem.build(self._profile(nothing), self.cluster)
        slots = slots_per_device(self.cluster, self.reserved, self.expert_bytes)
        self.mesh = make_mesh(cluster_devices(len(slots)))
        self.model = load_model(path)
        self.prompts = self._encode_prompts()
        self.layout = pool_layout(slots, self.cluster.device_server)
        self.slots = assign_slots(self.layout, self.placement.resident)
        pool = fill_pool(self.mesh, self.layout, self.slots, self._read)
        weights = Weights(place_decoder(self.model.decoder, self.mesh), pool, self._tables(self.slots))
        server = self.cluster.device_server
        self.engine = Engine(config, self.layout, self.mesh, weights, server, SEQUENCES, CHUNK)
        self.compilations = CompilationCounter()
        self.phases: list[dict[str, Any]] = []
        self.migrations: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.timeline: list[dict[str, Any]] = []
        self.activation: list[dict[str, Any]] = []
        self.placements: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.to_check: list[Request] = []
        self.within_budget = True

    def run(self) -> dict[str, Any]:
        """All phases, then the checks; the figures, as report.render takes them."""
        self._describe()
        self._warm_up()
        names = self.cluster.names
        domains = [DOMAINS[i % len(DOMAINS)] for i in range(len(names))]
        length = self.arguments.phase_seconds
        self.workload = PoissonWorkload(self.prompts, domains, self.arguments.rate, OUTPUT_TOKENS, self.seed)
        self.zero = time.monotonic()
        self.window = placement.DecayingCounts(length / 4, self.engine.counts(), 0.0)
        self._record_placement("uniform")
        self.compilations.start()
        self._phase("uniform", length)
        self._migrate("dance", "before the first migration")
        self._phase("dance", length)
        self.workload.domains = domains[1:] + domains[:1]
        self.events.append({"at_s": self._now(), "label": "workloads trade places"})
        self._say("   the servers' workloads trade places")
        self._phase("dance, other workloads", length)
        self._migrate("dance again", "after the workloads traded places")
        self._phase("dance again", length)
        self._drain()
        compiled = self.compilations.stop()
        self._say(f"checking {len(self.to_check)} requests against the dense model on one device …")
        checks = check_requests(self.model, self.to_check)
        checks |= {"compilations_after_warmup": compiled, "within_budget": self.within_budget}
        return self._result(checks)

    def passed(self, result: dict[str, Any]) -> bool:
        """Whether every check holds; says which does not."""
        checks = result["checks"]
        failed = []
        if checks["mismatches"]:
            failed.append(
                f"{checks['mismatches']} requests differ from the dense reference: {checks['first_mismatch']}"
            )
        if checks["compilations_after_warmup"]:
            failed.append(f"{checks['compilations_after_warmup']} compilations while serving")
        if not checks["within_budget"]:
            failed.append("a device holds more expert bytes than its budget")
        for line in failed:
            print(f"launch demo: FAILED: {line}", file=sys.stderr)
        return not failed

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def _now(self) -> float:
        return time.monotonic() - self.zero

    def _read(self, layer: int, expert: int) -> ExpertWeights:
        return jax.tree.map(lambda a: a[layer, expert], self.model.experts)

    def _profile(self, counts: np.ndarray) -> placement.Profile:
        return model_profile(
            self.config, self.cluster, counts, name=self.model_name, reserved=self.reserved, itemsize=self.itemsize
        )

    def _tables(self, slots: np.ndarray):
        # Which copy serves a remote call is the planner's rule, the one that its costs are counted by.
        serving = serving_server(self.problem, self.problem.held(slots >= 0))
        return place_tables(routing_tables(self.layout, slots, serving=serving), self.mesh)

    def _encode_prompts(self) -> dict[str, list[list[int]]]:
        length = min(PROMPT_TOKENS, self.config.max_position - OUTPUT_TOKENS[1])
        if length < PROMPT_TOKENS // 2:
            raise InputError(
                f"{self.model_name}: a context of {self.config.max_position} tokens is too short for the demo's prompts; "
                f"{PROMPT_TOKENS + OUTPUT_TOKENS[1]} are enough"
            )
        texts = {name: prompts(domain, 64, length, self.seed) for name, domain in load_domains(train=False).items()}
        return {name: [self.model.tokenizer.encode(text.decode()).ids for text in some] for name, some in texts.items()}

    def _describe(self) -> None:
        config, total = self.config, self.config.num_moe_layers * self.config.num_experts
        parameters = config.other_params + total * config.expert_params
        self._say(
            f"model {self.model_name}: {parameters / 1e6:.1f} M parameters, {config.num_moe_layers} layers x "
            f"{config.num_experts} experts, top-{config.top_k}; {total} experts of {self.expert_bytes / 1e3:.0f} kB"
        )
        for index, (server, device) in enumerate(self.cluster.device_names):
            slots = self.layout.capacity[index]
            self._say(
                f"  {server} device {device}: {self.cluster.memory[index] / 1e6:.1f} MB, {self.reserved / 1e6:.1f} MB "
                f"reserved, {slots} experts fit ({100 * slots / total:.0f} % of all)"
            )
        self._say(f"  together {sum(self.layout.capacity) / total:.2f} copies of all experts")

    def _warm_up(self) -> None:
        """Compile everything that serving and migrating run: both steps, and a write into every bank."""
        start = time.monotonic()
        first = next(iter(self.prompts.values()))[0]
        for server in range(len(self.cluster.names)):
            self.engine.submit(Request(server, first, 2, 0.0))
        while not self.engine.idle:
            self.engine.step()
        engine = self.engine
        unchanged = rewrite(self.layout, self.mesh, self.slots, self._read)
        pool = commit(engine.weights.pool, self.layout, self.mesh, unchanged)
        engine.adopt(engine.weights._replace(pool=pool))
        engine.take_tally()
        self._say(f"compiled and warm after {time.monotonic() - start:.1f} s; serving")

    def _serve(self, phase: Phase, until) -> None:
        """Serve arrivals until `until()` says so, taking statistics every tick."""
        next_tick = self._now() + TICK_S
        while not until():
            now = self._now()
            for request in self.workload.due(now):
                self.engine.submit(request)
            if self.engine.idle:
                time.sleep(min(max(self.workload.next_s - now, 0.0), 0.005))
            for request in self.engine.step():
                request.finished_s = self._now()
                phase.finished.append(request)
            if now >= next_tick:
                self._tick(phase)
                next_tick += TICK_S

    def _tick(self, phase: Phase) -> None:
        tally, now = self.engine.take_tally(), self._now()
        phase.tallies.append(tally)
        self.window = self.window.observe(self.engine.counts(), now)
        self.timeline.append({"t_s": now, "local_ratio": _by_server(self.cluster, tally.local, tally.remote)})

    def _phase(self, name: str, length: float) -> None:
        workload = dict(zip(self.cluster.names, self.workload.domains, strict=True))
        phase = Phase(name, self.placement.strategy, workload, self._now(), self.engine.counts())
        end = phase.start_s + length
        self._serve(phase, lambda: self._now() >= end)
        self._tick(phase)
        self._close(phase)

    def _close(self, phase: Phase) -> None:
        served = phase.finished
        latency = [r.finished_s - r.arrival_s for r in served if r.finished_s is not None]
        total = {
            name: sum(getattr(t, name) for t in phase.tallies) for name in ("local", "remote", "crossings", "rows")
        }
        asked, crossed = (sum(getattr(t, name) for t in phase.tallies) for name in ("asked", "crossed"))
        ratios = _by_server(self.cluster, np.asarray(total["local"]), np.asarray(total["remote"]))
        seconds = self._now() - phase.start_s
        hidden = self.config.hidden_size * self.itemsize
        # One way a row carries its weights and slots too, int32 and float32 for each of k assignments.
        row, parcel = 2 * hidden, 8 * self.config.top_k
        tokens = sum(len(r.output) for r in served)
        known = [ratio for ratio in ratios.values() if ratio is not None]
        counts = self.engine.counts() - phase.counts_before
        self.phases.append({
            "name": phase.name, "placement": phase.placement, "workload": phase.workload, "start_s": phase.start_s,
            "end_s": self._now(), "requests": len(served), "tokens": tokens, "steps": sum(t.steps for t in phase.tallies),
            "local_ratio": ratios, "local_ratio_mean": float(np.mean(known)) if known else None,
            "remote_calls": int(np.sum(total["remote"])),
            "remote_share_uniform": self._remote_share(counts, self.uniform),
            "remote_share": self._remote_share(counts, self.placement),
            "network_layers": crossed / asked if asked else None,
            "latency_p50_s": float(np.quantile(latency, 0.5)) if latency else None,
            "latency_p95_s": float(np.quantile(latency, 0.95)) if latency else None,
            "tokens_per_s": tokens / seconds,
            "bytes_exchanged": int(np.sum(total["rows"])) * (row + parcel),
            "bytes_needed": int(np.sum(total["crossings"])) * row,
            "counts": counts.tolist(),
        })  # fmt: skip
        self._pick(phase)
        self.console.print(phase_table(self.phases[-1:], header=len(self.phases) == 1))

    def _pick(self, phase: Phase) -> None:
        """Some requests of the phase to check, and one of each server to show."""
        rng = np.random.default_rng([self.seed, len(self.phases)])
        some = rng.permutation(len(phase.finished))[:CHECKED_PER_PHASE]
        self.to_check += [phase.finished[i] for i in some if phase.finished[i] not in self.to_check]
        for server, name in enumerate(self.cluster.names):
            request = next((r for r in reversed(phase.finished) if r.server == server and r.output), None)
            if request is not None:
                decode = self.model.tokenizer.decode
                self.samples.append({"phase": phase.name, "server": name, "domain": request.label,
                                     "prompt": decode(request.prompt), "output": decode(request.output)})  # fmt: skip

    def _remote_share(self, counts: np.ndarray, plan: placement.Placement) -> float:
        return placement.evaluate(self._profile(counts), self.cluster, plan)["remote_share"]

    def _migrate(self, label: str, activation: str) -> None:
        """Plan from the window, stage while serving, commit between two steps of whatever is running."""
        engine, before = self.engine, self.placement
        phase = Phase("", "", {}, self._now(), engine.counts())
        counts = self.window.counts
        workload = dict(zip(self.cluster.names, self.workload.domains, strict=True))
        self.activation.append(
            {"label": activation, "workload": workload, "counts": np.rint(counts).astype(int).tolist()}
        )
        clock = time.monotonic()
        with ThreadPoolExecutor(1) as worker:

            def prepare():
                plan = placement.plan(self._profile(counts), self.cluster, "dance", previous=before)
                return plan, stage(self.layout, self.mesh, self.slots, plan.resident, self._read)

            job = worker.submit(prepare)
            self._serve(phase, job.done)
            plan, staged = job.result()
        ready = time.monotonic()
        # There is always somebody in the middle of an answer when the experts move.
        self._serve(phase, lambda: bool(engine.in_flight))
        running, now, at = engine.in_flight, time.monotonic(), self._now()
        pool = commit(engine.weights.pool, self.layout, self.mesh, staged)
        engine.adopt(engine.weights._replace(pool=pool, tables=self._tables(staged.slots)))
        jax.block_until_ready(engine.weights.pool)
        done = time.monotonic()
        self.to_check += [request for request in running if request not in self.to_check]
        added, dropped = staged.slots >= 0, self.slots >= 0
        self.migrations.append({
            "at_s": at, "phase": len(self.phases), "from": before.strategy, "to": plan.strategy, "label": label,
            "copies_added": int((added & ~dropped).sum()), "copies_dropped": int((dropped & ~added).sum()),
            "bytes_moved": staged.nbytes, "stage_s": ready - clock, "commit_s": done - now,
            "requests_in_flight": len(running),
            "remote_share_before": self._remote_share(counts, before), "remote_share_after": self._remote_share(counts, plan),
        })  # fmt: skip
        self.placement, self.slots = plan, staged.slots
        self._record_placement(label)
        m = self.migrations[-1]
        self._say(
            f"   migration to {label!r} at {at:.1f} s: {m['copies_added']} copies moved in, {m['bytes_moved'] / 1e6:.1f} MB; "
            f"planned and staged in {m['stage_s']:.2f} s while serving, committed in {m['commit_s'] * 1e3:.0f} ms between "
            f"two steps of {len(running)} running requests"
        )
        # What finished while the plan was staged belongs to no phase's latency, but is checked all the same.
        self.to_check += [request for request in phase.finished if request not in self.to_check]
        engine.take_tally()

    def _record_placement(self, label: str) -> None:
        resident, budget = resident_bytes(self.engine.weights.pool, self.mesh), self.cluster.memory - self.reserved
        self.within_budget &= bool((resident <= budget).all())
        devices = [
            {"server": server, "device": device, "experts": [np.flatnonzero(row).tolist() for row in layers],
             "resident_bytes": int(held), "budget_bytes": int(most)}
            for (server, device), layers, held, most in zip(
                self.cluster.device_names, self.placement.resident, resident, budget, strict=True)
        ]  # fmt: skip
        at = self._now() if self.migrations else 0.0
        self.placements.append({"label": label, "at_s": at, "devices": devices})

    def _drain(self) -> None:
        """Let what is running finish; nothing new comes in."""
        while not self.engine.idle:
            for request in self.engine.step():
                request.finished_s = self._now()

    def _result(self, checks: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        total = config.num_moe_layers * config.num_experts
        final, devices = self.placements[-1]["devices"], iter(range(len(self.layout.capacity)))
        servers = [
            {"name": server.name, "devices": [
                {"memory_bytes": device.memory, "reserved_bytes": self.reserved,
                 "budget_bytes": device.memory - self.reserved, "slots": self.layout.capacity[i],
                 "resident_bytes": final[i]["resident_bytes"]}
                for device, i in zip(server.devices, devices, strict=False)]}
            for server in self.cluster.servers
        ]  # fmt: skip
        first, second = self.phases[1], self.phases[3]
        headline = {"remote_share_uniform": self.phases[0]["remote_share"]}
        for name, phase in (("first", first), ("second", second)):
            headline[f"remote_share_{name}"] = phase["remote_share"]
            headline[f"reduction_{name}"] = 1 - phase["remote_share"] / max(phase["remote_share_uniform"], 1e-12)
        return {
            "format": "dancemoe.demo/1", "seed": self.seed,
            "model": {"name": self.model_name, "layers": config.num_moe_layers, "experts": config.num_experts,
                      "top_k": config.top_k, "hidden_size": config.hidden_size, "expert_bytes": self.expert_bytes,
                      "parameters": config.other_params + total * config.expert_params},
            "cluster": {"servers": servers, "copies": sum(self.layout.capacity) / total},
            "phases": self.phases, "migrations": self.migrations, "events": self.events, "timeline": self.timeline,
            "activation": self.activation, "placements": self.placements, "samples": self.samples,
            "checks": checks, "headline": headline,
        }  # fmt: skip


def _by_server(cluster: Cluster, local: np.ndarray, remote: np.ndarray) -> dict[str, float | None]:
    """Local ratio of each server from [devices, layers] sums; None where nothing was activated."""
    result: dict[str, float | None] = {}
    for index, name in enumerate(cluster.names):
        mine = cluster.device_server == index
        total = local[mine].sum() + remote[mine].sum()
        result[name] = float(local[mine].sum() / total) if total else None
    return result
