"""Maps of experts to devices as inference engines read and write them; checks them, plans nothing.

SGLang (`--init-expert-location`, JSON or a saved dict) and TensorRT-LLM (the load balancer's YAML) number the slots of a
layer through all ranks and find the rank by division; vllm-ascend lists experts per device, in equal numbers; omni-infer
marks them in an array of 0 and 1, in any number. Layers without experts are rows of SGLang's map too.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placement.data.arrays import check_grid
from placement.engines.balancer_yaml import read_balancer_yaml
from placement.engines.recording import MAX_ID, integers, numbers
from placement.engines.saved_arrays import load_npy, load_torch
from placement.files import InputError, parse_json, read_bytes, show

REMEDY = "plan again with --equal-slots"
_MOST_SHARED = 4  # shared experts of a layer


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """Experts on every device: resident bool [D, L, E]; `layers` are the model's own indices of the layers, if known.

    `notes` say what a reader of the result should know.
    """

    resident: np.ndarray
    layers: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


def read_sglang(content: Any, path: str, ranks: int, experts: int | None = None) -> ExpertMap:
    """SGLang's and sglang-jax's `physical_to_logical_map` [layers, slots], from what `read_content` gives.

    Raises:
        InputError: damaged, slots that do not divide by the ranks, or an expert that is nowhere.
    """
    content = {"physical_to_logical_map": content} if isinstance(content, np.ndarray) else content
    if not isinstance(content, dict) or "physical_to_logical_map" not in content:
        raise InputError(f"{path}: physical_to_logical_map: missing; a map of SGLang has it")
    where = f"{path}: physical_to_logical_map"
    table = integers(content["physical_to_logical_map"], (2,), MAX_ID, where)
    return _from_slots(table, ranks, experts, where)


def read_content(path: str) -> Any:
    """Content of a .json, .pt or .npy file, unpickled as data only."""
    data = read_bytes(path)
    suffix = Path(path).suffix
    if suffix == ".pt":
        return load_torch(data, path)
    if suffix == ".npy":
        return load_npy(data, path)
    return parse_json(data, path)


def read_trtllm(path: str, ranks: int, experts: int | None = None) -> ExpertMap:
    """TensorRT-LLM's YAML: num_slots, and initial_global_assignments with the expert of every slot of each layer.

    Raises:
        InputError: it is not of that form, or as `read_sglang`.
    """
    _, rows = read_balancer_yaml(path)
    where, layers = f"{path}: initial_global_assignments", tuple(sorted(rows))
    table = integers([rows[layer] for layer in layers], (2,), MAX_ID, where)
    return _from_slots(table, ranks, experts, where, layers)


def _from_slots(
    table: np.ndarray, ranks: int, experts: int | None, where: str, indices: tuple[int, ...] | None = None
) -> ExpertMap:
    """The map of an expert per slot, int [L, P]."""
    layers, slots = table.shape
    if slots % ranks:
        raise InputError(f"{where} has {slots} slots, which {ranks} devices cannot share evenly; correct --servers")
    each = np.sort(table.reshape(layers, ranks, -1), -1)
    twice = int((each[..., 1:] == each[..., :-1]).sum())
    notes = (f"{twice} slots hold a second copy of an expert on their rank, which serves nobody, and are left out",)
    experts = int(table.max()) + 1 if experts is None else experts
    if table.max() >= experts:
        raise InputError(f"{where} has expert {table.max()}; the model has {experts}")
    resident = np.zeros(check_grid((layers, ranks, experts), where), bool)
    np.put_along_axis(resident, each, True, axis=-1)
    return ExpertMap(_complete(resident.transpose(1, 0, 2), where), indices, notes if twice else ())


def _complete(resident: np.ndarray, where: str) -> np.ndarray:
    missing = np.argwhere(~resident.any(0))
    if len(missing):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"{where}: layer {missing[0][0]} expert {missing[0][1]} is on no device{more}; the map loses it"
        )
    return resident


def read_vllm_ascend(path: str, experts: int | None = None) -> ExpertMap:
    """vllm-ascend's `expert_map_path` JSON.

    Raises:
        InputError: it is not of that form, devices differ between layers, or an expert is nowhere or twice on a device.
    """
    content = read_content(path)
    tables = content.get("layer_list") if isinstance(content, dict) else None
    if not isinstance(tables, list) or not tables or content.get("moe_layer_count") != len(tables):
        found = show(content.get("moe_layer_count")) if isinstance(content, dict) else show(content)
        raise InputError(f"{path}: moe_layer_count = {found}: must be the length of layer_list")
    rows: dict[tuple[int, int], list[int]] = {}
    indices = []
    for i, table in enumerate(tables):
        where = f"{path}: layer_list[{i}]"
        layer = table.get("layer_id") if isinstance(table, dict) else None
        if type(layer) is not int or not 0 <= layer <= MAX_ID or layer <= (indices or [-1])[-1]:
            raise InputError(f"{where}.layer_id = {show(layer)}: must be the index of a layer, in ascending order")
        indices.append(layer)
        rows |= {(j, i): listed for j, listed in enumerate(_ascend_devices(table, where))}
    number = {j for j, _ in rows}
    if len(rows) != len(number) * len(tables):
        raise InputError(
            f"{path}: layer_list: layers have different numbers of devices; must be the same devices in all"
        )
    note = _leave_out_shared(rows, len(tables), experts)
    largest = max((max(row) for row in rows.values() if row), default=0)
    experts = largest + 1 if experts is None else experts
    if largest >= experts:
        raise InputError(f"{path}: layer_list has expert {largest}; the model has {experts}")
    resident = np.zeros(check_grid((len(number), len(tables), experts), f"{path}: layer_list"), bool)
    for (device, layer), row in rows.items():
        resident[device, layer, row] = True
    # From 0 without a gap they count the layers that have experts; otherwise they are the model's own numbers.
    layers = None if indices == list(range(len(indices))) else tuple(indices)
    return ExpertMap(_complete(resident, path), layers, note)


def _ascend_devices(table: Mapping[str, Any], where: str) -> list[list[int]]:
    """Experts of every device of one layer."""
    devices = table.get("device_list")
    if not isinstance(devices, list) or not devices:
        raise InputError(f"{where}.device_list = {show(devices)}: must list the devices")
    if table.get("device_count", len(devices)) != len(devices):
        raise InputError(f"{where}.device_count = {show(table['device_count'])}: device_list has {len(devices)}")
    found = []
    for j, device in enumerate(devices):
        ids = device.get("device_expert") if isinstance(device, dict) else None
        if not isinstance(ids, list) or device.get("device_id", j) != j:
            raise InputError(f"{where}.device_list[{j}]: must have device_expert, and device_id {j} or none, in order")
        listed = integers(ids, (1,), MAX_ID, f"{where}.device_list[{j}].device_expert").tolist() if ids else []
        if len(set(listed)) < len(listed):
            raise InputError(f"{where}.device_list[{j}].device_expert = {show(ids)}: an expert twice; keep one")
        found.append(listed)
    return found


def _leave_out_shared(rows: dict[tuple[int, int], list[int]], layers: int, experts: int | None) -> tuple[str, ...]:
    """Take shared experts out of `rows`: with "mix placement" they have the ids after the last routed one, in every layer."""
    if experts is None:
        return ()
    above = [{e for (_, i), row in rows.items() if i == layer for e in row if e >= experts} for layer in range(layers)]
    if (
        not above[0]
        or above[0] != set(range(experts, experts + len(above[0])))
        or any(ids != above[0] for ids in above)
    ):
        return ()
    if len(above[0]) > _MOST_SHARED:
        return ()
    for row in rows.values():
        row[:] = [expert for expert in row if expert < experts]
    shared = ", ".join(map(str, sorted(above[0])))
    return (
        f"the model has {experts} experts: {shared} in every layer are shared ones (mix placement) and are left out",
    )


def read_omni_infer(path: str) -> ExpertMap:
    """omni-infer's placement pattern, 0 and 1 in [ranks, layers, experts].

    Raises:
        InputError: it is not of that form, or an expert is nowhere.
    """
    pattern = numbers(load_npy(read_bytes(path), path), (3,), path)
    check_grid(pattern.shape, path)
    if not np.isin(pattern, (0, 1)).all():
        raise InputError(f"{path}: holds other numbers than 0 and 1; a pattern is [ranks, layers, experts] of 0 and 1")
    return ExpertMap(_complete(pattern.astype(bool), path))


def equal_slots(experts: ExpertMap, where: str) -> np.ndarray:
    """Experts by slot, int64 [L, D, S], each device's in ascending order.

    Raises:
        InputError: devices hold unequal numbers of experts in some layer, or layers have unequal numbers.
    """
    per_device = experts.resident.sum(2)
    if (per_device != per_device.flat[0]).any():
        device, layer = np.argwhere(per_device != per_device.flat[0])[0]
        raise InputError(
            f"{where}: device {device} holds {per_device[device, layer]} experts of layer {layer}, device 0 holds "
            f"{per_device.flat[0]} of layer 0; this engine needs the same number everywhere: {REMEDY}"
        )
    layers, devices, slots = experts.resident.shape[1], len(experts.resident), int(per_device.flat[0])
    return np.nonzero(experts.resident.transpose(1, 0, 2))[2].reshape(layers, devices, slots)


def write_sglang(experts: ExpertMap, where: str, hidden_layers: int | None = None) -> bytes:
    """JSON for `--init-expert-location`; layers without experts get the rows that SGLang itself would give them.

    Raises:
        InputError: unequal slots.
    """
    slots = equal_slots(experts, where).reshape(experts.resident.shape[1], -1)
    indices = experts.layers or tuple(range(len(slots)))
    rows = [
        (np.arange(slots.shape[1]) % experts.resident.shape[2]).tolist()
        for _ in range(hidden_layers or indices[-1] + 1)
    ]
    for layer, row in zip(indices, slots.tolist(), strict=True):
        rows[layer] = row
    return _json_rows('{"physical_to_logical_map": [', rows, "]}")


def _json_rows(head: str, rows: Sequence[Any], tail: str) -> bytes:
    return (head + "\n" + ",\n".join(json.dumps(row) for row in rows) + "\n" + tail + "\n").encode()


def write_trtllm(experts: ExpertMap, where: str, updates: int = 0) -> bytes:
    """YAML for TensorRT-LLM's load balancer; layers by the model's own indices.

    Raises:
        InputError: unequal slots.
    """
    slots = equal_slots(experts, where).reshape(experts.resident.shape[1], -1)
    indices = experts.layers or tuple(range(len(slots)))
    lines = [f"  {layer}: {row}" for layer, row in zip(indices, slots.tolist(), strict=True)]
    head = ["initial_global_assignments:", *lines, f"layer_updates_per_iter: {updates}", f"num_slots: {slots.shape[1]}"]
    return ("\n".join(head) + "\n").encode()


def write_vllm_ascend(experts: ExpertMap, where: str) -> bytes:
    """JSON for vllm-ascend's `expert_map_path`; layers count from 0 among those that have experts.

    Raises:
        InputError: unequal slots, which its loader cannot read.
    """
    rows = [
        {
            "layer_id": layer,
            "device_count": len(devices),
            "device_list": [{"device_id": i, "device_expert": ids} for i, ids in enumerate(devices)],
        }
        for layer, devices in enumerate(equal_slots(experts, where).tolist())
    ]
    return _json_rows(f'{{"moe_layer_count": {len(rows)}, "layer_list": [', rows, "]}")


def write_omni_infer(experts: ExpertMap, where: str) -> bytes:
    """omni-infer's pattern: int32 0 and 1 in [ranks, layers, experts]; unequal slots are allowed."""
    buffer = io.BytesIO()
    np.save(buffer, experts.resident.astype(np.int32))
    return buffer.getvalue()
