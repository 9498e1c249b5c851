"""Expert statistics that engines record while they serve, read into one `Recording`; chooses no servers and no names.

Layouts as the engines' sources have them: SGLang's expert distribution recorder, sglang-jax, and TensorRT-LLM's expert
statistics.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placement.data.arrays import check_grid
from placement.data.problem import Tokens
from placement.engines.recording import MAX_ID, Recording, counted, integers, positive
from placement.engines.saved_arrays import load_safetensors
from placement.files import InputError, read_bytes, read_json, show

ARRIVALS = "every rank counted the tokens that arrived at it, not those that entered there (DeepEP low latency)"
COPIES = "every rank recorded the same tokens (attention is not data-parallel)"
SUMMED = "the engine summed over its ranks before writing"
# What `last_physical_to_logical_map` leaves open.
REBALANCED = "copies were counted through the map at the end of the recording; before a rebalance it was another"


def sglang(dumps: Sequence[tuple[str, Any]]) -> Recording:
    """Dumps of SGLang's expert distribution recorder, any mode, of one or all ranks; sglang-jax's are like mode `stat`.

    Args:
        dumps: path and content of each file, see `expand` and `engine_maps.read_content`.

    Raises:
        InputError: of unlike layouts or models, or a rank is missing.
    """
    for path, dump in dumps:
        if not isinstance(dump, dict) or not ("logical_count" in dump or "records" in dump):
            found = ", ".join(map(str, dump)) if isinstance(dump, dict) else type(dump).__name__
            raise InputError(f"{path}: holds {show(found, 80)}; a recorder's dump has logical_count or records")
    detailed = ["records" in dump for _, dump in dumps]
    if any(detailed) != all(detailed):
        path = dumps[detailed.index(False)][0]
        raise InputError(f"{path}: has another recorder mode than the other files; convert them apart")
    return _records(dumps) if detailed[0] else _logical_counts(dumps)


def expand(paths: Sequence[str], pattern: str) -> list[str]:
    """Files, with each folder replaced by the files in it that match.

    Raises:
        InputError: a folder has none.
    """
    found = []
    for path in paths:
        inside = sorted(map(str, Path(path).glob(pattern))) if os.path.isdir(path) else [path]
        if not inside:
            raise InputError(f"{path}: has no file {pattern}; name the recorder's folder")
        found += inside
    return found


def _logical_counts(dumps: Sequence[tuple[str, Mapping[str, Any]]]) -> Recording:
    """Dumps with `logical_count`, [layers, experts] or with steps before."""
    total: Any = 0
    for path, dump in dumps:
        where = f"{path}: logical_count"
        counts = counted(dump["logical_count"], (2, 3), where)
        counts = counts.sum(0) if counts.ndim == 3 else counts
        if np.ndim(total) and counts.shape != total.shape:
            raise InputError(f"{where} has shape {counts.shape}, {dumps[0][0]} has {total.shape}; convert models apart")
        total = total + counts
    return Recording(total[None], lost=SUMMED)


def _records(dumps: Sequence[tuple[str, Mapping[str, Any]]]) -> Recording:
    """SGLang's `per_pass` and `per_token` dumps: per rank counts of physical experts, and the map to logical ones."""
    tables = []
    for path, dump in dumps:
        key = f"{path}: last_physical_to_logical_map"
        if "last_physical_to_logical_map" not in dump:
            raise InputError(f"{key}: missing; record again with a current SGLang")
        tables.append(integers(dump["last_physical_to_logical_map"], (2,), MAX_ID, key))
        if tables[-1].shape != tables[0].shape:
            raise InputError(f"{key} has shape {tables[-1].shape}, {dumps[0][0]} has {tables[0].shape}; mixed models")
    experts = max(int(table.max()) for table in tables) + 1
    check_grid((len(tables), len(tables[0]), experts), f"{dumps[0][0]}: last_physical_to_logical_map")
    notes = [REBALANCED] if any((np.sort(table) != np.arange(table.shape[1])).any() for table in tables) else []
    physical: dict[int, np.ndarray] = {}
    logical: dict[int, np.ndarray] = {}
    level: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    started = skipped = 0
    for (path, dump), table in zip(dumps, tables, strict=True):
        if not isinstance(dump["records"], list):
            raise InputError(f"{path}: records = {show(dump['records'])}: must be a list of dicts")
        for i, record in enumerate(dump["records"]):
            where = f"{path}: records[{i}]"
            rank = record.get("rank") if isinstance(record, dict) else None
            if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < MAX_ID:
                raise InputError(f"{where}.rank = {show(rank)}: must be the index of a rank")
            counts = counted(record.get("global_physical_count"), (2,), f"{where}.global_physical_count")
            if counts.shape != table.shape:
                raise InputError(f"{where}.global_physical_count has shape {counts.shape}, the map {table.shape}")
            physical[rank] = physical.get(rank, 0) + counts
            logical[rank] = logical.get(rank, 0) + _by_expert(table, counts, experts)
            if "topk_ids_of_layer" in record:
                (ids, sequence), number, sequences = _record_tokens(record, table, where)
                skipped += number - len(ids)
                level.append((ids, np.full(len(ids), rank), sequence + started))
                started += sequences
    if not physical:
        raise InputError(f"{dumps[0][0]}: records: empty; record while requests run")
    ranks = _ranks(physical, dumps[0][0])
    counts, lost = np.stack([logical[rank] for rank in ranks]), _lost([physical[rank] for rank in ranks])
    if lost is not None:
        return Recording(counts[:1] if lost == COPIES else counts.sum(0, keepdims=True), lost, notes=notes)
    level = [part for part in level if len(part[0])]
    if len({part[0].shape[2] for part in level}) != 1:
        return Recording(counts, notes=notes)
    if skipped:
        notes.append(f"{skipped} tokens without a full set of experts are left out of the token level")
    tokens = Tokens(*(np.concatenate(parts) for parts in zip(*level, strict=True)))
    return Recording(counts, tokens=tokens, top_k=tokens.ids.shape[2], notes=notes)


