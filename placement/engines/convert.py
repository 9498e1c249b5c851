"""Between other engines' files and ours: which format a file has, and what becomes of it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from placement.data.placement import Placement
from placement.data.profile import Profile
from placement.data.statistics import implausible
from placement.engines import maps as engine_maps
from placement.engines import recorders
from placement.engines.facts import Facts, reserved_bytes
from placement.engines.maps import ExpertMap, read_content
from placement.engines.recording import Recording
from placement.engines.routed_experts import routed_experts
from placement.files import InputError, parse_json, read_bytes, read_json, read_lines, show, write_bytes

SOURCES = ("sglang", "sglang-jax", "trtllm", "routed-experts", "vllm-ascend", "omni-infer", "placement")
MAP_FACTS = ("servers", "name", "top_k", "expert_bytes")  # what a map lacks to be a placement
PROFILE_FACTS = ("servers", "name", "top_k", "hidden_size", "expert_bytes")  # what statistics lack to be a profile
TARGETS = ("profile", "placement", "sglang", "trtllm", "vllm-ascend", "omni-infer")


def detect(path: str) -> str:
    """Format of a file or folder.

    Raises:
        InputError: it cannot be told.
    """
    target = Path(path)
    if os.path.isdir(target):  # not Path.is_dir, which fails on names that are too long
        if (target / "meta_info.json").is_file():
            return "trtllm"
        for pattern, name in (("*.pt", "sglang"), ("*.npy", "sglang-jax")):
            if any(target.glob(pattern)):
                return name
        raise InputError(f"{path}: a folder without meta_info.json, .pt or .npy; name the recorder's folder")
    suffix = target.suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if suffix == ".safetensors":
        raise InputError(f"{path}: one rank's part; name the folder that has meta_info.json")
    if suffix == ".npy":
        content = read_content(path)
        if isinstance(content, dict):
            return "sglang-jax"
        if isinstance(content, np.ndarray) and content.ndim == 3 and content.dtype.kind in "iu":
            return "omni-infer" if content.shape[2] > 2 and content.max(initial=0) <= 1 else "routed-experts"
    if suffix == ".json":
        number, line = next(read_lines(path), (0, ""))
        lines = _is_json(line, f"{path}: line {number}")
        content = parse_json(line, path) if lines else read_json(path)
        if isinstance(content, list):
            return "routed-experts"
        for key, name in _KEYS.items():
            if isinstance(content, dict) and key in content:
                return name
    raise InputError(f"{path}: its format cannot be told; say it with --from, one of {', '.join(SOURCES)}")


def _is_json(line: str, where: str) -> bool:
    try:
        parse_json(line, where)
    except InputError:
        return False
    return True


_SUFFIXES = {".pt": "sglang", ".yaml": "trtllm", ".yml": "trtllm", ".jsonl": "routed-experts"}
_KEYS = {
    **{"format": "placement", "moe_layer_count": "vllm-ascend", "physical_to_logical_map": "sglang"},
    **{"logical_count": "sglang", "routed_experts": "routed-experts", "meta_info": "routed-experts"},
    **{"choices": "routed-experts", "prompt_routed_experts": "routed-experts"},
}


def read(paths: Sequence[str], kind: str, facts: Facts, target: str | None = None) -> Recording | ExpertMap | Placement:
    """Files of one format.

    Args:
        paths: one file or folder; several of recorders and requests.
        kind: one of `SOURCES`.
        facts: what the files may lack.
        target: one of `TARGETS`, or None; it decides whether a bare array is a map or counts, and what the files must be
            completed with.

    Raises:
        InputError: damaged, inconsistent, or several where one is one map.
    """
    path = paths[0]
    if facts.by is not None and kind != "routed-experts":
        raise InputError(f"{path}: a file of {kind} says nothing of single requests; --by needs requests with routing")
    experts = facts.experts if facts.experts is not None else (facts.shape.experts if facts.shape else None)
    if kind == "routed-experts":
        top_k = facts.top_k if facts.top_k is not None else (facts.shape.top_k if facts.shape else None)
        layers = facts.layers if facts.layers is not None else (facts.shape.hidden_layers if facts.shape else None)
        return routed_experts(paths, layers, top_k, experts, facts.by)
    if kind in ("sglang", "sglang-jax"):
        contents = [
            (file, read_content(file)) for file in recorders.expand(paths, "*.pt" if kind == "sglang" else "*.npy")
        ]
        first = contents[0][1]
        if not (
            target not in (None, "profile")
            if isinstance(first, np.ndarray)
            else isinstance(first, dict) and "physical_to_logical_map" in first
        ):
            wrapped = [({"logical_count": c} if isinstance(c, np.ndarray) else c) for _, c in contents]
            return recorders.sglang([(file, c) for (file, _), c in zip(contents, wrapped, strict=True)])
    if len(paths) > 1:
        raise InputError(f"{paths[1]}: one {kind} file or folder at a time; convert them apart")
    if kind == "placement":
        placement = Placement.load(path)
        if target not in (None, "placement"):
            placement.require_home()
        return placement
    if kind == "trtllm" and os.path.isdir(path):
        return recorders.trtllm(path)
    if kind == "vllm-ascend":
        return engine_maps.read_vllm_ascend(path, experts)
    if kind == "omni-infer":
        return engine_maps.read_omni_infer(path)
    read_bytes(path)  # a file that is missing is not first asked facts for
    facts.require(MAP_FACTS if target in (None, "placement") else ("servers",), path)
    ranks = len(facts.devices(path))
    if kind == "trtllm":
        return engine_maps.read_trtllm(path, ranks, experts)
    if facts.shape is None:
        facts.notes.append(
            "every row is taken as a layer with experts; SGLang has rows for layers without, which --model tells"
        )
    return engine_maps.read_sglang(contents[0][1], path, ranks, experts)


def moe_layers(experts: ExpertMap | Recording, number: int, facts: Facts, where: str) -> list[int]:
    """Which of `number` rows are layers with experts, by the model's configuration, or all of them.

    Raises:
        InputError: the configuration has another number of layers.
    """
    shape = facts.shape
    if shape is None:
        _check_gaps(experts.layers or (), facts, where)
        return list(range(number))
    if experts.layers is not None:
        missing = sorted(set(shape.layers) - set(experts.layers))
        if missing:
            raise InputError(f"{where}: layer {missing[0]} is missing, which --model has; correct one")
        if more := sorted(set(experts.layers) - set(shape.layers)):
            facts.notes.append(f"layers {show(more, 60)} have no experts by --model and are left out")
        return [experts.layers.index(layer) for layer in shape.layers]
    if number == len(shape.layers):
        return list(range(number))
    if number != shape.hidden_layers:
        found = f"{shape.hidden_layers} layers, {len(shape.layers)} of them with experts"
        raise InputError(f"{where}: has {number} layers, but --model has {found}; correct one")
    return list(shape.layers)


def _check_gaps(layers: Sequence[int], facts: Facts, where: str) -> None:
    """Refuse layers that are not evenly spaced: a missing one would give all later ones another's experts."""
    steps = set(np.diff(layers).tolist())
    if len(steps) > 1:
        missing = next(layer + 1 for layer, later in pairwise(layers) if later > layer + min(steps))
        raise InputError(
            f"{where}: layer {missing} is missing between others; record or write it again, or give --model config.json if "
            "it is a layer without experts"
        )
    if layers and (layers[0] or steps - {1}):
        facts.notes.append(f"layers {show(list(layers), 60)} have experts; the result numbers them from 0")


