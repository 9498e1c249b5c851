"""One server of a replay: the real steps on real links, with routing from a trace and experts too small to matter.

    python -m launch.bench.harness.replay_server JOB.json SERVER COORDINATOR

Started by `launch.bench.testbed`, once for each server. Prints one line of JSON for each run of the job. What a step takes
is split by taking it twice: once as it is, once with the same rows and all their experts at home.
"""

import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from dancemoe_jax import fill_pool, make_mesh, migrate, place_decoder, place_tables
from dancemoe_jax.expert_parallel.pool import pool_layout
from dancemoe_jax.expert_parallel.tables import Tables, assign_slots, routing_tables
from dancemoe_jax.inference.state import State, init_state
from dancemoe_jax.inference.steps import GivenRouting, Weights, decode_step, prefill
from dancemoe_jax.mesh import AXIS, shard_rows
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder
from dancemoe_jax.model.experts import ExpertWeights
from launch.bench.harness.replay import Replay, Rows, Spent
from launch.bench.harness.trace import ReplayRequest, Trace
from launch.cluster.join import join
from launch.cluster.measure import measure_links
from placement import Cluster
from placement.data.arrivals import Arrivals
from placement.files import read_json, read_lines
from placement.scheduling import PROMPTS

INNER = 8  # inner size of the experts that stand in for the traced model's
VOCABULARY = 64
# Computed in float32, which CPUs are fast in, but sent in the traced models' own type.
DTYPE, WIRE = jnp.float32, jnp.bfloat16


def replay_config(trace: Trace, hidden_size: int) -> ModelConfig:
    """A model with the traced one's layers, experts and hidden size, and little else."""
    _, layers, top_k = trace.ids[0].shape
    longest = max(int(n.max()) for n in trace.lengths)
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        num_experts=trace.experts,
        top_k=top_k,
        expert_size=INNER,
        max_position=longest + 1,
    )


def small_decoder(config: ModelConfig) -> Decoder:
    """What a replay has beside experts."""
    return jax.tree.map(lambda a: a.astype(DTYPE), Decoder(config, nnx.Rngs(0)))


def small_expert(config: ModelConfig, layer: int, expert: int) -> ExpertWeights:
    """What stands in for an expert of the traced model."""
    rng, hidden = np.random.default_rng((layer, expert)), config.hidden_size
    w_in, w_out = rng.normal(size=(2 * INNER, hidden)), rng.normal(size=(hidden, INNER))
    return ExpertWeights((w_in / hidden**0.5).astype(DTYPE), (w_out / INNER**0.5).astype(DTYPE))


@dataclasses.dataclass
class Done:
    """What the steps of a run have done on this server.

    Attributes:
        sent, received: bytes on its link.
        crossings: rows that had to leave it; rows: those that did.
    """

    sent: int = 0
    received: int = 0
    local: int = 0
    remote: int = 0
    crossings: int = 0
    rows: int = 0
    steps: int = 0


