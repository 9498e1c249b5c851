"""`python -m launch bench testbed`: the paper's experiment, requests of a routing trace on servers joined by real links."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

import placement
from launch.bench.harness.job import DEVICES, plan_arrays, run_job, testbed_cluster
from launch.bench.harness.step_costs import calibrated, calibration_plans, calibration_runs
from launch.bench.harness.trace import ReplayRequest, Trace, poisson
from placement import Cluster, InputError
from placement.data.arrivals import Arrivals
from placement.data.problem import Problem
from placement.registry import HOSTED, home_strategies
from placement.simulation.independent.alone import alone_seconds, measured_compute
from placement.simulation.independent.unit_costs import Compute, Steps
from placement.simulation.lockstep.predict import StepCosts, lock_step
from placement.text_table import print_table
from placement.units import parse_rate

STRATEGIES = "uniform,redundance,smartmoe,eplb,dance,exact,latency"
_BASE = "eplb"
_Run = dict[str, Any]
_Runs = list[_Run]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", required=True, metavar="T.npz", help="routing of three domains, one for each server")
    add("--strategies", default=STRATEGIES, metavar="A,B", help=f"plans to serve with ({STRATEGIES})")
    add(
        "--fixed",
        default="eplb,latency",
        metavar="A,B",
        help="plans to serve again with a fixed-size all_to_all; '' for none (eplb,latency)",
    )
    add("--rate", default="500Mbps", help="of every server's link (500Mbps)")
    add("--copies", type=float, default=1.3, help="of all experts, that the four devices hold together (1.3)")
    add("--hidden-size", type=int, default=2048, help="of the traced model (2048)")
    add("--expert-bytes", type=int, default=3 * 2048 * 1408 * 2, help="of the traced model, to plan with (17301504)")
    add("--gap", type=float, default=10.0, help="mean seconds between requests of a server, Poisson (10)")
    add("--arrivals", metavar="A.csv", help="requests' times from a file in place of Poisson ones")
    add("--stretch", type=float, default=1.0, help="factor on the times of --arrivals (1)")
    add("--duration", type=float, default=120.0, help="seconds of arrivals (120)")
    add("--rounds", type=int, default=3, help="windows of the arrivals, in each of which all plans take turns (3)")
    add("--sequences", type=int, default=4, help="sequences a device serves at once (4)")
    add("--chunk", type=int, default=64, help="prompt tokens of a step (64)")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Plan on first halves of the trace's texts, serve second halves, plans side by side in every window of time.

    Raises:
        InputError: a flag is out of range, or this machine cannot make a testbed.
    """
    names, fixed = (_names(getattr(args, flag), f"--{flag}") for flag in ("strategies", "fixed"))
    for flag in ("copies", "gap", "duration", "stretch", "rounds", "sequences", "chunk", "hidden_size", "expert_bytes"):
        if not getattr(args, flag) > 0:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be greater than 0")
    trace, rate = Trace.load(args.trace), 8 * parse_rate(args.rate, "--rate")
    slots = round(args.copies * trace.ids[0].shape[1] * trace.experts / sum(DEVICES))
    cluster = testbed_cluster(trace, slots, args.expert_bytes, rate, None)
    sizes = {"hidden_size": args.hidden_size, "expert_bytes": args.expert_bytes, "servers": cluster.names}
    console = Console(stderr=True)

    def progress(line: str) -> None:
        console.print(line, markup=False)

    plans = _plans(dict.fromkeys(names + fixed), trace, cluster, sizes, progress)
    kinds = [(name, "pairs") for name in names] + [(name, "fixed") for name in fixed]
    warm, calibration, serving = _runs(args, kinds)
    arrivals = _arrivals(args, cluster.names)
    job = {
        "trace": args.trace,
        "hidden_size": args.hidden_size,
        "slots": [slots] * sum(DEVICES),
        "sequences": args.sequences,
        "chunk": args.chunk,
        "runs": [*warm, *calibration, *serving],
        "arrivals": [column.tolist() for column in vars(arrivals).values()],
    }
    results = run_job(cluster, rate, job, plans, progress)[len(warm) :]
    timed, served = results[: len(calibration)], results[len(calibration) :]
    measured, costs = calibrated(cluster, trace, plans, calibration, timed, sizes)
    # What users do then, as one who passes --eval knows it: their texts, though not which of them comes when.
    problem = Problem.build(trace.profile(later=True, **sizes), measured)
    predict = _Prediction(problem, costs, trace.requests(arrivals), plans, args)
    rows = [_row(kind, list(zip(serving, served, strict=True)), predict, args) for kind in kinds]
    if args.json:
        steps = _timed_steps(calibration, timed)
        links = _links(measured)
        found = {"rate": args.rate, "gap": args.gap, "costs": vars(costs), "links": links, "steps": steps, "rows": rows}
        print(json.dumps(found))
    else:
        _print(rows, f"{rows[0]['requests']} requests for each plan, links of {args.rate}; seconds a request")


