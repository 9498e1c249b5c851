"""The manifest of a store (`model.json`): what its checkpoints hold, checked field by field before anything is read."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dancemoe_jax.errors import ModelError, show

FORMAT = "dancemoe.model/2"
_DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)} | {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8, np.bool_)
}
_FIELDS = ("w_in", "w_out", "b_in", "b_out", "s_in", "s_out")
_LARGEST = 2**40  # bytes of one array


class ArrayType(NamedTuple):
    """Shape and type of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorEntry(NamedTuple):
    """A tensor that is not a routed expert: the checkpoint it is in, what it is, and its bytes' CRC-32."""

    bundle: str
    array: ArrayType
    crc32: int


class Manifest(NamedTuple):
    """What a store holds.

    Attributes:
        per_bundle: experts of one layer in one checkpoint.
        arrays: of each expert, by name.
        crc32: of each [MoE layer][expert].
        decoder: tensors that are not routed experts, by their Hugging Face names.
    """

    per_bundle: int
    arrays: dict[str, ArrayType]
    crc32: list[list[int]]
    decoder: dict[str, TensorEntry]


def read_manifest(fields: dict[str, Any], file: Path) -> Manifest:
    """The manifest from the fields of `model.json`; `file` is named in errors.

    Raises:
        ModelError: it is of another format, or a field is missing or is not what it has to be.
    """
    if fields.get("format") != FORMAT:
        raise ModelError(f"{file}: format is {show(fields.get('format'))}, must be {FORMAT!r}")
    try:
        experts, decoder = _object(fields, "experts"), _object(fields, "decoder")
        arrays = {name: _array(about, f"experts.arrays.{name}") for name, about in _object(experts, "arrays").items()}
        _check("experts.arrays", sorted(arrays), set(arrays) <= set(_FIELDS) and {"w_in", "w_out"} <= set(arrays))
        crc32: Any = experts.get("crc32")
        per_bundle: Any = experts.get("per_bundle")
        _check("experts.per_bundle", per_bundle, type(per_bundle) is int and 0 < per_bundle < 2**31)
        _check("experts.crc32", crc32, isinstance(crc32, list) and len(crc32) > 0 and isinstance(crc32[0], list))
        for row in crc32:
            _check("experts.crc32", row, isinstance(row, list) and 0 < len(row) == len(crc32[0]))
            for value in row:
                _check("experts.crc32", value, _is_crc(value))
        entries = {name: _entry(entry, name) for name, entry in decoder.items()}
    except _WrongFieldError as error:
        raise ModelError(f"{file}: not a store's contents ({error}); convert the model again") from None
    return Manifest(per_bundle, arrays, crc32, entries)


class _WrongFieldError(Exception):
    pass


def _check(name: str, value: Any, good: bool) -> None:
    if not good:
        raise _WrongFieldError(f"{name} = {show(value)}")


def _object(fields: Any, name: str) -> dict[str, Any]:
    value = fields.get(name)
    _check(name, value, isinstance(value, dict))
    return value


def _array(about: Any, name: str) -> ArrayType:
    _check(name, about, isinstance(about, dict))
    shape, dtype = about.get("shape"), about.get("dtype")
    _check(f"{name}.shape", shape, isinstance(shape, list) and len(shape) <= 8)
    for size in shape:
        _check(f"{name}.shape", shape, type(size) is int and 0 <= size < 2**40)
    _check(f"{name}.dtype", dtype, isinstance(dtype, str) and dtype in _DTYPES)
    array = ArrayType(tuple(shape), _DTYPES[dtype])
    _check(f"{name}.shape", shape, array.nbytes <= _LARGEST)
    return array


def _entry(entry: Any, name: str) -> TensorEntry:
    array = _array(entry, f"decoder.{name}")
    bundle, crc32 = entry.get("bundle"), entry.get("crc32")
    _check(
        f"decoder.{name}.bundle", bundle, isinstance(bundle, str) and re.fullmatch(r"decoder/\d{5}", bundle) is not None
    )
    _check(f"decoder.{name}.crc32", crc32, _is_crc(crc32))
    return TensorEntry(bundle, array, crc32)


def _is_crc(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32
