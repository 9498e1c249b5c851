"""Routing that vLLM and SGLang return with single requests, read into one `Recording`: the token level of any engine."""

import base64
import binascii
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placement.data.arrays import check_grid
from placement.data.problem import Tokens
from placement.engines.recording import MAX_ID, MAX_NUMBERS, Recording, integers
from placement.engines.saved_arrays import load_npy
from placement.files import InputError, is_name, parse_json, read_bytes, read_json, read_lines, show


def routed_experts(
    paths: Sequence[str],
    layers: int | None = None,
    top_k: int | None = None,
    experts: int | None = None,
    by: str | None = None,
) -> Recording:
    """Routing that vLLM and SGLang return with a request: JSON lines of requests or whole responses, or `.npy` arrays.

    A line names its server in `server` or `source`; where none does, each file is a source. `routed_experts` (and vLLM's
    `prompt_routed_experts`) may be nested lists, base64 of a `.npy` file (vLLM), or base64 of bare int32 (SGLang).

    Args:
        paths: `.jsonl`, `.json` or `.npy` files.
        layers, top_k: shape of bare int32.
        experts: E, where ids do not tell it.
        by: field of a line whose values become the sources, such as "task", in place of the server.

    Raises:
        InputError: damaged, or of unlike shapes, or only some lines name a server, or one lacks the field `by`.
    """
    ids, source, names = _every_request(paths, layers, top_k, by)
    if sum(array.size for array in ids) > MAX_NUMBERS:
        raise InputError(f"{paths[0]}: more than {MAX_NUMBERS} assignments; convert a part of the requests")
    empty = [not len(array) for array in ids]
    source = [number for number, skip in zip(source, empty, strict=True) if not skip]
    ids = [array for array in ids if len(array)]
    if not ids:
        raise InputError(f"{paths[0]}: has no request with routing")
    odd = next((array for array in ids if array.shape[1:] != ids[0].shape[1:]), None)
    if odd is not None:
        raise InputError(
            f"{paths[0]}: requests of {ids[0].shape[1:]} and {odd.shape[1:]} layers and k; convert models apart"
        )
    sequence = np.repeat(np.arange(len(ids)), [len(array) for array in ids])
    server = np.repeat(source, [len(array) for array in ids])
    every = np.concatenate(ids)
    full = (every >= 0).all((1, 2))
    notes = [f"{(~full).sum()} tokens without routing are left out"] if not full.all() else []
    every, sequence, server = every[full], sequence[full], server[full]
    if not len(every):
        raise InputError(f"{paths[0]}: no token has routing")
    if experts is None:
        experts = int(every.max()) + 1
        notes.append(f"the largest id seen is {experts - 1}, so {experts} experts are taken; set others with --experts")
    elif every.max() >= experts:
        raise InputError(f"{paths[0]}: routed_experts has the id {every.max()}, but there are {experts} experts")
    shape = check_grid((len(names) or len(paths), every.shape[1], experts), f"{paths[0]}: routed_experts")
    flat = (server[:, None, None] * shape[1] + np.arange(shape[1])[:, None]) * experts + every
    counts = np.bincount(flat.ravel(), minlength=int(np.prod(shape))).reshape(shape)
    tokens = Tokens(every, server, sequence)
    return Recording(counts, names=tuple(names) or None, tokens=tokens, top_k=every.shape[2], notes=notes)


