"""Files of torch.save, numpy.save and safetensors, read without their packages and without running what is pickled in them."""

import math
from typing import Any

import numpy as np

from placement.data.arrays import UNREADABLE, is_shape, npy_header, open_zip, read_npy
from placement.engines.unpickle import STORAGES, Global, Refusal, load_pickle
from placement.files import InputError, one_line, parse_json, show

_AGAIN = "save it again with torch.save"
_MAX_HEADER = 2**24  # bytes of a safetensors header
_SAFETENSORS = {
    **{
        "BOOL": "?",
        "U8": "u1",
        "I8": "i1",
        "U16": "u2",
        "I16": "i2",
        "U32": "u4",
        "I32": "i4",
        "U64": "u8",
        "I64": "i8",
    },
    **{"F16": "f2", "F32": "f4", "F64": "f8"},
}


def load_torch(data: bytes, path: Any) -> Any:
    """Content of a file of `torch.save` (zip layout, PyTorch 1.6 and later), tensors as read-only numpy views.

    Args:
        data: the file.
        path: for messages.

    Raises:
        InputError: it is damaged, its tensors reach beyond their storages, or it holds anything but data.
    """
    if not data.startswith(b"PK"):
        raise InputError(f"{path}: not a PyTorch zip file; save it again with torch.save of PyTorch 1.6 or later")
    with open_zip(data, path, _AGAIN) as archive:
        entries = archive.infolist()
        # PyTorch stores without compression, so nothing can grow beyond the file itself.
        if any(entry.compress_type != 0 for entry in entries):
            raise InputError(f"{path}: has compressed or encrypted parts, which torch.save never writes; save it again")
        if sum(entry.file_size for entry in entries) > len(data):
            raise InputError(f"{path}: its parts are larger than the file; save it again with torch.save")
        try:
            parts = {entry.filename: archive.read(entry) for entry in entries if not entry.is_dir()}
        except UNREADABLE as error:
            raise InputError(f"{path}: truncated or damaged: {one_line(error, 100)}; {_AGAIN}") from None
    names = [name for name in parts if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise InputError(f"{path}: has {len(names)} parts named data.pkl; not a file of torch.save")
    prefix = names[0].removesuffix("data.pkl")
    order = ">" if parts.get(f"{prefix}byteorder", b"little") == b"big" else "<"
    widened: dict[str, np.ndarray] = {}  # a storage of bfloat16 is made once, however often it is referred to

    def storage(identity: Any) -> np.ndarray:
        kind, cls, key, _, count = identity if isinstance(identity, tuple) and len(identity) == 5 else (None,) * 5
        if kind != "storage" or not isinstance(cls, Global) or cls.name not in STORAGES or not isinstance(key, str):
            raise Refusal(f"the reference {show(identity)}")
        code, content = STORAGES[cls.name], parts[f"{prefix}data/{key}"]
        dtype = np.dtype("u2" if code == "bfloat16" else code).newbyteorder(order)
        if type(count) is not int or len(content) != count * dtype.itemsize:
            raise ValueError(f"a storage of {show(count)} numbers in {len(content)} bytes")
        if code != "bfloat16":
            return np.frombuffer(content, dtype)
        if key not in widened:
            widened[key] = (np.frombuffer(content, dtype).astype(np.uint32) << 16).view(np.float32)
        return widened[key]

    return load_pickle(parts[names[0]], path, storage, len(data))


def load_npy(data: bytes, path: Any) -> Any:
    """Content of a `.npy` file: an array of numbers, or the dict that numpy saved as a pickled object.

    Raises:
        InputError: it is damaged, or its pickle holds anything but data.
    """
    header = npy_header(data, str(path))
    if header.dtype is None:
        return load_pickle(data[header.start :], path)
    if header.dtype.kind not in "biuf":
        raise InputError(f"{path}: has type {header.dtype}; must be numbers")
    return read_npy(data, str(path))


def load_safetensors(data: bytes, path: Any) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file, read-only views of `data`.

    Raises:
        InputError: damaged, or a type that numpy does not have.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MAX_HEADER):
        raise InputError(f"{path}: truncated or damaged: {len(data)} bytes with a header of {size}; record it again")
    header = parse_json(data[8 : 8 + size], f"{path}: truncated or damaged: header")
    if not isinstance(header, dict):
        raise InputError(f"{path}: truncated or damaged: its header is no object; record it again")
    content = data[8 + size :]
    return {name: _tensor(content, entry, path, name) for name, entry in header.items() if name != "__metadata__"}


def _tensor(content: bytes, entry: Any, path: Any, name: str) -> np.ndarray:
    where = f"{path}: {show(name)}"
    kind, shape, ends = (
        entry.get(key) if isinstance(entry, dict) else None for key in ("dtype", "shape", "data_offsets")
    )
    if not isinstance(kind, str) or kind not in _SAFETENSORS:
        raise InputError(f"{where}: dtype = {show(kind)}: must be one of {', '.join(_SAFETENSORS)}")
    dtype = np.dtype(_SAFETENSORS[kind]).newbyteorder("<")
    if not is_shape(shape) or not is_shape(ends) or len(ends) != 2:
        raise InputError(f"{path}: truncated or damaged: {show(name)} has no shape and data_offsets; record it again")
    begin, end = ends
    count = math.prod(shape)
    if not begin <= end <= len(content) or end - begin != count * dtype.itemsize:
        found = f"bytes {begin} to {end} of {len(content)} for shape {show(shape)} of {kind}"
        raise InputError(f"{path}: truncated or damaged: {show(name)} has {found}; record it again")
    if not count:
        return np.zeros(shape, dtype)
    return np.frombuffer(content, dtype, count, begin).reshape(shape)
