"""Measuring a cluster that runs: latency and bandwidth of links, speed of devices, bandwidth of storage."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.mesh import AXIS, make_mesh, shard_rows
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.experts import ExpertWeights, expert
from placement import Cluster

SIZES = (4, 65536, 1048576)  # bytes of a message: the smallest gives the latency, the others the bandwidth
ROUNDS = {4: 50, 65536: 10, 1048576: 4}  # there and back
REPEATS = 5
_LARGEST = 2**26  # bytes of a message that is tried where smaller ones take no clearly longer time
_CLEAR = 0.25  # part of a message's time that its bytes have to make up
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

        def one_way(size: int, a: int = a, b: int = b) -> float:
            return _share(mesh, owners, server, _ping(mesh, int(members[a][0]), int(members[b][0]), size), a)

        latency[a, b] = latency[b, a] = one_way(SIZES[0])
        bandwidth[a, b] = bandwidth[b, a] = link_rate(one_way)
    return latency, bandwidth


def link_rate(one_way: Callable[[int], float]) -> float:
    """Bytes/s of a link beyond its latency.

    From two messages, the longer one so long that the time of its bytes stands out of the latency and of chance. Where even
    the longest takes no clearly longer time, what it travelled at as a whole: the link is at least as fast.

    Args:
        one_way: seconds of a message of so many bytes.

    >>> round(link_rate(lambda size: 0.001 + size / 1e6))
    1000000
    """
    middle, size = one_way(SIZES[1]), SIZES[2]
    while (large := one_way(size)) - middle < _CLEAR * large and size < _LARGEST:
        size *= 4
    if large - middle < _CLEAR * large:
        return size / large
    return (size - SIZES[1]) / (large - middle)


def _ping(mesh: Any, a: int, b: int, size: int) -> float:
    """Median seconds of a message of so many bytes one way, as part of a program like a step."""
    x = shard_rows(mesh, np.zeros((mesh.size, size // 4), np.float32))
    rounds = ROUNDS.get(size, 1)
    return _median(functools.partial(_bounce(mesh, a, b, rounds), x)) / (2 * rounds)


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
        ((2 * inner, config.hidden_size), (config.hidden_size, inner)),
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
    return float(np.asarray(add(shard_rows(mesh, np.where(sends, value, 0.0).astype(np.float32))))[0])
