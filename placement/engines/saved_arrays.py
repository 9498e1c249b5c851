"""Files of torch.save and numpy.save, read without torch and without running what is pickled in them."""

import io
import zipfile
from typing import Any

import numpy as np

from placement.engines.unpickle import DAMAGED, STORAGES, Global, Refusal, load_pickle
from placement.files import InputError, show


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
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            # PyTorch stores without compression, so nothing can grow beyond the file itself.
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise InputError(
                    f"{path}: has compressed or encrypted parts, which torch.save never writes; save it again"
                )
            if sum(entry.file_size for entry in entries) > len(data):
                raise InputError(f"{path}: its parts are larger than the file; save it again with torch.save")
            parts = {entry.filename: archive.read(entry) for entry in entries if not entry.is_dir()}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, *DAMAGED) as error:
        if isinstance(error, InputError):
            raise
        detail = show(" ".join(str(error).split()), 100)
        raise InputError(f"{path}: truncated or damaged: {detail}; save it again with torch.save") from None
    names = [name for name in parts if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise InputError(f"{path}: has {len(names)} parts named data.pkl; not a file of torch.save")
    prefix = names[0].removesuffix("data.pkl")
    order = ">" if parts.get(f"{prefix}byteorder", b"little") == b"big" else "<"

    def storage(identity: Any) -> np.ndarray:
        kind, cls, key, _, count = identity
        if kind != "storage" or not isinstance(cls, Global) or cls.name not in STORAGES:
            raise Refusal(f"the reference {show(identity)}")
        code, content = STORAGES[cls.name], parts[f"{prefix}data/{key}"]
        dtype = np.dtype("u2" if code == "bfloat16" else code).newbyteorder(order)
        if type(count) is not int or len(content) != count * dtype.itemsize:
            raise ValueError(f"a storage of {show(count)} numbers in {len(content)} bytes")
        numbers = np.frombuffer(content, dtype)
        return (numbers.astype(np.uint32) << 16).view(np.float32) if code == "bfloat16" else numbers

    return load_pickle(parts[names[0]], path, storage)


def load_npy(data: bytes, path: Any) -> Any:
    """Content of a `.npy` file: an array of numbers, or the dict that numpy saved as a pickled object.

    Raises:
        InputError: it is damaged, or its pickle holds anything but data.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        _, _, dtype = header[version](stream)
        if dtype != np.dtype(object):
            array = np.load(io.BytesIO(data), allow_pickle=False)
            if array.dtype.kind not in "biuf":
                raise InputError(f"{path}: has type {array.dtype}; must be numbers")
            return array
    except InputError:
        raise
    except (*DAMAGED, EOFError, OSError, SyntaxError) as error:
        detail = show(" ".join(str(error).split()), 100)
        raise InputError(f"{path}: not a readable .npy file: {detail}; save it again with numpy.save") from None
    return load_pickle(data[stream.tell() :], path)
