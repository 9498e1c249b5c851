"""Recording: what an engine's statistics say before servers have names, and the checks its arrays go through."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.data.problem import Tokens
from placement.files import InputError, show

MAX_ID = 10**5
MAX_NUMBERS = 2**27  # of one array, or of the token level of a recording


@dataclass(frozen=True, eq=False)
class Recording:
    """What an engine's files say.

    Attributes:
        counts: int64 or float64 [S, L, E] for S sources: ranks, files or named servers.
        lost: why the sources are not known, where they are not; S is then 1.
        names: names of the sources, where the files have them.
        tokens: token level, `server` being the source.
        layers: the model's own indices of the layers, where the files have them.
        top_k: experts per token, where the files say it.
        notes: what a reader of the result should know.
    """

    counts: np.ndarray
    lost: str | None = None
    names: tuple[str, ...] | None = None
    tokens: Tokens | None = None
    layers: tuple[int, ...] | None = None
    top_k: int | None = None
    notes: list[str] = field(default_factory=list)


def numbers(value: Any, ranks: Sequence[int], where: str) -> np.ndarray:
    """An array of numbers with one of some ranks, none of its sides 0.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, list | np.ndarray):
        raise InputError(f"{where} = {show(value)}: must be an array of {_dimensions(ranks)}")
    if isinstance(value, list) and not _only_numbers(value, ranks[-1]):
        raise InputError(f"{where} = {show(value)}: must be numbers of {_dimensions(ranks)}, and nothing else")
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)
    if array.size > MAX_NUMBERS:
        raise InputError(f"{where} has {array.size} numbers; at most {MAX_NUMBERS} are read, so split it")
    if array.ndim not in ranks or 0 in array.shape or array.dtype.kind not in "iuf":
        found = f"type {array.dtype} and shape {array.shape}" if array.dtype != object else "rows of unequal lengths"
        raise InputError(f"{where} has {found}; must be numbers of {_dimensions(ranks)}")
    return array


def _only_numbers(value: list, rank: int) -> bool:
    """Whether nested lists end in numbers: numpy makes room for the longest of texts and arrays in every entry."""
    kinds = set(map(type, value))
    if list in kinds:
        return rank > 1 and kinds == {list} and all(_only_numbers(row, rank - 1) for row in value)
    return kinds <= {int, float}


def _dimensions(ranks: Sequence[int]) -> str:
    return " or ".join(map(str, ranks)) + (" dimensions" if ranks[-1] > 1 else " dimension")


def counted(value: Any, ranks: Sequence[int], where: str) -> np.ndarray:
    """`numbers` that are finite and at least 0, int64 or float64."""
    array = numbers(value, ranks, where)
    bad = ~((array >= 0) & (array < 2**53))
    if bad.any():
        raise InputError(f"{where} has the value {array[bad][0]}; counts must be finite and at least 0")
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def integers(value: Any, ranks: Sequence[int], top: int, where: str, least: int = 0) -> np.ndarray:
    """`numbers` that are integers from `least` to `top`, int64."""
    array = numbers(value, ranks, where)
    bad = (array < least) | (array > top)
    if array.dtype.kind == "f" or bad.any():
        found = array.flat[0] if array.dtype.kind == "f" else array[bad][0]
        raise InputError(f"{where} has the value {found}; must be integers from {least} to {top}")
    return array.astype(np.int64)


def positive(value: Any, where: str) -> int:
    """A count of experts, layers or the like."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_ID:
        raise InputError(f"{where} = {show(value)}: must be an integer from 1 to {MAX_ID}")
    return value
