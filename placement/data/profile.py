"""Profile: what the users of each server activate, as `profile.npz` records it."""

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.data.arrays import check_grid, read_npz
from placement.files import InputError, is_name, parse_json, read_bytes, show, write_bytes

_META = ("model", "top_k", "experts", "hidden_size", "expert_bytes")
_TOKENS = ("ids", "server", "sequence")


@dataclass(frozen=True, eq=False)
class Profile:
    """Activations by source server, with the sizes of the model they were counted on.

    Attributes:
        counts: int64 or float64 [N, L, E], how often requests that entered at a server activated an expert. Fractions
            are kept: decayed or reconstructed statistics have them.
        servers: names of the servers, [N].
        model: name of the model.
        top_k: experts per token and layer.
        hidden_size: width of the activations that travel.
        expert_bytes: bytes of one expert of each layer, [L]; one number is taken for every layer.
        reserved_bytes: bytes on each device for everything that is not an expert: one number, or one per device.
        window: what the counts cover, in the words of those who recorded them.
        ids, server, sequence: optional token level: experts of every token, int [T, L, k]; index of the server where
            it entered, int [T]; the sequence it belongs to, int [T].
        source: where it was read from, for messages.

    Raises:
        InputError: on construction, where shapes or values do not fit together.
    """

    counts: np.ndarray
    servers: tuple[str, ...]
    model: str
    top_k: int
    hidden_size: int
    expert_bytes: int | tuple[int, ...]
    reserved_bytes: int | tuple[int, ...] = 0
    window: Any = None
    ids: np.ndarray | None = None
    server: np.ndarray | None = None
    sequence: np.ndarray | None = None
    source: str = "profile"

    def __post_init__(self) -> None:
        put = object.__setattr__
        counts = _numbers(self.counts, f"{self.source}: counts", 3)
        put(self, "counts", counts if counts.dtype == np.float64 else counts.astype(np.int64))
        put(self, "servers", tuple(self.servers))
        layers = counts.shape[1]
        sizes, reserved = _plain(self.expert_bytes), _plain(self.reserved_bytes)
        put(self, "expert_bytes", sizes if isinstance(sizes, tuple) else (sizes,) * layers)
        put(self, "reserved_bytes", reserved)
        _check_meta(self)
        if any(values is not None for values in (self.ids, self.server, self.sequence)):
            _check_tokens(self)
            put(self, "ids", np.asarray(self.ids))
            put(self, "server", np.asarray(self.server, np.int64))
            put(self, "sequence", np.asarray(self.sequence, np.int64))

    @classmethod
    def from_tokens(
        cls,
        ids: np.ndarray,
        server: np.ndarray,
        sequence: np.ndarray,
        *,
        servers: Sequence[str],
        experts: int,
        **meta: Any,
    ) -> "Profile":
        """Profile of recorded routing, token-level sets kept.

        Args:
            ids: experts of every token, int [T, L, k].
            server: index of the server where each token entered, int [T].
            sequence: the sequence each token belongs to, int [T].
            servers: names of the servers, [N].
            experts: experts per layer, E.
            meta: the other fields of a profile: model, hidden_size, expert_bytes, reserved_bytes, window.

        Raises:
            InputError: shapes or values do not fit together.

        >>> ids = np.array([[[0, 2]], [[0, 1]], [[2, 1]]])  # three tokens, one layer, two experts each
        >>> meta = {"model": "toy", "hidden_size": 64, "expert_bytes": 1000}
        >>> one = Profile.from_tokens(ids, [0, 0, 1], [7, 7, 8], servers=("a", "b"), experts=4, **meta)
        >>> one.counts[:, 0].tolist()
        [[2, 1, 1, 0], [0, 1, 1, 0]]
        """
        ids, server = np.asarray(ids), np.asarray(server)
        source = meta.get("source", "profile")
        if ids.ndim != 3 or ids.shape[2] == 0:
            raise InputError(f"{source}: ids has shape {ids.shape}; must be [tokens, layers, k]")
        shape = (len(servers), ids.shape[1], experts)
        # Counts of zero let the constructor check ids and servers before they index anything.
        zeros, tokens = np.zeros(shape, np.int64), {"ids": ids, "server": server, "sequence": sequence}
        empty = cls(zeros, tuple(servers), top_k=ids.shape[2], **tokens, **meta)
        layer = np.arange(shape[1])[:, None]
        flat = (server.astype(np.int64)[:, None, None] * shape[1] + layer) * experts + ids.astype(np.int64)
        counts = np.bincount(flat.ravel(), minlength=int(np.prod(shape))).reshape(shape)
        return cls(**{**vars(empty), "counts": counts})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `profile.npz`, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        sizes = np.atleast_1d(self.expert_bytes).tolist()
        meta = {
            "model": self.model,
            "top_k": self.top_k,
            "experts": self.counts.shape[2],
            "hidden_size": self.hidden_size,
            "expert_bytes": sizes[0] if len(set(sizes)) == 1 else sizes,
            "reserved_bytes": self.reserved_bytes,
            "window": self.window,
        }
        arrays: dict[str, Any] = {"counts": self.counts, "servers": np.array(self.servers)}
        arrays["meta"] = np.array(json.dumps(meta))
        if self.ids is not None:
            arrays |= {key: getattr(self, key) for key in _TOKENS}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> "Profile":
        """Read `profile.npz`; nothing in it is ever unpickled.

        Args:
            path: the file.
            facts: entries of `meta` for those that the file lacks.

        Raises:
            InputError: the file is missing, truncated, incomplete, or its shapes and values do not fit together.
        """
        names, remedy = ("counts", "servers", "meta", *_TOKENS), "write it again with Profile.save"
        arrays = read_npz(read_bytes(path), path, names, remedy)
        for key in ("counts", "servers", "meta"):
            if key not in arrays:
                raise InputError(f"{path}: {key}: missing; a profile has counts, servers and meta")
        meta = parse_json(_texts(arrays["meta"], 0, f"{path}: meta")[0], f"{path}: meta")
        if not isinstance(meta, dict):
            raise InputError(f"{path}: meta = {show(meta)}: must be an object")
        meta = {**(facts or {}), **meta}
        for key in _META:
            if key not in meta:
                raise InputError(f"{path}: meta.{key}: missing; meta has {', '.join(_META)}")
        counts = arrays["counts"]
        if counts.ndim == 3 and meta["experts"] != counts.shape[2]:
            found = show(meta["experts"])
            raise InputError(f"{path}: meta.experts = {found}: counts has {counts.shape[2]} experts; correct one")
        return cls(
            counts,
            _texts(arrays["servers"], 1, f"{path}: servers"),
            meta["model"],
            meta["top_k"],
            meta["hidden_size"],
            meta["expert_bytes"],
            meta.get("reserved_bytes", 0),
            meta.get("window"),
            *(arrays.get(key) for key in _TOKENS),
            source=str(path),
        )


