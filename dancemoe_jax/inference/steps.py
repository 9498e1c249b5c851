"""Serving steps: prefill and decode as free jitted functions over explicit state.

Each device serves the sequences that entered at it: their cache and attention are its own, experts are wherever the
tables say. Nothing in a step depends on a placement's shape, so a new placement never compiles anything. Generating whole
texts is generate.py's, batching requests over time the caller's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from dancemoe_jax.arguments import check_array
from dancemoe_jax.errors import ArgumentError
from dancemoe_jax.expert_parallel.dispatch import Traffic, Transport, default_transport
from dancemoe_jax.expert_parallel.pool import ExpertPool, PoolLayout
from dancemoe_jax.expert_parallel.slot_experts import slot_experts
from dancemoe_jax.expert_parallel.tables import Tables
from dancemoe_jax.huge_pages import on_huge_pages
from dancemoe_jax.inference.cache import Cache, attend_cached
from dancemoe_jax.inference.control import share_control
from dancemoe_jax.inference.finite import finite_rows
from dancemoe_jax.inference.next_tokens import next_tokens
from dancemoe_jax.inference.routed_experts import routed_experts
from dancemoe_jax.inference.state import State
from dancemoe_jax.inference.step_arguments import check_model, check_rest
from dancemoe_jax.inference.step_rows import StepRows, step_rows
from dancemoe_jax.kernels.gpu_call import GpuKernels, gpu_kernels
from dancemoe_jax.kernels.library import Kernels, use_native
from dancemoe_jax.mesh import AXIS, on_cpu, put, replicated, sharded
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, decoder_layer, scan_layers

DECODE_TILE, PREFILL_TILE = 8, 32


class Weights(NamedTuple):
    """All that a step reads and does not change.

    Attributes:
        decoder: everything but the routed experts, on every device (`place_decoder`).
        pool: the routed experts (`fill_pool`).
        tables: where each device sends its assignments (`place_tables`).
    """

    decoder: Decoder
    pool: ExpertPool
    tables: Tables


class StepResult(NamedTuple):
    """What a step found.

    Attributes:
        tokens: int32 [devices, rows], the greedy next token of every row.
        logits: float32 [devices, rows, vocab] they come from; with `all_logits` [devices, rows, chunk, vocab].
        traffic: int32 [devices, MoE layers] each.
        control: int32 [devices, n], the control words that were passed in, those of all devices on all of them; None where
            there were none.
        routed: int32 [devices, tokens, MoE layers, k], experts of every row's tokens, empty rows included.
        finite_layers: int32 [devices, rows], how many layers left all of a row's tokens finite, and one more where its logits
            are: `all_finite(config)`, or less where the row's tokens mean nothing (finite.py).
    """

    tokens: jax.Array
    logits: jax.Array
    traffic: Traffic
    control: jax.Array | None
    routed: jax.Array
    finite_layers: jax.Array
    counts: jax.Array
    last: jax.Array | None


class GivenRouting(NamedTuple):
    """Experts of each token that are known beforehand, from a trace: they take the place of the router's choice.

    Attributes:
        ids: int32 [devices, tokens, MoE layers, k], tokens in the order of the step's rows.
        weights: float of the same shape.
    """

    ids: jax.Array
    weights: jax.Array


def place_decoder(decoder: Decoder, mesh: Mesh) -> Decoder:
    """Everything but the routed experts, on every device of the mesh."""
    return on_huge_pages(put(decoder, replicated(mesh)))


def place_tables(tables: Tables, mesh: Mesh) -> Tables:
    """Tables of numpy arrays on the devices that read them: `device` and `slot` by source, the others everywhere."""
    by_source: Any = sharded(mesh)
    everywhere: Any = replicated(mesh)
    return put(tables, Tables(by_source, by_source, everywhere, everywhere))


_SHAPES = ("config", "layout", "mesh", "transport", "wire_dtype", "kernels")


@functools.partial(jax.jit, static_argnames=_SHAPES, donate_argnames=("state",))
def decode_step(
    weights: Weights,
    state: State,
    tokens: Int[ArrayLike, "devices sequences"],
    positions: Int[ArrayLike, "devices sequences"],
    active: Bool[ArrayLike, "devices sequences"],
    control: Int[ArrayLike, "devices n"] | None = None,
    routing: GivenRouting | None = None,
    last: Int[ArrayLike, "devices sequences"] | None = None,
    *,
    config: ModelConfig,
    layout: PoolLayout,
    mesh: Mesh,
    transport: Transport | None = None,
    wire_dtype: Any = None,
    kernels: Kernels = "auto",
) -> tuple[State, StepResult]:
    """One token for every active sequence: token and its position in, the next token out.

    Args:
        weights: what the step reads.
        state: must not be used afterwards, because its memory becomes the new state's.
        tokens, positions: of every sequence that the state has room for.
        active: which of them take part; the others' rows are ignored.
        control: numbers of each device that all devices receive, at no cost beyond the step's own.
        routing: takes the place of the router's.
        last: tokens that are on the devices: a row whose token is -1 is given its sequence's from here, so that a step can
            begin before anybody has read what the one before it gave (StepResult.last).
        config, layout, mesh: what the model, pool and tables were made with; the step is compiled for them.
        transport: how rows travel; default: as fits the mesh (dispatch.default_transport).
        wire_dtype: what rows between servers are rounded to, for less traffic than the activations' own type makes.
        kernels: native CPU calls where they can be had, or always XLA (kernels.library).

    Returns:
        The new state, and of each row the token that follows.

    Raises:
        ArgumentError: an array has the wrong shape or type, or config, layout and mesh are not those of the weights.
    """
    sequences = check_model(weights, state, config, layout, mesh)
    rows = {"devices": mesh.size, "sequences": sequences}
    check_array("tokens", tokens, "integers", rows)
    check_array("positions", positions, "integers", rows)
    check_array("active", active, "booleans", rows)
    check_rest((control, routing, last), config, mesh, sequences, sequences)
    native, gpu = _native(kernels, mesh, weights), gpu_kernels(kernels, mesh.devices.flat)

    def local(weights, state, tokens, positions, active, *rest):
        how = transport or default_transport(mesh), wire_dtype, on_cpu(mesh), native, gpu
        step = _Step(config, layout, *how, DECODE_TILE, *rest)
        fed = tokens[0] if step.last is None else jnp.where(tokens[0] < 0, step.last[0], tokens[0])
        rows = step_rows(fed[:, None], jnp.arange(sequences), positions[0], active[0].astype(jnp.int32))
        return _run(step, weights, state, rows)

    return _over_devices(local, mesh)(weights, state, tokens, positions, active, control, routing, last)


@functools.partial(jax.jit, static_argnames=(*_SHAPES, "all_logits", "most_tokens"), donate_argnames=("state",))
def prefill(
    weights: Weights,
    state: State,
    tokens: Int[ArrayLike, "devices rows chunk"],
    sequences: Int[ArrayLike, "devices rows"],
    starts: Int[ArrayLike, "devices rows"],
    lengths: Int[ArrayLike, "devices rows"],
    control: Int[ArrayLike, "devices n"] | None = None,
    routing: GivenRouting | None = None,
    last: Int[ArrayLike, "devices sequences"] | None = None,
    *,
    config: ModelConfig,
    layout: PoolLayout,
    mesh: Mesh,
    transport: Transport | None = None,
    wire_dtype: Any = None,
    kernels: Kernels = "auto",
    all_logits: bool = False,
    most_tokens: int | None = None,
) -> tuple[State, StepResult]:
    """A chunk of prompt for `rows` sequences of each device.

    Args:
        weights, state: as in `decode_step`.
        tokens: the chunk of each row.
        sequences: which of the device's sequences each row belongs to; rows of one step belong to different ones.
        starts: position of each chunk's first token.
        lengths: tokens of the chunk that count; 0 for a row without work.
        control, routing, last, config, layout, mesh, transport, wire_dtype, kernels: as in `decode_step`; nothing of `last`
            is fed.
        all_logits: give the logits at every position of the chunk, not only at its last token.
        most_tokens: that count on a device, of all rows together; the step computes only so many. `routing`, and the
            result's `routed`, then hold those that count, one row's after another's. Not with `all_logits`.

    Returns:
        The new state, and of each row the token that follows the chunk's last one.

    Raises:
        ArgumentError: an array has the wrong shape or type, or config, layout and mesh are not those of the weights.
    """
    room = check_model(weights, state, config, layout, mesh)
    check_array("tokens", tokens, "integers", {"devices": mesh.size, "rows": None, "chunk": None})
    _, rows, chunk = np.shape(tokens)
    for name, array in (("sequences", sequences), ("starts", starts), ("lengths", lengths)):
        check_array(name, array, "integers", {"devices": mesh.size, "rows": rows})
    if most_tokens is not None and (all_logits or not 0 < most_tokens <= rows * chunk):
        raise ArgumentError(f"most_tokens: {most_tokens}, must be from 1 to {rows * chunk}, and without all_logits")
    check_rest((control, routing, last), config, mesh, most_tokens or rows * chunk, room)
    native, gpu = _native(kernels, mesh, weights), gpu_kernels(kernels, mesh.devices.flat)

    def local(weights, state, tokens, sequences, starts, lengths, *rest):
        how = transport or default_transport(mesh), wire_dtype, on_cpu(mesh), native, gpu
        step = _Step(config, layout, *how, PREFILL_TILE, *rest)
        rows = step_rows(tokens[0], sequences[0], starts[0], lengths[0], most_tokens)
        return _run(step, weights, state, rows, all_logits)

    return _over_devices(local, mesh)(weights, state, tokens, sequences, starts, lengths, control, routing, last)


def _native(kernels: Kernels, mesh: Mesh, weights: Weights) -> bool:
    return use_native(kernels, mesh.devices.flat[0].platform, weights.decoder.embedding[...].dtype)


def _over_devices(local, mesh):
    """Run `local` on every device: sharded state and rows, replicated decoder, results with a device axis in front."""
    own: Any = P(AXIS)
    everywhere: Any = P()
    weights = Weights(everywhere, own, Tables(own, own, everywhere, everywhere))
    state = State(own, own, own, own)
    result = StepResult(own, own, Traffic(own, own, own, own), everywhere, own, own, own, own)

    def run(*arguments):
        specs = (weights, state, *(own for _ in arguments[2:]))
        # Float32 means float32: GPUs would multiply it in TF32, and a router's choice would follow.
        with jax.default_matmul_precision("highest"):
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(state, result))(*arguments)

    return run


class _Step(NamedTuple):
    """What the layers of one device's step share."""

    config: ModelConfig
    layout: PoolLayout
    transport: Transport
    wire_dtype: Any
    on_cpu: bool
    native: bool
    gpu: GpuKernels
    tile: int
    control: jax.Array | None
    routing: GivenRouting | None
    last: jax.Array | None

    @property
    def kernels(self) -> GpuKernels:
        """What attention and products take, which have no loop of their own."""
        return None if self.gpu == "loop" else self.gpu


