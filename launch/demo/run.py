"""`python -m launch demo`: unequal servers, real text, placement from observed routing, migration while serving.

Four phases on one running cluster: a uniform placement; the `dance` plan made from what phase one activated; the same
placement after the servers' workloads traded places; the plan made from a window that has forgotten the old workloads.
Both migrations happen under load. Every figure is measured; sampled requests are checked token by token. All servers run
in one process, or each in one of its own (`--processes`), by the same path.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

import placement
from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.checkpoint.reader import load_model
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.tokenizer import TokenizerBundle, load_tokenizer_bundle
from launch.cluster.devices import cluster_devices
from launch.cluster.example import demo_cluster
from launch.cluster.fingerprint import folder_fingerprint
from launch.cluster.join import join
from launch.cluster.start_all import of_first, run_everywhere
from launch.corpus import DOMAINS, load_domains, prompts
from launch.demo import picture, report
from launch.demo.arrivals import PoissonWorkload
from launch.demo.checks import check_requests
from launch.demo.conductor import Conductor, DemoEnded, DemoStopped
from launch.demo.console import phase_lines, summary_lines, text_lines
from launch.demo.figures import CHUNK, ITEMSIZE, Figures
from launch.demo.result import demo_result
from launch.demo.server import DemoServer
from launch.engine.host import Host, ending
from launch.engine.loading import Loaded, load
from launch.engine.memory import reserved_bytes, sizes, slots_per_device
from launch.migration.worker import MigrationWorker
from placement import Cluster, InputError, Placement, Profile
from placement.files import write_bytes

log = logging.getLogger(__name__)
SEQUENCES = 8
PROMPT_TOKENS, OUTPUT_TOKENS = 96, (24, 64)
_JOIN_S = 120.0


@dataclasses.dataclass
class _Setting:
    """What every process works out alike before anything is put on a device."""

    path: Path
    config: ModelConfig
    cluster: Cluster
    profile: Profile
    placed: Placement
    bundle: TokenizerBundle
    prompts: dict[str, list[list[int]]]


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 where a check fails.

    Raises:
        InputError, ModelError: a flag, the cluster or the model cannot be used.
        KeyboardInterrupt: a signal ended it.
    """
    started = time.monotonic()
    if arguments.phase_seconds < 1 or (arguments.rate is not None and arguments.rate <= 0) or arguments.seed < 0:
        raise InputError("--phase-seconds must be at least 1, --rate above 0 and --seed not negative")
    for flag, path in (("--report", arguments.report), ("--json", arguments.json), ("--picture", arguments.picture)):
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise InputError(f"{flag} {path}: cannot be written there; name a file in a directory that exists")
    console = Console(highlight=False)
    if not arguments.server:
        how = ", one process for each server" if arguments.processes else ""
        _say(console, f"DanceMoE demo: four phases and two live migrations{how}, about a minute")
        sys.stdout.flush()
    setting = _prepare(arguments)
    if arguments.processes and not arguments.server:
        cluster = setting.cluster
        return run_everywhere("demo", cluster, sys.argv[2:], arguments.coordinator, of_first(cluster))
    try:
        figures = _serve(arguments, setting, console)
    except DemoEnded as ended:
        log.error("launch demo: %s", ended)
        return 1
    if figures is None:
        return 0
    _say(console, f"checking {len(figures.to_check)} requests against the dense model on one device …")
    result = demo_result(figures, check_requests(load_model(setting.path), figures.to_check))
    result["wall_s"] = time.monotonic() - started
    result["peak_memory_bytes"] = figures.peak_memory + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report.write(result, arguments.report)
    if arguments.json:
        write_bytes(arguments.json, json.dumps(result, indent=1).encode())
    if arguments.picture:
        picture.draw(result, arguments.picture)
    samples = result["samples"][-len(setting.cluster.names) :]
    for line in ["", *text_lines(samples), "", *summary_lines(result, arguments.report)]:
        _say(console, line)
    return 0 if _passed(result) else 1


def _prepare(arguments: argparse.Namespace) -> _Setting:
    path = arguments.model or bundled_model()
    config = read_config(path)
    reserved = reserved_bytes(config, SEQUENCES, ITEMSIZE)
    cluster = Cluster.from_toml(arguments.cluster) if arguments.cluster else demo_cluster(config, reserved)
    # A cluster that cannot hold one copy is refused here.
    profile = sizes(path, config, cluster, sequences=SEQUENCES)
    placed = placement.plan(profile, cluster, "uniform")
    slots_per_device(cluster, reserved, config.expert_bytes(ITEMSIZE))
    bundle = load_tokenizer_bundle(path, config)
    texts = _encode_prompts(path.name, config, bundle, arguments.seed)
    return _Setting(path, config, cluster, profile, placed, bundle, texts)


def _encode_prompts(name: str, config: ModelConfig, bundle: TokenizerBundle, seed: int) -> dict[str, list[list[int]]]:
    length = min(PROMPT_TOKENS, config.max_position - OUTPUT_TOKENS[1])
    if length < PROMPT_TOKENS // 2:
        raise InputError(
            f"{name}: a context of {config.max_position} tokens is too short for the demo's prompts; "
            f"{PROMPT_TOKENS + OUTPUT_TOKENS[1]} are enough"
        )
    texts = {domain: prompts(text, 64, length, seed) for domain, text in load_domains(train=False).items()}
    encode = bundle.tokenizer.encode
    return {domain: [encode(text.decode()).ids for text in some] for domain, some in texts.items()}