def _every_request(
    paths: Sequence[str], layers: int | None, top_k: int | None, by: str | None
) -> tuple[list[np.ndarray], list[int], list[str]]:
    """Ids of every request, the index of its server, and the servers' names; no name where each file is a source."""
    ids: list[np.ndarray] = []
    source: list[int] = []
    names: dict[str, int] = {}
    unnamed = ""
    for number, path in enumerate(paths):
        if by and Path(path).suffix == ".npy":
            raise InputError(f"{path}: an array names no {by}; convert JSON lines of requests, each with its {by}")
        if Path(path).suffix == ".npy":
            ids.append(_routing(load_npy(read_bytes(path), path), layers, top_k, path))
            source.append(number)
            unnamed = unnamed or path
            continue
        for where, request in _requests(path):
            if not isinstance(request, dict):
                raise InputError(f"{where}: {show(request)}: must be an object with routed_experts")
            given = request.get(by) if by else request.get("server", request.get("source"))
            if (by and given is None) or (given is not None and not is_name(given)):
                raise InputError(f"{where}: {by or 'server'} = {show(given)}: must be a name of printable characters")
            ids.append(_of_request(request, layers, top_k, where))
            unnamed = unnamed or ("" if given is not None else where)
            source.append(number if given is None else names.setdefault(given, len(names)))
    if names and unnamed and any(len(array) for array in ids):
        raise InputError(f"{unnamed}: server: missing, but other requests name theirs; name it in every line")
    return ids, source, list(names)


def _of_request(request: Mapping[str, Any], layers: int | None, top_k: int | None, where: str) -> np.ndarray:
    """Ids of prompt and completion, int64 [T, L, k]."""
    parts = [_routing(value, layers, top_k, f"{where}: {key}") for key, value in _parts(request)]
    if not parts:
        raise InputError(f"{where}: routed_experts: missing; ask for it with the request")
    parts = [part for part in parts if len(part)] or parts[:1]
    if len({part.shape[1:] for part in parts}) > 1:
        raise InputError(f"{where}: prompt and completion have other layers or k; {parts[0].shape[1:]} first")
    return np.concatenate(parts)


def _requests(path: str) -> Iterator[tuple[str, Any]]:
    """Requests of a file of JSON lines, or of a JSON file that is one request or a list of them."""
    lines = read_lines(path)
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    try:
        value, broken = parse_json(first[1], f"{path}: line {first[0]}"), None
    except InputError as error:
        value, broken = None, error
    if second is not None and broken is None:
        yield f"{path}: line {first[0]}", value
        for number, line in itertools.chain([second], lines):
            yield f"{path}: line {number}", parse_json(line, f"{path}: line {number}")
        return
    if broken is not None:  # one document over several lines, or a damaged line
        try:
            value = read_json(path)
        except InputError as error:
            raise (broken if first[1].rstrip().endswith(("}", "]")) else error) from None
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        yield f"{path}: entry {i}", entry


def _parts(request: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Where a response keeps its routing, in the order of its tokens."""
    choices = request.get("choices")
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    meta = request.get("meta_info")
    inner = [request, *([meta] if isinstance(meta, dict) else []), *choices]
    keys = ("prompt_routed_experts", "routed_experts")
    found = [(key, part[key]) for key in keys for part in inner if part.get(key) is not None]
    return found


def _routing(value: Any, layers: int | None, top_k: int | None, where: str) -> np.ndarray:
    """Ids of one request, int64 [T, L, k], -1 where there is no routing."""
    if isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{where} = {show(value)}: not base64") from None
        if content.startswith(b"\x93NUMPY"):
            value = load_npy(content, where)
        elif layers is None or top_k is None:
            raise InputError(
                f"{where}: bare int32 without its shape; give --model config.json, or --layers and --top-k"
            )
        elif len(content) % (4 * layers * top_k):
            raise InputError(
                f"{where}: {len(content)} bytes are no int32 of [tokens, {layers}, {top_k}]; correct the model"
            )
        else:
            value = np.frombuffer(content, "<i4").reshape(-1, layers, top_k)
    if isinstance(value, list) and not value:  # nothing generated
        return np.zeros((0, layers or 1, top_k or 1), np.int64)
    if isinstance(value, np.ndarray) and value.ndim == 3 and len(value) == 0:
        return value.astype(np.int64)
    return integers(value, (3,), MAX_ID, where, least=-1)
