"""Sampling: every rule against plain numpy, reproducible whatever the batch, no recompilation for another mixture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancemoe_jax.errors import RequestError
from dancemoe_jax.inference import sampling
from dancemoe_jax.inference.sampling import SamplingRows, mark_seen, permitted, sample, stack_params
from dancemoe_jax.inference.sampling_params import SamplingParams

VOCAB = 40
draw = jax.jit(sample)


def nothing_seen(rows: int, vocab: int = VOCAB) -> np.ndarray:
    return np.zeros((rows, vocab), bool)


def probabilities(logits, params: SamplingParams, seen=()) -> np.ndarray:
    """The distribution that a request samples from, one rule after the other in float64."""
    scores = np.array(logits, np.float64)
    for token in set(seen):
        scores[token] = (
            scores[token] / params.repetition_penalty
            if scores[token] > 0
            else scores[token] * params.repetition_penalty
        )
    scores /= params.temperature
    order = np.argsort(-scores)
    if params.top_k:
        scores[order[params.top_k :]] = -np.inf
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    total, kept = 0.0, np.zeros(len(scores), bool)
    for token in order:
        if total >= params.top_p and params.top_p < 1:
            break
        kept[token], total = True, total + chances[token]
    chances[~kept] = 0
    chances[chances < params.min_p * chances.max()] = 0
    return chances / chances.sum()


def drawn(logits, params: SamplingParams, count: int, seen=()) -> np.ndarray:
    """How often each token comes in `count` draws of one request's tokens 0..count-1."""
    mask = nothing_seen(count)
    mask[:, list(seen)] = True
    tokens = draw(np.tile(logits, (count, 1)), stack_params([params] * count), np.arange(count), mask)
    return np.bincount(np.asarray(tokens), minlength=VOCAB)


RULES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"top_k": 12, "top_p": 0.8},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.15, "temperature": 1.7},
    {"repetition_penalty": 1.8, "top_p": 0.9},
    {"repetition_penalty": 0.6},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_frequencies_follow_the_rules(rules, rng):
    params = SamplingParams(**{"temperature": 1.0, "seed": 3} | rules)
    logits, seen, count = rng.normal(0, 2, VOCAB).astype(np.float32), (1, 7, 20, 33), 20_000
    expected = probabilities(logits, params, seen)
    found = drawn(logits, params, count, seen)
    assert not found[expected == 0].any(), "a token came that the rules exclude"
    deviation = np.sqrt(count * expected * (1 - expected)) + 1
    assert (np.abs(found - count * expected) < 5 * deviation).all()


def test_all_rules_mixed_in_one_batch_each_keep_their_own_support(rng):
    everyone = [SamplingParams(**{"temperature": 1.0, "seed": n} | rules) for n, rules in enumerate(RULES)]
    logits = rng.normal(0, 2, (len(everyone), VOCAB)).astype(np.float32)
    for index in range(30):
        tokens = np.asarray(
            draw(logits, stack_params(everyone), np.full(len(everyone), index), nothing_seen(len(everyone)))
        )
        for row, params in enumerate(everyone):
            assert probabilities(logits[row], params)[tokens[row]] > 0, params


def test_tokens_depend_on_seed_and_index_alone(rng):
    """The same request alone, in other rows, in larger batches and among other requests."""
    logits = rng.normal(0, 1, (6, VOCAB)).astype(np.float32)
    mine = SamplingParams(temperature=1.2, top_p=0.95, repetition_penalty=1.1, seed=77)
    others = [None, SamplingParams(temperature=2.0, seed=77), SamplingParams(top_k=3, temperature=1.0), None, None]
    alone = [int(draw(logits[:1], stack_params([mine]), np.array([i]), nothing_seen(1))[0]) for i in range(20)]
    assert len(set(alone)) > 5
    for row in range(6):
        params = [*others[:row], mine, *others[row:]]
        order = [*range(1, row + 1), 0, *range(row + 1, 6)]
        for i in range(20):
            index = np.arange(100, 106)
            index[row] = i
            assert int(draw(logits[order], stack_params(params), index, nothing_seen(6))[row]) == alone[i]
    another = dataclasses.replace(mine, seed=78)
    assert alone != [
        int(draw(logits[:1], stack_params([another]), np.array([i]), nothing_seen(1))[0]) for i in range(20)
    ]