def _by_expert(table: np.ndarray, counts: np.ndarray, experts: int) -> np.ndarray:
    """Counts of logical experts [L, E] from those of physical ones [L, P] and the map [L, P]."""
    layers = len(table)
    flat = (np.arange(layers)[:, None] * experts + table).ravel()
    summed = np.bincount(flat, counts.ravel(), minlength=layers * experts).reshape(layers, experts)
    return summed if counts.dtype == np.float64 else summed.astype(np.int64)


def _record_tokens(
    record: Mapping[str, Any], table: np.ndarray, where: str
) -> tuple[tuple[np.ndarray, np.ndarray], int, int]:
    """Logical ids [T, L, k] and sequences [T] of one pass; how many tokens it had; how many sequences."""
    layers, slots = table.shape
    key = f"{where}.topk_ids_of_layer"
    raw = record["topk_ids_of_layer"]
    if isinstance(raw, np.ndarray) and raw.ndim == 3 and raw.shape[1] == 0:  # an idle pass
        return (np.zeros((0, layers, 1), np.int64), np.zeros(0, np.int64)), 0, 0
    top = integers(raw, (3,), slots - 1, key, least=-1)
    if len(top) != layers:
        raise InputError(f"{key} has {len(top)} layers, the map {layers}; must be [layers, tokens, k]")
    used = (top >= 0).any((0, 1))
    top = top[:, :, used]  # the recorder's buffer is wider than the model's k
    ids = np.where(top >= 0, np.take_along_axis(table, top.clip(0).reshape(layers, -1), 1).reshape(top.shape), -1)
    ids = ids.transpose(1, 0, 2)
    lengths = record.get("extend_seq_lens")
    number = len(ids)
    starts = np.arange(number)  # one token of each sequence: a decode pass
    if isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths) and sum(lengths) == number:
        starts = np.repeat(np.arange(len(lengths)), lengths)
    routed = (ids >= 0).any((0, 2))  # layers without experts stay -1 for every token
    full = (ids[:, routed] >= 0).all((1, 2))
    return (ids[full], starts[full]), number, int(starts.max(initial=-1)) + 1


def _ranks(found: Mapping[int, Any], path: str) -> list[int]:
    ranks = sorted(found)
    missing = next((i for i, rank in enumerate(ranks) if i != rank), None)
    if missing is not None:
        raise InputError(f"{path}: rank {missing} of {ranks[-1] + 1} is missing; give the files of all ranks")
    return ranks


def _lost(physical: Sequence[np.ndarray]) -> str | None:
    """Whether the counts per rank tell where tokens came from."""
    if len(physical) < 2 or not sum(counts.sum() for counts in physical):
        return None
    if all(counts.shape == physical[0].shape and (counts == physical[0]).all() for counts in physical):
        return COPIES
    slots = physical[0].shape[1]
    block = np.arange(slots) * len(physical) // slots
    outside = [counts[:, block != rank].sum() for rank, counts in enumerate(physical)]
    return ARRIVALS if slots % len(physical) == 0 and not any(outside) else None


