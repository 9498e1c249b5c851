"""`python -m launch bench scaling`: how a step's time grows with devices, layers and experts. One process, no network."""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from dancemoe_jax import fill_pool, make_mesh, place_decoder, place_tables, pool_layout
from dancemoe_jax.config import ModelConfig
from dancemoe_jax.experts import ExpertWeights
from dancemoe_jax.generate import Weights, decode_step, init_state
from dancemoe_jax.model import Decoder
from dancemoe_jax.tables import assign_slots, routing_tables
from launch.cluster import cluster_devices
from placement import InputError

BASE = ModelConfig(
    vocab_size=256, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=32, top_k=4,
    expert_size=128, max_position=64,
)  # fmt: skip
ROWS = 4  # tokens of each device in a step
DEVICES, LAYERS, EXPERTS = (1, 2, 4, 8), (4, 8, 16, 32), (8, 32, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, help="steps of each kind (20)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Decode steps with experts dealt over all devices, the same rows on each device.

    Raises:
        InputError: a flag is out of range.
    """
    if args.repeats < 1:
        raise InputError(f"--repeats {args.repeats}: must be at least 1")
    if args.plot and not args.plot.parent.is_dir():
        raise InputError(f"--plot {args.plot}: its folder does not exist")
    cluster_devices(max(DEVICES))
    kinds = [("devices", n, BASE, n) for n in DEVICES]
    kinds += [("layers", n, dataclasses.replace(BASE, num_layers=n), 2) for n in LAYERS]
    kinds += [("experts", n, dataclasses.replace(BASE, num_experts=n), 2) for n in EXPERTS]
    rows = [
        {"of": of, "number": number, "devices": devices, "seconds": _step_seconds(config, devices, args.repeats)}
        for of, number, config, devices in kinds
    ]
    if args.plot:
        _plot(rows, args.plot)
    if args.json:
        print(json.dumps(rows))
        return
    table = Table(title=f"a decode step of {ROWS} rows a device, median of {args.repeats}")
    for column in ("growing", "number", "devices", "ms"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["of"], str(row["number"]), str(row["devices"]), f"{1e3 * row['seconds']:.1f}")
    Console().print(table)


def _step_seconds(config: ModelConfig, devices: int, repeats: int) -> float:
    """Median seconds of a step."""
    mesh, grid = make_mesh(cluster_devices(devices)), (config.num_moe_layers, config.num_experts)
    owner = np.arange(config.num_moe_layers * config.num_experts).reshape(grid) % devices
    resident = owner == np.arange(devices)[:, None, None]
    layout = pool_layout([int(held) for held in resident.sum((1, 2))], range(devices))
    slots = assign_slots(layout, resident)
    rng = np.random.default_rng(0)
    one = ExpertWeights(
        rng.normal(size=(config.hidden_size, 2 * config.expert_size)).astype(np.float32) / 16,
        rng.normal(size=(config.expert_size, config.hidden_size)).astype(np.float32) / 16,
    )
    pool = fill_pool(mesh, layout, slots, lambda layer, expert: one)
    decoder = place_decoder(Decoder(config, nnx.Rngs(0)), mesh)
    weights = Weights(decoder, pool, place_tables(routing_tables(layout, slots), mesh))
    state, shapes = init_state(config, mesh, ROWS), {"config": config, "layout": layout, "mesh": mesh}
    tokens = rng.integers(0, config.vocab_size, (devices, ROWS)).astype(np.int32)
    active, seconds = np.ones((devices, ROWS), bool), []
    for position in range(repeats + 2):
        where = np.full((devices, ROWS), position % config.max_position, np.int32)
        begin = time.perf_counter()
        state, result = decode_step(weights, state, tokens, where, active, **shapes)
        jax.block_until_ready(result.tokens)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9, 2.8), sharey=True)
    for axis, of in zip(axes, ("devices", "layers", "experts"), strict=True):
        own = [row for row in rows if row["of"] == of]
        axis.plot([row["number"] for row in own], [1e3 * row["seconds"] for row in own], "o-")
        axis.set(xlabel=of, xscale="log", ylim=(0, None))
        axis.set_xticks([row["number"] for row in own], [str(row["number"]) for row in own])
        axis.minorticks_off()
    axes[0].set_ylabel("ms a decode step")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
