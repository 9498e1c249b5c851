"""Bits of one weight in quantized checkpoints, from what `config.json` or a file beside it says; counts no parameters.

A quantized weight costs its own bits and its share of the scales, zero points and indices of its group. Formats of which this
is not known are refused: a size that is wrong by four plans experts where there is no memory for them.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.files import InputError, read_json, show

# Bits of one weight. Block formats add their scales: one byte for 32 weights, or one float32 for 128 x 128.
BITS = {
    "bf16": 16.0,
    "fp16": 16.0,
    "fp32": 32.0,
    "fp8": 8 + 32 / 128**2,
    "int8": 8.0,
    "int4": 4.0,
    "mxfp4": 4 + 8 / 32,
}
_SCALE, _INDEX = 16, 32  # bits of a scale in 16-bit floats, and of GPTQ's index of a row's group
_MOST_GROUP = 2**20


@dataclass(frozen=True)
class WeightBits:
    """Bits of one weight: in the experts' matrices, in the other matrices, in the embeddings; `dtype` names the experts'."""

    dtype: str
    expert: float
    matrix: float
    embedding: float


@dataclass(frozen=True)
class _Given:
    """A quantisation as a file has it, with what sizes depend on: the experts' matrices, [hidden, width] twice and back."""

    table: Mapping[str, Any]
    hidden: int
    width: int
    where: str

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = _MOST_GROUP) -> int:
        value = self.table.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise InputError(
                f"{self.where}.{key} = {show(value)}: must be an integer from {least} to {most}; {_REMEDY}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.table.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{self.where}.{key} = {show(value)}: must be true or false; {_REMEDY}")
        return default if value is None else value

    def scales(self, group: int, bits: float) -> float:
        """Bits a weight of one scale for each group of a column's weights; -1 is the whole column."""
        if group == -1:
            return bits * (2 * self.width + self.hidden) / (3 * self.hidden * self.width)
        return bits / group


_REMEDY = f"give the experts' type with --dtype, one of {', '.join(BITS)}"


