"""`python -m launch calibrate`: what the links and devices of a cluster really give, as a cluster file for the planner."""

import argparse
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dancemoe_jax.checkpoint import ExpertFile, bundled_model
from dancemoe_jax.config import ModelConfig
from dancemoe_jax.experts import ExpertWeights, expert
from dancemoe_jax.mesh import AXIS, deal, make_mesh
from launch.everywhere import run_everywhere
from launch.join import coordinator_address, folder_fingerprint, from_environment, join
from placement import Cluster, InputError
from placement.files import write_bytes

SIZES = (4, 65536, 1048576)  # bytes of a message: the smallest gives the latency, the others the bandwidth
ROUNDS = {4: 50, 65536: 10, 1048576: 4}  # there and back
REPEATS = 5
READ_SECONDS = 1.0


class Measured(NamedTuple):
    """Of a running cluster.

    Attributes:
        latency: seconds that a message of a few bytes takes, float [servers, servers].
        bandwidth: bytes/s beyond that, float [servers, servers].
        speed: of each device, relative to the fastest: float [devices].
        load_bandwidth: bytes/s at which each server reads experts, float [servers].
    """

    latency: np.ndarray
    bandwidth: np.ndarray
    speed: np.ndarray
    load_bandwidth: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", required=True, metavar="C.toml", help="the servers")
    add("--out", required=True, type=Path, metavar="NEW.toml", help="cluster file with what was measured")
    add("--server", metavar="NAME", help="be this one (default: start every server of the file that is this machine)")
    add("--model", type=Path, metavar="DIR", help="whose experts to read and compute (default: the bundled model)")
    add("--coordinator", metavar="HOST:PORT", help="where the servers meet (default: the first server's host)")
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for the other servers (60)")


def run(args: argparse.Namespace) -> int:
    """Measure on all servers at once; the first writes the file.

    Raises:
        InputError, ModelError: the cluster file or the model cannot be used, or the file cannot be written.
    """
    cluster, path = Cluster.from_toml(args.cluster), args.model or bundled_model()
    config = ModelConfig.from_hf(path)
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: its folder does not exist")
    found = None if args.server else from_environment(cluster, args.timeout)
    if found:
        args.server, args.coordinator = found
    if not args.server:
        return run_everywhere("calibrate", cluster, sys.argv[2:], args.coordinator)
    coordinator = args.coordinator or coordinator_address(cluster)
    agree = {"model": folder_fingerprint(path)}
    with join(cluster, args.server, coordinator=coordinator, agree=agree, timeout=args.timeout) as devices:
        measured = measure(cluster, devices, path, config, cluster.names.index(args.server))
        if args.server == cluster.names[0]:
            write_bytes(args.out, cluster_text(cluster, measured).encode())
            _print(cluster, measured, args.out)
    return 0


def measure(cluster: Cluster, devices: list[Any], path: Path, config: ModelConfig, server: int) -> Measured:
    """Measure, all processes together; all get the same."""
    mesh, owners = make_mesh(devices), cluster.device_server
    latency, bandwidth = measure_links(mesh, owners, server)
    seconds = np.zeros(len(devices))
    for index in range(len(devices)):
        own = _compute(devices[index], config) if owners[index] == server else 0.0
        seconds[index] = _share(mesh, owners, server, own, int(owners[index]))
    reading = [
        _share(mesh, owners, server, _reads(path) if index == server else 0.0, index)
        for index in range(len(cluster.names))
    ]
    return Measured(latency, bandwidth, seconds.min() / seconds, np.array(reading))


