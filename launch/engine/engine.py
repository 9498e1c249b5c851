"""The lock-step engine: requests join and leave a batch between two steps, all devices take every step together.

It owns the sequences' places on this process's devices and the serving state, nothing else: no clock, no planning, no
I/O. Each server's requests are served by that server's devices. What the next step is, all processes agree on without a
message of its own: every step carries the wishes of all devices for the one after it.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.errors import RequestError
from dancemoe_jax.expert_parallel.pool import PoolLayout, local_devices
from dancemoe_jax.inference.generate import check_prompt
from dancemoe_jax.inference.sampling import SamplingRows, choose, stack_params
from dancemoe_jax.inference.steps import GivenRouting, StepResult, Weights, decode_step, init_state, prefill
from dancemoe_jax.mesh import own_rows, shard_rows, sharded
from dancemoe_jax.model.config import ModelConfig
from launch.engine.request import Request
from launch.engine.token_sample import Sampler

# What a device wishes, and how far its process has come with a migration, as the columns of a step's control word.
PREFILL, DECODE, DONE, STOP, REFORM, ORDER, STAGE, GIVEN_UP = range(8)


@dataclasses.dataclass
class StepCounters:
    """What has been done since the last `Engine.take_counters`: int64 arrays [devices, layers] and step counts.

    `asked` counts (step, layer) pairs, `crossed` those in which some token had to leave its server.
    """

    local: np.ndarray
    remote: np.ndarray
    crossings: np.ndarray
    rows: np.ndarray
    steps: int = 0
    asked: int = 0
    crossed: int = 0


class Engine:
    """Continuous batching over all devices of a mesh, those of other processes included.

    Each process runs one with the same arguments, submits requests of its own servers, and steps whenever the others do:
    as long as `asleep` is false, and once `wake` has been called by all where it is true. In a program of one process
    `step` sees to that.

    Args:
        device_server: int [devices], the server of each device.
        sequences: sequences a device serves at once; chunk: prompt tokens a step takes from one of them.
        replays: all requests bring the experts of their tokens (`Request.routed`), and the router's choice is not asked.
        steps: what else the steps take: `transport`, `wire_dtype` (dancemoe_jax.inference.steps).

    Attributes:
        done, stop: this process has no more requests to come, or wants all to end now; told to all with the next step.
        reform: this process is ready to leave for another program, in which all requests go on; told like those.
        progress: order, stage and given-up order of a migration (launch.migration.worker); told to all with the next step.
        heard: what all devices said with the last step, int32 [devices, 8].
        steps: taken since the start, by kind; fed: tokens of this process's requests in them.
        sampler: is told the experts of every token that entered here; None asks no step for them.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: PoolLayout,
        mesh: Mesh,
        weights: Weights,
        device_server: np.ndarray,
        sequences: int = 8,
        chunk: int = 64,
        replays: bool = False,
        **steps: Any,
    ):
        self.shapes: dict[str, Any] = {"config": config, "layout": layout, "mesh": mesh, **steps}
        self.replays = replays
        self.config, self.weights, self.device_server, self.chunk = config, weights, np.asarray(device_server), chunk
        self.mesh, self.own = mesh, local_devices(mesh)
        self.state = init_state(config, mesh, sequences, weights.decoder.embedding[...].dtype)
        self.seen = jnp.zeros((mesh.size, sequences, config.vocab_size), bool, device=sharded(mesh))
        self.epoch = 0
        self.waiting: list[deque[Request]] = [deque() for _ in range(int(self.device_server.max()) + 1)]
        self.running: list[list[Request | None]] = [[None] * sequences for _ in self.device_server]
        self.done = self.stop = self.reform = False
        self.progress: tuple[int, int, int] = (0, 0, 0)
        self.received = np.zeros((mesh.size, 8), np.int32)
        self.steps, self.fed = {"prefill": 0, "decode": 0}, {"prefill": 0, "decode": 0}
        self.sampler: Sampler | None = None
        self._next: int | None = None
        self._lock = threading.Lock()
        self._counters = self._zero_counters()

    def submit(self, request: Request) -> None:
        """Queue a request at its server, from any thread. Raises RequestError where its prompt or routing does not fit."""
        check_prompt(self.config, request.prompt, "request")
        self._check_routed(request)
        with self._lock:
            self.waiting[request.server].append(request)

    def _check_routed(self, request: Request) -> None:
        if (request.routed is not None) != self.replays:
            raise RequestError(
                f"request: this engine {'replays' if self.replays else 'routes'} its requests; give `routed` "
                f"{'with each of them' if self.replays else 'to one with replays=True'}"
            )
        if request.routed is None:
            return
        fed = min(len(request.prompt) + request.max_tokens - 1, self.config.max_position)
        ids, weights = request.routed
        each = (self.config.num_moe_layers, self.config.top_k)
        if ids.shape != weights.shape or ids.shape[1:] != each or len(ids) < fed:
            raise RequestError(
                f"request: routing of shapes {ids.shape} and {weights.shape}; {fed} tokens are fed, give "
                f"[at least {fed}, {each[0]}, {each[1]}] for both"
            )
        if ids.min() < 0 or ids.max() >= self.config.num_experts:
            raise RequestError(f"request: routing names experts outside 0..{self.config.num_experts - 1}")

    @property
    def in_flight(self) -> list[Request]:
        return [request for row in self.running for request in row if request is not None]

    @property
    def idle(self) -> bool:
        """Whether this process has nothing to do."""
        return not any(self.waiting) and not self.in_flight

    @property
    def asleep(self) -> bool:
        """Whether nobody wished for anything with the last step, so that there is no next one."""
        return self._next is None

    @property
    def leaving(self) -> bool:
        """Whether all have agreed to end, or to leave for another program."""
        return self.ended or bool(self.received[:, REFORM].all())

    @property
    def ended(self) -> bool:
        """Whether all have agreed to end."""
        return bool(self.received[:, STOP].any() or self.received[:, DONE].all())

    def wake(self) -> None:
        """Have a next step after all; whoever wakes the others has a prompt."""
        self._next = PREFILL

    def adopt(self, weights: Weights) -> None:
        """Take new weights (pool and tables of another placement) from the next step on."""
        self.weights = weights
        self.epoch += 1

    def release(self) -> None:
        """Give up what is on the devices; no step may follow."""
        del self.weights, self.state, self.seen

    def counts(self) -> np.ndarray:
        """Assignments since the start of tokens that entered at this process's devices, by server: int64 [servers, layers,
        experts]."""
        shape = (len(self.waiting), self.config.num_moe_layers, self.config.num_experts)
        result = np.zeros(shape, np.int64)
        for device, counts in own_rows(self.state.counts).items():
            result[self.device_server[device]] += counts
        return result

    def take_counters(self) -> StepCounters:
        """What was done since the last call."""
        counters, self._counters = self._counters, self._zero_counters()
        return counters

    def step(self) -> list[Request]:
        """Take the next step, if there is one; the requests that it finished (their `finished_s` is the caller's)."""
        if self._next is None and len(self.own) == self.mesh.size and not self.idle:
            self.wake()
        if self._next is None:
            return []
        finished = self._drop_cancelled()
        self._admit()
        for request in self.in_flight:
            request.epochs.add(self.epoch)
        step = self._next
        finished += self._prefill() if step == PREFILL else self._decode()
        prefill, decode = self.received[:, PREFILL].any(), self.received[:, DECODE].any()
        self._next = PREFILL if prefill and not (decode and step == PREFILL) else DECODE if decode else None
        return finished

    def _drop_cancelled(self) -> list[Request]:
        dropped = []
        for row in self.running:
            for place, request in enumerate(row):
                if request is not None and request.cancelled:
                    row[place] = None
                    dropped.append(request)
        with self._lock:
            for server, queue in enumerate(self.waiting):
                dropped += [request for request in queue if request.cancelled]
                self.waiting[server] = deque(request for request in queue if not request.cancelled)
        for request in dropped:
            request.reason = "cancelled"
        return dropped

    def _admit(self) -> None:
        with self._lock:
            for server, queue in enumerate(self.waiting):
                devices = [device for device in self.own if self.device_server[device] == server]
                while queue and devices:
                    device = max(devices, key=lambda d: self.running[d].count(None))
                    if None not in self.running[device]:
                        break
                    self.running[device][self.running[device].index(None)] = queue.popleft()

    def _control(self, done: dict[int, int], given: set[int]) -> np.ndarray:
        """What the devices wish for the step after this one.

        Args:
            done: by request (id), prompt tokens in the cache after this step, where it changes that.
            given: requests (ids) that get a token from it.
        """
        control = np.zeros((len(self.running), 8), np.int32)
        for device in self.own:
            for request in filter(None, self.running[device]):
                if done.get(id(request), request.done) < len(request.prefix):
                    control[device, PREFILL] = 1
                elif len(request.output) + (id(request) in given) < request.max_tokens:
                    control[device, DECODE] = 1
            if self.waiting[self.device_server[device]] and None in self.running[device]:
                control[device, PREFILL] = 1
            control[device, DONE], control[device, STOP] = self.done and self.idle, self.stop
            control[device, REFORM] = self.reform
            control[device, ORDER:] = self.progress
        return control

    def _routing(self, width: int, rows: list[tuple[int, int, Request, int, int]]) -> GivenRouting | None:
        """Given routing of a step of `width` tokens a device. rows: device, place, request, its first token and how many."""
        if not self.replays:
            return None
        shape = (len(self.running), width, self.config.num_moe_layers, self.config.top_k)
        ids, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for device, place, request, first, count in rows:
            assert request.routed is not None
            ids[device, place : place + count] = request.routed[0][first : first + count]
            weights[device, place : place + count] = request.routed[1][first : first + count]
        return GivenRouting(shard_rows(self.mesh, ids), shard_rows(self.mesh, weights))

    def _prefill(self) -> list[Request]:
        devices = len(self.running)
        tokens = np.zeros((devices, 1, self.chunk), np.int32)
        sequence, start, length = np.zeros((3, devices, 1), np.int32)
        chosen: list[tuple[int, int, Request]] = []
        for device, row in enumerate(self.running):
            due = [(i, r) for i, r in enumerate(row) if r is not None and not r.prefilled]
            if due:
                place, request = min(due, key=lambda item: item[1].arrival_s)
                part = request.prefix[request.done : request.done + self.chunk]
                tokens[device, 0, : len(part)] = part
                sequence[device], start[device], length[device] = place, request.done, len(part)
                chosen.append((device, place, request))
        self.steps["prefill"] += 1
        self.fed["prefill"] += int(length.sum())
        done = {id(request): request.done + int(length[device, 0]) for device, _, request in chosen}
        ready = [(device, place, r) for device, place, r in chosen if done[id(r)] == len(r.prefix)]
        control = self._control(done, {id(request) for _, _, request in ready})
        inputs = (tokens, sequence, start, length, control)
        routing = self._routing(self.chunk, [(d, 0, r, r.done, int(length[d, 0])) for d, _, r in chosen])
        self.state, result = prefill(
            self.weights, self.state, *(shard_rows(self.mesh, part) for part in inputs), routing, **self.shapes
        )
        self._count(result, [(device, range(int(length[device, 0]))) for device, _, _ in chosen])
        following = {device: np.repeat(row, len(self.running[0])) for device, row in own_rows(result.tokens).items()}
        if not all(request.greedy for _, _, request in chosen):
            shape = (devices, len(self.running[0]))
            fed, valid = np.zeros((*shape, self.chunk), np.int32), np.zeros((*shape, self.chunk), bool)
            fresh = np.zeros(shape, bool)
            for device, place, request in chosen:
                fed[device, place], valid[device, place] = tokens[device, 0], np.arange(self.chunk) < length[device, 0]
                fresh[device, place] = request.done == 0
            following = self._choose(fed, valid, fresh, result.logits)
        for _, _, request in chosen:
            request.done = done[id(request)]
        return self._give(ready, following)

    def _decode(self) -> list[Request]:
        shape = (len(self.running), len(self.running[0]))
        tokens, positions = np.zeros((2, *shape), np.int32)
        active = np.zeros(shape, bool)
        chosen: list[tuple[int, int, Request]] = []
        for device, row in enumerate(self.running):
            for place, request in enumerate(row):
                if request is not None and request.prefilled:
                    tokens[device, place] = request.output[-1]
                    positions[device, place] = len(request.prompt) + len(request.output) - 1
                    active[device, place] = True
                    chosen.append((device, place, request))
        self.steps["decode"] += 1
        self.fed["decode"] += len(chosen)
        control = self._control({}, {id(request) for _, _, request in chosen})
        inputs = (tokens, positions, active, control)
        routing = self._routing(shape[1], [(d, place, r, int(positions[d, place]), 1) for d, place, r in chosen])
        self.state, result = decode_step(
            self.weights, self.state, *(shard_rows(self.mesh, part) for part in inputs), routing, **self.shapes
        )
        self._count(result, [(device, [place]) for device, place, _ in chosen])
        following = own_rows(result.tokens)
        if not all(request.greedy for _, _, request in chosen):
            following = self._choose(tokens[:, :, None], active[:, :, None], np.zeros(shape, bool), result.logits)
        return self._give(chosen, following)

    def _choose(self, tokens, valid, fresh, logits) -> dict[int, np.ndarray]:
        """Next tokens by the requests' own rules, of each place."""
        rows = [stack_params([request and request.params for request in row]) for row in self.running]
        rules = SamplingRows(*(shard_rows(self.mesh, np.stack(column)) for column in zip(*rows, strict=True)))
        index = np.array([[len(r.output) if r else 0 for r in row] for row in self.running], np.int32)
        fed = [shard_rows(self.mesh, part) for part in (tokens, valid, fresh)]
        self.seen, following = choose(self.seen, *fed, logits, rules, shard_rows(self.mesh, index), mesh=self.mesh)
        return own_rows(following)

    def _give(self, chosen: list[tuple[int, int, Request]], following: dict[int, np.ndarray]) -> list[Request]:
        """Give requests their next tokens; those that have ended with it leave their places."""
        finished = []
        for device, place, request in chosen:
            token = int(following[device][place])
            request.output.append(token)
            ended = token == self.config.eos_token and not self.replays
            if ended or token in request.stop_token_ids or (request.on_token and request.on_token(token)):
                request.reason = "stop"
            elif len(request.output) >= request.max_tokens or not self._room(request):
                request.reason = "length"
            if request.reason:
                self.running[device][place] = None
                finished.append(request)
        return finished

    def _room(self, request: Request) -> bool:
        return len(request.prompt) + len(request.output) < self.config.max_position

    def _count(self, result: StepResult, fed: list[tuple[int, Sequence[int]]]) -> None:
        """Keep the books of a step; fed: devices and the rows of theirs that held a token."""
        counters, traffic = self._counters, result.traffic
        for name in ("local", "remote", "crossings", "rows"):
            for device, layers in own_rows(getattr(traffic, name)).items():
                getattr(counters, name)[device] += layers
        crossings = np.sum(list(own_rows(traffic.crossings).values()), axis=0)
        counters.steps += 1
        counters.asked += self.config.num_moe_layers
        counters.crossed += int((crossings > 0).sum())
        self.received = np.asarray(result.control)
        if self.sampler is not None and fed:
            routed = own_rows(result.routed)
            for device, rows in fed:
                self.sampler.add(int(self.device_server[device]), routed[device][list(rows)])

    def _zero_counters(self) -> StepCounters:
        shape = (len(self.running), self.config.num_moe_layers)
        local, remote, crossings, rows = np.zeros((4, *shape), np.int64)
        return StepCounters(local, remote, crossings, rows)
