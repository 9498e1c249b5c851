"""`python -m launch bench scaling`: how a step's time grows with devices, layers and experts, what slots, context and
sequences cost that nobody uses, and what dispatch adds to layers that are local everywhere. One process, no network."""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from dancemoe_jax import fill_pool, make_mesh, place_decoder, place_tables, pool_layout
from dancemoe_jax.expert_parallel.dispatch import dispatch
from dancemoe_jax.expert_parallel.slot_experts import slot_experts
from dancemoe_jax.expert_parallel.tables import Tables, assign_slots, routing_tables
from dancemoe_jax.inference.state import init_state
from dancemoe_jax.inference.steps import Weights, decode_step
from dancemoe_jax.kernels.library import use_native
from dancemoe_jax.mesh import AXIS
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.devices import cluster_devices
from placement import InputError
from placement.text_table import print_table, print_text


class Size(NamedTuple):
    """What a device has room for: experts in its pool, tokens of a sequence, sequences."""

    slots: int
    context: int
    sequences: int


BASE = ModelConfig(
    vocab_size=256,
    hidden_size=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=32,
    top_k=4,
    expert_size=128,
    max_position=64,
)
ROWS = 4  # tokens of each device in a step
LOCAL_ROWS = 64
# A step of one sequence: slots of the pool, context, batch slots. Each is then made larger, and nobody uses what is added.
USED = Size(slots=64, context=256, sequences=1)
UNUSED = {"slots": 512, "context": 4096, "sequences": 16}
WIDE = dataclasses.replace(BASE, hidden_size=1024, num_layers=2, expert_size=1024)
DEVICES, LAYERS, EXPERTS = (1, 2, 4, 8), (4, 8, 16, 32), (8, 32, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, help="steps of each kind (20)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Decode steps with experts sharded over all devices, the same rows on each device.

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
    unused = _unused_seconds(args.repeats)
    alone, dispatched = _local_layers(args.repeats)
    if args.plot:
        _plot(rows, args.plot)
    if args.json:
        print(
            json.dumps(
                {"steps": rows, "unused": unused, "local_layers": {"alone_s": alone, "dispatched_s": dispatched}}
            )
        )
        return
    cells = [[r["of"], str(r["number"]), str(r["devices"]), f"{1e3 * r['seconds']:.1f} ms"] for r in rows]
    title = f"a decode step of {ROWS} rows a device, median of {args.repeats}"
    print_table(("growing", "number", "devices", "step"), cells, title=title)
    changes = (f"{getattr(USED, of)} to {UNUSED[of]} {of} {ratio:.2f}" for of, ratio in unused.items())
    print_text("a step of one sequence, with room for more that nobody uses, times as long:", ", ".join(changes) + ".")
    print_text(
        f"experts of {BASE.num_layers} layers that are local everywhere, {LOCAL_ROWS} rows: {1e3 * alone:.2f} ms, with "
        f"dispatch {1e3 * dispatched:.2f} ms ({100 * (dispatched / alone - 1):+.1f} %)",
    )


def _local_layers(repeats: int) -> tuple[float, float]:
    """Median seconds of layers whose experts are all on every device: the experts alone, and as a step dispatches them."""
    devices, grid = 2, (BASE.num_moe_layers, BASE.num_experts)
    mesh, rng = make_mesh(cluster_devices(devices)), np.random.default_rng(0)
    layout = pool_layout([BASE.num_moe_layers * BASE.num_experts] * devices, range(devices))
    slots = assign_slots(layout, np.ones((devices, *grid), bool))
    pool = fill_pool(mesh, layout, slots, lambda layer, expert: _expert(rng, BASE))
    tables = place_tables(routing_tables(layout, slots), mesh)
    x = rng.normal(size=(devices * LOCAL_ROWS, BASE.hidden_size)).astype(np.float32)
    ids = rng.integers(0, BASE.num_experts, (devices * LOCAL_ROWS, BASE.top_k)).astype(np.int32)
    weights = np.full(ids.shape, 1 / BASE.top_k, np.float32)
    valid, everyone = jnp.ones(LOCAL_ROWS, bool), jnp.ones(devices, bool)

    def layers(dispatched: bool, pool, tables, x, ids, weights):
        compute = functools.partial(slot_experts, pool, native=use_native("auto", "cpu"), tile=8)

        def layer(x, own):
            if dispatched:
                out, _ = dispatch(compute, layout.links, own, x, weights, ids, valid, everyone, transport="pairs")
            else:
                out = compute(x, own.slot[ids], weights)
            return x + out, None

        tables = tables._replace(device=tables.device[0], slot=tables.slot[0])
        return jax.lax.scan(layer, x, tables)[0]

    of_device, everywhere = P(AXIS), P()
    specs = (of_device, Tables(of_device, of_device, everywhere, everywhere), of_device, of_device, of_device)
    programs = [
        jax.jit(jax.shard_map(functools.partial(layers, how), mesh=mesh, in_specs=specs, out_specs=of_device))
        for how in (False, True)
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(5 * repeats + 2):  # in turns, so that drift of the machine hits both alike
        for program, took in zip(programs, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(program(pool, tables, x, ids, weights))
            took.append(time.perf_counter() - begin)
    alone, dispatched = (statistics.median(took[2:]) for took in seconds)
    return alone, dispatched


def _expert(rng: np.random.Generator, config: ModelConfig) -> ExpertWeights:
    return ExpertWeights(
        rng.normal(size=(2 * config.expert_size, config.hidden_size)).astype(np.float32) / 16,
        rng.normal(size=(config.hidden_size, config.expert_size)).astype(np.float32) / 16,
    )


def _unused_seconds(repeats: int) -> dict[str, float]:
    """By what is made larger: a step of one sequence against the same with less room. In turns, ratios of medians."""
    steps = {of: _stepper(WIDE, 1, USED._replace(**{of: most}), active=1) for of, most in UNUSED.items()}
    base, took = _stepper(WIDE, 1, USED, active=1), {of: ([], []) for of in UNUSED}
    for number in range(3 * repeats + 2):
        for of, step in steps.items():
            for which, seconds in zip((base, step), took[of], strict=True):
                seconds.append(which(number))
    return {of: statistics.median(more[2:]) / statistics.median(less[2:]) for of, (less, more) in took.items()}


def _step_seconds(config: ModelConfig, devices: int, repeats: int) -> float:
    """Median seconds of a step with all rows active, experts sharded over the devices."""
    slots = -(-config.num_moe_layers * config.num_experts // devices)
    step = _stepper(config, devices, Size(slots, config.max_position, ROWS), active=ROWS)
    return statistics.median([step(number) for number in range(repeats + 2)][2:])


def _stepper(config: ModelConfig, devices: int, size: Size, active: int) -> Callable[[int], float]:
    """A function that takes the step of a number and gives its seconds, with `active` sequences on each device."""
    config = dataclasses.replace(config, max_position=size.context)
    mesh, grid = make_mesh(cluster_devices(devices)), (config.num_moe_layers, config.num_experts)
    owner = np.arange(config.num_moe_layers * config.num_experts).reshape(grid) % devices
    layout = pool_layout([size.slots] * devices, range(devices))
    slots = assign_slots(layout, owner == np.arange(devices)[:, None, None])
    rng = np.random.default_rng(0)
    one = _expert(rng, config)
    pool = fill_pool(mesh, layout, slots, lambda layer, expert: one)
    decoder = place_decoder(Decoder(config, nnx.Rngs(0)), mesh)
    weights = Weights(decoder, pool, place_tables(routing_tables(layout, slots), mesh))
    states, shapes = [init_state(config, mesh, size.sequences)], {"config": config, "layout": layout, "mesh": mesh}
    tokens = rng.integers(0, config.vocab_size, (devices, size.sequences)).astype(np.int32)
    present = np.broadcast_to(np.arange(size.sequences) < active, tokens.shape)

    def step(number: int) -> float:
        where = np.full(tokens.shape, number % BASE.max_position, np.int32)
        begin = time.perf_counter()
        state, result = decode_step(weights, states.pop(), tokens, where, present, **shapes)
        jax.block_until_ready(result.tokens)
        states.append(state)
        return time.perf_counter() - begin

    return step


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
