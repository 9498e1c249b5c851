"""Named tensors of a Hugging Face directory: shards opened by their headers, bytes read when they are asked for.

Block-scaled tensors (float8 with `_scale_inv`, MXFP4 with `_blocks` and `_scales`) look like the plain tensors that
they stand for. What the names mean to a model is not known here.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dancemoe_jax.checkpoint.extents import Extent
from dancemoe_jax.checkpoint.shard import Shard
from dancemoe_jax.errors import ModelError
from dancemoe_jax.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"model-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_FLOAT8, _MXFP4 = ("F8_E4M3", "F8_E5M2"), "MXFP4"
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_MXFP4_PACKED = 16  # bytes of 32 values that share a scale


class _Stored(NamedTuple):
    """Where a tensor's bytes are."""

    file: Shard
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class _Logical(NamedTuple):
    """A tensor as callers see it; `read(index, dtype)` takes rows `range` of the leading axis, or None for all."""

    kind: str
    shape: tuple[int, ...]
    read: Callable[[range | None, np.dtype | None], np.ndarray]


class TensorFiles:
    """The tensors of `model.safetensors`, or of shards with their index.

    Opening reads headers only and checks them: every shard is there, whole, and holds what the index says, and every
    quantized tensor has scales that fit it. Reading is safe from several threads at once.

    Args:
        path: directory with the weights and, for float8 blocks other than 128 x 128, `config.json`.
        same_content: whether the files hold what they held when they were opened; asked before a file is refused that was
            only touched or copied since. None: it is refused.

    Raises:
        ModelError: a file is missing, damaged, or contradicts the index, or a tensor's encoding is not supported.
    """

    def __init__(self, path: str | Path, same_content: Callable[[], bool] | None = None):
        self.path = Path(path)
        self._stored = _stored_tensors(self.path, same_content)
        self._tensors = dict(_logical_tensors(self._stored, _float8_block(self.path)))

    def names(self) -> list[str]:
        """All tensors, quantized ones once and under the name of the tensor that they stand for."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as `read` gives it."""
        return self._find(name).shape

    def kind(self, name: str) -> str:
        """How the file stores it: `"BF16"`, `"F32"`, … as safetensors spells them, or `"MXFP4"`."""
        return self._find(name).kind

    def read(self, name: str, index: int | slice | None = None, dtype: Any = None) -> np.ndarray:
        """A tensor, or the part of its leading axis that `index` selects; no other bytes are read.

        Quantized tensors come decoded, MXFP4 in the layout of unquantized ones: [experts, inputs, outputs].

        Args:
            index: an integer (drops the axis) or a slice of step 1.
            dtype: of the result; default as stored, or float32 for quantized tensors.

        Raises:
            ModelError: there is no such tensor, or its file changed since it was opened.
        """
        tensor = self._find(name)
        dtype = None if dtype is None else np.dtype(dtype)
        if index is None:
            return tensor.read(None, dtype)
        if isinstance(index, slice):
            start, stop, step = index.indices(tensor.shape[0])
            if step != 1:
                raise ValueError(f"index of {name!r} has step {step}, only 1 is supported")
            return tensor.read(range(start, max(start, stop)), dtype)
        row = range(tensor.shape[0])[index]
        return tensor.read(range(row, row + 1), dtype)[0]

    def extents(self) -> list[Extent]:
        """Where the bytes of every stored tensor lie, file by file."""
        places = [Extent(t.file.path, t.start, t.size) for t in self._stored.values() if t.size]
        return sorted(places, key=lambda extent: (extent.file.name, extent.offset))

    def _find(self, name: str) -> _Logical:
        if name not in self._tensors:
            raise ModelError(f"{self.path}: tensor {name!r} is missing; export or download the model again")
        return self._tensors[name]


def _stored_tensors(path: Path, same_content: Callable[[], bool] | None) -> dict[str, _Stored]:
    """Every tensor that the directory declares, from its index and its shards' headers, or from these alone."""
    index = path / INDEX
    if (path / WEIGHTS).exists() or not index.exists():
        shards = [] if (path / WEIGHTS).exists() else _numbered_shards(path)
        headers = [_header(file, same_content) for file in shards or [path / WEIGHTS]]
        return _joined(headers, shards)
    shards = _weight_map(index)
    headers = {shard: _header(path / shard, same_content) for shard in sorted(set(shards.values()))}
    for name, shard in shards.items():
        if name not in headers[shard]:
            raise ModelError(
                f"{path / shard}: tensor {name!r} is missing, {INDEX} says it is here; download the shard again"
            )
    return {name: headers[shard][name] for name, shard in shards.items()}