def measure_links(mesh: Any, owners: np.ndarray, server: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a message of a few bytes between servers and bytes/s beyond that, float [servers, servers] each.

    The diagonal holds the seconds of a message between two devices of a server, 0 where it has one; its bytes are free.

    Args:
        owners: server of each device; server: this process's.
    """
    members = [np.flatnonzero(owners == index) for index in range(int(owners.max()) + 1)]
    latency = np.zeros((len(members), len(members)))
    bandwidth = np.full_like(latency, np.inf)
    for a, own in enumerate(members):
        if len(own) > 1:
            latency[a, a] = _share(mesh, owners, server, _ping(mesh, int(own[0]), int(own[1]), SIZES[0]), a)
    for a, b in itertools.combinations(range(len(members)), 2):
        took = {size: _ping(mesh, int(members[a][0]), int(members[b][0]), size) for size in SIZES}
        small, middle, large = (_share(mesh, owners, server, took[size], a) for size in SIZES)
        latency[a, b] = latency[b, a] = small
        bandwidth[a, b] = bandwidth[b, a] = (SIZES[2] - SIZES[1]) / max(large - middle, 1e-9)
    return latency, bandwidth


def cluster_text(cluster: Cluster, measured: Measured) -> str:
    """The cluster file with measured links and devices."""
    lines, device = ["# measured by python -m launch calibrate", ""], 0
    for index, server in enumerate(cluster.servers):
        lines += ["[[server]]", f'name = "{server.name}"']
        lines += [f'host = "{server.host}"'] if server.host else []
        lines.append("devices = [")
        for own in server.devices:
            load = measured.load_bandwidth[index] / len(server.devices)
            lines.append(
                f'  {{ memory = {own.memory}, load_bandwidth = "{load / 1e6:.1f}MB/s", speed = {measured.speed[device]:.3f} }},'
            )
            device += 1
        lines += ["]", ""]
    for a, b in itertools.combinations(range(len(cluster.names)), 2):
        lines += [
            "[[link]]", f'from = "{cluster.names[a]}"', f'to = "{cluster.names[b]}"', "both = true",
            f'bandwidth = "{8 * measured.bandwidth[a, b] / 1e6:.1f}Mbps"', f'latency = "{1e3 * measured.latency[a, b]:.3f}ms"',
            "",
        ]  # fmt: skip
    return "\n".join(lines)


def _ping(mesh: Any, a: int, b: int, size: int) -> float:
    """Median seconds of a message of so many bytes one way, as part of a program like a step."""
    x = deal(mesh, np.zeros((mesh.size, size // 4), np.float32))
    return _median(functools.partial(_bounce(mesh, a, b, ROUNDS[size]), x)) / (2 * ROUNDS[size])


def _bounce(mesh: Any, a: int, b: int, rounds: int):
    def there_and_back(_, x):
        return jax.lax.ppermute(jax.lax.ppermute(x, AXIS, [(a, b)]), AXIS, [(b, a)])

    def local(x):
        return jax.lax.fori_loop(0, rounds, there_and_back, x)

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)))


def _compute(device: Any, config: ModelConfig) -> float:
    """Median seconds of one expert on 64 tokens."""
    inner = config.expert_size
    weights = jax.tree.map(
        lambda shape: jax.device_put(np.ones(shape, np.float32), device),
        ((config.hidden_size, 2 * inner), (inner, config.hidden_size)),
        is_leaf=lambda shape: isinstance(shape[0], int),
    )
    x = jax.device_put(np.ones((64, config.hidden_size), np.float32), device)

    @jax.jit
    def repeated(x, w_in, w_out):
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(expert(x, ExpertWeights(w_in, w_out))), x)

    return _median(functools.partial(repeated, x, *weights))


def _median(call) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _reads(path: Path) -> float:
    """Bytes a second at which experts come from the checkpoint, for about a second."""
    file = ExpertFile(path, np.dtype(np.float32), False)
    config, done, begin = file.config, 0, time.perf_counter()
    experts = itertools.cycle(np.ndindex(config.num_moe_layers, config.num_experts))
    while (took := time.perf_counter() - begin) < READ_SECONDS:
        done += sum(leaf.nbytes for leaf in jax.tree.leaves(file.read(*next(experts))))
    return done / took


def _share(mesh: Any, owners: np.ndarray, server: int, value: float, source: int) -> float:
    """The number of one server, on all."""
    sends = (owners == source) & (owners == server)
    sends &= np.cumsum(sends) == 1
    add = jax.jit(jax.shard_map(lambda a: jax.lax.psum(a, AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P()))
    return float(np.asarray(add(deal(mesh, np.where(sends, value, 0.0).astype(np.float32))))[0])


def _print(cluster: Cluster, measured: Measured, out: Path) -> None:
    for a, b in itertools.combinations(range(len(cluster.names)), 2):
        print(
            f"{cluster.names[a]} - {cluster.names[b]}: {1e3 * measured.latency[a, b]:.3f} ms, "
            f"{8 * measured.bandwidth[a, b] / 1e6:.0f} Mbit/s",
            file=sys.stderr,
        )
    for index, name in enumerate(cluster.names):
        speeds = ", ".join(f"{speed:.2f}" for speed in measured.speed[cluster.device_server == index])
        print(f"{name}: speed {speeds}, reads {measured.load_bandwidth[index] / 1e6:.0f} MB/s", file=sys.stderr)
    print(f"wrote {out}", file=sys.stderr)
