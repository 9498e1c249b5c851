"""A model as Orbax checkpoints in logical-expert order, made so that one expert is read without its neighbours.

    config.json, tokenizer files      as in the Hugging Face directory
    model.json                        what the checkpoints hold, with checksums; written last
    decoder/00000 …                   everything that is not a routed expert, under its Hugging Face names and shapes
    experts/00003/00016 …             experts 16 and following of MoE layer 3, a dictionary of arrays for each

Every numbered directory is an Orbax checkpoint of its own of at most `BUNDLE` bytes (or one expert or tensor), so that
writing needs little memory and an interrupted write goes on where it stopped. Single experts are read from where they lie
in the checkpoint's files (extents.py), or else by tensorstore, which Orbax stores arrays with: Orbax's own loading is an
operation of all processes together and takes 10 ms a call, while here a process stages experts for itself.
"""

import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dancemoe_jax.checkpoint.arena import Arena
from dancemoe_jax.checkpoint.extents import Extent, find_extents, read_extent
from dancemoe_jax.checkpoint.manifest import FORMAT, ArrayType, TensorEntry, read_manifest
from dancemoe_jax.errors import ModelError
from dancemoe_jax.files import read_json, remove_leftovers, replace_directory, write_json

MANIFEST, CONFIG, RECIPE = "model.json", "config.json", "recipe.json"
BUNDLE = 256 * 2**20
_ORBAX_STATE = "state"  # the directory in a checkpoint that Orbax keeps a saved tree in

Arrays = dict[str, np.ndarray]


def is_store(path: str | Path) -> bool:
    """Whether a directory is a finished store (its contents are not looked at)."""
    return (Path(path) / MANIFEST).is_file()


class ExpertStore:
    """A finished store. Reading is safe from several threads at once and takes no part in any collective operation.

    Attributes:
        path: the store's directory.
        config_fields: the fields of `config.json`.
        num_layers, num_experts: MoE layers, and experts of each.
        decoder: the tensors that are not routed experts.

    Raises:
        ModelError: the directory is no store, or not one that was finished.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        remedy = "a model store needs it, convert the model again"
        manifest, self.config_fields = (read_json(self.path / name, remedy) for name in (MANIFEST, CONFIG))
        held = read_manifest(manifest, self.path / MANIFEST)
        self._per_bundle, self._arrays, self._crc32 = held.per_bundle, held.arrays, held.crc32
        self.num_layers, self.num_experts = len(self._crc32), len(self._crc32[0])
        self._extents: dict[str, dict[str, Extent]] = {}
        self.decoder = DecoderTensors(self.path, held.decoder)

    def expert_arrays(self) -> dict[str, ArrayType]:
        """Shape and type of each of an expert's arrays."""
        return self._arrays

    def read(self, layer: int, expert: int, arena: Arena | None = None) -> Arrays:
        """The arrays of one expert; `layer` counts MoE layers.

        Args:
            arena: where large arrays go if they can, see `extents.read_extent`.

        Returns:
            `w_in` [2 * inner, hidden] (gate, then up) and `w_out` [hidden, inner]; where the model has them biases `b_in`
            and `b_out`, and for int8 weights scales `s_in` and `s_out`.

        Raises:
            ModelError: the expert is missing, or its bytes are not those that were written.
        """
        checksum = self._crc32[layer][expert]
        bundle = _expert_bundle(layer, expert - expert % self._per_bundle)
        where = f"{self.path / bundle}: expert {expert} of MoE layer {layer}"
        arrays = self._read_extents(bundle, expert, arena)
        if arrays is not None and _checksum(arrays) == checksum:
            return arrays
        keys = {name: (f"{expert:05}.{name}", array) for name, array in self._arrays.items()}
        return _read_checked(self.path / bundle, keys, checksum, where)

    def is_stored(self, layer: int, expert: int, arrays: Arrays) -> bool:
        """Whether arrays, by name, are what is stored of an expert, by their types and their checksum."""
        types = {name: ArrayType(array.shape, array.dtype) for name, array in arrays.items()}
        return types == self._arrays and _checksum(arrays) == self._crc32[layer][expert]

    def _read_extents(self, bundle: str, expert: int, arena: Arena | None) -> Arrays | None:
        """An expert's arrays from where they lie, unchecked; None where they are stored in another way, or not to be read."""
        try:
            if bundle not in self._extents:
                self._extents[bundle] = find_extents(self.path / bundle / _ORBAX_STATE)
            # All of them, or none is read.
            extents = [self._extents[bundle][f"{expert:05}.{name}"] for name in self._arrays]
            if [extent.size for extent in extents] != [array.nbytes for array in self._arrays.values()]:
                return None
            return {
                name: read_extent(extent, array.shape, array.dtype, arena)
                for extent, (name, array) in zip(extents, self._arrays.items(), strict=True)
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            return None  # tensorstore says more exactly what it is

    def decoder_tensors(self) -> Arrays:
        """All tensors that are not routed experts, by their Hugging Face names."""
        return {name: self.decoder.read(name) for name in self.decoder.names()}


class DecoderTensors:
    """The tensors of a store that are not routed experts; to be read like those of `TensorFiles`."""

    def __init__(self, path: Path, contents: dict[str, TensorEntry]):
        self.path = path
        self._contents = contents

    def names(self) -> list[str]:
        return list(self._contents)

    def __contains__(self, name: str) -> bool:
        return name in self._contents

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).array.shape

    def kind(self, name: str) -> str:
        """The stored type as numpy spells it."""
        return self._find(name).array.dtype.name

    def read(self, name: str, index: int | slice | None = None, dtype: Any = None) -> np.ndarray:
        """One tensor, all of it or what `index` selects of its leading axis.

        Raises:
            ModelError: there is no such tensor, or its bytes are not those that were written.
        """
        entry = self._find(name)
        bundle = self.path / entry.bundle
        array = _read_checked(bundle, {name: (name, entry.array)}, entry.crc32, f"{bundle}: tensor {name!r}")[name]
        array = array if index is None else array[index]
        return array if dtype is None else array.astype(dtype, copy=False)

    def _find(self, name: str) -> TensorEntry:
        if name not in self._contents:
            raise ModelError(f"{self.path}: tensor {name!r} is missing; convert the model again")
        return self._contents[name]


