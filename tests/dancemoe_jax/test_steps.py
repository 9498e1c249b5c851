"""The sacred one: whatever the placement, before, during and after migration, the tokens are the dense model's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dancemoe_jax import RequestError, decode_step, generate, init_state, migrate, prefill
from dancemoe_jax.expert_parallel.all_to_all import size_classes
from dancemoe_jax.expert_parallel.two_stage import two_stage_experts
from dancemoe_jax.inference.cache import PAGE
from dancemoe_jax.kernels.library import use_native
from dancemoe_jax.mesh import AXIS
from dancemoe_jax.model.config import Latent
from tests.helpers.cluster_of_devices import CAPACITY, PROMPTS, Small, random_resident


def relative_error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


def run_prefill(small, weights, state, prompt, *, device=0, sequence=0, chunk=8, start=0):
    """All chunks of one prompt on one device; the logits after it."""
    logits = None
    devices = small.mesh.size
    for begin in range(start, len(prompt), chunk):
        part = prompt[begin : begin + chunk]
        tokens = np.zeros((devices, 1, chunk), np.int32)
        where, starts, lengths = np.zeros((3, devices, 1), np.int32)
        tokens[device, 0, : len(part)] = part
        where[device], starts[device], lengths[device] = sequence, begin, len(part)
        state, result = prefill(weights, state, tokens, where, starts, lengths, **small.shapes)
        logits = np.asarray(result.logits)[device, 0]
    return state, logits


@pytest.mark.parametrize(
    ("seed", "transport"), [*((seed, "all_to_all") for seed in range(6)), (0, "ragged"), (1, "ragged"), (0, "fixed")]
)
def test_any_placement_gives_the_reference_tokens(seed, transport):
    small = Small.make(
        seed, shared_expert_size=8 if seed % 2 else 0, tie_embeddings=seed % 3 > 0, qk_norm="" if seed == 4 else "head"
    )
    _, weights = small.place(random_resident(np.random.default_rng(seed)))
    texts = generate(weights, PROMPTS, 12, chunk=8, transport=transport, **small.shapes)
    assert texts == [small.reference_text(prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("seed", range(4))
def test_logits_of_prefill_and_decode_match_the_reference(seed):
    small = Small.make(seed)
    rng = np.random.default_rng(seed)
    _, weights = small.place(random_resident(rng))
    text = rng.integers(0, small.config.vocab_size, 30).tolist()
    expected = small.reference_logits(text)
    state, logits = run_prefill(
        small, weights, init_state(small.config, small.mesh, 2), text[:19], device=2, sequence=1
    )
    assert relative_error(logits, expected[18]) < 1e-5
    grid = (small.mesh.size, 2)
    active = np.zeros(grid, bool)
    active[2, 1] = True
    for position in range(19, 30):
        tokens, positions = np.full((2, *grid), (position,), np.int32)
        tokens[2, 1] = text[position]
        state, result = decode_step(weights, state, tokens, positions, active, **small.shapes)
        assert relative_error(np.asarray(result.logits)[2, 1], expected[position]) < 1e-5


@pytest.mark.parametrize("latent", [None, Latent(kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8)])
def test_a_prompt_has_the_same_logits_in_steps_of_every_width(latent, native, rng):
    small = Small.make(latent=latent, shared_expert_size=8)
    _, weights = small.place(random_resident(rng))
    prompt, other = rng.integers(0, 64, 21).tolist(), rng.integers(0, 64, 30).tolist()
    expected = small.reference_logits(prompt)[-1]
    shapes = small.shapes | {"kernels": "auto" if native else "xla"}
    for chunk in (4, 32):
        _, logits = run_prefill(
            small, weights, init_state(small.config, small.mesh, 2), prompt, device=2, sequence=1, chunk=chunk
        )
        assert relative_error(logits, expected) < 1e-5
    # Beside another prompt in the same step.
    tokens, lengths = np.zeros((4, 4, 32), np.int32), np.zeros((4, 4), np.int32)
    tokens[2, 0, :30], tokens[2, 1, :21], lengths[2, :2] = other, prompt, (30, 21)
    sequences, starts = np.broadcast_to(np.array([0, 1, 0, 0], np.int32), (4, 4)), np.zeros((4, 4), np.int32)
    state = init_state(small.config, small.mesh, 2)
    _, result = prefill(weights, state, tokens, sequences, starts, lengths, **shapes)
    assert relative_error(np.asarray(result.logits)[2, 1], expected) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("latent", [None, Latent(kv_rank=128, nope_dim=32, rope_dim=16, value_dim=32)])
def test_a_prompt_has_the_same_bits_in_steps_of_every_width(latent, dtype, rng):
    if not use_native("auto", "cpu"):
        pytest.skip("no C++ compiler")
    norm = "" if latent else "head"
    small = Small.make(latent=latent, shared_expert_size=24, qk_norm=norm, head_dim=64, max_position=300)
    small.decoder = jax.tree.map(lambda a: a.astype(dtype), small.decoder)
    _, weights = small.place(random_resident(rng))
    prompt, other = rng.integers(0, 64, 280).tolist(), rng.integers(0, 64, 200).tolist()
    seen = []

    def cached(state):
        """Keys and values of the prompt's whole pages."""
        pages = np.asarray(state.pages)[2, :, 1, : 280 // PAGE]
        caches = [np.asarray(cache) for cache in (state.k, state.v) if cache is not None]
        return [cache.reshape(4, -1, *cache.shape[1:])[2][pages] for cache in caches]

    for chunk in (8, 64, 256, 280):
        state = init_state(small.config, small.mesh, 2, dtype)
        state, logits = run_prefill(small, weights, state, prompt, device=2, sequence=1, chunk=chunk)
        seen.append((logits, *cached(state)))
    # Beside another prompt in the same step.
    tokens, lengths = np.zeros((4, 2, 280), np.int32), np.zeros((4, 2), np.int32)
    tokens[2, 0, :200], tokens[2, 1], lengths[2] = other, prompt, (200, 280)
    sequences, starts = np.tile(np.arange(2, dtype=np.int32), (4, 1)), np.zeros((4, 2), np.int32)
    state = init_state(small.config, small.mesh, 2, dtype)
    state, result = prefill(weights, state, tokens, sequences, starts, lengths, **small.shapes)
    seen.append((np.asarray(result.logits)[2, 1], *cached(state)))
    assert all(np.abs(part.astype(np.float32)).max() > 0 for part in seen[0])
    for got in seen[1:]:
        for part, first in zip(got, seen[0], strict=True):
            np.testing.assert_array_equal(part, first)


def test_a_device_without_a_token_computes_nothing_of_its_own(native, rng):
    small = Small.make(shared_expert_size=8)
    _, weights = small.place(random_resident(rng))
    shapes = small.shapes | {"kernels": "auto" if native else "xla"}
    tokens = np.full((small.mesh.size, 2), 7, np.int32)
    active = np.zeros(tokens.shape, bool)
    active[1] = True
    _, result = decode_step(
        weights, init_state(small.config, small.mesh, 2), tokens, np.zeros_like(tokens), active, **shapes
    )
    routed = np.asarray(result.routed)
    assert (np.sort(routed[1], -1)[..., 1:] > np.sort(routed[1], -1)[..., :-1]).all()  # a router chose them
    assert not routed[[0, 2, 3]].any()  # no router was asked, or it had named other experts
    assert np.asarray(result.logits)[1].any()
    assert not np.asarray(result.logits)[[0, 2, 3]].any()


def test_tokens_stay_the_same_through_migrations_and_nothing_recompiles(rng):
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    expected = small.reference_text(PROMPTS[0], 20)
    state, logits = run_prefill(small, weights, init_state(small.config, small.mesh, 1), PROMPTS[0])
    text = [int(np.argmax(logits))]
    grid = (small.mesh.size, 1)
    active = np.arange(small.mesh.size)[:, None] == 0
    compiled = None
    for step in range(19):
        if step % 3 == 1:
            pool, slots = migrate(
                weights.pool, slots, random_resident(rng), small.read, layout=small.layout, mesh=small.mesh
            )
            weights = weights._replace(pool=pool, tables=small.tables(slots))
        position = np.full(grid, len(PROMPTS[0]) + step, np.int32)
        state, result = decode_step(weights, state, np.full(grid, text[-1], np.int32), position, active, **small.shapes)
        text.append(int(result.tokens[0, 0]))
        compiled = compiled or decode_step._cache_size()
    assert text == expected
    assert decode_step._cache_size() == compiled


def test_counts_are_what_the_router_chose_by_device_of_entry(rng):
    from dancemoe_jax.model.decoder import forward

    small = Small.make()
    _, weights = small.place(random_resident(rng))
    prompt = PROMPTS[2]
    state, _ = run_prefill(small, weights, init_state(small.config, small.mesh, 2), prompt, device=3)
    ids = np.asarray(forward(small.config, small.decoder, small.experts, np.array([prompt]))[1])
    expected = np.stack([np.bincount(layer.ravel(), minlength=small.config.num_experts) for layer in ids])
    counts = np.asarray(state.counts)
    np.testing.assert_array_equal(counts[3], expected)
    assert counts[:3].sum() == 0


def test_traffic_is_what_the_placement_implies(rng):
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    prompt = PROMPTS[2][:8]
    grid = (4, 1)
    tokens = np.zeros((4, 1, 8), np.int32)
    tokens[1, 0, : len(prompt)] = prompt
    lengths = np.array([[0], [len(prompt)], [0], [0]], np.int32)
    zeros = np.zeros(grid, np.int32)
    state, result = prefill(
        weights, init_state(small.config, small.mesh, 1), tokens, zeros, zeros, lengths, **small.shapes
    )
    from dancemoe_jax.model.decoder import forward

    ids = np.asarray(forward(small.config, small.decoder, small.experts, np.array([prompt]))[1])
    to = np.take_along_axis(np.asarray(weights.tables.device)[1][:, None, :], ids, axis=2)
    server = small.device_server[to]
    traffic = result.traffic
    np.testing.assert_array_equal(np.asarray(traffic.local)[1], (server == 1).sum((1, 2)))
    np.testing.assert_array_equal(np.asarray(traffic.remote)[1], (server != 1).sum((1, 2)))
    crossings = [[sum((row == s).any() for row in layer) for s in (0, 2)] for layer in server]
    np.testing.assert_array_equal(np.asarray(traffic.crossings)[1], np.sum(crossings, axis=1))
    assert np.asarray(traffic.local)[[0, 2, 3]].sum() == 0
    # All devices agree on a size; it holds the busiest pair and is less than twice as large.
    for layer, row in enumerate(np.asarray(traffic.rows)[1]):
        busiest = max(sum((r == d).any() for r in to[layer]) for d in (0, 2, 3))
        assert row // 3 in [0, *size_classes(8)]
        assert busiest <= row // 3 < 2 * busiest or row == busiest == 0


def test_layers_local_everywhere_send_nothing():
    full = CAPACITY[0] + 100
    small = Small.make(capacity=(full,) * 4)
    _, weights = small.place(np.ones((4, 3, 8), bool))
    assert not np.asarray(weights.tables.needs).any()
    state, _ = run_prefill(small, weights, init_state(small.config, small.mesh, 1), PROMPTS[2])
    grid = np.zeros((4, 1), np.int32)
    _, result = decode_step(weights, state, grid, grid + 13, grid == 0, **small.shapes)
    traffic = jax.tree.map(np.asarray, result.traffic)
    assert traffic.rows.sum() == traffic.remote.sum() == traffic.crossings.sum() == 0
    assert traffic.local.sum() == 4 * 3 * 3


def test_no_collective_over_expert_weights(rng):
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    state = init_state(small.config, small.mesh, 2)
    grid = np.zeros((4, 2), np.int32)
    text = decode_step.lower(weights, state, grid, grid, grid == 0, **small.shapes).compile().as_text() or ""
    assert "all-to-all" in text
    assert "all-gather" not in text
    for line in re.findall(r".*(?:all-to-all|all-reduce|collective-permute)\(.*", text):
        assert "32,32]" not in line.split("(")[0], f"an expert's weights [32, 32] cross devices: {line}"


def test_steps_lower_for_cuda(rng):
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    state = init_state(small.config, small.mesh, 2)
    grid = np.zeros((4, 2), np.int32)
    shapes = {**small.shapes, "transport": "ragged"}
    traced = decode_step.trace(weights, state, grid, grid, grid == 0, **shapes)
    assert "ragged_all_to_all" in traced.lower(lowering_platforms=("cuda",)).as_text()
    chunk = np.zeros((4, 1, 8), np.int32)
    row = grid[:, :1]
    traced = prefill.trace(weights, state, chunk, row, row, row, **shapes)
    assert "ragged_all_to_all" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("transport", ["pairs", "ragged", "all_to_all", "fixed"])
def test_steps_have_no_array_without_elements(transport, rng):
    """As a constant it crashes the compiler of jax 0.11.2."""
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    state = init_state(small.config, small.mesh, 2)
    grid, shapes = np.zeros((4, 2), np.int32), {**small.shapes, "transport": transport}
    decoding = decode_step.lower(weights, state, grid, grid, grid == 0, **shapes).as_text()
    chunk, row = np.zeros((4, 1, 8), np.int32), grid[:, :1]
    for text in (decoding, prefill.lower(weights, state, chunk, row, row, row, **shapes).as_text()):
        assert re.findall(r"tensor<(?:\d+x)*4x.*?>", text)
        assert not re.findall(r"tensor<(?:\d+x)*0x.*?>", text)


def holds(equation, *names):
    """Whether an equation of a jaxpr, or one inside of it, is one of these."""
    if any(name in f"{equation.primitive.name} {equation.params.get('name', '')}" for name in names):
        return True
    inner = [getattr(part, "jaxpr", part) for value in equation.params.values() for part in jax.tree.leaves(value)]
    return any(holds(own, *names) for part in inner for own in getattr(part, "eqns", ()))


def test_on_accelerators_what_is_at_home_waits_for_nothing_that_travels():
    small = Small.make()

    @jax.jit
    def marked(x, slots, topk_weights):
        return x * (slots.sum(-1, keepdims=True) + topk_weights.sum(-1, keepdims=True))

    def local(x):
        one = jnp.zeros((3, 2), jnp.int32) + jax.lax.axis_index(AXIS)
        every = jnp.ones((4, 4), bool)
        links = small.layout.links
        return two_stage_experts(links, marked, x, x[:, :2], one, one, every, every, transport="ragged")[0]

    over_devices = jax.shard_map(local, mesh=small.mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    (mapped,) = jax.make_jaxpr(over_devices)(jnp.ones((12, 8))).eqns
    body = mapped.params["jaxpr"]
    (choice,) = [own for own in body.eqns if own.primitive.name == "cond" and holds(own, "ragged_all_to_all")]
    together = next(
        own.jaxpr for own in choice.params["branches"] if any(holds(e, "ragged_all_to_all") for e in own.eqns)
    )
    travelled, computed = set(), {True: 0, False: 0}
    for equation in together.eqns:
        waits = any(id(var) in travelled for var in equation.invars)
        if holds(equation, "marked"):
            computed[waits] += 1
        if waits or holds(equation, "ragged_all_to_all", "all_gather"):
            travelled |= {id(var) for var in equation.outvars}
    assert computed[False] == 1
    assert computed[True] == 1


def test_end_of_text_and_the_context_end_a_text(rng):
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    free = generate(weights, [PROMPTS[0]], 100, chunk=8, **small.shapes)[0]
    assert len(free) == small.config.max_position - len(PROMPTS[0])
    stop = free[4]
    import dataclasses

    shapes = small.shapes | {"config": dataclasses.replace(small.config, eos_token=stop)}
    assert generate(weights, [PROMPTS[0]], 100, chunk=8, **shapes)[0] == free[: free.index(stop)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "0 tokens"), ([1] * 48, "48 tokens; the model's context of 48"), ([64], r"must lie in 0\.\.63")],
)
def test_prompts_that_cannot_be_served_are_refused(prompt, message, rng):
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    with pytest.raises(RequestError, match=message):
        generate(weights, [prompt], 1, **small.shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sequence_has_the_same_bits_in_every_batch_and_among_all_neighbours(dtype, rng):
    if not use_native("auto", "cpu"):
        pytest.skip("no C++ compiler")
    small = Small.make()
    small.decoder = jax.tree.map(lambda a: a.astype(dtype), small.decoder)
    _, weights = small.place(random_resident(rng))
    grid = (small.mesh.size, 16)
    own = rng.integers(0, small.config.vocab_size, 6)
    expected = None
    for others in (0, 1, 7, 15):
        place = int(rng.integers(16))
        state, seen = init_state(small.config, small.mesh, 16, dtype), []
        neighbours = rng.choice(np.delete(np.arange(16), place), others, replace=False)
        for position, token in enumerate(own):
            tokens = rng.integers(0, small.config.vocab_size, grid).astype(np.int32)
            positions = np.full(grid, position, np.int32)
            active = np.zeros(grid, bool)
            tokens[1, place], active[1, place], active[1, neighbours] = token, True, True
            active[[0, *range(2, small.mesh.size)]] = others > 0
            state, result = decode_step(
                weights, state, tokens, positions, active, transport="all_to_all", **small.shapes
            )
            seen.append(np.asarray(result.logits)[1, place])
        expected = seen if expected is None else expected
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("transport", ["all_to_all", "ragged"])
def test_in_bfloat16_the_placement_changes_no_bit(native, transport, rng):
    small = Small.make()
    small.decoder = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small.decoder)
    kernels = "auto" if native else "xla"
    prompt, grid = rng.integers(0, small.config.vocab_size, 9).astype(np.int32), (small.mesh.size, 2)
    tokens = np.zeros((*grid, len(prompt)), np.int32)
    tokens[2, 1] = prompt
    sequences = np.tile(np.arange(2, dtype=np.int32), (small.mesh.size, 1))
    starts, lengths = np.zeros(grid, np.int32), np.zeros(grid, np.int32)
    lengths[2, 1] = len(prompt)
    how = {"transport": transport, "kernels": kernels, **small.shapes}
    expected = None
    for _ in range(10):
        _, weights = small.place(random_resident(rng))
        state = init_state(small.config, small.mesh, 2, jnp.bfloat16)
        state, result = prefill(weights, state, tokens, sequences, starts, lengths, **how)
        seen = [np.asarray(result.logits)[2, 1]]
        for step in range(6):
            rows = rng.integers(0, small.config.vocab_size, grid).astype(np.int32)
            rows[2, 1] = step
            positions = np.full(grid, len(prompt) + step, np.int32)
            state, result = decode_step(weights, state, rows, positions, np.ones(grid, bool), **how)
            seen.append(np.asarray(result.logits)[2, 1])
        expected = seen if expected is None else expected
        np.testing.assert_array_equal(seen, expected)