def quantization_beside(config: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What files of quantisers beside a `config.json` say, in the form of its own `quantization_config`; None without any.

    Raises:
        InputError: such a file cannot be used.
    """
    folder = Path(config).parent
    for name, read in (("quantize_config.json", _gptq_file), ("hf_quant_config.json", _modelopt_file)):
        if os.path.isfile(folder / name):
            parsed = read_json(folder / name)
            if not isinstance(parsed, dict):
                raise InputError(f"{folder / name}: must be an object, as the quantiser wrote it; {_REMEDY}")
            return read(parsed)
    return None


def _gptq_file(parsed: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "gptq", **parsed}


def _modelopt_file(parsed: dict[str, Any]) -> dict[str, Any]:
    inner = parsed.get("quantization")
    return {"quant_method": "modelopt", **(inner if isinstance(inner, dict) else {})}


def quantization(
    parsed: Mapping[str, Any], base: str, dtype: str | None, hidden: int, width: int, source: str
) -> WeightBits:
    """Bits of a model's weights.

    Args:
        parsed: the configuration.
        base: a key of `BITS` for what is not quantized.
        dtype: a key of `BITS` for the experts in place of what the configuration says; None takes that.
        hidden, width: of an expert: its matrices are [hidden, width], [hidden, width] and [width, hidden].
        source: for messages.

    Raises:
        InputError: a quantisation whose sizes are not known, or a damaged description of one.
    """
    plain = BITS[base]
    if dtype is not None:
        return WeightBits(dtype, BITS[dtype], BITS["fp8"] if dtype == "fp8" else plain, plain)
    key = next((key for key in ("quantization_config", "quantization") if parsed.get(key)), None)
    if key is None:
        return WeightBits(base, plain, plain, plain)
    table, where = parsed[key], f"{source}: {key}"
    if not isinstance(table, Mapping):
        raise InputError(f"{where} = {show(table)}: must be an object; {_REMEDY}")
    given = _Given(table, hidden, width, where)
    method = table.get("quant_method")
    if method is None and {"bits", "group_size"} <= set(table):  # as mlx-lm writes it, embeddings included
        bits = _mlx(given)
        return WeightBits(f"mlx {table['bits']} bits", bits, bits, bits)
    if not isinstance(method, str) or method not in _METHODS:
        raise InputError(f"{where}.quant_method = {show(method)}: its sizes are not known; {_REMEDY}")
    name, bits, everywhere = _METHODS[method](given)
    kept = " ".join(map(str, _left_out(given)))
    if "experts." in kept.replace("shared_experts.", "") or "experts$" in kept:
        raise InputError(f"{where}: leaves experts out ({show(kept)}), so their sizes are not known; {_REMEDY}")
    attention = everywhere and "attn" not in kept
    return WeightBits(name, bits, bits if attention else plain, plain)


def _left_out(given: _Given) -> list[Any]:
    """Names of modules that stay as they are."""
    for key in ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers"):
        value = given.table.get(key)
        if value is not None and not isinstance(value, list):
            raise InputError(f"{given.where}.{key} = {show(value)}: must be a list of modules; {_REMEDY}")
        if value:
            return value
    return []


def _mlx(given: _Given) -> float:
    """Each group has a scale and a bias. Routers may have other bits; no other module may."""
    for name, value in given.table.items():
        if isinstance(value, Mapping) and not name.endswith((".gate", ".router", "_gate")):
            raise InputError(f"{given.where}.{name}: layers of different bits, whose sizes are not known; {_REMEDY}")
    return given.count("bits", most=16) + given.scales(given.count("group_size"), 2 * _SCALE)


def _awq(given: _Given) -> tuple[str, float, bool]:
    """Packed zero points whether they are used or not."""
    bits, group = given.count("bits", most=16), given.count("group_size", least=-1)
    return f"awq {bits} bits", bits + given.scales(_group(given, group), _SCALE + bits), True


def _gptq(given: _Given) -> tuple[str, float, bool]:
    """As AWQ, and for every row the index of its group."""
    bits, group = given.count("bits", most=16), given.count("group_size", least=-1)
    rows = _INDEX * (2 * given.hidden + given.width) / (3 * given.hidden * given.width)
    return f"gptq {bits} bits", bits + given.scales(_group(given, group), _SCALE + bits) + rows, True


def _group(given: _Given, group: int) -> int:
    if group == 0:
        raise InputError(f"{given.where}.group_size = 0: must be -1 or an integer from 1; {_REMEDY}")
    return group


def _fp8(given: _Given) -> tuple[str, float, bool]:
    """One float32 for each block, or for the whole matrix."""
    block = given.table.get("weight_block_size")
    if block is None:
        return "fp8 per tensor", 8.0, True
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(n) is int and 0 < n <= _MOST_GROUP for n in block)
    ):
        raise InputError(f"{given.where}.weight_block_size = {show(block)}: must be two integers from 1; {_REMEDY}")
    return "fp8", 8 + 32 / (block[0] * block[1]), True


def _compressed_tensors(given: _Given) -> tuple[str, float, bool]:
    """One group of linear layers, packed integers or floats of 4 or 8 bits."""
    groups = given.table.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, dict) else []
    weights = entries[0].get("weights") if len(entries) == 1 and isinstance(entries[0], dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{given.where}.config_groups = {show(groups)}: must be one group with weights; {_REMEDY}")
    inner = _Given(weights, given.hidden, given.width, f"{given.where}.config_groups.weights")
    bits, kind = inner.count("num_bits", most=16), weights.get("type")
    group = weights.get("group_size")
    group = -1 if group is None else _group(inner, inner.count("group_size", least=-1))
    scale = _SCALE if kind == "int" or group == -1 else 8  # floats of 4 bits have scales of one byte
    if weights.get("strategy") == "tensor":
        scale = 0
    if weights.get("strategy") == "block":
        block = _fp8(_Given({"weight_block_size": weights.get("block_structure")}, 1, 1, inner.where))
        return f"compressed-tensors {bits} bits", block[1] - 8 + bits, True
    zero = 0 if inner.flag("symmetric", True) else bits
    return f"compressed-tensors {bits} bits", bits + inner.scales(group, scale + zero), True


def _modelopt(given: _Given) -> tuple[str, float, bool]:
    kind = given.table.get("quant_algo")
    if kind == "NVFP4":  # a byte for each group
        return "nvfp4", 4 + given.scales(_group(given, given.count("group_size", 16)), 8), True
    if kind == "FP8":
        return "fp8 per tensor", 8.0, True
    raise InputError(f"{given.where}.quant_algo = {show(kind)}: its sizes are not known; {_REMEDY}")


def _mxfp4(_: _Given) -> tuple[str, float, bool]:
    """gpt-oss: the experts alone."""
    return "mxfp4", BITS["mxfp4"], False


_METHODS: dict[str, Callable[[_Given], tuple[str, float, bool]]] = {
    **{"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors},
    **{"modelopt": _modelopt, "mxfp4": _mxfp4},
}
