"""NaN and infinity that arise in a step: their row is named with the layer, and its neighbors' numbers stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancemoe_jax import ModelError, decode_step, generate, init_state, prefill
from dancemoe_jax.inference.finite import all_finite, not_finite
from dancemoe_jax.kernels.experts import slot_experts_native, slot_experts_xla
from dancemoe_jax.model.decoder import forward
from dancemoe_jax.model.experts import ExpertWeights
from tests.helpers.cluster_of_devices import Small, random_resident

LAYER = 1


def with_expert_that_overflows(small: Small, expert: int) -> None:
    """Give an expert of a layer finite weights that are so large that its products are not."""
    w_out = small.experts.w_out[...]
    small.experts.w_out[...] = w_out.at[LAYER, expert].set(3e38)


def prompts_around_an_expert(small: Small, rng) -> tuple[int, list[int], list[list[int]]]:
    """An expert, a prompt that chooses it in the layer, and prompts that do not."""
    prompts = rng.integers(0, small.config.vocab_size, (60, 2))
    ids = np.asarray(forward(small.config, small.decoder, small.experts, prompts)[1])[LAYER].reshape(60, -1)
    chosen = (ids[:, :, None] == np.arange(small.config.num_experts)).any(1)
    expert = int(np.argmin(chosen.sum(0)))
    choosing, others = prompts[chosen[:, expert]].tolist(), prompts[~chosen[:, expert]].tolist()
    assert choosing
    assert len(others) > 7
    return expert, choosing[0], others[:7]


@pytest.mark.parametrize("kernels", ["auto", "xla"])
@pytest.mark.parametrize("transport", ["all_to_all", "ragged"])
def test_a_row_that_is_not_finite_is_known_by_its_layer_and_spoils_no_other(rng, kernels, transport):
    small = Small.make()
    expert, choosing, others = prompts_around_an_expert(small, rng)
    resident = random_resident(rng)
    results = []
    for prompt in (others[7 % len(others)], choosing):  # alone, and beside the bad one
        _, weights = small.place(resident)
        tokens = np.array([[prompt, others[0]], [others[1], others[2]], [others[3], others[4]], [others[5], others[6]]])
        sequences = np.broadcast_to(np.arange(2, dtype=np.int32), (4, 2))
        lengths = np.full((4, 2), 2, np.int32)
        state = init_state(small.config, small.mesh, 2)
        shapes = {**small.shapes, "kernels": kernels, "transport": transport}
        state, result = prefill(
            weights, state, tokens.astype(np.int32), sequences, 0 * lengths, lengths, all_logits=True, **shapes
        )
        results.append((np.asarray(result.logits), np.asarray(result.finite_layers)))
        with_expert_that_overflows(small, expert)
    healthy, bad = results
    assert (healthy[1] == all_finite(small.config)).all()
    assert bad[1][0, 0] == LAYER
    assert (np.delete(bad[1].ravel(), 0) == all_finite(small.config)).all()
    assert np.isnan(bad[0][0, 0]).any()
    others_of = [np.delete(logits.reshape(8, 2, -1), 0, axis=0) for logits in (healthy[0], bad[0])]
    np.testing.assert_array_equal(*others_of)


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_the_cache_of_such_a_row_spoils_nobody_who_has_its_place_next(rng, kernels):
    small = Small.make()
    expert, choosing, others = prompts_around_an_expert(small, rng)
    resident = random_resident(rng)
    _, sound = small.place(resident)
    with_expert_that_overflows(small, expert)
    _, broken = small.place(resident)
    shapes = {**small.shapes, "kernels": kernels}
    zero = np.zeros((4, 1), np.int32)
    # The place is used up to its end first, so that what is left there lies behind the next one's tokens.
    long = np.array([(choosing * 24)[: small.config.max_position]] * 4, np.int32)[:, None]
    short = np.array([others[0]] * 4, np.int32)[:, None]
    found = []
    for weights in (sound, broken):
        state = init_state(small.config, small.mesh, 1)
        state, result = prefill(weights, state, long, zero, zero, zero + long.shape[2], **shapes)
        layers = np.asarray(result.finite_layers)
        state, result = prefill(sound, state, short, zero, zero, zero + 2, **shapes)
        logits = [np.asarray(result.logits)]
        state, result = decode_step(sound, state, np.asarray(result.tokens), zero + 2, zero == 0, **shapes)
        found.append((layers, [*logits, np.asarray(result.logits)]))
    assert (found[0][0] == all_finite(small.config)).all()
    assert (found[1][0] == LAYER).all()
    assert np.isfinite(found[0][1]).all()
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_keys_and_values_that_are_not_finite_are_noticed_in_their_layer(rng, kernels):
    small = Small.make(qk_norm="")
    small.decoder.run_0.v[...] = small.decoder.run_0.v[...].at[2].set(3e38)
    _, weights = small.place(random_resident(rng))
    grid = np.zeros((4, 1), np.int32)
    active = np.arange(4)[:, None] < 2
    state = init_state(small.config, small.mesh, 1)
    state, result = decode_step(weights, state, grid + 3, grid, active, **small.shapes, kernels=kernels)
    assert np.asarray(result.finite_layers)[:, 0].tolist() == [2, 2, 4, 4]
    assert all(np.isfinite(np.asarray(part)).all() for part in jax.tree.leaves(state))


def test_generate_names_the_prompt_and_the_layer(rng):
    small = Small.make()
    expert, choosing, others = prompts_around_an_expert(small, rng)
    with_expert_that_overflows(small, expert)
    _, weights = small.place(random_resident(rng))
    with pytest.raises(ModelError, match=r"prompt 5: .* from layer 1 on .*--dtype float32"):
        generate(weights, [*others[:5], choosing], 1, **small.shapes)


def test_the_output_head_is_named_where_the_layers_are_finite():
    config = Small.make().config
    assert "from layer 2 on" in not_finite(config, 2)
    assert "from the output head on" in not_finite(config, 3)
    assert all_finite(config) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_without_an_expert_here_takes_nothing_from_its_neighbors_expert(native, dtype):
    """Experts are computed in tiles of rows, which hold rows of other tokens too."""
    compute = slot_experts_native if native else slot_experts_xla
    banks = [ExpertWeights(jnp.ones((1, 64, 32), dtype), jnp.full((1, 32, 32), 3e38, dtype))]
    slots, weights = jnp.array([[0, -1], [-1, -1], [-1, 0]]), jnp.ones((3, 2))
    out = np.asarray(compute(banks, jnp.full((3, 32), 10, dtype), slots, weights), np.float32)
    assert not np.isfinite(out[[0, 2]]).any()
    assert (out[1] == 0).all()
