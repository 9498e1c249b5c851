"""The lock-step engine: requests join and leave a batch between two steps, all devices take every step together.

It owns the sequences' places on the devices and the serving state, nothing else: no clock, no planning, no I/O. Each
server's requests are served by that server's devices. What a step does is decided from the requests alone: a chunk of
prompt where one is waiting, in turn with one token for everybody who is generating.
"""

import dataclasses
from collections import deque

import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.config import ModelConfig
from dancemoe_jax.generate import StepResult, Weights, check_prompt, decode_step, init_state, prefill
from dancemoe_jax.pool import PoolLayout


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt that entered at a server, and how far it has come.

    Attributes:
        arrival_s: when it arrived; `finished_s` when its last token came, on the caller's clock.
        epochs: the engine's epochs (placements) under which its steps ran.
    """

    server: int
    prompt: list[int]
    max_tokens: int
    arrival_s: float
    label: str = ""
    output: list[int] = dataclasses.field(default_factory=list)
    done: int = 0  # prompt tokens in the cache
    finished_s: float | None = None
    epochs: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Tally:
    """What has been done since the last `Engine.take_tally`: int64 arrays [devices, layers] and step counts.

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
    """Continuous batching over all devices of a mesh.

    Args:
        device_server: int [devices], the server of each device.
        sequences: sequences a device serves at once; chunk: prompt tokens a step takes from one of them.
    """

    def __init__(self, config: ModelConfig, layout: PoolLayout, mesh: Mesh, weights: Weights, device_server: np.ndarray,
                 sequences: int = 8, chunk: int = 64):  # fmt: skip
        self.shapes = {"config": config, "layout": layout, "mesh": mesh}
        self.config, self.weights, self.device_server, self.chunk = config, weights, np.asarray(device_server), chunk
        self.state = init_state(config, mesh, sequences)
        self.epoch = 0
        self.waiting: list[deque[Request]] = [deque() for _ in range(int(self.device_server.max()) + 1)]
        self.running: list[list[Request | None]] = [[None] * sequences for _ in self.device_server]
        self._decode_next = False
        self._tally = self._empty_tally()

    def submit(self, request: Request) -> None:
        """Queue a request at its server. Raises ModelError where its prompt does not fit the model."""
        check_prompt(self.config, request.prompt, "request")
        self.waiting[request.server].append(request)

    @property
    def in_flight(self) -> list[Request]:
        return [request for row in self.running for request in row if request is not None]

    @property
    def idle(self) -> bool:
        return not any(self.waiting) and not self.in_flight

    def adopt(self, weights: Weights) -> None:
        """Take new weights (pool and tables of another placement) from the next step on."""
        self.weights = weights
        self.epoch += 1

    def counts(self) -> np.ndarray:
        """Assignments since the start by the server where the token entered, int64 [servers, layers, experts]."""
        by_device = np.asarray(self.state.counts).astype(np.int64)
        result = np.zeros((len(self.waiting), *by_device.shape[1:]), np.int64)
        np.add.at(result, self.device_server, by_device)
        return result

    def take_tally(self) -> Tally:
        """What was done since the last call."""
        tally, self._tally = self._tally, self._empty_tally()
        return tally

    def step(self) -> list[Request]:
        """Take one step if there is anything to do; the requests that it finished (their `finished_s` is the caller's)."""
        self._admit()
        prefilling = any(r.done < len(r.prompt) for r in self.in_flight)
        decoding = any(r.done == len(r.prompt) for r in self.in_flight)
        if not (prefilling or decoding):
            return []
        decode = decoding and (self._decode_next or not prefilling)
        self._decode_next = not decode
        for request in self.in_flight:
            request.epochs.add(self.epoch)
        return self._decode() if decode else self._prefill()

    def _admit(self) -> None:
        for server, queue in enumerate(self.waiting):
            devices = np.flatnonzero(self.device_server == server)
            while queue:
                device = max(devices, key=lambda d: self.running[d].count(None))
                if None not in self.running[device]:
                    break
                self.running[device][self.running[device].index(None)] = queue.popleft()

    def _prefill(self) -> list[Request]:
        devices = len(self.running)
        tokens = np.zeros((devices, 1, self.chunk), np.int32)
        sequence, start, length = np.zeros((3, devices, 1), np.int32)
        chosen: list[tuple[int, int, Request]] = []
        for device, row in enumerate(self.running):
            due = [(i, r) for i, r in enumerate(row) if r is not None and r.done < len(r.prompt)]
            if due:
                place, request = min(due, key=lambda item: item[1].arrival_s)
                part = request.prompt[request.done : request.done + self.chunk]
                tokens[device, 0, : len(part)] = part
                sequence[device], start[device], length[device] = place, request.done, len(part)
                chosen.append((device, place, request))
        self.state, result = prefill(self.weights, self.state, tokens, sequence, start, length, **self.shapes)
        self._count(result)
        following = np.asarray(result.tokens)
        finished = []
        for device, place, request in chosen:
            request.done += int(length[device, 0])
            if request.done == len(request.prompt) and self._append(request, int(following[device, 0])):
                self.running[device][place] = None
                finished.append(request)
        return finished

    def _decode(self) -> list[Request]:
        shape = (len(self.running), len(self.running[0]))
        tokens, positions = np.zeros((2, *shape), np.int32)
        active = np.zeros(shape, bool)
        for device, row in enumerate(self.running):
            for place, request in enumerate(row):
                if request is not None and request.done == len(request.prompt):
                    tokens[device, place] = request.output[-1]
                    positions[device, place] = request.done + len(request.output) - 1
                    active[device, place] = True
        self.state, result = decode_step(self.weights, self.state, tokens, positions, active, **self.shapes)
        self._count(result)
        following = np.asarray(result.tokens)
        finished = []
        for device, place in np.argwhere(active):
            request = self.running[device][place]
            if request is not None and self._append(request, int(following[device, place])):
                self.running[device][place] = None
                finished.append(request)
        return finished

    def _append(self, request: Request, token: int) -> bool:
        """Give a request its next token; whether it was the last."""
        request.output.append(token)
        full = len(request.prompt) + len(request.output) >= self.config.max_position
        return full or token == self.config.eos_token or len(request.output) >= request.max_tokens

    def _count(self, result: StepResult) -> None:
        tally, traffic = self._tally, result.traffic
        for name in ("local", "remote", "crossings", "rows"):
            getattr(tally, name)[...] += np.asarray(getattr(traffic, name))
        tally.steps += 1
        tally.asked += self.config.num_moe_layers
        tally.crossed += int((np.asarray(traffic.crossings).sum(0) > 0).sum())

    def _empty_tally(self) -> Tally:
        shape = (len(self.running), self.config.num_moe_layers)
        local, remote, crossings, rows = np.zeros((4, *shape), np.int64)
        return Tally(local, remote, crossings, rows)