@contextlib.contextmanager
def _devices(arguments: argparse.Namespace, setting: _Setting) -> Iterator[list[Any]]:
    """All devices of the cluster, in this process or in those of all servers."""
    cluster = setting.cluster
    if not arguments.server:
        yield list(cluster_devices(len(cluster.device_server)))
        return
    agree = {
        "model": folder_fingerprint(setting.path),
        "flags": repr((arguments.seed, arguments.phase_seconds, arguments.rate)),
    }
    at = {"coordinator": arguments.coordinator, "timeout": _JOIN_S}
    with join(cluster, arguments.server, agree=agree, **at) as devices:
        yield devices


def _serve(arguments: argparse.Namespace, setting: _Setting, console: Console) -> Figures | None:
    """Be one server, or all of them; the figures in the first process."""
    cluster, begin = setting.cluster, time.monotonic()
    index = cluster.names.index(arguments.server) if arguments.server else 0
    own = [index] if arguments.server else list(range(len(cluster.names)))
    with _devices(arguments, setting) as devices:
        planned = {"placed": setting.placed, "profile": setting.profile, "fits": True}
        loaded = load(
            setting.path, setting.config, cluster, devices, sequences=SEQUENCES, chunk=CHUNK, wide=False, **planned
        )
        domains = [DOMAINS[i % len(DOMAINS)] for i in range(len(cluster.names))]
        workload = PoissonWorkload(setting.prompts, domains, arguments.rate or 0.0, OUTPUT_TOKENS, arguments.seed)
        host = Host(loaded.engine, index)
        worker = MigrationWorker(loaded, host.channel, host.wake)
        server = DemoServer(host, loaded, worker, own, workload)
        figures = conductor = None
        if index == 0:
            figures = _figures(arguments, setting, loaded, console, time.monotonic() - begin)
            conductor = Conductor(server, figures, arguments.phase_seconds, lambda line: _say(console, line))
        worker.start()
        host.between = server.between
        in_main = threading.current_thread() is threading.main_thread()
        with ending(host) if in_main else contextlib.nullcontext():
            server.start(next(iter(setting.prompts.values()))[0])
            if conductor:
                conductor.start()
            try:
                host.run()
            finally:
                server.end()
                worker.end()
        stopped = host.engine.stop or not host.engine.done
        if not stopped:
            server.last(host.channel)
        if conductor:
            _collect(conductor, stopped)
        elif stopped:
            raise SystemExit(1)
    return figures


def _collect(conductor: Conductor, stopped: bool) -> None:
    try:
        conductor.collect()
    except DemoStopped:
        if stopped and conductor.server.host.engine.stop:
            raise KeyboardInterrupt from None
        raise


def _figures(
    arguments: argparse.Namespace, setting: _Setting, loaded: Loaded, console: Console, loading_s: float
) -> Figures:
    config, cluster = setting.config, setting.cluster
    capacity, reserved = loaded.engine.shapes["layout"].capacity, reserved_bytes(config, SEQUENCES, ITEMSIZE)
    figures = Figures(
        config,
        cluster,
        setting.path.name,
        arguments.seed,
        capacity=capacity,
        reserved=reserved,
        uniform=loaded.placement,
        decode=setting.bundle.tokenizer.decode,
        say=lambda line: _say(console, line),
        show=lambda phase, header: _say(console, "\n".join(phase_lines(phase, header))),
        loading_s=loading_s,
    )
    total = config.num_moe_layers * config.num_experts
    parameters = config.other_params + total * config.expert_params
    _say(
        console,
        f"model {figures.model_name}: {parameters / 1e6:.1f} M parameters, {config.num_moe_layers} layers x "
        f"{config.num_experts} experts of {figures.expert_bytes / 1e3:.0f} kB, top-{config.top_k}",
    )
    for index, (server, device) in enumerate(cluster.device_names):
        _say(
            console,
            f"  {server} device {device}: {cluster.memory[index] / 1e6:.1f} MB, {reserved / 1e6:.1f} MB "
            f"reserved, room for {capacity[index]} experts ({100 * capacity[index] / total:.0f} %)",
        )
    _say(console, f"  together {sum(capacity) / total:.2f} copies of all experts")
    return figures


def _passed(result: dict[str, Any]) -> bool:
    """Whether every check holds; prints which does not."""
    checks = result["checks"]
    failed = []
    if checks["mismatches"]:
        failed.append(f"{checks['mismatches']} requests differ from the dense reference: {checks['first_mismatch']}")
    if checks["compilations_after_warmup"]:
        failed.append(f"{checks['compilations_after_warmup']} compilations while serving")
    if not checks["within_budget"]:
        failed.append("a device holds more expert bytes than its budget")
    for line in failed:
        log.error("launch demo: FAILED: %s", line)
    return not failed


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
