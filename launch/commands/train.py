"""`python -m launch train`: train a small mixture of experts on text by domain and export it as a model directory."""

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dancemoe_jax.checkpoint.writer import check_replaceable, save_hf
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.training import TrainConfig, TrainState, batch_at, init_state, schedule, train_step
from launch.corpus import EOS, encode, read_domains
from placement import InputError
from placement.files import one_line, parse_json


def run(args: argparse.Namespace) -> None:
    """Train, or resume, then export.

    Raises:
        DanceMoEError, InputError: a flag, a domain, the output directory or the checkpoints cannot be used.
    """
    train = TrainConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)})
    _check(args, train)
    check_replaceable(args.out)
    domains = read_domains(args.domain, train.seed)
    if train.batch % len(domains):
        raise InputError(f"--batch {train.batch} is no multiple of the {len(domains)} domains; try {len(domains) * 4}")
    config = ModelConfig(
        vocab_size=EOS + 1,
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_heads=args.hidden // 32,
        num_kv_heads=max(1, args.hidden // 64),
        head_dim=32,
        num_experts=args.experts,
        top_k=args.top_k,
        expert_size=args.expert_size,
        max_position=train.context,
        eos_token=EOS,
    )
    tokens = [encode(domain.train) for domain in domains]
    for domain, stream in zip(domains, tokens, strict=True):
        print(f"{domain.name}: {len(domain.train)} documents, {len(stream):,} bytes to train on")
        if len(stream) <= train.context + 1:
            raise InputError(
                f"domain {domain.name!r} has {len(stream)} bytes, less than --context {train.context}; "
                "give more text or a smaller context"
            )
    directory = (args.checkpoints or args.out.with_name(args.out.name + ".checkpoints")).resolve()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--checkpoints {directory} is a file; give a directory")
    names = [domain.name for domain in domains]
    with ocp.training.Checkpointer(directory) as checkpointer:
        state, seconds = _train(config, train, tokens, names, checkpointer, args.save_every)
    print(f"trained {train.steps} steps" + ("" if seconds is None else f" in {seconds / 60:.1f} min"))
    save_hf(args.out, config, state.decoder, state.experts)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"wrote {args.out} ({size / 1e6:.1f} MB)")


def _check(args: argparse.Namespace, train: TrainConfig) -> None:
    """Flags that are wrong whatever the text; the others are checked where they are used."""
    for flag in ("steps", "batch", "save_every", "layers", "experts", "top_k", "expert_size"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if args.hidden != 32 and (args.hidden < 64 or args.hidden % 64):
        raise InputError(f"--hidden {args.hidden}: must be 32 or a multiple of 64 (heads of 32 in pairs)")
    if args.top_k > args.experts:
        raise InputError(f"--top-k {args.top_k} exceeds --experts {args.experts}")
    if train.context < 8:
        raise InputError(f"--context {train.context}: must be at least 8 tokens")
    if train.seed < 0 or train.warmup < 0:
        raise InputError(f"--seed {train.seed}, --warmup {train.warmup}: must not be negative")
    for flag in ("learning_rate", "clip"):
        if not 0 < getattr(train, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(train, flag)}: must be a positive number")
    for flag in ("weight_decay", "balance", "z"):
        if not 0 <= getattr(train, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(train, flag)}: must be a number of at least 0")


def _train(
    config: ModelConfig,
    train: TrainConfig,
    tokens: list[np.ndarray],
    names: list[str],
    checkpointer: ocp.training.Checkpointer,
    save_every: int,
) -> tuple[TrainState, float | None]:
    """The state after `train.steps` steps and the seconds they took, those before a resume included where known."""
    recipe = {"model": dataclasses.asdict(config), "train": dataclasses.asdict(train), "domains": names}
    state, before = _resume(init_state(config, train), recipe, checkpointer)
    console = Console()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    ]
    first = int(state.step)
    started, trained, rate = time.monotonic(), 0, schedule(train)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=train.steps, completed=first, loss="")
        for step in range(first, train.steps):
            batch = batch_at(train, tokens, step)
            state, metrics = train_step(state, batch, config=config, train=train, num_domains=len(names))
            trained += batch.size
            if (step + 1) % 50 == 0 or step + 1 == train.steps:
                bits = np.asarray(metrics.domain_loss) / np.log(2)
                loss = "  ".join(f"{name} {value:.3f}" for name, value in zip(names, bits, strict=True))
                speed = trained / (time.monotonic() - started)
                line = (
                    f"step {step + 1:>6}/{train.steps}  bits/byte: {loss}  balance {float(metrics.balance):.3f}"
                    f"  lr {np.asarray(rate(step)):.2e}  {speed:,.0f} bytes/s"
                )
                progress.update(task, completed=step + 1, loss=loss)
                if not console.is_terminal:
                    print(line, flush=True)
            if (step + 1) % save_every == 0 or step + 1 == train.steps:
                clock = {} if before is None else {"seconds": round(before + time.monotonic() - started, 1)}
                checkpointer.save(step + 1, state, custom_metadata=recipe | clock)
    jax.block_until_ready(state)
    return state, None if before is None else before + time.monotonic() - started


def _resume(
    state: TrainState, recipe: dict[str, Any], checkpointer: ocp.training.Checkpointer
) -> tuple[TrainState, float | None]:
    """The newest checkpoint, if there is one of this recipe, and the seconds behind it, where it has them."""
    if checkpointer.latest is None:
        return state, 0.0
    step, directory = checkpointer.latest.step, checkpointer.directory
    try:
        saved = checkpointer.metadata(step).custom_metadata
        saved = dict(saved) if isinstance(saved, dict) else {}
        seconds = saved.pop("seconds", None)
        recipe = parse_json(json.dumps(recipe), "recipe")  # as it comes back: tuples are lists
        same = saved == recipe
        state = checkpointer.load(step, state) if same else state
    except Exception as error:  # orbax and its storage raise many kinds for a damaged checkpoint
        reason = one_line(error) or type(error).__name__
        raise InputError(f"{directory}/{step}: damaged checkpoint ({reason}); remove it to resume before it") from None
    if not same:
        changed = _difference(recipe, saved)
        raise InputError(f"{directory}: checkpoints of another recipe ({changed}); give --checkpoints elsewhere")
    print(f"resumed from step {step} in {directory}")
    return state, seconds if isinstance(seconds, int | float) else None


def _difference(recipe: dict[str, Any], saved: dict[str, Any]) -> str:
    """The first thing in which two recipes differ, in words."""
    for part in recipe:
        ours, theirs = recipe[part], saved.get(part)
        if not isinstance(ours, dict) or not isinstance(theirs, dict):
            if ours != theirs:
                return f"{part}: {theirs} there, {ours} here"
            continue
        for key in ours:
            if ours[key] != theirs.get(key):
                return f"{key}: {theirs.get(key)} there, {ours[key]} here"
    return "it has settings that this version does not know"
