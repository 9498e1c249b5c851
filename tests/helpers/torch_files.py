"""Files as torch.save writes them (zip layout, pickle protocol 2), made without torch; tests read them back."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np

STORAGE = {"int32": "IntStorage", "int64": "LongStorage", "float32": "FloatStorage", "float64": "DoubleStorage"}


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def torch_pickle(value, storages):
    """Instructions of protocol 2 as torch.save writes them, tensors by reference to a storage."""
    if isinstance(value, np.ndarray):
        storages.append(np.ascontiguousarray(value))
        strides = [step // value.itemsize for step in storages[-1].strides]
        cls = f"ctorch\n{STORAGE[value.dtype.name]}\n".encode()
        identity = b"(" + text("storage") + cls + text(str(len(storages) - 1)) + text("cpu")
        identity += torch_pickle(value.size, storages) + b"tQ"
        sizes = b"".join(torch_pickle(tuple(numbers), storages) for numbers in (value.shape, strides))
        hooks = b"\x89ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + b"K\x00" + sizes + hooks + b"tR"
    if isinstance(value, dict):
        items = b"".join(torch_pickle(part, storages) for pair in value.items() for part in pair)
        return b"}(" + items + b"u"
    if isinstance(value, list | tuple):
        inner = b"".join(torch_pickle(part, storages) for part in value)
        return b"](" + inner + b"e" if isinstance(value, list) else b"(" + inner + b"t"
    if isinstance(value, str):
        return text(value)
    if value is None:
        return b"N"
    return b"J" + struct.pack("<i", value) if isinstance(value, int) else b"G" + struct.pack(">d", value)


def zipped(program, storages=(), name="archive", **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        archive.writestr(f"{name}/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr(f"{name}/byteorder", "little")
        for i, numbers in enumerate(storages):
            archive.writestr(f"{name}/data/{i}", numbers.tobytes())
        archive.writestr(f"{name}/version", "3\n")
    return buffer.getvalue()


def torch_save(path, value):
    storages = []
    program = torch_pickle(value, storages)
    Path(path).write_bytes(zipped(program, storages, Path(path).stem))
