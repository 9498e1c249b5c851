"""`python -m launch bench programs`: what a step would do on a GPU, compiled for one on a machine that has none."""

import argparse
import json
import os
from typing import Any

from launch.cluster.gpu import prepare_gpu
from placement import InputError
from placement.text_table import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", default="mixtral,deepseek-v2-lite,qwen3-30b", metavar="A,B", help="default: all three"
    )
    parser.add_argument("--card", default="sm_90", help="sm_90: H100 80GB (default); sm_86: A10, as RTX 30 cards")
    parser.add_argument(
        "--topologies", default="1x1x1,3x1x1", metavar="T,U", help="servers x hosts x cards (1x1x1,3x1x1)"
    )
    parser.add_argument("--sequences", type=int, default=8, help="batch slots of a device (8)")
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens of a prefill (64)")
    parser.add_argument("--kernels", choices=("auto", "xla"), default="auto", help="xla: without the project's kernels")
    parser.add_argument("--int8", action="store_true", help="experts in int8")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Compile decode and prefill of every model for every topology, and read what the programs do."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the card is compiled for, not looked for
    prepare_gpu([], [], None)
    from launch.bench.harness.gpu_models import MODELS
    from launch.bench.harness.gpu_program import summary
    from launch.bench.harness.gpu_target import CARDS, lower_step, target_mesh

    names = args.models.split(",")
    for what, name, known in (("--card", args.card, CARDS), *(("--models", name, MODELS) for name in names)):
        if name not in known:
            raise InputError(f"{what} {name}: unknown; known are {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        for topology in args.topologies.split(","):
            mesh = target_mesh(topology, args.card)
            for kind, chunk in (("decode", 0), ("prefill", args.chunk)):
                config, tokens = MODELS[name], chunk or args.sequences
                how = {"sequences": args.sequences, "chunk": chunk, "int8": args.int8, "kernels": args.kernels}
                compiled = lower_step(config, mesh, one_server=not topology.endswith("x1"), **how).compile()
                tiles = min(tokens * config.top_k, config.num_experts)
                found = {"model": name, "topology": topology, "step": kind, **summary(compiled, tiles)}
                rows.append({**found, "layers": config.num_layers})
    if args.json:
        print(json.dumps({"card": args.card, "sequences": args.sequences, "chunk": args.chunk, "rows": rows}))
        return
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    print("a step on each card; sizes in MB")
    header = ("model", "mesh", "step", "launches", "waits", "written", "copied", "temporary")
    print_table(header, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    sizes = (f"{row[key] / 1e6:,.0f}" for key in ("written", "copied", "temporary"))
    return (row["model"], row["topology"], row["step"], f"{row['launches']:,}", f"{row['waits']:,}", *sizes)