def _plans(
    names: Iterable[str], trace: Trace, cluster: Cluster, sizes: Mapping[str, Any], progress: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Plans to calibrate and to serve with, as the servers read them."""
    profile, plans = trace.profile(**sizes), {}
    for name, resident in calibration_plans(sum(DEVICES), trace.ids[0].shape[1], trace.experts).items():
        plans |= plan_arrays(name, resident, profile, cluster)
    for name in names:
        plans |= plan_arrays(name, placement.plan(profile, cluster, name).resident, profile, cluster)
        progress(f"planned {name}")
    return plans


def _runs(args: argparse.Namespace, kinds: list[tuple[str, str]]) -> tuple[_Runs, _Runs, _Runs]:
    """Runs of the job: steps that compile, steps that calibrate, and windows in which all kinds of serving take turns."""
    warm = [
        {
            "plan": kinds[0][0],
            "transport": transport,
            "active": [0],
            "rows": 1,
            "prefill": prefill,
            "steps": 1,
            "warm": 1,
        }
        for transport in dict.fromkeys(transport for _, transport in kinds)
        for prefill in (False, True)
    ]
    serving, length = [], args.duration / args.rounds
    for window in range(args.rounds):
        span, first = [window * length, (window + 1) * length], window % len(kinds)
        # In every window another kind comes first.
        order = [*kinds[first:], *kinds[:first]]
        serving += [{"plan": plan, "transport": transport, "window": span} for plan, transport in order]
    return warm, calibration_runs(sum(DEVICES), args.sequences, args.chunk), serving


def _row(
    kind: tuple[str, str], served: list[tuple[_Run, dict[str, Any]]], predict: "_Prediction", args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one kind of serving over all windows, with what was predicted where rows travel in pairs."""
    own = [(run, found) for run, found in served if (run["plan"], run["transport"]) == kind]
    figures = _figures(kind, [found for _, found in own], args)
    if kind[1] == "pairs":
        windows = [run["window"] for run, _ in own]
        figures |= {"predicted": predict(kind[0], windows), "advised": predict.alone(kind[0], windows)}
    return figures


def _timed_steps(runs: _Runs, results: Sequence[Mapping[str, Any]]) -> _Runs:
    """Runs of steps, each with what it took."""
    return [
        {**run, **{k: next(iter(found.values()))[k] for k in ("compute_s", "network_s")}}
        for run, found in zip(runs, results, strict=True)
        if "active" in run
    ]


def _links(measured: Cluster) -> dict[str, list[list[float]]]:
    """Latency and bandwidth between servers, 0 within them, as JSON has no infinity."""
    away = ~np.eye(len(measured.names), dtype=bool)
    return {key: np.where(away, getattr(measured, key), 0.0).tolist() for key in ("latency", "bandwidth")}


@dataclass(frozen=True, eq=False)
class _Prediction:
    """Means that the lock-step simulation gives for the same requests, each window beginning at rest; and what `placement
    advise` expects of each of them alone."""

    problem: Problem
    costs: StepCosts
    requests: Sequence[ReplayRequest]
    plans: Mapping[str, np.ndarray]
    args: argparse.Namespace

    def __call__(self, name: str, windows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Seconds a request under a plan."""
        args, plans = self.args, self.plans
        tables = {key: plans[f"{key}_{name}"] for key in ("serving", "likely")}
        options = {"sequences": args.sequences, "chunks": (args.chunk,), "seed": args.seed, **tables}
        parts: dict[str, list[np.ndarray]] = {}
        for arrivals in self._windows(windows):
            served = lock_step(self.problem, plans[f"resident_{name}"], arrivals, self.costs, **options)
            for key in ("latency", "compute", "network", "waiting"):
                parts.setdefault(key, []).append(getattr(served, key))
        means = {key: float(np.concatenate(values).mean()) for key, values in parts.items()}
        return {"mean": means.pop("latency"), **means}

    def alone(self, name: str, windows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Seconds a request, and to its first token, with no other in the cluster."""
        usual, costs = Compute.roofline(self.problem), self.costs
        compute = measured_compute(usual, costs.prefill, costs.decode, self.args.chunk)
        steps = Steps.build(self.problem, self.plans[f"resident_{name}"], compute)
        every = [alone_seconds(steps, arrivals, self.args.chunk) for arrivals in self._windows(windows)]
        first, latency = (np.concatenate(column) for column in zip(*every, strict=True))
        return {"mean": float(latency.mean()), "first_token": float(first.mean())}

    def _windows(self, windows: Sequence[Sequence[float]]) -> Iterator[Arrivals]:
        columns = np.array([[r.arrival_s, r.server, r.prompt, r.output] for r in self.requests]).reshape(-1, 4).T
        for begin, end in windows:
            seconds, *rest = columns[:, (begin <= columns[0]) & (columns[0] < end)]
            yield Arrivals(seconds - begin, *(column.astype(np.int64) for column in rest))


def _names(text: str, flag: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    for name in names:
        if name not in home_strategies():
            why = "is planned and not yet served" if name in HOSTED else "is unknown"
            raise InputError(f"{flag}: {name!r} {why}; choose from {', '.join(home_strategies())}")
    return names


def _arrivals(args: argparse.Namespace, servers: tuple[str, ...]) -> Arrivals:
    if args.arrivals is None:
        return poisson(len(DEVICES), args.gap, args.duration, args.seed)
    return Arrivals.load(args.arrivals, servers, stretch=args.stretch, duration=args.duration, seed=args.seed)


def _figures(kind: tuple[str, str], windows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Of all requests that one plan served, in all windows: seconds, and bytes as the links counted them."""
    each = np.array([request for found in windows for request in next(iter(found.values()))["requests"]])
    done = [server["done"] for found in windows for server in found.values()]
    sent = sum(d["sent"] for d in done)
    least = 2 * 2 * args.hidden_size * sum(d["crossings"] for d in done)
    calls = sum(d["local"] + d["remote"] for d in done)
    _, latency, compute, network, waiting = each.T
    return {
        "strategy": kind[0],
        "transport": kind[1],
        "requests": len(each),
        "mean": float(latency.mean()),
        "p95": float(np.percentile(latency, 95)),
        "compute": float(compute.mean()),
        "network": float(network.mean()),
        "waiting": float(waiting.mean()),
        "remote": sum(d["remote"] for d in done) / calls,
        "sent_bytes": sent,
        "least_bytes": least,
        "by_server": [latency[each[:, 0] == server].tolist() for server in range(len(DEVICES))],
    }


def _print(rows: list[dict[str, Any]], title: str) -> None:
    base = next((row["mean"] for row in rows if row["strategy"] == _BASE and row["transport"] == "pairs"), None)
    columns = (
        "plan",
        "rows travel by",
        "mean",
        "predicted",
        "advised",
        f"to {_BASE}",
        "p95",
        "computing",
        "network",
        "waiting",
        "remote",
        "sent",
        "to least",
    )
    cells: list[list[str]] = []
    for row in rows:
        found = (row.get(key) for key in ("predicted", "advised"))
        guessed = [f"{f['mean']:.2f} s ({100 * (f['mean'] / row['mean'] - 1):+.0f} %)" if f else "" for f in found]
        change = f"{100 * (row['mean'] / base - 1):+.1f} %" if base else ""
        seconds = [f"{row[key]:.2f} s" for key in ("mean", "p95", "compute", "network", "waiting")]
        cells.append(
            [
                row["strategy"],
                row["transport"],
                seconds[0],
                *guessed,
                change,
                *seconds[1:],
                f"{100 * row['remote']:.1f} %",
                f"{row['sent_bytes'] / 1e9:.2f} GB",
                f"{row['sent_bytes'] / row['least_bytes']:.2f}" if row["least_bytes"] else "",
            ]
        )
    print_table(columns, cells, title=title, left=2)
