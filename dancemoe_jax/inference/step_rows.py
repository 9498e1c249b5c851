"""The rows of a step on one device: as they are given, a chunk of each of a few sequences, and as they are computed.

Layers compute either the whole grid of rows and tokens, or, where few of its places hold a token, only the tokens that
count, one row's after another's. Attention always sees the grid: the tokens of a row share their keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class StepRows(NamedTuple):
    """R rows of C tokens; [n, m] is [R, C], or [most tokens, 1] where only tokens that count are computed.

    Attributes:
        slots: the sequence of each row, [R]; starts, lengths: of its tokens, [R].
        tokens, positions, owners: of what is computed, and the sequence it belongs to, [n, m]; valid: whether it counts.
        places: of what is computed in the grid, [most tokens], R * C for what does not count; None: the grid is computed.
        chunk: C.
    """

    slots: Int[Array, " rows"]
    starts: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    tokens: Int[Array, "n m"]
    positions: Int[Array, "n m"]
    owners: Int[Array, "n m"]
    valid: Bool[Array, "n m"]
    places: Int[Array, " tokens"] | None
    chunk: int

    def to_grid(self, x: Array) -> Array:
        """What is computed [n, m, ...] as [R, C, ...], zeros where there is nothing."""
        if self.places is None:
            return x
        grid = jnp.zeros((len(self.slots) * self.chunk, *x.shape[2:]), x.dtype)
        return grid.at[self.places].set(x[:, 0], mode="drop").reshape(len(self.slots), self.chunk, *x.shape[2:])

    def from_grid(self, x: Array) -> Array:
        """The inverse of `to_grid`."""
        if self.places is None:
            return x
        return x.reshape(-1, *x.shape[2:]).at[self.places].get(mode="fill", fill_value=0)[:, None]

    def of_last(self, x: Array) -> Array:
        """Of [n, m, ...] what belongs to each row's last token that counts, [R, ...]; anything for a row without one."""
        if self.places is None:
            last = jnp.maximum(self.lengths - 1, 0)
            return jnp.take_along_axis(x, last.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]
        return x[jnp.maximum(jnp.cumsum(self.lengths) - 1, 0), 0]

    def put_last(self, last: Int[Array, " sequences"], tokens: Int[Array, " rows"]) -> Int[Array, " sequences"]:
        """`last` with the token that follows each row in the place of its sequence."""
        return last.at[jnp.where(self.lengths > 0, self.slots, len(last))].set(tokens, mode="drop")

    def least(self, numbers: Int[Array, " n"], most: int) -> Int[Array, " rows"]:
        """The least of the numbers of each row's tokens that count; `most` for a row without one."""
        if self.places is None:
            return numbers
        # Places beyond the grid are of no row.
        return jnp.full(len(self.slots), most, numbers.dtype).at[self.places // self.chunk].min(numbers, mode="drop")


def step_rows(
    tokens: Int[Array, "rows chunk"],
    slots: Int[Array, " rows"],
    starts: Int[Array, " rows"],
    lengths: Int[Array, " rows"],
    most_tokens: int | None = None,
) -> StepRows:
    """Rows of a step.

    Args:
        most_tokens: that count, of all rows together; None: the whole grid is computed.
    """
    rows, chunk = tokens.shape
    index = jnp.arange(chunk)[None]
    valid = index < lengths[:, None]
    positions, owners = starts[:, None] + index, jnp.broadcast_to(slots[:, None], tokens.shape)
    if most_tokens is None:
        return StepRows(slots, starts, lengths, tokens, positions, owners, valid, None, chunk)
    places = jnp.nonzero(valid.reshape(-1), size=most_tokens, fill_value=rows * chunk)[0]
    tokens, positions, owners = (
        a.reshape(-1).at[places].get(mode="fill", fill_value=0)[:, None] for a in (tokens, positions, owners)
    )
    return StepRows(slots, starts, lengths, tokens, positions, owners, places[:, None] < rows * chunk, places, chunk)
