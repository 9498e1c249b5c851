"""Finding NaN and infinity among weights as they are read: one such number would silently decide every token."""

import numpy as np

from dancemoe_jax.errors import ModelError

_STRIP = 2**18  # numbers at a time, so that what is computed of them stays in the cache
# By itemsize and name of floating-point types: the bits of the exponent, all set in what is no finite number.
_EXPONENT = {"float64": 0x7FF0000000000000, "float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def is_finite(array: np.ndarray) -> bool:
    """Whether an array holds no NaN and no infinity. Integers never do.

    >>> is_finite(np.array([1.0, np.inf]))
    False
    """
    if (exponent := _EXPONENT.get(array.dtype.name)) is None:
        return True
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    mask = bits.dtype.type(exponent)
    return all((bits[start : start + _STRIP] & mask).max(initial=0) != mask for start in range(0, len(bits), _STRIP))


def cast(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Weights in the type that they are to have, the same array where it has it.

    Args:
        what: names the array and its file, for the message.

    Raises:
        ModelError: it holds NaN or infinity, or a number too large for `dtype`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype, copy=False)
    check_finite(result, array, what)
    return result


def check_finite(result: np.ndarray, stored: np.ndarray, what: str) -> None:
    """Raise ModelError unless `result`, made from `stored`, is finite; `what` names them."""
    if is_finite(result):
        return
    if is_finite(stored):
        raise ModelError(
            f"{what} has numbers too large for {result.dtype.name}; load it with --dtype bfloat16 or float32"
        )
    raise ModelError(f"{what} holds NaN or infinity; export or download the model again")
