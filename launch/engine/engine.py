"""The lock-step engine: requests join and leave a batch between two steps, all devices take every step together.

It owns the requests in the batch slots of this process's devices and the serving state, nothing else: no clock, no
planning, no I/O. Each server's requests are served by that server's devices. What the next step is, all processes agree
on without a message of its own: every step carries what all devices want after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.expert_parallel.pool import PoolLayout, local_devices
from dancemoe_jax.inference.finite import all_finite, not_finite
from dancemoe_jax.inference.state import init_state, place_pages
from dancemoe_jax.inference.steps import GivenRouting, Weights, decode_step, prefill
from dancemoe_jax.mesh import on_cpu, own_rows, shard_rows, sharded
from dancemoe_jax.model.config import ModelConfig
from launch.engine.batch import Batch, Member
from launch.engine.control_word import ControlWord, MigrationProgress, blank
from launch.engine.flight import Flight
from launch.engine.logprobs import note_logprobs
from launch.engine.pages import Pages, least_pages
from launch.engine.request import Request
from launch.engine.step_counters import StepCounters
from launch.engine.step_inputs import decode_inputs, given_routing, prefill_inputs, row_numbers
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
        chunks: how many prompt tokens steps may take on a device, smallest first.
        done, stop: this process has no more requests to come, or wants all to end now; sent to all with the next step.
        reform: this process is ready to leave for another program, in which all requests go on; sent like those.
        hold: between two steps there may be something to do on this process that all others do between the same two; sent
            like those.
        migration_progress: of this process's migration worker (launch.migration.worker); sent like those.
        received: what all devices sent with the last step.
        steps: taken since the start, by kind; tokens_processed: of this process's requests in them.
        taking: requests of this process in the step that begins, or is waited for.
        last: int32 [devices, sequences] on the devices, the last token of each batch slot; what a decode step is fed where the
            host has not read it yet.
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
        self._alone = len(self.own) == mesh.size
        self._sequences = sequences
        self.chunks = chunks_of(chunk, config.max_position) if wide else (chunk,)
        least = least_pages(config.layer_windows, config.max_position, self.chunks[-1])
        self.pages = sequences * least if pages is None else pages
        if self.pages < least:
            raise ValueError(f"pages: {pages}, one sequence of {config.max_position} tokens takes {least}")
        self.batch = Batch(self.device_server.tolist(), self.own, sequences, config.max_position, not replays)
        self.forget()
        self.epoch = 0
        self.done = self.stop = self.reform = self.hold = False
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
        shape = (self.pages, config.layer_windows, self._sequences, config.max_position, self.chunks[-1])
        self.batch.pages = {device: Pages(*shape) for device in self.own}
        self.steps, self.tokens_processed = {"prefill": 0, "decode": 0}, {"prefill": 0, "decode": 0}
        self._choice = TokenChoice(self.mesh, self._sequences, config.vocab_size)
        self._counters = StepCounters.zero(self.mesh.size, config.num_moe_layers)
        self.last = jnp.zeros((self.mesh.size, self._sequences), jnp.int32, device=sharded(self.mesh))
        self._flight: Flight | None = None
        self._counts: jax.Array | None = None

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
        return self._next is None and self._flight is None

    @property
    def leaving(self) -> bool:
        """Whether all have agreed to end, or to leave for another program."""
        return self.ended or bool(self.received.reform.all())

    @property
    def ended(self) -> bool:
        """Whether all have agreed to end."""
        return bool(self.received.stop.any() or self.received.done.all())

    def wake(self, wish: Wish = _A_PROMPT) -> None:
        """Have a next step after all, a prefill step as wide as is wished; all processes wish for the same."""
        self._next = next_turn(None, [wish], self.chunks)

    def adopt(self, weights: Weights) -> None:
        """Take new weights (pool and tables of another placement) from the next step on."""
        self.weights = weights
        self.epoch += 1

    def release(self) -> None:
        """Give up what is on the devices; no step may follow."""
        jax.block_until_ready(self.state)
        del self.weights, self.state, self._choice

    def counts(self) -> np.ndarray:
        """Assignments since the start of tokens that entered at this process's devices, by server: int64 [servers, layers,
        experts]."""
        shape = (len(self.batch.waiting), self.config.num_moe_layers, self.config.num_experts)
        result = np.zeros(shape, np.int64)
        for device, counts in own_rows(self._counts).items() if self._counts is not None else ():
            result[self.device_server[device]] += counts
        return result

    def take_counters(self) -> StepCounters:
        """What was done since the last call."""
        counters, self._counters = self._counters, StepCounters.zero(self.mesh.size, self.config.num_moe_layers)
        return counters

    def step(self) -> list[Request]:
        """Wait for the next step, if there is one; the requests that it finished (their `finished_s` is the caller's).

        Where it can be known what the step after it takes, that one begins before anybody reads what this one gives: tokens
        go from one to the other on the devices.
        """
        finished: list[Request] = []
        flight, self._flight = self._flight, None
        if flight is None:
            if self._next is None and (not self._alone or self.idle):
                return []
            finished += self.batch.let_in()
            turn = self._next or next_turn(None, self.batch.wishes(), self.chunks) or Turn("prefill", self.chunks[0])
            flight = self._begin(turn, self.batch.plan(turn))
        # Others' words come with the step; a process that is alone knows what it has sent.
        self.received = ControlWord.of(flight.control if self._alone else np.asarray(flight.result.control))
        self._next = self._turn_after(flight)
        self._begin_ahead()
        self.taking = [request for _, request in flight.members]
        self._count(flight)
        finished += self._give(flight)
        finished += self.batch.let_in()
        if self._may_begin and self._flight is None and self._next is not None:
            self._flight = self._begin(self._next, self.batch.plan(self._next))
        return finished

    def _turn_after(self, flight: Flight) -> Turn | None:
        """The step that follows, in agreement with all processes: by what devices wished when this one began to run."""
        wishes = self.batch.wishes() if self._alone else [self.received.wish]
        return next_turn(flight.turn.kind, wishes, self.chunks)

    @property
    def _may_begin(self) -> bool:
        """Whether the step after the one whose words were received may begin before the caller has had its turn."""
        return not (self.leaving or self.received.hold.any())

    def _begin_ahead(self) -> None:
        """Begin the step after one that is under way, where nothing depends on what that one gives."""
        if self._next is not None and self._may_begin and self.batch.foreseeable(self._next):
            planned = self.batch.plan_ahead(self._next)
            if planned is not None:
                self._flight = self._begin(self._next, planned)

    def _begin(self, turn: Turn, planned: tuple[Step, list[Member]]) -> Flight:
        """Begin a step on the devices."""
        step, members = planned
        for request in self.in_flight:
            request.epochs.add(self.epoch)
        self.taking = [request for _, request in members]
        control, numbers = self._control(step), row_numbers(turn.kind, members)
        take, inputs, how = self._inputs(turn, members, control)
        self._place_pages()
        self.state, result = take(self.weights, self.state, *inputs, **how)
        width = 1 if turn.kind == "decode" else turn.tokens
        self.last = self._choice.next_tokens(members, numbers, self.batch.running, result, self.last, width)
        ready = []
        for rows, request in members:
            if turn.kind == "prefill":
                request.done = rows.start + rows.count
            ready.append(request.prefilled)
            request.coming += request.prefilled
        routed = result.routed if self.sampler or self.on_routed else None
        if not on_cpu(self.mesh):  # where results lie in the host's memory
            for part in jax.tree.leaves((self.last, result.control, result.finite_layers, result.traffic, routed)):
                part.copy_to_host_async()  # all of it is on its way before any of it is waited for
        return Flight(turn, members, numbers, ready, control, result, self.last)

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
        return take, [*on_devices, self._routing(turn, members), self.last], how

    def compiled(self) -> dict[str, Any]:
        """Both kinds of step as compiled for this engine's devices, prefill at its widest. Nothing runs."""
        kinds: tuple[Kind, ...] = ("prefill", "decode")
        found = {}
        for kind in kinds:
            take, inputs, how = self._inputs(Turn(kind, self.chunks[-1]), [], blank(self.mesh.size))
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
        control.hold[:] = self.hold  # read last: it is set before any progress that needs it is reported
        return words

    def _routing(self, turn: Turn, members: Sequence[Member]) -> GivenRouting | None:
        if not self.replays:
            return None
        tokens = self._sequences if turn.kind == "decode" else turn.tokens
        shape = (self.mesh.size, tokens, self.config.num_moe_layers, self.config.top_k)
        return GivenRouting(*(shard_rows(self.mesh, part) for part in given_routing(turn.kind, members, shape)))

    def _count(self, flight: Flight) -> None:
        """Count a step, and sample its tokens."""
        turn, members, result = flight.turn, flight.members, flight.result
        self.steps[turn.kind] += 1
        self._counts = result.counts
        self._counters.add(result.traffic)
        held = [self.batch.holds(member) for member in members]
        self.tokens_processed[turn.kind] += sum(
            rows.count for (rows, _), here in zip(members, held, strict=True) if here
        )
        if self.sampler or self.on_routed:
            step = flight.routed(held)
            for rows, _, experts in step:
                if self.sampler is not None:
                    self.sampler.add(int(self.device_server[rows.device]), experts)
            if self.on_routed is not None and step:
                self.on_routed([(request, experts) for _, request, experts in step])

    def _give(self, flight: Flight) -> list[Request]:
        """Give the step's tokens to those that have their whole prompt behind them and have not left since it began; those
        that ended with it."""
        failed, good = self._take_out_broken(flight)
        self.batch.note([flight.members[i] for i in good])
        ready = [i for i in good if flight.ready[i]]
        tokens, members, given = own_rows(flight.tokens), [], []
        for i in ready:
            rows, request = flight.members[i]
            members.append((rows, request))
            given.append(int(tokens[rows.device][rows.slot]))
            request.coming -= 1
        note_logprobs(members, [flight.numbers[i] for i in ready], given, flight.result.logits)
        return failed + self.batch.give(members, given, None if self.replays else self.config.eos_token)

    def _take_out_broken(self, flight: Flight) -> tuple[list[Request], list[int]]:
        """End the requests whose numbers are not finite any more; those, and which members go on."""
        layers, failed, good = own_rows(flight.result.finite_layers), [], []
        for i, (member, number) in enumerate(zip(flight.members, flight.numbers, strict=True)):
            rows, request = member
            if not self.batch.holds(member):
                continue
            finite = int(layers[rows.device][number])
            if finite == all_finite(self.config):
                good.append(i)
            else:
                self.batch.fail(rows, not_finite(self.config, finite))
                failed.append(request)
        return failed, good