def trtllm(folder: str) -> Recording:
    """TensorRT-LLM's EXPERT_STATISTIC_PATH: meta_info.json, rank*.safetensors, and token level where raw files are.

    Raises:
        InputError: files missing, damaged, or not of one model.
    """
    path = Path(folder) / "meta_info.json"
    meta = read_json(path)
    meta = meta if isinstance(meta, dict) else {}
    experts, top_k = (positive(meta.get(key), f"{path}: {key}") for key in ("num_experts", "num_experts_per_token"))
    plain, raw = _rank_files(folder)
    if not plain:
        raise InputError(f"{folder}: has no rank*.safetensors; record with EXPERT_STATISTIC_ITER_RANGE")
    ranks = _ranks(plain, folder)
    layers = sorted({layer for content in plain.values() for _, layer in content})
    counts = np.zeros(check_grid((len(ranks), len(layers), experts), f"{path}: num_experts"), np.int64)
    for rank in ranks:
        for (step, layer), tensor in plain[rank].items():
            where = f"{folder}: rank{rank}.safetensors: {step}_{layer}"
            values = integers(tensor, (1,), 2**53, where)
            if len(values) != experts:
                raise InputError(f"{where} has {len(values)} counts; num_experts is {experts}")
            counts[rank, layers.index(layer)] += values
    lost = COPIES if len(ranks) > 1 and counts.any() and (counts == counts[0]).all() else None
    notes, tokens = [], None
    if raw and lost is None:
        tokens = _raw_tokens(raw, ranks, layers, experts, top_k, folder, notes)
    kept = counts[:1] if lost else counts
    return Recording(kept, lost, tokens=tokens, layers=tuple(layers), top_k=top_k, notes=notes)


_ByStepAndLayer = dict[tuple[int, int], np.ndarray]


def _rank_files(folder: str) -> tuple[dict[int, _ByStepAndLayer], dict[int, _ByStepAndLayer]]:
    """Counts, and chosen experts, of every rank that has a file, by iteration and layer."""
    plain: dict[int, _ByStepAndLayer] = {}
    raw: dict[int, _ByStepAndLayer] = {}
    for file in sorted(Path(folder).glob("rank*.safetensors")):
        match = re.fullmatch(r"rank([0-9]{1,18})(_raw)?\.safetensors", file.name)
        if match is None:
            continue
        content: _ByStepAndLayer = {}
        for key, tensor in load_safetensors(read_bytes(file), file).items():
            parts = re.fullmatch(r"([0-9]{1,18})_([0-9]{1,5})", key)
            if parts is None:
                raise InputError(f"{file}: {show(key)}: keys must be ITERATION_LAYER")
            content[int(parts[1]), int(parts[2])] = tensor
        (raw if match[2] else plain)[int(match[1])] = content
    return plain, raw


def _raw_tokens(
    raw: Mapping[int, Mapping[tuple[int, int], np.ndarray]],
    ranks: Sequence[int],
    layers: Sequence[int],
    experts: int,
    top_k: int,
    folder: str,
    notes: list[str],
) -> Tokens | None:
    """Tokens of TensorRT-LLM's raw files; None with a note where they are incomplete."""
    if sorted(raw) != list(ranks):
        notes.append("raw files of some ranks are missing, so that only counts are taken")
        return None
    ids, source = [], []
    for rank in ranks:
        for step in sorted({step for step, _ in raw[rank]}):
            row = []
            for layer in layers:
                where = f"{folder}: rank{rank}_raw.safetensors: {step}_{layer}"
                tensor = raw[rank].get((step, layer))
                if tensor is None or (row and len(tensor) != len(row[0])):
                    notes.append(
                        f"{where} is missing or has other tokens than its neighbours, so that only counts are taken"
                    )
                    return None
                if tensor.size:
                    tensor = integers(tensor, (2,), experts - 1, where)
                row.append(tensor.reshape(-1, top_k) if tensor.size % top_k == 0 else tensor)
                if row[-1].shape[1:] != (top_k,):
                    raise InputError(f"{where} has shape {tensor.shape}; num_experts_per_token is {top_k}")
            ids.append(np.stack(row, 1))
            source.append(np.full(len(row[0]), rank))
    sequence = np.arange(sum(map(len, ids)))
    notes.append("the raw files do not tell which tokens belong together: every token is its own sequence")
    return Tokens(np.concatenate(ids), np.concatenate(source), sequence)
