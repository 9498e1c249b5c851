"""Logarithms of the probabilities of chosen tokens and of the likeliest ones, where requests want them. Takes no step."""

from collections.abc import Sequence

import jax
import numpy as np

from dancemoe_jax.mesh import own_rows
from launch.engine.batch import Member


def note_logprobs(members: Sequence[Member], numbers: Sequence[int], tokens: Sequence[int], logits: jax.Array) -> None:
    """Set `last_logprobs` of the requests that want them, by the model's logits as they are, whatever its rules are.

    Args:
        numbers: row of each member; tokens: chosen for it; logits: of the step, float32 [devices, rows, vocab].
    """
    if all(request.logprobs is None for _, request in members):
        return
    found = own_rows(logits)
    for (rows, request), number, token in zip(members, numbers, tokens, strict=True):
        if request.logprobs is not None:
            row = np.asarray(found[rows.device][number], np.float64)
            row -= row.max()
            row -= np.log(np.exp(row).sum())
            likeliest = np.argsort(-row, kind="stable")[: request.logprobs]
            request.last_logprobs = (float(row[token]), [(int(i), float(row[i])) for i in likeliest])
