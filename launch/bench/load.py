"""`python -m launch bench load`: memory and speed of loading one server's share of a large sharded checkpoint."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dancemoe_jax.checkpoint.expected_tensors import expected_tensors
from dancemoe_jax.checkpoint.families import config_from_fields, fields_of
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.checkpoint.tensor_files import TensorFiles
from dancemoe_jax.expert_parallel.pool import read_ahead
from dancemoe_jax.model.config import ModelConfig
from placement import InputError
from placement.files import parse_json, read_lines
from placement.text_table import print_table

SHARD_BYTES = 512 * 2**20
MODEL = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=16,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    num_experts=32,
    top_k=4,
    expert_size=768,
    max_position=4096,
    tie_embeddings=False,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint (a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each kind (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--child", choices=["load", "read", "drop", "start"], help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Make a checkpoint of more than 2 GB, load a share of it in fresh processes, and compare with plainly reading it.

    Raises:
        InputError: a flag is out of range or the disk is full.
    """
    if args.child:
        print(json.dumps(_child(args.child, args.folder)))
        return
    if args.repeats < 1:
        raise InputError(f"--repeats {args.repeats}: must be at least 1")
    try:
        with tempfile.TemporaryDirectory(prefix="load-", dir=args.folder) as folder:
            size = write_checkpoint(Path(folder), MODEL)
            figures = _measure(Path(folder), args.repeats) | {"checkpoint_bytes": size}
    except OSError as error:
        raise InputError(f"--folder {args.folder or tempfile.gettempdir()}: {error.strerror or error}") from None
    if args.json:
        print(json.dumps(figures))
    else:
        _print(figures)


def _measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Medians over fresh processes, the kinds taking turns so that the machine's drift hits all alike."""
    found: dict[str, list[dict[str, Any]]] = {"start": [], "read": [], "drop": [], "load": []}
    for _ in range(repeats):
        for kind, results in found.items():
            forget(folder)
            command = [sys.executable, "-m", "launch", "bench", "load", "--child", kind, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(parse_json(done.stdout, kind))
    kept, largest = found["load"][0]["kept_bytes"], found["load"][0]["largest_bytes"]
    base = statistics.median(result["peak_bytes"] for result in found["start"])
    peak = statistics.median(result["peak_bytes"] for result in found["load"]) - base
    read, drop, load = (statistics.median(r["seconds"] for r in found[kind]) for kind in ("read", "drop", "load"))
    return {
        "kept_bytes": kept,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "allowed_bytes": 1.1 * kept + largest,
        "load_seconds": load,
        "read_seconds": read,
        "drop_seconds": drop,
        "read_bytes": found["read"][0]["bytes"],
        "speed_ratio": read / load,
        "drop_ratio": drop / load,
    }


def _child(kind: str, folder: Path) -> dict[str, Any]:
    """One measurement in a process of its own.

    `start` does nothing; `read` reads as many bytes as the share has into memory that it keeps, `drop` into a small buffer
    over and over; `load` loads the share.
    """
    share = [(layer, e) for layer in range(MODEL.num_moe_layers) for e in range(0, MODEL.num_experts, 3)]
    result: dict[str, Any] = {}
    begin = time.perf_counter()
    if kind == "load":
        file = ExpertFile(folder, ml_dtypes.bfloat16)
        held = [file.decoder(), list(read_ahead(file.read, share))]
        result["seconds"] = time.perf_counter() - begin
        result["kept_bytes"] = _nbytes(held)
        tensors = TensorFiles(folder)
        result["largest_bytes"] = max(2 * int(np.prod(tensors.shape(name))) for name in tensors.names())
    elif kind in ("read", "drop"):
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        part = (MODEL.other_params + len(share) * MODEL.expert_params) * 2 / total
        files = list(folder.glob("*.safetensors"))
        held = [_read(file, int(part * file.stat().st_size), keep=kind == "read") for file in files]
        result["bytes"] = sum(count for count, _ in held)
        result["seconds"] = time.perf_counter() - begin
    result["peak_bytes"] = _peak_bytes()
    return result


def _peak_bytes() -> int:
    """Most memory that this process has had; the kernel's other count, ru_maxrss, begins with the parent's."""
    for _, line in read_lines("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise InputError("/proc/self/status: has no VmHWM; peak memory is measured on Linux only")


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _read(file: Path, count: int, keep: bool) -> tuple[int, np.ndarray]:
    """Bytes read from the front of a file, and the memory that they were read into."""
    step = 2**22
    data, done = np.empty(count if keep else step, np.uint8), 0
    with file.open("rb", buffering=0) as stream:
        while done < count and (got := stream.readinto(data.data[done : done + step] if keep else data.data)):
            done += got
    return done, data


def forget(folder: Path) -> None:
    """Drop the files below a folder from the page cache, so that every measurement reads them anew."""
    for file in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def write_checkpoint(folder: Path, config: ModelConfig) -> int:
    """A sharded checkpoint with the published layout and made-up weights; its bytes."""
    fields = fields_of(config)
    assert config_from_fields(fields, "bench") == config
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**16, 2**22, dtype=np.uint16) & 0xBFFF  # no infinities
    shard: dict[str, np.ndarray] = {}
    weight_map: dict[str, str] = {}
    number = total = 0

    def flush() -> None:
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in dict(expected_tensors(config)).items():
        count = int(np.prod(shape))
        shard[name] = np.resize(noise, count).view(ml_dtypes.bfloat16).reshape(shape)
        total += 2 * count
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            flush()
            number += 1
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _print(figures: dict[str, Any]) -> None:
    mb = {key: f"{figures[key] / 1e6:.0f} MB" for key in ("kept_bytes", "peak_bytes", "allowed_bytes")}
    rows = [
        ["peak memory", mb["peak_bytes"], f"{mb['kept_bytes']} kept, {mb['allowed_bytes']} allowed"],
        ["time", f"{figures['load_seconds']:.2f} s", f"{figures['read_seconds']:.2f} s for reading as much"],
        ["its speed against that", f"{figures['speed_ratio']:.2f}", ""],
        ["against reading and dropping", f"{figures['drop_ratio']:.2f}", f"{figures['drop_seconds']:.2f} s"],
    ]
    title = f"loading a server's share of a {figures['checkpoint_bytes'] / 1e9:.2f} GB checkpoint"
    print_table(("", "measured", "compared with"), rows, title=title)
