"""`python -m launch convert`: a model from its Hugging Face directory to a store of Orbax checkpoints, and back.

Both ways one tensor or one bundle of experts is in memory at a time. A store is continued where an interrupted run left it;
a Hugging Face directory appears whole or not at all.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors.numpy import save_file

from dancemoe_jax.checkpoint.finite import cast
from dancemoe_jax.checkpoint.orbax_store import StoreWriter, is_store
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.checkpoint.sources import stored_dtype
from dancemoe_jax.checkpoint.tensor_files import INDEX, WEIGHTS
from dancemoe_jax.checkpoint.writer import stored_tensors
from dancemoe_jax.files import read_json, write_directory, write_json
from dancemoe_jax.model.experts import dequantize
from placement import InputError
from placement.units import parse_bytes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_PLAIN_LINE_SECONDS = 5.0


def run(args: argparse.Namespace) -> None:
    """Convert, in the direction that the source's kind asks for.

    Raises:
        DanceMoEError, InputError: the source cannot be used, something is in the target's place, or the disk is full.
    """
    backward = is_store(args.source)
    if backward and args.int8:
        raise InputError("--int8: a Hugging Face directory has no layout for int8 experts; leave the flag out")
    file = ExpertFile(args.source, np.dtype(args.dtype), args.int8)
    config = file.config
    size = config.expert_bytes(np.dtype(args.dtype).itemsize, args.int8)
    total = config.other_params * np.dtype(args.dtype).itemsize + config.num_moe_layers * config.num_experts * size
    try:
        with _Bar(total) as bar:
            if backward:
                _to_hf(args.source, args.target, file, args.dtype, parse_bytes(args.shard_size, "--shard-size"), bar)
            else:
                _to_store(args.source, args.target, file, args.dtype, args.int8, size, bar)
    except OSError as error:
        raise InputError(f"{args.target}: {error.strerror or error}; make room or choose another place") from None
    print(f"{args.target}: {total / 1e6:.1f} MB")


def _to_store(source: Path, target: Path, file: ExpertFile, dtype: str, int8: bool, size: int, bar: "_Bar") -> None:
    config, tensors = file.config, file.decoder_tensors()
    fields = read_json(source / "config.json")
    # Weights are stored decoded, so the store's configuration must not promise otherwise.
    fields = {key: value for key, value in fields.items() if key != "quantization_config"} | {"torch_dtype": dtype}
    files = sorted(source.glob("*.safetensors*"))
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    writer = StoreWriter(target, {"source": str(source.resolve()), "files": stamp, "dtype": dtype, "int8": int8})
    itemsize = np.dtype(dtype).itemsize
    bytes_of = {name: int(np.prod(tensors.shape(name))) * itemsize for name in file.decoder_names()}

    def read_tensor(name: str) -> np.ndarray:
        return bar.count(cast(tensors.read(name), stored_dtype(name, dtype), f"{source}: tensor {name!r}"))

    writer.write_decoder(bytes_of, read_tensor)

    for layer in range(config.num_moe_layers):

        def read(expert: int, layer: int = layer) -> dict[str, np.ndarray]:
            weights = file.read(layer, expert)
            return {field: bar.count(part) for field, part in weights._asdict().items() if part is not None}

        writer.write_layer(layer, config.num_experts, size, read)
    writer.finish(fields, [source / name for name in TOKENIZER_FILES if (source / name).is_file()])


def _to_hf(source: Path, target: Path, file: ExpertFile, dtype: str, shard_bytes: int, bar: "_Bar") -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists and is not empty; choose another directory or remove it")

    def write(fresh: Path) -> None:
        names, size, weight_map = [], 0, {}
        tensors = stored_tensors(file.config, file.decoder(), lambda *at: dequantize(file.read(*at)), dtype)
        for number, shard in enumerate(_shards(tensors, shard_bytes), 1):
            names.append(f"model-{number:05}.safetensors")
            save_file(shard, fresh / names[-1], metadata={"format": "pt"})
            os.chmod(fresh / names[-1], 0o666 & ~_umask())
            weight_map |= dict.fromkeys(shard, names[-1])
            size += sum(bar.count(array).nbytes for array in shard.values())
        if len(names) == 1:
            (fresh / names[0]).rename(fresh / WEIGHTS)
        else:
            write_json(fresh / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_json(fresh / "config.json", read_json(source / "config.json") | {"torch_dtype": dtype})
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, fresh / name)

    write_directory(target, write)


def _shards(tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, array in tensors:
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = array
    yield shard


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Bar:
    """A progress bar on a terminal; elsewhere a line every few seconds."""

    def __init__(self, total: int):
        self._total, self._done, self._last = total, 0, time.monotonic()
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("converting"), *columns) if sys.stderr.isatty() else None

    def __enter__(self) -> "_Bar":
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task("", total=self._total)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress:
            self._progress.stop()

    def count(self, array: Any) -> Any:
        """Hands `array` on and adds its bytes."""
        self._done += sum(leaf.nbytes for leaf in jax.tree.leaves(array))
        if self._progress:
            self._progress.update(self._task, completed=self._done)
        elif time.monotonic() - self._last > _PLAIN_LINE_SECONDS:
            self._last = time.monotonic()
            print(f"{self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB", file=sys.stderr, flush=True)
        return array
