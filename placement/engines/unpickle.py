"""Pickles of strangers, read as data: nothing in a file can name code that then runs.

A pickle is a small program. This module runs it on a machine of its own that knows plain data, numpy arrays and the storages of
PyTorch's zip files, and stops at anything else. Neither `pickle` nor torch is involved. What it builds is bounded by the size
of the file: references are counted as if each were a copy, nesting ends at a fixed depth, and keys of dicts are texts
and numbers, whose hash needs no recursion. Holds no engine's layout.
"""

import math
import pickletools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.data.arrays import is_shape
from placement.files import MAX_DEPTH, InputError, one_line, show

_PLAIN = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE"}
_PLAIN |= {"SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
STORAGES = {
    "torch.BoolStorage": "?",
    "torch.ByteStorage": "u1",
    "torch.CharStorage": "i1",
    "torch.ShortStorage": "i2",
    "torch.IntStorage": "i4",
    "torch.LongStorage": "i8",
    "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "f4",
    "torch.DoubleStorage": "f8",
}
_ARRAY = {"numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"}
_SCALAR = {"numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"}
_BUFFER = {"numpy._core.numeric._frombuffer", "numpy.core.numeric._frombuffer"}
_ADMITTED = {"collections.OrderedDict", "numpy.ndarray", "numpy.dtype", "_codecs.encode"}
_DATA = _ADMITTED | _ARRAY | _SCALAR | _BUFFER
_TORCH = {"torch._utils._rebuild_tensor_v2", *STORAGES}
_DTYPE = re.compile(r"([?biuf])([1248]?)")
MAX_INSTRUCTIONS = 10**7
_LITTLE = 10**5  # entries, and bytes made beyond those in the file, that any pickle may have
# What decoding raises on a file that is cut short or altered.
DAMAGED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, UnicodeError, MemoryError)


class Refusal(Exception):
    """What the file wants and does not get, for one line."""


@dataclass(eq=False)
class Global:
    """The name of something that a pickle refers to; nothing behind it is ever looked up."""

    name: str


@dataclass(eq=False)
class _Pending:
    """An array or a dtype whose content a later BUILD brings, and the memo entries that must then follow."""

    kind: str
    value: Any = None
    memo: list[int] = field(default_factory=list)
    built: bool = False


@dataclass(eq=False)
class _Boxed:
    """The only content of a numpy object array: how numpy saves a dict."""

    value: Any


class _Mark:
    pass