def test_the_same_under_shard_map(rng):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("expert",))
    own = jax.sharding.PartitionSpec("expert")
    params = [SamplingParams(temperature=1.0, seed=n % 3, top_k=5 * (n % 2)) for n in range(8)]
    arguments = (rng.normal(size=(8, VOCAB)).astype(np.float32), stack_params(params), np.arange(8), nothing_seen(8))
    dealt = jax.shard_map(sample, mesh=mesh, in_specs=(own, own, own, own), out_specs=own)
    np.testing.assert_array_equal(jax.jit(dealt)(*arguments), draw(*arguments))


def test_greedy_is_the_first_largest_and_ignores_every_other_rule(rng):
    logits = rng.integers(0, 4, (5, VOCAB)).astype(np.float32)
    rows = stack_params(
        [None, SamplingParams(), SamplingParams(top_k=3), SamplingParams(seed=9), SamplingParams(temperature=1e-30)]
    )
    np.testing.assert_array_equal(draw(logits, rows, np.arange(5), nothing_seen(5)), logits.argmax(1))
    mixed = stack_params([None, None, None, None, SamplingParams(temperature=1.0)])
    np.testing.assert_array_equal(draw(logits, mixed, np.arange(5), nothing_seen(5))[:4], logits.argmax(1)[:4])


def test_greedy_with_a_repetition_penalty():
    logits = np.array([[2.0, 1.5, -1.0], [-2.0, -1.0, -1.5]], np.float32)
    seen = np.array([[True, False, False], [False, True, False]])
    rows = stack_params([SamplingParams(repetition_penalty=2.0)] * 2)
    np.testing.assert_array_equal(draw(logits, rows, np.zeros(2, int), seen), [1, 2])
    rows = stack_params([SamplingParams(), SamplingParams(repetition_penalty=2.0)])
    np.testing.assert_array_equal(draw(logits, rows, np.zeros(2, int), seen), [0, 2])


def test_extreme_logits_and_temperatures_draw_what_is_possible():
    logits = np.full((3, VOCAB), -np.inf, np.float32)
    logits[:, 5], logits[1, 6], logits[2] = 1e30, 1e30, -1e30
    rows = stack_params([SamplingParams(temperature=t, top_p=0.9, top_k=8) for t in (1e-4, 1e4, 1.0)])
    for index in range(20):
        tokens = np.asarray(draw(logits, rows, np.full(3, index), nothing_seen(3)))
        assert tokens[0] == 5
        assert tokens[1] in (5, 6)
        assert 0 <= tokens[2] < VOCAB


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_a_large_vocabulary_keeps_the_same_tokens_as_a_full_sort(scale, rng, monkeypatch):
    """Flat distributions reach past the likeliest tokens that are looked at first, steep ones do not."""
    logits = rng.normal(0, scale, (4, 6000)).astype(np.float32)
    rules = [{"top_p": 0.9}, {"top_k": 3000, "top_p": 0.5}, {"top_k": 20, "top_p": 0.95}, {"min_p": 0.5}]
    rows = stack_params([SamplingParams(temperature=1.0, **each) for each in rules])
    scaled = logits - logits.max(1, keepdims=True)
    found = scaled >= np.asarray(sampling._top_threshold(scaled, rows))[:, None]
    monkeypatch.setattr(sampling, "LIKELIEST", 6000)
    assert (found == (scaled >= np.asarray(sampling._top_threshold(scaled, rows))[:, None])).all()
    for row, each in enumerate(rules[:3]):
        kept = probabilities(logits[row], SamplingParams(temperature=1.0, **each)) > 0
        assert abs(int(found[row].sum()) - int(kept.sum())) <= 1, "but for what a sum in 32 bits rounds away"
    assert found[3].all(), "min-p is not this function's"


