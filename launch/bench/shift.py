"""`python -m launch bench shift`: users of three servers change what they work on; how serving fares with and without
migration.

The same requests are served without and with migration on servers joined by real links, in the real serving loop and on
the wall clock; every round in the other order, so that drift of the machine hits both alike. At the shift each server's
users turn to the domain of the next one's. The ratio of local assignments has recovered in the first of two windows in a
row that reach `RECOVERED` of its mean before the shift; windows without tokens are passed over. The mean is of the run's
own second half of the time before the shift, as users before it are steady.
"""

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import placement
from launch.bench.harness.job import DEVICES, plan_arrays, run_job, testbed_cluster
from launch.bench.harness.trace import Trace, poisson
from placement import InputError
from placement.data.arrivals import Arrivals
from placement.registry import home_strategies
from placement.text_table import print_table
from placement.units import format_bytes, parse_bytes, parse_rate, parse_seconds

RECOVERED = 0.95
WINDOW_S = 5.0
_RUNS = ("without", "with")
_WARM_S = 60.0  # of arrivals in a run whose figures are dropped: the first minutes of a job are slower than the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", required=True, metavar="T.npz", help="routing of three domains, one for each server")
    add("--rate", default="500Mbps", help="of every server's link (500Mbps)")
    add("--load-bandwidth", default="1GB/s", metavar="RATE", help="of every server's storage (1GB/s)")
    add("--copies", type=float, default=1.3, help="of all experts, that the four devices hold together (1.3)")
    add("--hidden-size", type=int, default=2048, help="of the traced model (2048)")
    add("--expert-bytes", type=int, default=3 * 2048 * 1408 * 2, help="of the traced model (17301504)")
    add("--gap", type=float, default=10.0, help="mean seconds between requests of a server, Poisson (10)")
    add("--duration", type=float, default=150.0, help="seconds of arrivals (150)")
    add("--shift-at", type=float, metavar="S", help="when users change (after half of the duration)")
    add("--interval", default="5s", metavar="T", help="between revisions of the placement (5s)")
    add("--half-life", default="10s", metavar="T", help="after which an activation counts half (10s)")
    add("--horizon", default="300s", metavar="T", help="over which a migration has to pay (300s)")
    add(
        "--strategy",
        default="latency",
        choices=sorted(home_strategies()),
        help="of first and revised plans (latency)",
    )
    add("--staging-memory", default="4GB", metavar="SIZE", help="of each server's host, for experts on their way (4GB)")
    add("--rounds", type=int, default=2, help="times that both are run (2)")
    add("--window", type=float, default=WINDOW_S, help="seconds over which a local ratio is measured (5)")
    add("--sequences", type=int, default=4, help="sequences a device serves at once (4)")
    add("--chunk", type=int, default=64, help="prompt tokens of a step (64)")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, metavar="FILE.png", help="draw both runs over time")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Plan on first halves of the trace's texts, serve second halves without migration and with it.

    Raises:
        InputError: a flag is out of range, or this machine cannot make a testbed.
    """
    policy = _policy(args)
    if args.plot and not args.plot.parent.is_dir():
        raise InputError(f"--plot {args.plot}: its folder does not exist")
    rate, storage = 8 * parse_rate(args.rate, "--rate"), parse_rate(args.load_bandwidth, "--load-bandwidth", "1GB/s")
    trace, shift = Trace.load(args.trace), args.duration / 2 if args.shift_at is None else args.shift_at
    if not 0 < shift < args.duration:
        raise InputError(
            f"--shift-at {shift:g}: must be greater than 0 and less than the duration of {args.duration:g}"
        )
    slots = round(args.copies * trace.ids[0].shape[1] * trace.experts / sum(DEVICES))
    cluster = testbed_cluster(trace, slots, args.expert_bytes, rate, storage)
    arrivals = _arrivals(args, shift)
    profile = trace.profile(hidden_size=args.hidden_size, expert_bytes=args.expert_bytes, servers=cluster.names)
    planned = placement.plan(profile, cluster, args.strategy).resident
    plans = plan_arrays(args.strategy, planned, profile, cluster)
    # Every round in the other order.
    order = [name for number in range(args.rounds) for name in _RUNS[:: 1 - 2 * (number % 2)]]
    job = {
        "trace": args.trace,
        "hidden_size": args.hidden_size,
        "expert_bytes": args.expert_bytes,
        "slots": [slots] * sum(DEVICES),
        "sequences": args.sequences,
        "chunk": args.chunk,
        "shift_s": shift,
        "window_s": args.window,
        "arrivals": [column.tolist() for column in vars(arrivals).values()],
        "strategy": args.strategy,
        "runs": [
            {"policy": None, "until": _WARM_S},
            *({"policy": policy if name == "with" else None, "until": args.duration} for name in order),
        ],
    }
    console = Console(stderr=True)
    served = run_job(
        cluster, rate, job, plans, lambda line: console.print(line, markup=False), "launch.bench.harness.shift_server"
    )
    about = {"shift_s": shift, "window_s": args.window, "servers": list(cluster.names)}
    result = about | _result(list(zip(order, served[1:], strict=True)), shift, args.window)
    if took := result["with"]["staging_s"]:
        staged = result["with"]["copies_first_server"] * args.expert_bytes
        result["staging_of_storage"] = staged / took / storage
    if args.plot:
        _plot(result, args.plot)
    print(json.dumps(result)) if args.json else _print(result)


def _policy(args: argparse.Namespace) -> dict[str, Any]:
    """What `Policy` takes, out of the flags.

    Raises:
        InputError: one of the flags is out of range.
    """
    for flag in ("copies", "gap", "duration", "rounds", "window", "sequences", "chunk", "hidden_size", "expert_bytes"):
        if not getattr(args, flag) > 0:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be greater than 0")
    times = {}
    for flag in ("interval", "half_life", "horizon"):
        name, given = f"--{flag.replace('_', '-')}", getattr(args, flag)
        times[flag] = parse_seconds(given, name)
        if not times[flag] > 0:
            raise InputError(f"{name} {given}: must be greater than 0s")
    staging = parse_bytes(args.staging_memory, "--staging-memory")
    return {"strategy": args.strategy, "staging_bytes": staging, **times}


def _arrivals(args: argparse.Namespace, shift: float) -> Arrivals:
    """Poisson arrivals, some before the shift and some after it."""
    arrivals = poisson(len(DEVICES), args.gap, args.duration, args.seed)
    for name, found in (("before", arrivals.seconds < shift), ("after", arrivals.seconds >= shift)):
        if not found.any():
            raise InputError(f"--duration {args.duration:g}: no request comes {name} the shift; make it longer")
    return arrivals


def _result(served: list[tuple[str, dict[str, dict[str, Any]]]], shift: float, window: float) -> dict[str, Any]:
    """Figures of the runs without and with migration, and by how much it cut latency.

    Args:
        served: for each run its name, and what each server printed.
    """
    result = {}
    for name in _RUNS:
        own = [(number, found) for number, (run, found) in enumerate(served) if run == name]
        pooled = {f"{number}/{server}": printed for number, found in own for server, printed in found.items()}
        result[name] = figures(pooled, shift, window)
    without, migrating = (result[name]["latency"] for name in _RUNS)
    result["cut"] = {key: 1 - migrating[key]["mean"] / without[key]["mean"] for key in ("before", "after", "overall")}
    return result


def figures(servers: dict[str, dict[str, Any]], shift: float, window: float) -> dict[str, Any]:
    """What the servers of one run or several alike printed, as figures. Seconds; ratios are None where there are no tokens."""
    requests = sorted((request for found in servers.values() for request in found["requests"]), key=lambda r: r[1])
    each = np.array(requests)
    _, arrival, latency, gap = each.T
    after = arrival >= shift
    counts: dict[int, np.ndarray] = {}
    for found in servers.values():
        for number, *own in found["windows"]:
            counts[number] = counts.get(number, np.zeros(2, np.int64)) + own
    windows = sorted((number * window, int(local), int(remote)) for number, (local, remote) in counts.items())
    windows = [w for w in windows if w[1] + w[2]]
    decisions = [d for found in servers.values() for d in found["decisions"]]
    adopted = [d for d in decisions if d["verdict"] == "adopted" and d["outcome"]]
    end = max(at for at, _, _ in windows) + window
    before = _ratio(windows, shift / 2, shift)
    return {
        "latency": {
            name: {
                "requests": int(chosen.sum()),
                "mean": float(latency[chosen].mean()),
                "p95": float(np.percentile(latency[chosen], 95)),
            }
            for name, chosen in (("before", ~after), ("after", after), ("overall", np.ones_like(after)))
        },
        "local_ratio": {
            "before": before,
            "right_after": _ratio(windows, shift, shift + 2 * window),
            "after": _ratio(windows, shift, end),
            "end": _ratio(windows, (shift + end) / 2, end),
        },
        "recovered_s": recovered(windows, shift, before),
        "adopted": len(adopted),
        "kept": sum(d["verdict"] == "kept" for d in decisions),
        "failed": sum(d["verdict"] == "failed" for d in decisions),
        "copies": sum(d["copies"] for d in adopted),
        "bytes": sum(d["bytes"] for d in adopted),
        "staging_s": sum(d["outcome"]["stage_s"] for d in adopted),
        "copies_first_server": sum(d["outcome"]["copies_here"] for d in adopted),
        "longest_gap_s": float(gap.max()),
        "median_gap_s": statistics.median(gap),
        "requests": requests,
        "windows": windows,
        "decisions": decisions,
    }


def _ratio(windows: list[tuple[float, int, int]], begin: float, end: float) -> float | None:
    local, remote = (sum(w[column] for w in windows if begin <= w[0] < end) for column in (1, 2))
    return local / (local + remote) if local + remote else None


def recovered(windows: list[tuple[float, int, int]], shift: float, before: float | None) -> float | None:
    """Seconds from the shift to the first of two windows in a row that reach `RECOVERED` of a ratio; None: never.

    Args:
        windows: begin, local and remote assignments; only those that begin at the shift or later count.
        before: the ratio to get back to.
    """
    if before is None:
        return None
    later = [(at - shift, local / (local + remote)) for at, local, remote in windows if at >= shift]
    for (at, ratio), (_, following) in pairwise(later):
        if min(ratio, following) >= RECOVERED * before:
            return at
    return None


def _print(result: dict[str, Any]) -> None:
    runs = [result[name] for name in _RUNS]
    rows: list[list[str]] = []
    for key, name in (("before", "before the shift"), ("after", "after the shift"), ("overall", "overall")):
        count = runs[0]["latency"][key]["requests"]
        means = [f"{found['latency'][key]['mean']:.2f} s" for found in runs]
        rows.append([f"mean latency {name} ({count} requests)", *means, f"{100 * result['cut'][key]:.1f} %"])
        rows.append([f"  95th percentile {name}", *(f"{found['latency'][key]['p95']:.2f} s" for found in runs), ""])
    for key, name in (
        ("before", "before the shift"),
        ("right_after", "right after"),
        ("after", "after"),
        ("end", "at the end"),
    ):
        rows.append([f"local ratio {name}", *(_percent(found["local_ratio"][key]) for found in runs), ""])
    back = [f"{found['recovered_s']:g} s" if found["recovered_s"] is not None else "never" for found in runs]
    rows.append([f"{100 * RECOVERED:g} % of the ratio before again after", *back, ""])
    for key, name in (("adopted", "plans adopted"), ("kept", "plans not adopted"), ("copies", "copies moved")):
        rows.append([name, *(str(found[key]) for found in runs), ""])
    rows.append(["staged", *(format_bytes(found["bytes"]) for found in runs), ""])
    rows.append(["staging took", *(f"{found['staging_s']:.1f} s" for found in runs), ""])
    if share := result.get("staging_of_storage"):
        rows.append(["first server's staging, of its storage's speed", "", _percent(share), ""])
    rows.append(["longest gap between two tokens", *(f"{found['longest_gap_s']:.2f} s" for found in runs), ""])
    columns = ["", *(f"{name} migration" for name in _RUNS), "cut"]
    print_table(columns, rows, title=f"users change after {result['shift_s']:g} s")


def _percent(ratio: float | None) -> str:
    return "no tokens" if ratio is None else f"{100 * ratio:.1f} %"


def _plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 5.5), sharex=True)
    for name, colour in zip(_RUNS, ("tab:gray", "tab:blue"), strict=True):
        found = result[name]
        at = [begin + result["window_s"] / 2 for begin, _, _ in found["windows"]]
        ratio = [100 * local / (local + remote) for _, local, remote in found["windows"]]
        above.plot(at, ratio, ".-", color=colour, label=f"{name} migration")
        below.plot(*zip(*((r[1], r[2]) for r in found["requests"]), strict=True), "o", color=colour, alpha=0.7)
        for decision in found["decisions"]:
            if decision["verdict"] == "adopted" and decision["outcome"]:
                begin, took = decision["at"], decision["outcome"]["seconds"]
                for axis in (above, below):
                    axis.axvspan(begin, begin + took, color=colour, alpha=0.12, lw=0)
    for axis in (above, below):
        axis.axvline(result["shift_s"], color="tab:red", lw=1)
    above.set(ylabel="local assignments, %", ylim=(None, 100))
    above.legend(loc="lower left", title="shaded: migrating; red: users change")
    below.set(xlabel="seconds; a request where it arrives", ylabel="latency, s", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