def _numbered_shards(path: Path) -> list[Path]:
    """Shards of a directory without an index, by their names; none if there are none.

    Raises:
        ModelError: not all of them are there.
    """
    found = {match[1]: match[2] for file in path.glob("*.safetensors") if (match := _SHARD_NAME.fullmatch(file.name))}
    if not found:
        return []
    count = max(found.values())
    names = [f"model-{number:0{len(count)}}-of-{count}.safetensors" for number in range(1, min(int(count), 10**5) + 1)]
    for name in names:
        if not (path / name).is_file():
            raise ModelError(f"{path}: {INDEX} is missing and so is {name}; download the model again")
    return [path / name for name in names]


def _joined(headers: list[dict[str, _Stored]], files: list[Path]) -> dict[str, _Stored]:
    tensors: dict[str, _Stored] = {}
    for number, header in enumerate(headers):
        if both := sorted(tensors.keys() & header.keys()):
            raise ModelError(
                f"{files[number]}: tensor {both[0]!r} is in another shard too, and {INDEX}, which would say which one "
                "counts, is missing; download the model again"
            )
        tensors |= header
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        shards = read_json(index, "not an index of shards, download it again")["weight_map"]
        # A shard is a file of this directory and nothing beyond it.
        if shards and all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            return shards
    except (KeyError, TypeError, AttributeError):
        pass
    raise ModelError(f"{index}: not an index of shards ('weight_map'); download it again")


def _header(file: Path, same_content: Callable[[], bool] | None) -> dict[str, _Stored]:
    """One shard's tensors. safetensors judges the file; it keeps the offsets to itself, so they are read here again."""
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as opened:
            shard = Shard(file, os.fstat(opened.fileno()), same_content)
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file; a model directory needs its weights here") from None
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file}: damaged or truncated ({reason}); export or download it again") from None
    header.pop("__metadata__", None)
    return {
        name: _Stored(shard, field["dtype"], tuple(field["shape"]), 8 + size + start, end - start)
        for name, field in header.items()
        for start, end in [field["data_offsets"]]
    }


def _float8_block(path: Path) -> tuple[int, int]:
    """Rows and columns that share one float8 scale."""
    file = path / "config.json"
    quantization = read_json(file, optional=True).get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ModelError(f"{file}: quantization_config = {quantization!r}, must be an object; download it again")
    block = quantization.get("weight_block_size") or (128, 128)
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise ModelError(f"{file}: quantization_config.weight_block_size = {block!r}, must be [rows, columns]")
    return block[0], block[1]


def _logical_tensors(stored: dict[str, _Stored], block: tuple[int, int]) -> Iterator[tuple[str, _Logical]]:
    """Pair quantized tensors with their scales."""
    for name, tensor in stored.items():
        base = name.removesuffix(_BLOCKS)
        if name.endswith(_BLOCKS) and base + _SCALES in stored:
            yield base, _mxfp4(name, tensor, stored[base + _SCALES])
        elif tensor.kind in _FLOAT8:
            yield name, _float8(name, tensor, stored.get(name + _SCALE), block)
        elif not _is_scale(name, stored):
            yield name, _plain(name, tensor)


def _is_scale(name: str, stored: dict[str, _Stored]) -> bool:
    return (name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored) or (
        name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in stored
    )


def _plain(name: str, tensor: _Stored) -> _Logical:
    def read(rows: range | None, dtype: np.dtype | None) -> np.ndarray:
        if tensor.kind not in DTYPES:
            raise ModelError(
                f"{tensor.file}: tensor {name!r} is stored as {tensor.kind}; supported: {', '.join(DTYPES)}"
            )
        array = _read_rows(tensor, rows)
        return array if dtype is None else array.astype(dtype, copy=False)

    return _Logical(tensor.kind, tensor.shape, read)


