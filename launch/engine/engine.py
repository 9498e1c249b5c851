"""The lock-step engine: requests join and leave a batch between two steps, all devices take every step together.

It owns the requests in the batch slots of this process's devices and the serving state, nothing else: no clock, no
planning, no I/O. Each server's requests are served by that server's devices. What the next step is, all processes agree
on without a message of its own: every step carries what all devices want after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.expert_parallel.pool import PoolLayout, local_devices
from dancemoe_jax.inference.finite import all_finite, not_finite
from dancemoe_jax.inference.state import init_state, place_pages
from dancemoe_jax.inference.steps import GivenRouting, StepResult, Weights, decode_step, prefill
from dancemoe_jax.mesh import own_rows, shard_rows
from dancemoe_jax.model.config import ModelConfig
from launch.engine.batch import Batch, Member
from launch.engine.control_word import ControlWord, MigrationProgress, blank
from launch.engine.logprobs import note_logprobs
from launch.engine.pages import Pages, least_pages
from launch.engine.request import Request
from launch.engine.step_counters import StepCounters
from launch.engine.step_inputs import decode_inputs, given_routing, prefill_inputs, row_numbers, token_places
from launch.engine.token_choice import TokenChoice
from launch.engine.token_sample import Sampler
from placement.scheduling import Kind, Step, Turn, Wish, chunks_of, next_turn

_A_PROMPT = Wish(1, False)


class Engine:
    """Continuous batching over all devices of a mesh, those of other processes included.

    Each process runs one with the same arguments, submits requests of its own servers, and steps whenever the others do:
    as long as `asleep` is false, and once `wake` has been called by all where it is true. In a program of one process
    `step` sees to that.

    Args:
        device_server: int [devices], the server of each device.
        sequences: batch slots of a device; chunk: prompt tokens that a step takes on a device where somebody decodes.
        pages: of a device's cache (inference.cache), at least `least_pages`; default: so many that none has to wait for one.
        replays: all requests bring the experts of their tokens (`Request.routed`), and the router's choice is not used.
        wide: prefill steps take more where nobody decodes. XLA sums in another order in steps of another width, so the last
            bits of a request's numbers then depend on what else is served; those of native calls do not.
        steps: what else the steps take: `transport`, `wire_dtype` (dancemoe_jax.inference.steps).

    Attributes:
        batch: the requests of this process.
        done, stop: this process has no more requests to come, or wants all to end now; sent to all with the next step.
        reform: this process is ready to leave for another program, in which all requests go on; sent like those.
        migration_progress: of this process's migration worker (launch.migration.worker); sent like those.
        received: what all devices sent with the last step.
        steps: taken since the start, by kind; tokens_processed: of this process's requests in them.
        taking: requests of this process in the last step that began.
        sampler: is given the experts of every token that entered here; None reads them from no step.
        on_routed: is called with every step's requests here and the experts of their tokens; None likewise.
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
        wide: bool = False,
        pages: int | None = None,
        **steps: Any,
    ):
        self.shapes: dict[str, Any] = {"config": config, "layout": layout, "mesh": mesh, **steps}
        self.replays = replays
        self.config, self.weights, self.device_server, self.chunk = config, weights, np.asarray(device_server), chunk
        self.mesh, self.own = mesh, local_devices(mesh)
        self._sequences = sequences
        self._chunks = chunks_of(chunk, config.max_position) if wide else (chunk,)
        least = least_pages(config.layer_windows, config.max_position, self._chunks[-1])
        self.pages = sequences * least if pages is None else pages
        if self.pages < least:
            raise ValueError(f"pages: {pages}, one sequence of {config.max_position} tokens takes {least}")
        self.batch = Batch(self.device_server.tolist(), self.own, sequences, config.max_position, not replays)
        self.forget()
        self.epoch = 0
        self.done = self.stop = self.reform = False
        self.migration_progress = MigrationProgress()
        self.received = ControlWord.of(blank(mesh.size))
        self.sampler: Sampler | None = None
        self.on_routed: Callable[[list[tuple[Request, np.ndarray]]], None] | None = None
        self.taking: list[Request] = []
        self._next: Turn | None = None

    def forget(self) -> None:
        """Begin with empty caches and counts, as if nothing had been served. No request may be in a batch slot."""
        config, dtype = self.config, self.weights.decoder.embedding[...].dtype
        self.state = init_state(config, self.mesh, self._sequences, dtype, self.pages)
        shape = (self.pages, config.layer_windows, self._sequences, config.max_position, self._chunks[-1])
        self.batch.pages = {device: Pages(*shape) for device in self.own}
        self.steps, self.tokens_processed = {"prefill": 0, "decode": 0}, {"prefill": 0, "decode": 0}
        self._choice = TokenChoice(self.mesh, self._sequences, config.vocab_size)
        self._counters = StepCounters.zero(self.mesh.size, config.num_moe_layers)

    def submit(self, request: Request) -> None:
        """Queue a request at its server, from any thread. Raises RequestError where its prompt or routing does not fit."""
        request.check(self.config, self.replays)
        self.batch.submit(request)

    @property
    def in_flight(self) -> list[Request]:
        """Requests in batch slots of this process's devices."""
        return self.batch.in_flight

    @property
    def idle(self) -> bool:
        """Whether this process has no request to serve."""
        return self.batch.idle

    @property
    def asleep(self) -> bool:
        """Whether no device wanted anything with the last step, so that there is no next one."""
        return self._next is None

    @property
    def leaving(self) -> bool:
        """Whether all have agreed to end, or to leave for another program."""
        return self.ended or bool(self.received.reform.all())

    @property
    def ended(self) -> bool:
        """Whether all have agreed to end."""
        return bool(self.received.stop.any() or self.received.done.all())

    @property
    def chunks(self) -> tuple[int, ...]:
        """How many prompt tokens steps may take on a device, smallest first."""
        return self._chunks

    def wake(self, wish: Wish = _A_PROMPT) -> None:
        """Have a next step after all, a prefill step as wide as is wished; all processes wish for the same."""
        self._next = next_turn(None, [wish], self._chunks)

    def adopt(self, weights: Weights) -> None:
        """Take new weights (pool and tables of another placement) from the next step on."""
        self.weights = weights
        self.epoch += 1

    def release(self) -> None:
        """Give up what is on the devices; no step may follow."""
        del self.weights, self.state, self._choice

    def counts(self) -> np.ndarray:
        """Assignments since the start of tokens that entered at this process's devices, by server: int64 [servers, layers,
        experts]."""
        shape = (len(self.batch.waiting), self.config.num_moe_layers, self.config.num_experts)
        result = np.zeros(shape, np.int64)
        for device, counts in own_rows(self.state.counts).items():
            result[self.device_server[device]] += counts
        return result

    def take_counters(self) -> StepCounters:
        """What was done since the last call."""
        counters, self._counters = self._counters, StepCounters.zero(self.mesh.size, self.config.num_moe_layers)
        return counters

    def step(self) -> list[Request]:
        """Take the next step, if there is one; the requests that it finished (their `finished_s` is the caller's)."""
        alone = len(self.own) == self.mesh.size
        if self._next is None and (not alone or self.idle):
            return []
        finished = self.batch.drop_cancelled()
        self.batch.admit()
        turn = self._next or next_turn(None, self.batch.wishes(), self._chunks) or Turn("prefill", self._chunks[0])
        for request in self.in_flight:
            request.epochs.add(self.epoch)
        step, members = self.batch.plan(turn)
        self.taking = [request for _, request in members]
        result = self._take(turn, members, self._control(step))
        self._count(turn, members, result)
        finished += self._give(turn, members, result)
        self.received = ControlWord.of(np.asarray(result.control))
        self._next = next_turn(turn.kind, [self.received.wish], self._chunks)
        return finished

    def _take(self, turn: Turn, members: Sequence[Member], control: np.ndarray) -> StepResult:
        """Run a step on the devices."""
        take, inputs, how = self._inputs(turn, members, control)
        self._place_pages()
        self.state, result = take(self.weights, self.state, *inputs, **how)
        # All of it is on its way to the host before any of it is waited for.
        wanted = (
            result.tokens,
            result.control,
            result.traffic,
            result.routed if self.sampler or self.on_routed else None,
        )
        for part in jax.tree.leaves(wanted):
            part.copy_to_host_async()
        return result

    def _place_pages(self) -> None:
        """Tell the devices who has which pages, where that has changed."""
        own = self.batch.pages
        if any(pages.changed for pages in own.values()):
            table = np.zeros(self.state.pages.shape, np.int32)
            for device, pages in own.items():
                table[device], pages.changed = pages.table, False
            self.state = self.state._replace(pages=place_pages(self.mesh, table))

    def _inputs(
        self, turn: Turn, members: Sequence[Member], control: np.ndarray
    ) -> tuple[Any, list[Any], dict[str, Any]]:
        """The function that takes a step, and what it takes beside weights and state, by place and by name."""
        if turn.kind == "prefill":
            take, inputs = prefill, prefill_inputs(members, self.mesh.size, turn.tokens)
            how = {**self.shapes, "most_tokens": turn.tokens}
        else:
            take, inputs, how = decode_step, decode_inputs(members, self.mesh.size, self._sequences), self.shapes
        on_devices = [*inputs, control]
        if self.mesh.size > 1:  # to a single device the step itself takes them, for less
            on_devices = [shard_rows(self.mesh, part) for part in on_devices]
        return take, [*on_devices, self._routing(turn, members)], how

    def compiled(self) -> dict[str, Any]:
        """Both kinds of step as compiled for this engine's devices, prefill at its widest. Nothing runs."""
        kinds: tuple[Kind, ...] = ("prefill", "decode")
        found = {}
        for kind in kinds:
            take, inputs, how = self._inputs(Turn(kind, self._chunks[-1]), [], blank(self.mesh.size))
            found[kind] = take.lower(self.weights, self.state, *inputs, **how).compile()
        return found

    @property
    def batch_slots(self) -> int:
        """Sequences that a device serves at once."""
        return self._sequences

    def _control(self, step: Step) -> np.ndarray:
        """What this process's devices send with a step, as control words."""
        words = blank(self.mesh.size)
        control = ControlWord.of(words)
        control.prefill[:], control.decode[:] = zip(*step.wishes, strict=True)
        control.done[:], control.stop[:], control.reform[:] = self.done and self.idle, self.stop, self.reform
        control.command[:], control.stage[:], control.given_up[:] = self.migration_progress
        return words

    def _routing(self, turn: Turn, members: Sequence[Member]) -> GivenRouting | None:
        if not self.replays:
            return None
        tokens = self._sequences if turn.kind == "decode" else turn.tokens
        shape = (self.mesh.size, tokens, self.config.num_moe_layers, self.config.top_k)
        return GivenRouting(*(shard_rows(self.mesh, part) for part in given_routing(turn.kind, members, shape)))

    def _count(self, turn: Turn, members: Sequence[Member], result: StepResult) -> None:
        """Count a step, and sample its tokens."""
        self.steps[turn.kind] += 1
        self.tokens_processed[turn.kind] += sum(rows.count for rows, _ in members)
        self._counters.add(result.traffic)
        if (self.sampler or self.on_routed) and members:
            step, routed = [], own_rows(result.routed)
            for (rows, request), first in zip(members, token_places(turn.kind, members), strict=True):
                step.append((request, routed[rows.device][first : first + rows.count]))
                if self.sampler is not None:
                    self.sampler.add(int(self.device_server[rows.device]), step[-1][1])
            if self.on_routed is not None:
                self.on_routed(step)

    def _give(self, turn: Turn, members: Sequence[Member], result: StepResult) -> list[Request]:
        """Give the step's tokens to requests that have their whole prompt behind them; those that ended with it."""
        numbers = row_numbers(turn.kind, members)
        failed, members, numbers = self._take_out_broken(members, numbers, result)
        width = 1 if turn.kind == "decode" else turn.tokens
        self.batch.note(members)
        tokens = self._choice.next_tokens(members, numbers, self.batch.running, result, width)
        ready, ready_rows, given = [], [], []
        for (rows, request), number, token in zip(members, numbers, tokens, strict=True):
            if turn.kind == "prefill":
                request.done = rows.start + rows.count
            if request.prefilled:
                ready.append((rows, request))
                ready_rows.append(number)
                given.append(token)
        note_logprobs(ready, ready_rows, given, result.logits)
        return failed + self.batch.give(ready, given, None if self.replays else self.config.eos_token)

    def _take_out_broken(
        self, members: Sequence[Member], numbers: Sequence[int], result: StepResult
    ) -> tuple[list[Request], list[Member], list[int]]:
        """End the requests whose numbers are not finite any more; those, and the members that go on with their rows."""
        layers, failed, good, rows_of_good = own_rows(result.finite_layers), [], [], []
        for (rows, request), number in zip(members, numbers, strict=True):
            finite = int(layers[rows.device][number])
            if finite == all_finite(self.config):
                good.append((rows, request))
                rows_of_good.append(number)
            else:
                self.batch.fail(rows, not_finite(self.config, finite))
                failed.append(request)
        return failed, good, rows_of_good
