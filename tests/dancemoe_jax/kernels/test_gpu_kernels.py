"""The GPU's kernels, carried out operation by operation on a CPU, against float64 and against their references in XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancemoe_jax import generate
from dancemoe_jax.inference import steps
from dancemoe_jax.kernels.gpu_attention import cached_attention_gpu
from dancemoe_jax.kernels.gpu_call import gpu_kernels
from dancemoe_jax.kernels.gpu_experts import fits, make_plan, slot_experts_gpu
from dancemoe_jax.kernels.gpu_linear import stacked_linear_gpu
from dancemoe_jax.kernels.gpu_loop import slot_experts_loop
from dancemoe_jax.kernels.swiglu import ExpertWeights
from dancemoe_jax.model.experts import dequantize, quantize
from tests.helpers.cluster_of_devices import PROMPTS, Small, random_resident
from tests.helpers.pages import over_whole_context, paged

HOW = "interpreted"


def random_bank(rng, slots, hidden, inner, dtype, bias, int8):
    own = ExpertWeights(
        rng.normal(size=(slots, 2 * inner, hidden)).astype(np.float32) / hidden**0.5,
        rng.normal(size=(slots, hidden, inner)).astype(np.float32) / inner**0.5,
        rng.normal(size=(slots, 2 * inner)).astype(np.float32) if bias else None,
        rng.normal(size=(slots, hidden)).astype(np.float32) if bias else None,
    )
    own = quantize(own) if int8 else own
    stored = {"w_in", "w_out", "b_in", "b_out"} - ({"w_in", "w_out"} if int8 else set())
    return own._replace(**{name: jnp.asarray(a, dtype) for name in stored if (a := getattr(own, name)) is not None})


def exact_experts(banks, x, slots, weights, limit):
    """In float64, assignment by assignment."""
    whole = [dequantize(jax.tree.map(lambda a: np.asarray(a, np.float64), bank)) for bank in banks]
    w_in, w_out, b_in, b_out = (
        None if whole[0][part] is None else np.concatenate([bank[part] for bank in whole]) for part in range(4)
    )
    out = np.zeros(x.shape)
    for (token, place), slot in np.ndenumerate(slots):
        if slot >= 0:
            inner = w_in[slot] @ np.asarray(x[token], np.float64) + (0 if b_in is None else b_in[slot])
            gate, up = np.split(inner, 2)
            if limit:
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                inner = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            else:
                inner = gate / (1 + np.exp(-gate)) * up
            out[token] += weights[token, place] * (w_out[slot] @ inner + (0 if b_out is None else b_out[slot]))
    return out


# tokens, k, slots of each bank, hidden, inner
SHAPES = [
    (1, 2, (6,), 32, 48),
    (5, 3, (4, 5), 40, 24),
    (33, 4, (20,), 64, 32),
    (70, 4, (3, 1, 2), 36, 20),
    (300, 1, (4,), 16, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "bias", "int8", "limit"),
    [("float32", False, False, 0.0), ("bfloat16", True, False, 7.0), ("float32", False, True, 0.0)],
)
def test_experts_are_those_of_float64(shape, dtype, bias, int8, limit):
    tokens, k, sizes, hidden, inner = shape
    rng = np.random.default_rng(tokens)
    banks = tuple(random_bank(rng, size, hidden, inner, dtype, bias, int8) for size in sizes)
    x = jnp.asarray(rng.normal(size=(tokens, hidden)), dtype)
    # Group sizes of every kind: one slot for nearly all, some for none, a third of the assignments nowhere.
    slots = np.where(rng.random((tokens, k)) < 0.5, 0, rng.integers(0, sum(sizes), (tokens, k)))
    slots = np.where(rng.random((tokens, k)) < 0.3, -1, slots).astype(np.int32)
    slots[0, 0] = 0
    weights = rng.random((tokens, k)).astype(np.float32)
    got = slot_experts_gpu(
        banks, x, jnp.asarray(slots), jnp.asarray(weights), limit=limit, most_slots=sum(sizes), how=HOW
    )
    expected = exact_experts(banks, x, slots, weights, limit)
    assert got.dtype == jnp.float32
    loop = slot_experts_loop(banks, x, jnp.asarray(slots), jnp.asarray(weights), limit=limit, most_slots=sum(sizes))
    for own in (got, loop):
        error = np.abs(np.asarray(own, np.float64) - expected).max() / np.abs(expected).max()
        assert error < (2e-2 if dtype == "bfloat16" else 2e-6)


def test_a_plan_covers_every_assignment_once_and_no_tile_holds_two_slots(rng):
    for tile, count in ((1, 7), (4, 40), (16, 100)):
        slots = rng.integers(-1, 6, (count, 1)).astype(np.int32)
        plan = jax.tree.map(np.asarray, make_plan(jnp.asarray(slots), tile, 6))
        seen = []
        for slot, start, rows in zip(plan.slot, plan.start, plan.rows, strict=True):
            own = plan.order[start : start + rows]
            assert (slots[own, 0] == slot).all()
            assert 0 < rows <= tile or (slot == -1 and rows == 0)
            seen += own.tolist()
        assert sorted(seen) == np.flatnonzero(slots >= 0).tolist()


def test_a_tokens_experts_give_the_same_bits_beside_any_others(rng):
    banks = (random_bank(rng, 6, 32, 16, "float32", False, False),)
    x, slots = jnp.asarray(rng.normal(size=(40, 32)), jnp.float32), rng.integers(0, 6, (40, 3)).astype(np.int32)
    weights = jnp.asarray(rng.random((40, 3)), jnp.float32)
    run = jax.jit(lambda *a: slot_experts_gpu(banks, *a, most_slots=6, how=HOW))
    together = run(x, jnp.asarray(slots), weights)
    others = jnp.asarray(np.where(np.arange(40)[:, None] == 7, slots, rng.integers(-1, 6, (40, 3))).astype(np.int32))
    np.testing.assert_array_equal(together[7], run(x, others, weights)[7])


def test_arrays_that_pallas_counts_wrongly_are_refused():
    def bank(slots, dtype):
        return ExpertWeights(jax.ShapeDtypeStruct((slots, 1024, 1024), dtype), jax.ShapeDtypeStruct((8, 8), dtype))

    assert fits([bank(1024, jnp.int8)])
    assert not fits([bank(1024, jnp.int8), bank(3000, jnp.int8)])
    assert fits([bank(3000, jnp.bfloat16)])
    assert not fits([bank(8, jnp.uint16)])


# rows, tokens, heads, kv_heads, width, value, positions, latent, window, sinks
ATTENTION = [
    (3, 1, 8, 2, 20, 20, 700, False, None, False),
    (2, 7, 8, 2, 20, 16, 700, False, 50, True),
    (3, 5, 4, 1, 40, 32, 300, True, None, False),
    (2, 40, 4, 1, 40, 32, 600, True, 100, True),
    (5, 1, 6, 6, 16, 16, 1100, False, 0, False),
]


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_that_of_xla_over_the_whole_context(case, rng):
    rows, tokens, heads, kv_heads, width, value, positions, latent, window, sinks = case

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, keys = normal(rows, tokens, heads, width), normal(2, 5, positions, kv_heads, width)
    values = None if latent else normal(2, 5, positions, kv_heads, value)
    slot = jnp.asarray(rng.permutation(5)[:rows], jnp.int32)
    length = jnp.asarray(rng.integers(0, tokens + 1, rows), jnp.int32).at[0].set(tokens)
    # A row that rests has a start beyond the cache.
    start = jnp.where(length > 0, jnp.asarray(rng.integers(0, positions - tokens, rows), jnp.int32), positions)
    how = {"scale": 0.3, "window": window, "sinks": normal(heads) if sinks else None}
    how["value_width"] = value if latent else None
    expected = over_whole_context(q, keys, values, 1, slot, start, length, **how)
    got = cached_attention_gpu(q, *paged(rng, keys, values), 1, slot, start, length, **how, how=HOW)
    np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_products_are_those_of_float64(heads, transposed, rng):
    for rows, inputs, outputs, dtype in ((1, 40, 24, "float32"), (70, 130, 50, "float32"), (9, 64, 32, "bfloat16")):
        x = jnp.asarray(rng.normal(size=(rows, *heads, inputs)), dtype)
        last = (inputs, outputs) if transposed else (outputs, inputs)
        weight = jnp.asarray(rng.normal(size=(3, *heads, *last)), dtype)
        got = stacked_linear_gpu(x, weight, 2, transposed=transposed, dtype=jnp.float32, how=HOW)
        own = np.asarray(weight, np.float64)[2]
        own = own if transposed else np.swapaxes(own, -1, -2)
        expected = np.einsum("r...i,...io->r...o", np.asarray(x, np.float64), own)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * inputs**0.5)


def test_whole_steps_with_the_kernels_give_the_reference_tokens(monkeypatch, rng):
    monkeypatch.setattr(steps, "gpu_kernels", lambda kernels, devices: HOW)
    monkeypatch.setattr(steps, "use_native", lambda *_: False)
    # What carries kernels out operation by operation does not know of axes over which values vary.
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    jax.clear_caches()
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    texts = generate(weights, PROMPTS[:2], 3, chunk=8, transport="ragged", **small.shapes)
    jax.clear_caches()
    assert texts == [small.reference_text(prompt, 3) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize(("server", "transport"), [((0,), "ragged"), ((0,), "pairs"), ((0, 0), "ragged")])
def test_a_mesh_of_one_server_takes_every_transport(server, transport):
    small = Small.make(capacity=(24,) * len(server), device_server=server)
    _, weights = small.place(np.ones((len(server), 3, 8), bool))
    texts = generate(weights, PROMPTS[:1], 4, chunk=8, transport=transport, **small.shapes)
    assert texts == [small.reference_text(PROMPTS[0], 4)]


class Card:
    platform, device_kind, compute_capability = "gpu", "NVIDIA GeForce RTX 3090", "8.6"


def test_kernels_are_for_cards_that_their_compiler_knows():
    turing, other = Card(), Card()
    turing.compute_capability = "7.5"
    other.device_kind = "AMD Instinct"
    assert gpu_kernels("auto", [Card(), Card()]) == "compiled"
    assert gpu_kernels("xla", [Card()]) is None
    assert gpu_kernels("auto", [Card(), turing]) == gpu_kernels("auto", [other]) == "loop"
    assert gpu_kernels("auto", jax.devices("cpu")) is None
