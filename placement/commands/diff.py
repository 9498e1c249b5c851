"""`python -m placement diff`: what moves between two placements, how long that takes, and whether it pays."""

import argparse
import json
from typing import Any

from placement.commands.inputs import add_cluster, add_json, add_workload, read_workload
from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.data.profile import Profile
from placement.files import InputError, show
from placement.migration.decide import Verdict, should_migrate
from placement.migration.diff import Diff, diff
from placement.planner import evaluate
from placement.text_table import print_table, print_text
from placement.units import format_bytes, parse_seconds

_SHOWN = 20  # moves listed before the rest is only counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_cluster(parser)
    add("old", metavar="OLD.json", help="placement in force")
    add("new", metavar="NEW.json", help="placement to reach")
    add("--profile", metavar="P", help="profile.npz: what users activate, for the verdict")
    add("--horizon", default="300s", metavar="T", help="until the next revision (default: 300s)")
    add("--stall", default="50ms", metavar="T", help="standstill when the new placement takes over (default: 50ms)")
    text = "seconds that serving loses for each second of transfer (default: 0.1)"
    add("--interference", type=float, default=0.1, metavar="X", help=text)
    text = "prompt chunks with their decode steps within the horizon (default: as many as OLD can serve one by one)"
    add("--chunks", type=float, metavar="N", help=text)
    add_workload(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the moves, and the verdict where there is a profile.

    Raises:
        InputError: an input cannot be used.
    """
    cluster = Cluster.from_toml(arguments.cluster)
    old, new = Placement.load(arguments.old), Placement.load(arguments.new)
    workload = read_workload(arguments)
    horizon, stall = (parse_seconds(getattr(arguments, key), f"--{key}") for key in ("horizon", "stall"))
    chunks = arguments.chunks
    if chunks is not None and not 0 <= chunks < 1e15:
        raise InputError(f"--chunks = {show(chunks)}: must be a number from 0")
    found = diff(old, new, cluster)
    weighed = None
    if arguments.profile:
        profile = Profile.load(arguments.profile)
        before, after = (evaluate(profile, cluster, p, workload=workload)["step_seconds"] for p in (old, new))
        if chunks is None:
            chunks = horizon / before if before > 0 else 0.0
        options = {"horizon": horizon, "interference": arguments.interference, "stall_seconds": stall}
        weighed = before, after, should_migrate(found, chunks * (before - after), **options)
    if arguments.json:
        print(json.dumps(_as_json(found, cluster, weighed)))
        return
    _print(found, cluster, weighed)


def _name(cluster: Cluster, device: int) -> str:
    server, index = cluster.device_names[device]
    return f"{server}/{index}"


def _verdict(verdict: Verdict) -> str:
    return "migrate" if verdict else "stay"


def _as_json(found: Diff, cluster: Cluster, weighed: tuple[float, float, Verdict] | None) -> dict[str, Any]:
    names = cluster.names
    rounds = [
        {
            "staged": step.staged,
            "seconds": step.seconds,
            "drops": [{"layer": i, "expert": e, "device": _name(cluster, d)} for i, e, d in step.drops],
            "moves": [
                {
                    "layer": move.layer,
                    "expert": move.expert,
                    "device": _name(cluster, move.device),
                    "source": None if move.source is None else _name(cluster, move.source),
                    "bytes": move.bytes,
                    "seconds": move.seconds,
                }
                for move in step.moves
            ],
        }
        for step in found.rounds
    ]
    result: dict[str, Any] = {
        "bytes": found.bytes,
        "seconds": found.seconds,
        "load_seconds": found.load_seconds,
        "host_bytes": found.host_bytes,
        "links": [
            {"from": names[a], "to": names[b], "bytes": int(size)}
            for (a, b), size in (
                (pair, found.link_bytes[pair]) for pair in zip(*found.link_bytes.nonzero(), strict=True)
            )
        ],
        "disks": {_name(cluster, d): int(size) for d, size in enumerate(found.disk_bytes) if size},
        "rounds": rounds,
        "verdict": None,
    }
    if weighed is not None:
        before, after, verdict = weighed
        result |= {"verdict": _verdict(verdict), "step_seconds_old": before, "step_seconds_new": after}
        result |= {"saving_seconds": verdict.saving_seconds, "cost_seconds": verdict.cost_seconds}
    return result


def _print(found: Diff, cluster: Cluster, weighed: tuple[float, float, Verdict] | None) -> None:
    print(
        f"{len(found.moves)} moves of {format_bytes(found.bytes)} and {len(found.drops)} drops "
        f"in {len(found.rounds)} rounds, {found.seconds:.3g} s"
    )
    if found.host_bytes:
        print_text(f"devices are too full to swap in place: up to {format_bytes(found.host_bytes)} wait in host memory")
    if found.moves:
        rows = [
            [
                f"{move.layer}/{move.expert}",
                "storage" if move.source is None else _name(cluster, move.source),
                _name(cluster, move.device),
                format_bytes(move.bytes),
                f"{move.seconds:.3g} s",
            ]
            for move in found.moves[:_SHOWN]
        ]
        print()
        print_table(["layer/expert", "from", "to", "bytes", "alone"], rows, left=3)
        if len(found.moves) > _SHOWN:
            print(f"and {len(found.moves) - _SHOWN} more; --json lists all")
        rows = [
            [f"{cluster.names[a]} to {cluster.names[b]}", format_bytes(int(found.link_bytes[a, b]))]
            for a, b in zip(*found.link_bytes.nonzero(), strict=True)
        ]
        rows += [[f"storage to {_name(cluster, d)}", format_bytes(b)] for d, b in enumerate(found.disk_bytes) if b]
        if rows:
            print()
            print_table(["path", "bytes"], rows)
    print()
    if weighed is None:
        print_text("verdict: give --profile to weigh what the new placement saves against the migration")
        return
    before, after, verdict = weighed
    print(f"a chunk and its decode steps: {before:.4g} s now, {after:.4g} s after")
    print_text(
        f"verdict: {_verdict(verdict)}; it saves {verdict.saving_seconds:.3g} s until the horizon "
        f"and costs {verdict.cost_seconds:.3g} s"
    )