class StoreWriter:
    """Writes a store beside its place and moves it there when it is whole; what an interrupted run finished is kept.

    Call `write_decoder`, then `write_layer` for each MoE layer in order, then `finish`.

    Args:
        path: the store to be; nothing may be there, except a store, which is replaced in the end.
        recipe: what the store is made from. An unfinished store of another recipe is discarded.

    Raises:
        ModelError: something that is not a store is in the way.
    """

    def __init__(self, path: str | Path, recipe: dict[str, Any]):
        self.path = Path(path)
        if self.path.exists() and not is_store(self.path) and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise ModelError(f"{self.path}: exists and is not a model store; choose another directory or remove it")
        remove_leftovers(self.path.absolute())
        self._part = self.path.absolute().with_name(f".{self.path.name}.unfinished")  # Orbax takes no relative path
        if _recipe(self._part) != recipe:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
            write_json(self._part / RECIPE, recipe, lines=False)
        self._decoder: dict[str, dict[str, Any]] = {}
        self._experts: dict[str, Any] = {"per_bundle": 1, "arrays": {}, "crc32": []}

    def write_decoder(self, sizes: Mapping[str, int], read: Callable[[str], np.ndarray]) -> None:
        """Write everything that is not a routed expert.

        Args:
            sizes: the tensors' names, and about how many bytes each takes.
            read: gives one tensor; not called for tensors that an interrupted run wrote.
        """
        for number, names in enumerate(_bundles(sizes)):
            bundle = f"decoder/{number:05}"
            self._save(bundle, {name: (lambda name=name: read(name)) for name in names})
            self._decoder |= {name: {"bundle": bundle, **entry} for name, entry in self._saved(bundle).items()}

    def write_layer(self, layer: int, experts: int, expert_bytes: int, read: Callable[[int], Arrays]) -> None:
        """Write the experts of one MoE layer.

        Args:
            experts: how many.
            expert_bytes: about how many bytes one takes, the same in all layers.
            read: gives one expert's arrays; not called for experts that an interrupted run wrote.
        """
        per_bundle = max(1, BUNDLE // expert_bytes)
        checksums: list[int] = []
        for first in range(0, experts, per_bundle):
            bundle = _expert_bundle(layer, first)
            range_ = range(first, min(first + per_bundle, experts))
            self._save(bundle, {f"{e:05}": (lambda e=e: read(e)) for e in range_})
            saved = self._saved(bundle)
            checksums += [saved[f"{e:05}"]["crc32"] for e in range_]
            self._experts |= {"per_bundle": per_bundle, "arrays": saved[f"{first:05}"]["arrays"]}
        self._experts["crc32"].append(checksums)

    def finish(self, config_fields: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
        """Put the store in its place, with `config.json` and copies of `files` (the tokenizer's)."""
        for file in files:
            shutil.copyfile(file, self._part / file.name)
        write_json(self._part / CONFIG, dict(config_fields), lines=False)
        manifest = {"format": FORMAT, "decoder": self._decoder, "experts": self._experts}
        write_json(self._part / MANIFEST, manifest, lines=False)
        os.sync()
        replace_directory(self._part, self.path)
        (self.path / RECIPE).unlink()

    def _save(self, bundle: str, leaves: Mapping[str, Callable[[], Any]]) -> None:
        """One Orbax checkpoint, unless it is there. Orbax makes it appear whole."""
        from orbax.checkpoint import v1 as ocp  # here, because servers only read, and loading it takes long

        if (self._part / bundle).exists():
            return
        for leftover in (self._part / bundle).parent.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(leftover)
        tree = {name: read() for name, read in leaves.items()}
        context = ocp.Context()
        # Weights hardly compress, and inflating them would be slower than reading them.
        context.array.saving.use_compression = False
        context.memory.deepcopy_host_arrays = False
        described: Any = {name: _describe(leaf) for name, leaf in tree.items()}
        with context:
            ocp.save(str(self._part / bundle), tree, custom_metadata=described)

    def _saved(self, bundle: str) -> dict[str, Any]:
        """What `_save` wrote about the leaves."""
        from orbax.checkpoint import v1 as ocp

        described = ocp.metadata(str(self._part / bundle)).custom_metadata
        assert isinstance(described, dict)
        return described


def _expert_bundle(layer: int, first: int) -> str:
    return f"experts/{layer:05}/{first:05}"


def _bundles(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, cut where a bundle would grow past its size."""
    bundles: list[list[str]] = []
    filled = BUNDLE
    for name, size in sizes.items():
        if filled + size > BUNDLE or not bundles:
            bundles.append([])
            filled = 0
        bundles[-1].append(name)
        filled += size
    return bundles


def _describe(leaf: np.ndarray | Arrays) -> dict[str, Any]:
    if isinstance(leaf, np.ndarray):
        return {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "crc32": _checksum({"": leaf})}
    arrays = {name: {"shape": list(a.shape), "dtype": a.dtype.name} for name, a in leaf.items()}
    return {"arrays": arrays, "crc32": _checksum(leaf)}


def _checksum(arrays: Arrays) -> int:
    """CRC-32 of all arrays' bytes, in the order of their names."""
    value = 0
    for _, array in sorted(arrays.items()):
        value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value


def _read_checked(bundle: Path, keys: Mapping[str, tuple[str, ArrayType]], checksum: int, where: str) -> Arrays:
    """Arrays of one checkpoint by their names in it, read side by side."""
    database = {"driver": "ocdbt", "base": f"file://{bundle.absolute()}/{_ORBAX_STATE}/"}
    try:
        opening = {
            name: ts.open({"driver": "zarr3", "kvstore": {**database, "path": f"{key}/"}}, open=True, read=True)
            for name, (key, _) in keys.items()
        }
        # What is there may claim any size, so it is compared before memory is taken for it.
        for name, (_, expected) in keys.items():
            found = opening[name].result()
            if (tuple(found.shape), np.dtype(found.dtype.numpy_dtype)) != expected:
                raise ValueError(
                    f"it is {found.dtype.name} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
                )
        reading = {name: array.result().read() for name, array in opening.items()}
        arrays = {name: np.asarray(array.result()) for name, array in reading.items()}
    except Exception as error:  # tensorstore has no exception of its own
        reason = "no such checkpoint" if not bundle.exists() else str(error).split("[tensorstore_spec")[0].strip()
        raise ModelError(f"{where} cannot be read ({reason}); convert the model again") from None
    if _checksum(arrays) != checksum:
        raise ModelError(f"{where} is damaged (checksum differs); convert the model again")
    return arrays


def _recipe(part: Path) -> dict[str, Any] | None:
    try:
        return read_json(part / RECIPE)
    except ModelError:
        return None