def test_another_mixture_compiles_nothing(rng):
    traced = []

    @jax.jit
    def step(*arguments):
        traced.append(1)
        return sample(*arguments)

    logits = rng.normal(size=(2, VOCAB)).astype(np.float32)
    for rules in RULES:
        step(logits, stack_params([None, SamplingParams(**rules)]), np.arange(2), nothing_seen(2))
    assert len(traced) == 1


def test_all_greedy_neither_sorts_nor_draws():
    """What costs sits in branches of its own: the greedy path is the outermost branch and only an argmax."""
    rows = SamplingRows(*map(jnp.asarray, stack_params([None])))
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((1, VOCAB)), rows, jnp.zeros(1, int), jnp.zeros((1, VOCAB), bool)).jaxpr
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert "cond" in names
    assert not {"sort", "random_bits", "cumsum", "argmax"} & set(names)
    greedy, _ = jaxpr.eqns[names.index("cond")].params["branches"]
    assert {equation.primitive.name for equation in greedy.jaxpr.eqns} <= {"argmax", "convert_element_type"}


def test_seen_tokens_are_marked_and_forgotten():
    seen = mark_seen(
        jnp.zeros((3, 6), bool),
        jnp.array([[1, 2], [3, 4], [5, 0]]),
        jnp.array([[True, True], [True, False], [False, False]]),
        jnp.zeros(3, bool),
    )
    expected = np.zeros((3, 6), bool)
    expected[0, [1, 2]] = expected[1, 3] = True
    np.testing.assert_array_equal(seen, expected)
    seen = mark_seen(
        seen, jnp.array([[0], [5], [2]]), jnp.array([[True], [True], [True]]), jnp.array([True, False, False])
    )
    expected[0] = False
    expected[0, 0] = expected[1, 5] = expected[2, 2] = True
    np.testing.assert_array_equal(seen, expected)


MEANINGLESS = {
    "max_tokens": [0, 1.5, True],
    "temperature": [-1, float("nan"), float("inf"), "1", None],
    "top_k": [-1, 2.0, 2**31],
    "top_p": [0, 1.1, True],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0, float("inf")],
    "seed": [-1, 2**32, 0.5],
    "stop": ["text", ("",), ["x"], (1,)],
    "stop_tokens": [(-1,), ("a",), 5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in MEANINGLESS.items() for value in values]
)
def test_values_that_mean_nothing(field, value):
    with pytest.raises(RequestError, match=f"sampling: {field} = ") as error:
        SamplingParams(**{field: value})
    assert "must be" in str(error.value)
    assert "\n" not in str(error.value)


def test_largest_values_are_taken():
    params = SamplingParams(temperature=1.0, seed=2**32 - 1, top_k=2**31 - 1, top_p=1, min_p=1)
    assert (
        draw(np.eye(1, VOCAB, 4, dtype=np.float32), stack_params([params]), np.array([2**31 - 1]), nothing_seen(1))[0]
        == 4
    )


def test_a_mask_leaves_what_may_come_as_it_is_and_nothing_else():
    logits = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32)
    allowed = np.array([[2**32 - 1, 2**32 - 1], [0b1001 << 5, 0b10]], np.uint32)
    found = np.asarray(permitted(jnp.asarray(logits), jnp.asarray(allowed)))
    np.testing.assert_array_equal(found[0], logits[0])
    assert np.flatnonzero(np.isfinite(found[1])).tolist() == [5, 8, 33]
    np.testing.assert_array_equal(found[1, [5, 8, 33]], logits[1, [5, 8, 33]])