def _texts(array: np.ndarray, rank: int, where: str) -> tuple[str, ...]:
    """Texts of an array of one rank, 0 or 1."""
    if array.dtype.kind != "U" or array.ndim != rank:
        must = "names, [servers]" if rank else "a text"
        raise InputError(f"{where} has type {array.dtype} and shape {array.shape}; must be {must}")
    codes = np.frombuffer(array.tobytes(), np.dtype("u4").newbyteorder(array.dtype.byteorder))
    if (codes > sys.maxunicode).any():
        raise InputError(f"{where} has characters that do not exist; write it again with Profile.save")
    return tuple(np.atleast_1d(array).tolist())


def _plain(value: Any) -> Any:
    """Arrays and lists as tuples, numbers as Python's own: what JSON and numpy give, made one."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return tuple(value) if isinstance(value, list) else value


def _numbers(values: Any, where: str, rank: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != rank or 0 in array.shape:
        raise InputError(f"{where} has shape {array.shape}; must be [servers, layers, experts], none of them 0")
    check_grid(array.shape, where)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{where} has type {array.dtype}; must be integers or fractions")
    array = array.astype(np.float64) if array.dtype.kind == "f" else array
    bad = ~((array >= 0) & (array < 2**53))  # NaN compares false
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(f"{where}{list(place)} = {array[place]}: must be a finite number from 0 to 2**53")
    return array


def _check_meta(profile: Profile) -> None:
    where, counts = profile.source, profile.counts
    servers, layers, experts = counts.shape
    names = profile.servers
    if len(names) != servers or len({*map(str, names)}) < servers:
        raise InputError(f"{where}: servers = {show(names)}: must be {servers} different names, one per row of counts")
    if not all(is_name(name) for name in names):
        raise InputError(f"{where}: servers = {show(names)}: must be texts of printable characters")
    if not isinstance(profile.model, str) or not profile.model.isprintable():
        raise InputError(f"{where}: meta.model = {show(profile.model)}: must be a text of printable characters")
    for key, top in (("top_k", experts), ("hidden_size", 2**31)):
        value = getattr(profile, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= top:
            raise InputError(f"{where}: meta.{key} = {show(value)}: must be an integer from 1 to {top}")
    for key, least in (("expert_bytes", 1), ("reserved_bytes", 0)):
        values = getattr(profile, key)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**53:
                raise InputError(f"{where}: meta.{key} = {show(value)}: must be a whole number of bytes from {least}")
    if isinstance(profile.expert_bytes, tuple) and len(profile.expert_bytes) != layers:
        found = f"{len(profile.expert_bytes)} sizes for {layers} layers"
        raise InputError(f"{where}: meta.expert_bytes: {found}; give one number or one per layer")


def _check_tokens(profile: Profile) -> None:
    where = profile.source
    servers, layers, experts = profile.counts.shape
    arrays = {}
    for key in _TOKENS:
        if getattr(profile, key) is None:
            raise InputError(f"{where}: {key}: missing; the token level needs {', '.join(_TOKENS)}")
        arrays[key] = np.asarray(getattr(profile, key))
        if arrays[key].dtype.kind not in "iu":
            raise InputError(f"{where}: {key} has type {arrays[key].dtype}; must be integers")
    tokens = len(arrays["server"]) if arrays["server"].ndim else 0
    for key, shape in (("ids", (tokens, layers, profile.top_k)), ("server", (tokens,)), ("sequence", (tokens,))):
        if arrays[key].shape != shape:
            found = arrays[key].shape
            raise InputError(f"{where}: {key} has shape {found}; must be {shape} to fit counts, top_k and server")
    for key, top in (("ids", experts), ("server", servers)):
        bad = (arrays[key] < 0) | (arrays[key] >= top)
        if bad.any():
            raise InputError(f"{where}: {key} has the value {arrays[key][bad][0]}; must be from 0 to {top - 1}")
    ordered = np.sort(arrays["ids"], -1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        k = profile.top_k
        raise InputError(f"{where}: ids: a token names an expert twice in one layer; must be {k} different experts")