def _run(step, weights, state, rows: StepRows, all_logits=False):
    """One step of one device."""
    config, valid = step.config, rows.valid
    # On a GPU a condition would wait for the host.
    present = valid.any() if step.on_cpu else None
    cache = Cache(state.pages[0], step.native, step.kernels, step.on_cpu)
    tables = weights.tables._replace(device=weights.tables.device[0], slot=weights.tables.slot[0])
    busy, control = share_control(valid.any(), step.control)
    compute = functools.partial(
        slot_experts,
        weights.pool,
        native=step.native,
        gpu=step.gpu,
        most_slots=config.num_experts,
        tile=step.tile,
        limit=config.swiglu_limit,
    )
    moe = functools.partial(routed_experts, step, compute, valid, busy)

    def body(carry, layer_inputs):
        x, finite, *caches = carry
        layer, index, window, own = layer_inputs

        attention = functools.partial(attend_cached, cache, rows, index, caches)
        x, caches, aux = decoder_layer(
            config, layer, x, rows.positions, attention, functools.partial(moe, own), window, present
        )
        return (x, finite + finite_rows(x, valid), *caches), aux

    per_layer = (tables, jax.tree.map(lambda a: jnp.swapaxes(a[0], 0, 1), step.routing))
    none = jax.lax.pcast(jnp.zeros(len(valid), jnp.int32), AXIS, to="varying")
    carry = (weights.decoder.embedding[...][rows.tokens], none, state.k, state.v)
    (x, finite, k, v), (traffic, counts, routed) = scan_layers(
        config, weights.decoder, body, carry, per_layer, native=step.native, active=valid.reshape(-1), gpu=step.kernels
    )
    logits, final, likeliest = next_tokens(step, weights.decoder, x, rows, present, all_logits)
    finite = rows.least(finite, config.num_layers)
    head = finite_rows(logits, valid) if all_logits else finite_rows(final[:, None], rows.lengths[:, None] > 0)
    counts = state.counts + counts[None]
    result = StepResult(
        likeliest[None],
        logits[None],
        jax.tree.map(lambda a: a[None], traffic),
        control,
        jnp.swapaxes(routed, 0, 1).astype(jnp.int32)[None],
        jnp.where(finite == config.num_layers, finite + head, finite)[None],
        counts,
        None if step.last is None else rows.put_last(step.last[0], likeliest)[None],
    )
    return State(k, v, state.pages, counts), result
