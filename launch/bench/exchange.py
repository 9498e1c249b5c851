"""`python -m launch bench exchange`: what a step across servers takes and sends, by how rows travel."""

import argparse
import json
from typing import Any

import numpy as np
from rich.console import Console

from launch.bench.harness.job import plan_arrays, run_job, testbed_cluster
from launch.bench.harness.trace import Trace
from placement.text_table import print_table
from placement.units import parse_rate

TRANSPORTS = ("pairs", "all_to_all", "fixed")
# Load of a step: which devices have tokens, and how many each.
CASES = {
    "decode, 1 server": {"prefill": False, "active": [0], "rows": 1},
    "decode, 3 servers": {"prefill": False, "active": [0, 1, 2, 3], "rows": 1},
    "decode, 4 rows each": {"prefill": False, "active": [0, 1, 2, 3], "rows": 4},
    "prefill, 1 server": {"prefill": True, "active": [0], "rows": 64},
    "prefill, 3 servers": {"prefill": True, "active": [0, 1, 2, 3], "rows": 64},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", required=True, metavar="T.npz", help="routing of three domains")
    parser.add_argument("--rate", default="500Mbps", help="of every server's link (500Mbps)")
    parser.add_argument("--hidden-size", type=int, default=2048, help="of the traced model (2048)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each kind in a round (30)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which all kinds take turns (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    """Steps with every layer remote and with every layer local, by every transport in turn."""
    trace, rate = Trace.load(args.trace), 8 * parse_rate(args.rate, "--rate")
    _, layers, _ = trace.ids[0].shape
    slots = layers * trace.experts
    cluster = testbed_cluster(trace, slots, 1, rate, None)
    profile = trace.profile(hidden_size=args.hidden_size, expert_bytes=1)
    plans: dict[str, np.ndarray] = {}
    for name, resident in (
        ("apart", _apart(layers, trace.experts)),
        ("home", np.ones((4, layers, trace.experts), bool)),
    ):
        plans |= plan_arrays(name, resident, profile, cluster)
    kinds = [("apart", case, t) for case in CASES for t in TRANSPORTS]
    kinds += [("home", case, "pairs") for case in CASES]
    runs = [
        {"plan": plan, "transport": transport, "steps": args.steps, "warm": 3 if number else 5, **CASES[case]}
        for number in range(args.rounds)
        for plan, case, transport in kinds
    ]
    job = {"trace": args.trace, "hidden_size": args.hidden_size, "slots": [slots] * 4, "sequences": 4, "chunk": 64}
    console = Console(stderr=True)
    results = run_job(cluster, rate, {**job, "runs": runs}, plans, lambda line: console.print(line, markup=False))
    rows = [_figures(kind, results[i :: len(kinds)], args.hidden_size) for i, kind in enumerate(kinds)]
    if args.json:
        print(json.dumps({"rate": args.rate, "rows": rows}))
    else:
        _print(rows, args.rate)


def _apart(layers: int, experts: int) -> np.ndarray:
    """Every expert of the first server's tokens elsewhere: half on the second server, a quarter on each of the last two."""
    resident = np.zeros((4, layers, experts), bool)
    owner = np.array([1, 2, 1, 3])[np.arange(experts) % 4]
    resident[owner, :, np.arange(experts)] = True
    return resident


def _figures(kind: tuple[str, str, str], rounds: list[dict[str, Any]], hidden_size: int) -> dict[str, Any]:
    """Medians over the rounds; bytes of all of them against the least that the placement needs."""
    plan, case, transport = kind
    first = [next(iter(found.values())) for found in rounds]
    done = [server["done"] for found in rounds for server in found.values()]
    # A row and its sum, two bytes a number.
    least = 2 * 2 * hidden_size * sum(d["crossings"] for d in done)
    sent = sum(d["sent"] for d in done)
    steps = sum(f["done"]["steps"] for f in first)
    times = {part: float(np.median([f[f"{part}_s"] for f in first])) for part in ("total", "compute", "network")}
    return {
        "placement": plan,
        "case": case,
        "transport": transport,
        **times,
        "sent_bytes": sent / steps,
        "least_bytes": least / steps,
        "ratio": sent / least if least else None,
    }


def _print(rows: list[dict[str, Any]], rate: str) -> None:
    columns = ("experts", "step", "rows travel by", "takes", "computing", "network", "sent", "at least", "ratio")
    cells: list[list[str]] = []
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        times = (f"{1e3 * row[key]:.1f} ms" for key in ("total", "compute", "network"))
        sizes = (f"{row[key] / 1e3:.1f} kB" for key in ("sent_bytes", "least_bytes"))
        cells.append([row["placement"], row["case"], row["transport"], *times, *sizes, ratio])
    print_table(columns, cells, title=f"one step over three servers, {rate}: time, and bytes on the links", left=3)
