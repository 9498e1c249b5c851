"""Stands in for the package `gguf`: writes names, shapes and types as a line of JSON instead of a file of weights."""

import enum
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np


class GGMLQuantizationType(enum.IntEnum):
    F32 = 0
    Q8_0 = 8
    BF16 = 30


GGML_QUANT_SIZES = {
    GGMLQuantizationType.F32: (1, 4),
    GGMLQuantizationType.Q8_0: (32, 34),
    GGMLQuantizationType.BF16: (1, 2),
}


def quantize(numbers, kind):
    block, size = GGML_QUANT_SIZES[kind]
    return np.zeros(numbers.size // block * size, np.uint8)


def quant_shape_to_byte_shape(shape, kind):
    block, size = GGML_QUANT_SIZES[kind]
    assert shape[-1] % block == 0, shape
    return (*shape[:-1], shape[-1] // block * size)


class GGUFWriter:
    def __init__(self, path, arch):
        self.path, self.arch, self.keys, self.tensors, self.written = Path(path), arch, {}, {}, []

    def _add(self, key, value):
        self.keys[key] = value

    add_bool = add_uint32 = add_float32 = add_string = _add

    def add_tensor_info(self, name, shape, dtype, nbytes, raw_dtype):
        assert dtype == np.uint8
        assert name not in self.tensors
        self.tensors[name] = {"bytes": nbytes, "shape": list(shape), "kind": raw_dtype.name}

    def write_header_to_file(self):
        pass

    write_kv_data_to_file = write_ti_data_to_file = write_header_to_file

    def write_tensor_data(self, data):
        self.written.append(data.nbytes)

    def close(self):
        assert self.written == [tensor["bytes"] for tensor in self.tensors.values()]
        self.path.write_text(json.dumps({"arch": self.arch, "keys": self.keys, "tensors": self.tensors}))


def installed() -> ModuleType:
    """This module, as the package that it stands in for."""
    return sys.modules[__name__]