def to_profile(recording: Recording, facts: Facts, where: str) -> Profile:
    """A profile of a recording; what it leaves open comes from `facts`, what it should be known for goes to its notes.

    Raises:
        InputError: something is missing or contradicts the flags.
    """
    notes = facts.notes
    notes += recording.notes
    counts: np.ndarray = recording.counts
    tokens = recording.tokens
    keep = moe_layers(recording, counts.shape[1], facts, where)
    if not counts.any():
        raise InputError(f"{where}: no assignment was counted; record while requests run")
    routed, silent = _routed(recording)
    indices = recording.layers or tuple(range(counts.shape[1]))
    if facts.shape is None:
        keep = routed
        _check_silent(routed, silent, indices, where, notes)
    elif lost := [indices[i] for i in keep if i in silent]:
        raise InputError(
            f"{where}: layer {lost[0]} has no routing, but by --model it has experts, and every token chooses some in each "
            "layer; record again, or correct --model"
        )
    counts = counts[:, keep]
    notes += implausible(counts, [indices[i] for i in keep])
    known = {"servers": recording.names, "top_k": recording.top_k}
    facts.require([key for key in PROFILE_FACTS if known.get(key) is None], where)
    top_k = facts.need("top_k", where, recording.top_k)
    facts.need("experts", where, counts.shape[2])
    if recording.lost is not None:
        names = facts.names(where)
        notes.append(f"{recording.lost}: every server gets the mean, and no plan can be source-aware")
        counts, server = np.repeat(counts / len(names), len(names), 0), None
    elif recording.names is not None:
        names, server = _named(recording.names, facts, where)
    else:
        names, server = facts.names(where), facts.server_of(len(counts), where)
    level: dict[str, Any] = {}
    if server is not None:
        summed = np.zeros((len(names), *counts.shape[1:]), counts.dtype)
        np.add.at(summed, server, counts)
        counts = summed
        if tokens is not None:
            ids = tokens.ids[:, keep].astype(np.uint8 if counts.shape[2] <= 256 else np.uint16)
            level = {"ids": ids, "server": server[tokens.server], "sequence": tokens.sequence}
    meta = {key: facts.need(key, where) for key in ("hidden_size", "expert_bytes")}
    meta |= {"model": facts.need("name", where), "reserved_bytes": reserved_bytes(facts)}
    return Profile(counts, names, top_k=top_k, window={"from": where}, **meta, **level, source=where)


