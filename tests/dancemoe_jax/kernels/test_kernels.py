"""Native calls against their twins in XLA, and the order of their additions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancemoe_jax.inference.cache import PAGE
from dancemoe_jax.kernels import library
from dancemoe_jax.kernels.argmax import likeliest_native, likeliest_xla
from dancemoe_jax.kernels.attention import cached_attention_native, cached_attention_xla
from dancemoe_jax.kernels.choice import choose_native, choose_xla
from dancemoe_jax.kernels.experts import slot_experts_native, slot_experts_xla
from dancemoe_jax.kernels.linear import stacked_linear_native, stacked_linear_xla, stacked_linears_native
from dancemoe_jax.kernels.norm import rms_norm_native, rms_norm_xla, rotated_native, rotated_xla
from dancemoe_jax.kernels.swiglu import gated
from dancemoe_jax.kernels.zeros import zeros
from dancemoe_jax.model.experts import ExpertWeights
from tests.helpers.pages import over_whole_context, paged

pytestmark = pytest.mark.skipif(library.load() is None, reason="no C++ compiler")

KINDS = ["float32", "bfloat16", "int8"]


def stored(rng, kind, *shape):
    """Weights as a pool holds them, and their scale where they have one."""
    weights = rng.normal(size=shape).astype(np.float32)
    if kind == "int8":
        scale = np.abs(weights).max(-1) / 127
        return jnp.asarray(np.rint(weights / scale[..., None]).astype(np.int8)), jnp.asarray(scale)
    weights = jnp.asarray(weights, kind)
    return (weights if kind == "float32" else jax.lax.bitcast_convert_type(weights, jnp.uint16)), None


def banks_of(rng, kind, sizes, hidden, inner, biased):
    banks = []
    for size in sizes:
        (w_in, s_in), (w_out, s_out) = (
            stored(rng, kind, size, 2 * inner, hidden),
            stored(rng, kind, size, hidden, inner),
        )
        b_in, b_out = stored(rng, kind, size, 2 * inner), stored(rng, kind, size, hidden)
        if kind == "int8":
            b_in, b_out = stored(rng, "float32", size, 2 * inner), stored(rng, "float32", size, hidden)
        bias = (b_in[0], b_out[0]) if biased else (None, None)
        banks.append(ExpertWeights(w_in, w_out, *bias, s_in, s_out))
    return banks


def close(ours, theirs, kind):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    scale = np.abs(theirs).max() + 1e-9
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=2e-2 if kind == "bfloat16" else 2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("hidden", "inner", "biased", "limit"), [(64, 48, False, 0.0), (52, 23, True, 7.0), (16, 80, True, 0.0)]
)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_experts_equal_their_twin(kind, hidden, inner, biased, limit, tokens, rng):
    banks = banks_of(rng, kind, [3, 1, 4], hidden, inner, biased)
    x = jnp.asarray(rng.normal(size=(tokens, hidden)), "bfloat16" if kind == "bfloat16" else "float32")
    slots = jnp.asarray(rng.integers(-1, 8, (tokens, 3)), jnp.int32)
    weights = jnp.asarray(rng.random((tokens, 3)), jnp.float32)
    got = jax.jit(lambda *a: slot_experts_native(*a, limit=limit))(banks, x, slots, weights)
    assert got.dtype == jnp.float32
    wide = x.astype(jnp.float32)
    close(got, slot_experts_xla(banks, wide, slots, weights, limit=limit), kind)


def test_experts_with_nothing_to_do_give_zeros(rng):
    banks = banks_of(rng, "float32", [2], 16, 16, False)
    got = slot_experts_native(banks, jnp.ones((3, 16)), jnp.full((3, 2), -1), jnp.ones((3, 2)))
    np.testing.assert_array_equal(got, np.zeros((3, 16)))


@pytest.mark.parametrize("width", [1, 15, 16, 511, 512, 700, 4096])
def test_the_likeliest_token_equals_its_twin(width, rng):
    logits = rng.normal(size=(6, width)).astype(np.float32)
    logits[1] = np.round(logits[1])  # several are the largest
    logits[2] = -np.inf
    logits[3] = 0.0
    logits[4] = np.arange(width)
    active = jnp.asarray([True, True, True, True, True, False])
    expected = likeliest_xla(jnp.asarray(logits), active)
    np.testing.assert_array_equal(jax.jit(likeliest_native)(logits, active), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(64, 96, 1), (1100, 70, 7), (37, 5, 40), (2100, 40, 33)])
def test_linear_equals_its_twin(kind, inputs, outputs, rows, rng):
    weight, scale = stored(rng, kind, 3, outputs, inputs)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), "bfloat16" if kind == "bfloat16" else "float32")
    call = jax.jit(stacked_linear_native, static_argnames="dtype")
    for layer in range(3):
        got = call(x, weight, jnp.int32(layer), scale=scale, dtype="float32")
        close(got, stacked_linear_xla(x.astype(jnp.float32), weight, layer, scale=scale), "float32")
        close(call(x, weight, jnp.int32(layer), scale=scale), got, kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_rows_that_are_not_active_give_zeros(kind, transposed, heads, rng):
    weight, _ = stored(rng, kind, 2, *heads, *((40, 24) if transposed else (24, 40)))
    x = jnp.asarray(rng.normal(size=(5, *heads, 40)), kind)
    active = jnp.array([True, False, True, True, False])
    got = stacked_linear_native(x, weight, 1, active, transposed=transposed)
    close(got, stacked_linear_xla(x.astype(jnp.float32), weight, 1, active, transposed=transposed), kind)
    np.testing.assert_array_equal(got[np.array([1, 4])], 0)
    whole = stacked_linear_native(x, weight, 1, transposed=transposed)
    np.testing.assert_array_equal(got[np.array([0, 2, 3])], whole[np.array([0, 2, 3])])
    nobody = stacked_linear_native(x, weight, 1, jnp.zeros(5, bool), transposed=transposed)
    np.testing.assert_array_equal(nobody, jnp.zeros_like(whole))


def cache_of(rng, kind, *shape):
    return stored(rng, kind, *shape)[0]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 0, 5, 300])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_attention_equals_its_twin(kind, window, sinks, tokens, rng):
    keys, values = cache_of(rng, kind, 2, 5, 700, 2, 24), cache_of(rng, kind, 2, 5, 700, 2, 40)
    q = jnp.asarray(rng.normal(size=(4, tokens, 6, 24)), jnp.float32)
    slot, start = jnp.array([3, 0, 1, 4]), jnp.array([0, 255, 600, 17])
    length = jnp.array([tokens, tokens, max(1, tokens - 3), 0])
    sink = jnp.asarray(rng.normal(size=6), jnp.float32) if sinks else None
    at, how = (jnp.int32(1), slot, start, length), {"scale": 0.2, "window": window, "sinks": sink}
    expected = over_whole_context(q, keys, values, *at, **how)
    pages = paged(rng, keys, values)
    for compute in (cached_attention_native, cached_attention_xla):
        np.testing.assert_allclose(
            jax.jit(functools.partial(compute, scale=0.2))(q, *pages, *at, window=window, sinks=sink),
            expected,
            atol=3e-6,
        )
    np.testing.assert_allclose(cached_attention_xla(q, *pages, *at, **how, used=False), expected, atol=3e-6)


def test_latent_attention_equals_its_twin(rng):
    keys = cache_of(rng, "float32", 2, 3, 600, 1, 72)
    q = jnp.asarray(rng.normal(size=(3, 2, 16, 72)), jnp.float32)
    at, how = (
        (1, jnp.array([2, 0, 1]), jnp.array([500, 3, 256]), jnp.array([2, 2, 1])),
        {"scale": 0.1, "value_width": 50},
    )
    expected, pages = over_whole_context(q, keys, None, *at, **how), paged(rng, keys, None)
    for compute in (cached_attention_native, cached_attention_xla):
        np.testing.assert_allclose(compute(q, *pages, *at, **how), expected, atol=3e-6)


@pytest.mark.parametrize("compute", [cached_attention_native, cached_attention_xla])
def test_attention_reads_no_page_outside_the_window(compute, rng):
    keys, values, table = paged(
        rng, cache_of(rng, "float32", 1, 1, 700, 2, 24), cache_of(rng, "float32", 1, 1, 700, 2, 40)
    )
    q = jnp.asarray(rng.normal(size=(1, 3, 6, 24)), jnp.float32)
    at = (0, jnp.array([0]), jnp.array([600]), jnp.array([3]))
    how = {"scale": 0.2, "window": 70}
    expected = compute(q, keys, values, table, *at, **how)
    kept = table.at[:, :, : (600 - 69) // PAGE].set(len(keys))  # the pages before are gone
    np.testing.assert_array_equal(compute(q, keys, values, kept, *at, **how), expected)


def test_attention_over_a_page_that_is_not_there_is_refused(rng):
    keys, table = paged(rng, cache_of(rng, "float32", 1, 1, 100, 2, 24))
    at = (0, jnp.array([0]), jnp.array([70]), jnp.array([1]))
    with pytest.raises(Exception, match="outside the cache"):
        cached_attention_native(jnp.zeros((1, 1, 2, 24)), keys, keys, table.at[0, 0, 1].set(len(keys)), *at, scale=1.0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 2048), (3, 5, 7, 128), (2, 37)])
def test_norm_equals_its_twin(kind, shape, rng):
    x, scale = jnp.asarray(rng.normal(size=shape) * 3, kind), jnp.asarray(rng.normal(size=shape[-1]), kind)
    got = jax.jit(rms_norm_native, static_argnums=2)(x, scale, 1e-5)
    assert got.dtype == x.dtype
    close(got, rms_norm_xla(x, scale, 1e-5), kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [0, 24, 72])
def test_rotated_heads_equal_their_twin(kind, interleaved, norm, rng):
    x = jnp.asarray(rng.normal(size=(4, 5, 3, 24)) * 3, kind)
    turn = rng.normal(size=(4, 5, 12)) * 9
    turns = jnp.asarray(np.cos(turn), kind), jnp.asarray(np.sin(turn), kind)
    how = (interleaved, jnp.asarray(rng.normal(size=norm), kind) if norm else None, 1e-5)
    got = jax.jit(rotated_native, static_argnums=(3, 5))(x, *turns, *how)
    assert got.dtype == x.dtype
    close(got, rotated_xla(x, *turns, *how), kind)
    active = jnp.asarray(rng.random(20) < 0.5)
    some = rotated_native(x, *turns, *how, active)
    np.testing.assert_array_equal(some, jnp.where(active.reshape(4, 5, 1, 1), got, 0))
    np.testing.assert_array_equal(rotated_native(x[:1], *(a[:1] for a in turns), *how), got[:1])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_rows_that_are_not_active_are_neither_normed_nor_routed(kind, rng):
    x, scale = jnp.asarray(rng.normal(size=(4, 5, 3, 24)), kind), jnp.asarray(rng.normal(size=24), kind)
    active = jnp.asarray(rng.random(20) < 0.5)
    whole = rms_norm_native(x, scale, 1e-5)
    some = rms_norm_native(x, scale, 1e-5, active)
    np.testing.assert_array_equal(some, jnp.where(active.reshape(4, 5, 1, 1), whole, 0))
    logits = jnp.asarray(rng.normal(size=(20, 40)), jnp.float32)
    weights, ids = choose_native(logits, **HOW)
    some_weights, some_ids = choose_native(logits, active=active, **HOW)
    np.testing.assert_array_equal(some_weights, jnp.where(active[:, None], weights, 0))
    np.testing.assert_array_equal(some_ids, jnp.where(active[:, None], ids, jnp.arange(4)[None]))


@pytest.mark.parametrize("kind", KINDS)
def test_several_weights_in_one_call_give_what_each_gives_alone(kind, rng):
    weights, scales = zip(*(stored(rng, kind, 2, outputs, 300) for outputs in (500, 3, 70)), strict=True)
    x = jnp.asarray(rng.normal(size=(5, 300)), "float32" if kind == "float32" else "bfloat16")
    active = jnp.array([True, False, True, True, True])
    scales = scales if kind == "int8" else ()
    got = stacked_linears_native(x, weights, 1, active, scales)
    for part, weight, scale in zip(got, weights, scales or [None] * 3, strict=True):
        np.testing.assert_array_equal(part, stacked_linear_native(x, weight, 1, active, scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_gated_rows_meet_weights_as_if_they_had_been_gated_before(kind, rows, rng):
    weight, scale = stored(rng, kind, 2, 70, 300)
    x = jnp.asarray(rng.normal(size=(rows, 600)), "float32" if kind == "float32" else "bfloat16")
    active = jnp.asarray(rng.random(rows) < 0.7).at[0].set(True)
    scales = (scale,) if kind == "int8" else ()
    (got,) = stacked_linears_native(x, [weight], 1, active, scales, gated=True)
    expected = stacked_linear_xla(gated(x), weight, 1, active, *scales)
    close(got, expected, "float32" if kind == "float32" else "bfloat16")
    (alone,) = stacked_linears_native(x[:1], [weight], 1, active[:1], scales, gated=True)
    np.testing.assert_array_equal(alone[0], got[0])


HOW = {"k": 4, "sigmoid": False, "normalize": True, "scale": 1.0, "groups": 1, "top_groups": 1}
CHOICES = [
    {},
    {"normalize": False, "scale": 2.5},
    {"sigmoid": True, "groups": 4, "top_groups": 2},
    {"groups": 8, "top_groups": 3},
]


@pytest.mark.parametrize("how", CHOICES)
@pytest.mark.parametrize("corrected", [False, True])
def test_choice_equals_its_twin(how, corrected, rng):
    logits = rng.normal(size=(50, 40)).astype(np.float32) * 3
    logits[0] = 0.0  # several are the largest
    logits[1, 3:7] = 5.0
    correction = jnp.asarray(rng.normal(size=40), jnp.float32) if corrected else None
    weights, ids = jax.jit(lambda a: choose_native(a, correction, **HOW | how))(logits)
    expected_weights, expected_ids = choose_xla(jnp.asarray(logits), correction, **HOW | how)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-6)


def test_the_choice_of_a_token_without_numbers_is_some_experts():
    ids = np.asarray(choose_native(jnp.full((2, 40), jnp.nan), **HOW)[1])
    assert all(len(set(row)) == 4 and 0 <= min(row) <= max(row) < 40 for row in ids.tolist())


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
def test_memory_of_any_size_is_zeros_on_its_device(dtype):
    device = jax.devices()[1]
    for shape in ((3, 5), (2**20 + 3, 5), (2, 3 * 2**20)):
        made = zeros(shape, dtype, device)
        assert (made.shape, made.dtype, made.devices()) == (shape, jnp.dtype(dtype), {device})
        assert not np.asarray(made).any()


# --- The order of additions.


def neighbours(rng, rows, own, place):
    """`own` at row `place` among random others."""
    others = rng.normal(size=(rows, *own.shape)).astype(np.float32)
    return jnp.asarray(others).at[place].set(own.astype(jnp.float32)).astype(own.dtype)


@pytest.mark.parametrize("compute", [slot_experts_native, slot_experts_xla])
def test_in_bfloat16_partial_sums_add_up_to_the_same_bits_in_every_order(compute, rng):
    banks = banks_of(rng, "bfloat16", [8], 200, 70, True)
    x = jnp.asarray(rng.normal(size=(5, 200)), "bfloat16")
    slots = jnp.asarray(rng.permuted(np.tile(np.arange(8), (5, 1)), axis=1))
    weights = jnp.asarray(rng.random((5, 8)) / 20)  # the products of random weights are large
    whole = np.asarray(compute(banks, x, slots, weights))
    assert np.abs(whole).max() > 1
    for _ in range(5):  # assignments dealt to three devices, whose sums come back in any order
        device = jnp.asarray(rng.integers(0, 3, slots.shape))
        partial = [np.asarray(compute(banks, x, jnp.where(device == d, slots, -1), weights)) for d in range(3)]
        one, two, three = rng.permutation(3)
        np.testing.assert_array_equal(partial[one] + (partial[two] + partial[three]), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_every_batch(kind, rng):
    banks = banks_of(rng, kind, [5, 3], 200, 70, True)
    weight, scale = stored(rng, kind, 2, 90, 2200)
    x, wide = (jnp.asarray(rng.normal(size=n), "float32" if kind == "float32" else "bfloat16") for n in (200, 2200))
    slots, weights = np.array([1, 6, 4]), jnp.array([0.2, 0.5, 0.3])
    alone = slot_experts_native(banks, x[None], jnp.asarray(slots[None]), weights[None])[0]
    alone_linear = stacked_linear_native(wide[None], weight, 1, scale=scale)[0]
    for rows in (*range(1, 17), 40):
        place = int(rng.integers(rows))
        routed = rng.integers(-1, 8, (rows, 3))
        routed[place] = slots
        shares = jnp.asarray(rng.random((rows, 3)), jnp.float32).at[place].set(weights)
        got = slot_experts_native(banks, neighbours(rng, rows, x, place), jnp.asarray(routed), shares)
        np.testing.assert_array_equal(got[place], alone)
        got = stacked_linear_native(neighbours(rng, rows, wide, place), weight, 1, scale=scale)
        np.testing.assert_array_equal(got[place], alone_linear)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_row_is_normed_and_routed_to_the_same_bits_in_every_batch(kind, rng):
    x, scale = jnp.asarray(rng.normal(size=(600, 2, 128)), kind), jnp.asarray(rng.normal(size=128), kind)
    logits = jnp.asarray(rng.normal(size=(600, 60)), jnp.float32)
    normed, routed = rms_norm_native(x, scale, 1e-6), choose_native(logits, **HOW)
    for rows in (1, 2, 3, 16, 64, 256):
        np.testing.assert_array_equal(rms_norm_native(x[:rows], scale, 1e-6), normed[:rows])
        for got, whole in zip(choose_native(logits[:rows], **HOW), routed, strict=True):
            np.testing.assert_array_equal(got, whole[:rows])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kv_heads", "value_width"), [(2, None), (1, 40)])
def test_a_query_has_the_same_bits_in_every_batch_and_chunk(kind, kv_heads, value_width, rng):
    keys = cache_of(rng, kind, 1, 16, 900, kv_heads, 56)
    values = None if value_width else cache_of(rng, kind, 1, 16, 900, kv_heads, 48)
    cache, elsewhere = paged(rng, keys, values), paged(rng, keys, values)
    q = jnp.asarray(rng.normal(size=(8, 56)), kind)
    how = {"scale": 0.3, "value_width": value_width}
    for position in (0, 255, 256, 850):
        ours = (jnp.array([7]), jnp.array([position]), jnp.array([1]))
        alone = cached_attention_native(q[None, None], *cache, 0, *ours, **how)[0, 0]
        for rows in (2, 5, 16):
            place = int(rng.integers(rows))
            slot = jnp.asarray(rng.integers(0, 16, rows), jnp.int32).at[place].set(7)
            start = jnp.asarray(rng.integers(0, 800, rows), jnp.int32).at[place].set(position)
            batch = neighbours(rng, rows, q[None], place)
            got = cached_attention_native(batch, *elsewhere, 0, slot, start, jnp.ones(rows, jnp.int32), **how)
            np.testing.assert_array_equal(got[place, 0], alone)
        for before in (1, 4, 30):  # as a token of a chunk of prompt
            if position < before:
                continue
            chunk = neighbours(rng, before + 3, q, before)[None]
            ours = (jnp.array([7]), jnp.array([position - before]), jnp.array([before + 3]))
            got = cached_attention_native(chunk, *cache, 0, *ours, **how)
            np.testing.assert_array_equal(got[0, before], alone)


@pytest.mark.parametrize(("kind", "activations"), [(kind, "bfloat16") for kind in KINDS] + [("bfloat16", "float32")])
def test_instruction_sets_with_fused_products_agree_on_all_bits(kind, activations, rng):
    loaded = library.load()
    banks = banks_of(rng, kind, [4], 150, 70, False)
    x = jnp.asarray(rng.normal(size=(29, 150)), activations)
    slots, weights = jnp.asarray(rng.integers(-1, 4, (29, 2))), jnp.asarray(rng.random((29, 2)), jnp.float32)
    keys, table = paged(rng, cache_of(rng, "float32", 1, 2, 600, 2, 40))
    q = jnp.asarray(rng.normal(size=(2, 3, 8, 40)), jnp.float32)
    results = {}
    level = 0
    try:
        while loaded.dancemoe_use_instruction_set(level):
            name = loaded.dancemoe_instruction_set().decode()
            at = (0, jnp.array([0, 1]), jnp.array([500, 3]), jnp.array([3, 2]))
            attended = cached_attention_native(q, keys, keys, table, *at, scale=0.3)
            results[name] = np.asarray(slot_experts_native(banks, x, slots, weights)), np.asarray(attended)
            level += 1
    finally:
        loaded.dancemoe_use_instruction_set(level - 1)
    expected = results.pop("plain")
    for product, attended in results.values():
        np.testing.assert_allclose(attended, expected[1], rtol=1e-4, atol=1e-4)
        if activations == "float32":
            np.testing.assert_allclose(product, expected[0], rtol=1e-4, atol=1e-4)
        else:  # what lies between the two products is rounded, and may fall to either side
            close(product, expected[0], activations)
    parts = list(results.values())
    for ours in parts[1:]:
        for part, first in zip(ours, parts[0], strict=True):
            np.testing.assert_array_equal(part, first)


# --- Inside programs.


@pytest.mark.parametrize(("width", "times"), [(256, 100), (1024, 10)])  # as much as one thread does, and several
def test_four_devices_of_one_process_call_at_once_and_come_back(width, times, rng):
    devices = 4
    mesh = jax.make_mesh((devices,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    small = functools.partial(jax.tree.map, lambda a: a * width**-0.5)
    banks = small(banks_of(rng, "float32", [4], width, 192, False))
    weight = small(stored(rng, "float32", 6, width, width)[0])
    x = jnp.asarray(rng.normal(size=(devices * 4, width)), jnp.float32)
    slots, weights = jnp.asarray(rng.integers(0, 4, (devices * 4, 2))), jnp.ones((devices * 4, 2)) / 2

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(jax.P("d"), jax.P("d"), jax.P("d"), jax.P(), jax.P()), out_specs=jax.P("d"))
    def steps(x, slots, weights, banks, weight):
        def layer(x, index):
            x = x + 0.1 * slot_experts_native(banks, x, slots, weights)
            x = x + 0.1 * stacked_linear_native(x, weight, index)
            return jax.lax.ppermute(x, "d", [(i, (i + 1) % devices) for i in range(devices)]), None

        return jax.lax.scan(layer, x, jnp.arange(6))[0]

    first = np.asarray(steps(x, slots, weights, banks, weight))
    assert np.isfinite(first).all()
    for _ in range(times):
        np.testing.assert_array_equal(steps(x, slots, weights, banks, weight), first)


def test_a_scan_copies_no_weight(rng):
    weight, _ = stored(rng, "float32", 7, 300, 200)
    run = jax.jit(
        lambda x, w: jax.lax.scan(
            lambda x, i: (stacked_linear_native(x, w, i)[:, :200], None), x, jnp.arange(7, dtype=jnp.int32)
        )[0]
    )
    text = run.lower(jnp.ones((2, 200)), weight).compile().as_text() or ""
    assert "dancemoe_linear" in text
    made = [
        line
        for line in text.splitlines()
        if "= f32[300,200]" in line or "= f32[1,300,200]" in line or (" copy(" in line and "7,300,200" in line)
    ]
    assert not made