class Server:
    """This process's part of the replay."""

    def __init__(self, job: dict[str, Any], name: str, devices: list[Any]) -> None:
        self.cluster = Cluster.from_dict(job["cluster"], source="testbed")
        self.server = self.cluster.names.index(name)
        self.trace, self.sequences, self.chunk = Trace.load(job["trace"]), job["sequences"], job["chunk"]
        self.config, self.mesh = replay_config(self.trace, job["hidden_size"]), make_mesh(devices)
        self.arrivals = job.get("arrivals", [])
        self.plans = dict(np.load(job["plans"], allow_pickle=False))
        self.layout = pool_layout(job["slots"], self.cluster.device_server)
        self.shapes: dict[str, Any] = {"config": self.config, "layout": self.layout, "mesh": self.mesh}
        first = self.plans[f"resident_{job['runs'][0]['plan']}"]
        self.slots = assign_slots(self.layout, first)
        pool = fill_pool(self.mesh, self.layout, self.slots, self._read)
        decoder = place_decoder(small_decoder(self.config), self.mesh)
        self.weights = Weights(decoder, pool, self._tables(job["runs"][0]["plan"]))
        self.state, self.scratch = (init_state(self.config, self.mesh, self.sequences, DTYPE) for _ in range(2))
        self.home = place_tables(self._home_tables(), self.mesh)
        slowest = jax.shard_map(lambda a: jax.lax.pmax(a, AXIS), mesh=self.mesh, in_specs=P(AXIS), out_specs=P())
        self._slowest = jax.jit(slowest)
        self.done = Done()

    def _read(self, layer: int, expert: int) -> ExpertWeights:
        return small_expert(self.config, layer, expert)

    def _tables(self, plan: str) -> Tables:
        serving, likely = self.plans[f"serving_{plan}"], self.plans[f"likely_{plan}"]
        return place_tables(routing_tables(self.layout, self.slots, serving=serving, likely=likely), self.mesh)

    def _home_tables(self) -> Tables:
        """As if every expert were on every device: slots of other experts stand in."""
        devices, layers, experts = self.slots.shape
        device = np.broadcast_to(np.arange(devices, dtype=np.int32)[:, None, None], self.slots.shape)
        number = np.arange(layers * experts, dtype=np.int32).reshape(layers, experts)
        slot = number % np.array(self.layout.capacity, np.int32)[:, None, None]
        none = np.zeros((layers, devices, devices, devices), bool)
        return Tables(np.ascontiguousarray(device), slot, none, none[..., 0])

    def adopt(self, plan: str) -> None:
        """Migrate to a plan, as a serving cluster would."""
        pool, self.slots = migrate(
            self.weights.pool,
            self.slots,
            self.plans[f"resident_{plan}"],
            self._read,
            layout=self.layout,
            mesh=self.mesh,
        )
        self.weights = self.weights._replace(pool=pool, tables=self._tables(plan))

    def at_home(self, rows: Rows) -> float:
        """Seconds of a step as if all experts were at home, on the slowest server."""
        home = self.weights._replace(tables=self.home)
        self.scratch, seconds, _ = self._take(home, self.scratch, rows, "pairs")
        return self._agree(seconds)[0]

    def step(self, rows: Rows, transport: str) -> Spent:
        """Take a step; what it took on the slowest server."""
        before = _link_bytes()
        self.state, seconds, traffic = self._take(self.weights, self.state, rows, transport)
        after = _link_bytes()
        home = self.weights._replace(tables=self.home)
        self.scratch, at_home, _ = self._take(home, self.scratch, rows, "pairs")
        done = self.done
        done.sent, done.received = done.sent + after[0] - before[0], done.received + after[1] - before[1]
        done.steps += 1
        for name in ("local", "remote", "crossings", "rows"):
            shards = getattr(traffic, name).addressable_shards
            setattr(done, name, getattr(done, name) + sum(int(np.asarray(shard.data).sum()) for shard in shards))
        whole, compute = self._agree(seconds, at_home)
        return Spent(min(whole, compute), max(whole - compute, 0.0))

    def _agree(self, *seconds: float) -> list[float]:
        """Those of the slowest server."""
        took = np.tile(np.array(seconds, np.float32), (self.mesh.size, 1))
        return [float(s) for s in np.asarray(self._slowest(shard_rows(self.mesh, took)))[0]]

    def _take(self, weights: Weights, state: State, rows: Rows, transport: str):
        routing = GivenRouting(shard_rows(self.mesh, rows.ids), shard_rows(self.mesh, rows.weights))
        tokens = (rows.position * 7 + rows.sequence) % VOCABULARY
        options = {**self.shapes, "transport": transport, "wire_dtype": WIRE}
        if rows.prefill:
            sequence, start, length = np.moveaxis(rows.pieces, 2, 0)
            position = start[:, :, None] + np.arange(self.chunk, dtype=np.int32)
            tokens = (position * 7 + sequence[:, :, None]) % VOCABULARY
            inputs = [shard_rows(self.mesh, part) for part in (tokens, sequence, start, length)]
            take, options["most_tokens"] = prefill, self.chunk
        else:
            inputs = [shard_rows(self.mesh, part) for part in (tokens, rows.position, rows.active)]
            take = decode_step
        jax.block_until_ready(inputs)
        begin = time.perf_counter()
        state, result = take(weights, state, *inputs, None, routing, **options)
        jax.block_until_ready(result.tokens)
        return state, time.perf_counter() - begin, result.traffic

    def requests(self, run: dict[str, Any]) -> list[ReplayRequest]:
        """The job's requests of one window of time, which begins at 0."""
        begin, end = run["window"]
        requests = self.trace.requests(Arrivals(*(np.array(column) for column in self.arrivals)))
        return [
            dataclasses.replace(request, arrival_s=request.arrival_s - begin)
            for request in requests
            if begin <= request.arrival_s < end
        ]

    def serve(self, run: dict[str, Any]) -> dict[str, Any]:
        """Replay requests; figures of each."""
        requests = self.requests(run)
        replay = Replay(requests, self.cluster.device_server.tolist(), self.sequences, self.chunk)
        replay.run(lambda rows: self.step(rows, run["transport"]))
        each = [[r.server, r.latency_s, r.compute_s, r.network_s, r.waiting_s] for r in requests]
        return {"requests": each, "steps": replay.steps}

    def ping(self, _: dict[str, Any]) -> dict[str, Any]:
        """What messages take between servers, and within them on the diagonal."""
        latency, bandwidth = measure_links(self.mesh, self.cluster.device_server, self.server)
        np.fill_diagonal(bandwidth, 0.0)  # JSON has no infinity
        return {"latency": latency.tolist(), "bandwidth": bandwidth.tolist()}

    def repeat(self, run: dict[str, Any]) -> dict[str, Any]:
        """Steps of one kind with tokens drawn from the trace; medians. `home`: only as if all experts were at home."""
        rng, devices = np.random.default_rng(0), self.mesh.size
        shape = (devices, self.chunk if run["prefill"] else self.sequences)
        spent = []
        for number in range(run["steps"] + run["warm"]):
            if number == run["warm"]:
                self.done = Done()
            ids = np.zeros((*shape, *self.trace.ids[0].shape[1:]), np.int32)
            weights, active = np.zeros(ids.shape, np.float32), np.zeros(shape, bool)
            for device in run["active"]:
                domain = self.cluster.device_server[device] % len(self.trace.domains)
                start = rng.integers(0, len(self.trace.ids[domain]) - run["rows"])
                own = slice(start, start + run["rows"])
                ids[device, : run["rows"]], weights[device, : run["rows"]] = (
                    self.trace.ids[domain][own],
                    self.trace.weights[domain][own],
                )
                active[device, : run["rows"]] = True
            index = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
            sequence, position = (np.zeros_like(index), index) if run["prefill"] else (index, np.zeros_like(index))
            pieces = np.zeros((devices, PROMPTS, 3), np.int32)
            pieces[:, 0, 2] = active.sum(1)
            rows = Rows(run["prefill"], ids, weights, sequence, position, active, pieces)
            spent.append(Spent(self.at_home(rows)) if run.get("home") else self.step(rows, run["transport"]))
        kept = spent[run["warm"] :]
        return {
            "compute_s": statistics.median(s.compute_s for s in kept),
            "network_s": statistics.median(s.network_s for s in kept),
            "total_s": statistics.median(sum(s) for s in kept),
        }


def _link_bytes() -> tuple[int, int]:
    """Bytes that have left and entered this network namespace, beside its loopback."""
    sent = received = 0
    for _, line in read_lines("/proc/net/dev"):
        name, colon, figures = line.partition(":")
        if colon and name.strip() != "lo":
            words = figures.split()
            sent, received = sent + int(words[8]), received + int(words[0])
    return sent, received


def main(path: str, name: str, coordinator: str) -> None:
    job = read_json(path)
    cluster = Cluster.from_dict(job["cluster"], source="testbed")
    with join(cluster, name, coordinator=coordinator, timeout=120) as devices:
        server = Server(job, name, devices)
        for number, run in enumerate(job["runs"]):
            server.adopt(run["plan"])
            server.done = Done()
            figures = (server.ping if "ping" in run else server.repeat if "active" in run else server.serve)(run)
            print(json.dumps({"run": number, **figures, "done": dataclasses.asdict(server.done)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