def _check_silent(
    routed: Sequence[int], silent: Sequence[int], indices: Sequence[int], where: str, notes: list[str]
) -> None:
    """Layers without routing are taken as layers without experts where a model has those: first, or at even distances."""
    if not routed:
        raise InputError(f"{where}: no assignment was counted; record while requests run")
    inside = [i for i in silent if routed[0] < i < routed[-1]]
    if (inside and len(set(np.diff(routed).tolist())) > 1) or any(i > routed[-1] for i in silent):
        layer = indices[inside[0] if inside else silent[-1]]
        raise InputError(
            f"{where}: layer {layer} has no routing though others have, and every token chooses experts in each layer; record "
            "again, or give --model config.json if it is a layer without experts"
        )
    if silent:
        left = show([indices[i] for i in silent], 60)
        notes.append(f"layers {left} have no routing and are left out, as layers without experts")


def _routed(recording: Recording) -> tuple[list[int], list[int]]:
    """Layers with routing, and those without: no counts, or the same expert twice for a token."""
    used = recording.counts.any((0, 2))
    if recording.tokens is not None and len(recording.tokens.ids):
        ordered = np.sort(recording.tokens.ids, -1)
        used &= ~(ordered[..., 1:] == ordered[..., :-1]).any((0, 2))
    return np.flatnonzero(used).tolist(), np.flatnonzero(~used).tolist()


def _named(found: tuple[str, ...], facts: Facts, where: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Servers in the order of the flags, else as found; and the index of each found one."""
    names = (facts.cluster.names if facts.cluster is not None else facts.servers) or found
    for name in found:
        if name not in names:
            raise InputError(
                f"{where}: server = {show(name)}: not among {', '.join(names)}; correct --servers or the file"
            )
    return names, np.array([names.index(name) for name in found])


def to_placement(experts: ExpertMap, facts: Facts, where: str) -> Placement:
    """A placement of an engine's map.

    Raises:
        InputError: other devices than the flags say, or something is missing.
    """
    facts.require(MAP_FACTS, where)
    keep = moe_layers(experts, experts.resident.shape[1], facts, where)
    resident, devices = experts.resident[:, keep], facts.devices(where)
    if len(devices) != len(resident):
        raise InputError(
            f"{where}: has {len(resident)} ranks, the flags name {len(devices)} devices; correct --servers, "
            "--ranks-per-server or --cluster"
        )
    if resident.shape[2] < facts.need("experts", where, resident.shape[2]):
        raise InputError(f"{where}: has {resident.shape[2]} experts; the model has more")
    model = {"name": facts.need("name", where), "layers": resident.shape[1], "experts": resident.shape[2]}
    model |= {key: facts.need(key, where) for key in ("top_k", "expert_bytes")}
    model["reserved_bytes"] = reserved_bytes(facts)
    placement = Placement(resident, devices, "converted", model, source=where)
    if facts.cluster is not None:
        placement.validate(facts.cluster)
    return placement


def to_map(placement: Placement | ExpertMap, facts: Facts, where: str) -> ExpertMap:
    """An engine's map of a placement or of another engine's map, layers numbered as the model numbers them."""
    experts = ExpertMap(placement.resident, getattr(placement, "layers", None))
    number = experts.resident.shape[1]
    keep = moe_layers(experts, number, facts, where)
    layers = experts.layers
    if facts.shape is not None:
        if experts.resident.shape[2] != facts.shape.experts:
            raise InputError(f"{where}: has {experts.resident.shape[2]} experts, --model has {facts.shape.experts}")
        layers = facts.shape.layers
    elif layers is None:
        layers = tuple(range(facts.first_layer, facts.first_layer + number))
    return replace(experts, resident=experts.resident[:, keep], layers=layers)


def write_map(experts: ExpertMap, kind: str, path: str, facts: Facts, where: str) -> None:
    """Write an engine's map, atomically.

    Raises:
        InputError: the engine needs equal slots and the map has others; nothing is written.
    """
    if kind == "sglang":
        hidden = facts.shape.hidden_layers if facts.shape is not None else None
        write_bytes(path, engine_maps.write_sglang(experts, where, hidden))
        return
    writer = {
        "trtllm": engine_maps.write_trtllm,
        "vllm-ascend": engine_maps.write_vllm_ascend,
        "omni-infer": engine_maps.write_omni_infer,
    }
    write_bytes(path, writer[kind](experts, where))
