"""Choosing the next token of every row of a step, each row by its own request's rules. Knows no batch and no sequence.

What differs between requests is arrays, so requests of any kind share a step and nothing recompiles. The random numbers
of a token depend on its request's seed and its place in the output alone: neither the row, nor the batch, nor the
placement changes what a request is answered.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from dancemoe_jax.inference.sampling_params import SamplingParams
from dancemoe_jax.mesh import AXIS
from dancemoe_jax.text.grammar import WORD

# Below this a temperature is greedy in effect, and too near what 32-bit floats call zero to divide by.
LEAST_TEMPERATURE = 1e-5
# Top-k and top-p look at so many likeliest tokens first, which nearly always settles them; sorting a large vocabulary
# costs forty times as much.
LIKELIEST = 1024


class SamplingRows(NamedTuple):
    """The parameters of a step's rows, each an array of one shape: [rows], or with a device axis in front."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any


def stack_params(params: Sequence[SamplingParams | None]) -> SamplingRows:
    """Rows for a step out of requests, as host arrays [rows]; None is a row without a request."""
    rows = [row or SamplingParams() for row in params]

    def column(name: str, dtype) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    temperature = column("temperature", np.float32)
    return SamplingRows(
        np.where(temperature < LEAST_TEMPERATURE, np.float32(0), temperature),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        column("repetition_penalty", np.float32),
        column("seed", np.uint32),
    )


def mark_seen(
    seen: Bool[Array, "rows vocab"],
    tokens: Int[Array, "rows some"],
    valid: Bool[Array, "rows some"],
    fresh: Bool[Array, " rows"],
) -> Bool[Array, "rows vocab"]:
    """What the repetition penalty remembers, after a step's input tokens.

    Args:
        seen: before the step; start with all false.
        valid: which of the tokens count.
        fresh: rows in which a new request begins: what was seen there before is forgotten.
    """
    rows, vocab = seen.shape
    kept = seen & ~fresh[:, None]
    return kept.at[jnp.arange(rows)[:, None], jnp.where(valid, tokens, vocab)].set(True, mode="drop")


def sample(
    logits: Float[Array, "rows vocab"],
    rows: SamplingRows,
    index: Int[Array, " rows"],
    seen: Bool[Array, "rows vocab"],
) -> Int[Array, " rows"]:
    """The next token of each row: penalty, temperature, top-k, top-p, min-p, then one draw, as transformers orders them.

    Tokens exactly as probable as the last one that top-k or top-p admits are admitted too. Costs an argmax where no row
    asks for more, and sorts only where one asks for top-k or top-p. Has no collective: call it inside `jax.shard_map`
    where logits are sharded over devices.

    Args:
        rows: parameters, arrays [rows].
        index: how many tokens each row's request has been given before.
        seen: tokens of each row's prompt and output (`mark_seen`).
    """
    logits = logits.astype(jnp.float32)
    random = rows.temperature > 0

    def full(logits):
        penalty = rows.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        return lax.cond(
            random.any(), lambda x: jnp.where(random, _draw(x, rows, index), _likeliest(x)), _likeliest, logits
        )

    return lax.cond((random | (rows.repetition_penalty != 1)).any(), full, _likeliest, logits)


def _likeliest(logits):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _draw(logits, rows, index):
    """A token from each row's truncated distribution, by the largest of logit plus Gumbel noise."""
    # Relative to the largest, so that no temperature, however small, overflows.
    scaled = (logits - logits.max(-1, keepdims=True)) / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    sorts = (rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1))
    lowest = lax.cond(sorts.any(), lambda x: _top_threshold(x, rows), lambda x: x.min(-1), scaled)
    lowest = jnp.maximum(lowest, jnp.log(rows.min_p))
    keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(rows.seed, index)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(keys)
    return _likeliest(jnp.where(scaled >= lowest[:, None], scaled + noise, -jnp.inf))


def _top_threshold(scaled, rows):
    """The smallest value that top-k, and then top-p among what it left, admit in each row; -inf where neither is asked."""
    vocab = scaled.shape[1]
    if vocab <= LIKELIEST:
        return _threshold_among(scaled, rows, vocab)[0]
    lowest, settled = _threshold_among(scaled, rows, LIKELIEST)
    every_row = (settled | (rows.temperature == 0)).all()
    return lax.cond(every_row, lambda: lowest, lambda: _threshold_among(scaled, rows, vocab)[0])


def _threshold_among(scaled, rows, count):
    """`_top_threshold` from the `count` largest values alone, and in which rows that is all there is to know."""
    falling = lax.top_k(scaled, count)[0]
    limited, nucleus = rows.top_k > 0, rows.top_p < 1
    last_of_k = jnp.clip(rows.top_k - 1, 0, count - 1)[:, None]
    kth = jnp.where(limited[:, None], jnp.take_along_axis(falling, last_of_k, axis=-1), -jnp.inf)
    weight = jnp.where(falling >= kth, jnp.exp(falling), 0)
    reached = jnp.cumsum(weight, axis=-1)
    wanted = rows.top_p[:, None] * jnp.where(scaled >= kth, jnp.exp(scaled), 0).sum(-1, keepdims=True)
    admitted = (reached - weight < wanted).at[:, 0].set(True)  # at least one, whatever the sums are rounded to
    last = jnp.where(admitted, falling, jnp.inf).min(-1)
    settled = jnp.where(limited, rows.top_k <= count, ~nucleus | (reached[:, -1] >= wanted[:, 0]))
    return jnp.where(nucleus, jnp.maximum(kth[:, 0], last), kth[:, 0]), settled


def permitted(logits: Float[Array, "rows vocab"], allowed: UInt32[Array, "rows words"]) -> Float[Array, "rows vocab"]:
    """Logits with -inf for tokens that may not come; allowed: a bit each, from the lowest one of the first word up."""
    bits = (allowed[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None]) & 1
    return jnp.where(bits.reshape(len(bits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="seen")
def choose(seen, tokens, valid, fresh, logits, rules, index, row=None, allowed=None, last=None, *, mesh):
    """Next tokens int32 [devices, rows], and what their requests have seen, the step's own tokens included.

    Args:
        seen: bool [devices, rows, vocab]; tokens, valid: [devices, rows, some]; fresh: [devices, rows], new requests.
        logits: [devices, some, vocab].
        rules: SamplingRows of [devices, rows]; index: [devices, rows], tokens that the request has been given before.
        row: int [devices, rows], whose logits each row takes; None: its own.
        allowed: uint32 [devices, rows, words], tokens that may come (`permitted`); None: any.
        last: int32 [devices, rows], what was chosen before this step: the token of a row where `tokens` has -1, and what
            rows without a token in this step are given again.
    """

    def local(seen, tokens, valid, fresh, logits, rules, index, row, allowed, last):
        tokens = tokens[0] if last is None else jnp.where(tokens[0] < 0, last[0][:, None], tokens[0])
        seen = mark_seen(seen[0], tokens, valid[0], fresh[0])
        logits = logits[0] if row is None else logits[0][row[0]]
        if allowed is not None:
            logits = permitted(logits, allowed[0])
        chosen = sample(logits, jax.tree.map(lambda a: a[0], rules), index[0], seen)
        if last is not None:
            chosen = jnp.where(valid[0].any(-1), chosen, last[0])
        return seen[None], chosen[None]

    own: Any = P(AXIS)
    run = jax.shard_map(local, mesh=mesh, in_specs=own, out_specs=own)
    return run(seen, tokens, valid, fresh, logits, rules, index, row, allowed, last)