class _Machine:
    """Runs one pickle; `storage` gives the numbers of a PyTorch storage, None where there are no storages."""

    def __init__(self, storage: Callable[[Any], np.ndarray] | None = None):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.boxed: list[_Boxed] = []
        self.storage = storage
        self.entries = self.bytes = self.content = 0  # how much it may still make

    def run(self, data: bytes, file_bytes: int) -> Any:
        """The object that the pickle describes; `file_bytes` bound what it may make."""
        stack = self.stack
        self.entries, self.bytes, self.content = (_LITTLE + 4 * size for size in (len(data), len(data), file_bytes))
        for number, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            if number > MAX_INSTRUCTIONS:
                raise Refusal(f"over {MAX_INSTRUCTIONS} instructions")
            name = opcode.name
            if name in _PLAIN:
                stack.append(arg)
            elif name in _CONSTANT:
                stack.append(_CONSTANT[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                number = _TUPLES[name]
                items = [self.pop() for _ in range(number)]
                stack.append(tuple(reversed(items)))
            elif name == "STOP":
                return self.result()
            elif name not in ("PROTO", "FRAME"):
                self.step(name, arg)
        raise ValueError("it does not end")

    def step(self, name: str, arg: Any) -> None:
        """All opcodes that do more than push a value."""
        stack = self.stack
        match name:
            case "MARK":
                stack.append(_Mark())
            case "TUPLE" | "LIST" | "DICT":
                items = self.since_mark()
                stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _pairs(items))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if name == "APPEND" else self.since_mark()
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = list(reversed([self.pop(), self.pop()])) if name == "SETITEM" else self.since_mark()
                self.top(dict).update(_pairs(items))
            case "MEMOIZE" | "PUT" | "BINPUT" | "LONG_BINPUT":
                key = len(self.memo) if name == "MEMOIZE" else int(arg)
                self.memo[key] = stack[-1]
                if isinstance(stack[-1], _Pending):
                    stack[-1].memo.append(key)
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(arg)])
            case "GLOBAL":
                stack.append(self.admit(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                if not isinstance(attribute, str) or not isinstance(module, str):
                    raise TypeError("a name that is no text")
                stack.append(self.admit(f"{module}.{attribute}"))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                stack.append(self.call(function, arguments))
            case "BUILD":
                state, pending = self.pop(), self.pop()
                stack.append(self.build(pending, state))
            case "BINPERSID" if self.storage is not None:
                stack.append(self.storage(self.pop()))
            case _:
                raise Refusal(f"the pickle instruction {name}")

    def pop(self) -> Any:
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise ValueError("unbalanced marks")
        return value

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"items for what is no {kind.__name__}")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        items = []
        while not isinstance(value := self.stack.pop(), _Mark):
            items.append(value)
        return items[::-1]

    def admit(self, name: str) -> Global:
        if name in _DATA or (self.storage is not None and name in _TORCH):
            return Global(name)
        raise Refusal(name)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Refusal(f"a call of {show(function)}")
        name = function.name
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name in _ARRAY:
            return _Pending("array")
        if name == "numpy.dtype":
            return _Pending("dtype", _dtype(arguments[0]))
        if name in _SCALAR:
            dtype, data = arguments
            return np.frombuffer(data, self.numeric(dtype), 1)[0].item()
        if name in _BUFFER:
            data, dtype, shape, order = arguments
            return self.array(data, self.numeric(dtype), shape, order == "F")
        if name == "torch._utils._rebuild_tensor_v2":
            return _tensor(*arguments[:4])
        if name == "_codecs.encode" and len(arguments) == 2 and arguments[1] == "latin1":  # how protocol 2 writes bytes
            if not isinstance(arguments[0], str):
                raise TypeError("bytes that are no text")
            return self.made(arguments[0].encode("latin1"))
        raise Refusal(f"a call of {name}")

    def build(self, pending: Any, state: Any) -> Any:
        """Content of an array or byte order of a dtype."""
        if not isinstance(pending, _Pending) or pending.built:
            raise Refusal("the state of an object")
        pending.built = True
        if pending.kind == "dtype":
            _, order, *rest = state
            if order not in ("<", ">", "|", "="):
                raise ValueError("an unknown byte order")
            if any(part is not None for part in rest[:3]):
                raise Refusal("a structured numpy dtype")
            value: Any = pending.value.newbyteorder(order) if pending.value != np.dtype(object) else pending.value
        else:
            _, shape, dtype, fortran, data = state
            if _settled(dtype) == np.dtype(object):
                if not isinstance(data, list) or len(data) != 1:
                    raise Refusal("a numpy object array")
                self.boxed.append(value := _Boxed(data[0]))
            else:
                value = self.array(data, self.numeric(dtype), shape, bool(fortran))
        for key in pending.memo:
            self.memo[key] = value
        return value

    def numeric(self, dtype: Any) -> np.dtype:
        """A dtype of numbers; object arrays would hold references to anything."""
        dtype = _settled(dtype)
        if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf":
            raise Refusal("a numpy object array")
        return dtype

    def made(self, data: bytes) -> bytes:
        """Bytes that are not in the file, counted: a short file may ask for the same ones many times."""
        self.bytes -= len(data)
        if self.bytes < 0:
            raise Refusal("much more than the file is large")
        return data

    def array(self, data: Any, dtype: np.dtype, shape: Any, fortran: bool) -> np.ndarray:
        sides = _sides(shape)
        if not isinstance(data, bytes | bytearray) or len(data) != math.prod(sides) * dtype.itemsize:
            raise ValueError(f"an array of shape {show(shape)} with other content")
        content = data if isinstance(data, bytes) else self.made(bytes(data))
        return np.frombuffer(content, dtype).reshape(sides, order="F" if fortran else "C")

    def result(self) -> Any:
        """What is left on the stack; a boxed dict only as the whole file, never inside something."""
        (value,) = self.stack
        if self.boxed and (len(self.boxed) > 1 or value is not self.boxed[0]):
            raise Refusal("a numpy object array")
        value = value.value if isinstance(value, _Boxed) else _settled(value)
        self.check_size(value)
        return value

    def check_size(self, value: Any) -> None:
        """Refuse what is nested deep, and lists that share lists so that following them never ends."""
        waiting = [iter((value,))]
        while waiting:
            if len(waiting) > MAX_DEPTH:
                raise Refusal(f"values nested over {MAX_DEPTH} deep")
            for item in waiting[-1]:
                self.entries -= 1
                self.content -= item.nbytes if isinstance(item, np.ndarray) else 0
                if self.entries < 0 or self.content < 0:
                    raise Refusal("the same values so often that they would fill the memory")
                if isinstance(item, list | tuple | dict):
                    waiting.append(iter(item.values() if isinstance(item, dict) else item))
                    break
            else:
                waiting.pop()


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn. Python hashes a key that is nested deep without a limit, and overflows its stack."""
    for key in items[::2]:
        if key is not None and not isinstance(key, str | bytes | int | float):
            raise Refusal(f"a dict with the key {show(key)}")
    return dict(zip(items[::2], items[1::2], strict=True))


def _sides(shape: Any) -> tuple[int, ...]:
    if not is_shape(shape):
        raise ValueError(f"an array of shape {show(shape)}")
    return tuple(shape)


def _settled(value: Any) -> Any:
    return value.value if isinstance(value, _Pending) else value


def _dtype(code: Any) -> np.dtype:
    if code in ("O8", "O", "|O"):
        return np.dtype(object)
    if not isinstance(code, str) or not _DTYPE.fullmatch(code.lstrip("<>|=")):
        raise Refusal(f"the numpy type {show(code)}")
    return np.dtype(code)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A view into a storage, within its bounds."""
    size, stride, (offset,) = _sides(size), _sides(stride), _sides((offset,))
    if not isinstance(storage, np.ndarray):
        raise ValueError("a tensor without a storage")
    if len(size) != len(stride) or math.prod(size) > max(storage.size, 1):
        raise ValueError(f"a tensor of size {size} on a storage of {storage.size} numbers")
    if math.prod(size) == 0:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.size:
        raise ValueError(f"a tensor that reaches number {last} of a storage of {storage.size}")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def load_pickle(
    data: bytes, path: Any, storage: Callable[[Any], np.ndarray] | None = None, file_bytes: int | None = None
) -> Any:
    """Content of a pickle of plain data, numpy arrays and, where `storage` is given, tensors.

    Args:
        data: the pickle.
        path: for messages.
        storage: the numbers behind a persistent identity of PyTorch.
        file_bytes: of the file that holds the pickle and its storages; None where that is the pickle alone.

    Raises:
        InputError: it is damaged, or holds anything else.
    """
    try:
        with (
            warnings.catch_warnings()
        ):  # pickletools reads a text with its escapes, right or wrong, before it is refused
            warnings.simplefilter("ignore")
            return _Machine(storage).run(data, len(data) if file_bytes is None else file_bytes)
    except Refusal as refusal:
        raise InputError(
            f"{path}: its pickle holds {one_line(refusal, 100)}; only arrays, tensors, dicts, lists, tuples, texts and "
            "numbers are read, and nothing in it was run"
        ) from None
    except DAMAGED as error:
        detail = one_line(error, 100) or type(error).__name__
        raise InputError(f"{path}: truncated or damaged: its pickle has {detail}; save it again") from None