def _float8(name: str, tensor: _Stored, scales: _Stored | None, block: tuple[int, int]) -> _Logical:
    """A matrix or a stack of them, with a scale for each block of a matrix."""
    shape = tensor.shape
    expected = (*shape[:-2], *(-(-size // width) for size, width in zip(shape[-2:], block, strict=False)))
    fits = scales is not None and scales.kind in ("F32", "BF16", "F16") and scales.shape == expected
    if scales is None or not fits or len(shape) not in (2, 3):
        found = "no scales" if scales is None else f"scales {scales.kind} {list(scales.shape)}"
        raise ModelError(
            f"{tensor.file}: float8 tensor {name!r} {list(shape)} has {found}; supported: {name + _SCALE!r} "
            f"{list(expected)} of blocks {list(block)} (quantization_config.weight_block_size)"
        )

    def read(rows: range | None, dtype: np.dtype | None) -> np.ndarray:
        rows = range(shape[0]) if rows is None else rows
        out = np.empty((len(rows), *shape[1:]), dtype or np.float32)
        if len(shape) == 2:
            first = rows.start // block[0]
            scale = _read_rows(scales, range(first, -(-rows.stop // block[0])))
            _scale_blocks(_read_rows(tensor, rows), scale, block, rows.start - first * block[0], out)
        else:
            for matrix, row in zip(out, rows, strict=True):
                part = range(row, row + 1)
                _scale_blocks(_read_rows(tensor, part)[0], _read_rows(scales, part)[0], block, 0, matrix)
        return out

    return _Logical(tensor.kind, shape, read)


def _scale_blocks(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int], skipped: int, out: np.ndarray
) -> None:
    """`out = values * scales` with a scale per block; the first block's `skipped` rows are not in `values`.

    A band of blocks at a time, so that the float32 intermediate stays small.
    """
    height, width = values.shape
    for band, scale in enumerate(scales):
        rows = slice(max(0, band * block[0] - skipped), min(height, (band + 1) * block[0] - skipped))
        out[rows] = values[rows].astype(np.float32) * np.repeat(scale.astype(np.float32), block[1])[:width]


# Both values of a byte, low nibble first: sign, two bits of exponent, one of mantissa (E2M1).
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_PAIRS = np.stack(
    [np.concatenate([_E2M1, -_E2M1])[nibble] for nibble in (np.arange(256) & 15, np.arange(256) >> 4)], axis=-1
)
# A scale's byte is a power of two; 255 is not a number (E8M0).
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)


def _mxfp4(name: str, blocks: _Stored, scales: _Stored) -> _Logical:
    good = blocks.kind == scales.kind == "U8" and len(blocks.shape) == 4 and blocks.shape[-1] == _MXFP4_PACKED
    if not good or scales.shape != blocks.shape[:-1]:
        raise ModelError(
            f"{blocks.file}: {name!r} is {blocks.kind} {list(blocks.shape)} with scales {scales.kind} "
            f"{list(scales.shape)}; supported: U8 [experts, outputs, groups, {_MXFP4_PACKED}] and U8 [experts, outputs, groups]"
        )
    experts, outputs, groups, packed = blocks.shape

    def read(rows: range | None, dtype: np.dtype | None) -> np.ndarray:
        rows = range(experts) if rows is None else rows
        out = np.empty((len(rows), groups * 2 * packed, outputs), dtype or np.float32)
        for matrix, expert in zip(out, rows, strict=True):
            part = range(expert, expert + 1)
            _decode_mxfp4(_read_rows(blocks, part)[0], _read_rows(scales, part)[0], matrix)
        return out

    return _Logical(_MXFP4, (experts, groups * 2 * packed, outputs), read)


def _decode_mxfp4(blocks: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """[outputs, groups, 16] bytes with [outputs, groups] scales into `out` [inputs, outputs]."""
    outputs, groups, _ = blocks.shape
    step = 128  # outputs at a time: the float32 intermediate is eight times its bytes
    for first in range(0, outputs, step):
        part = slice(first, first + step)
        values = _E2M1_PAIRS[blocks[part]].reshape(-1, groups, 2 * _MXFP4_PACKED) * _E8M0[scales[part], None]
        out[:, part] = values.reshape(len(values), -1).T


def _read_rows(tensor: _Stored, rows: range | None) -> np.ndarray:
    """Read rows of the leading axis into fresh memory.

    A plain read leaves nothing mapped, so a process grows by what it keeps and not by the files' pages; it was also
    five times as fast as safetensors' own, which copies out of a mapping.
    """
    dtype = np.dtype(DTYPES[tensor.kind])
    shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
    offset = tensor.start
    if rows is not None:
        offset += rows.start * math.prod(tensor.shape[1:]) * dtype.itemsize
    array = np.empty(shape, dtype)
    tensor.file.read_into(offset, array)
    return array
