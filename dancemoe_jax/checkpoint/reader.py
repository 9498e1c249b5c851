"""Model directories in the Hugging Face layout: checked before anything is loaded, written whole or not at all.

A directory holds `config.json`, `tokenizer.json` and `model.safetensors` (or shards and their index). Which tensor is which
parameter is sources.py's business, how its bytes are stored tensor_files.py's. Routed experts come back as host arrays, or one
at a time straight from the file, because which device gets which expert is not decided here.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from dancemoe_jax.checkpoint.arena import Arena
from dancemoe_jax.checkpoint.expected_tensors import (
    abstract_decoder,
    expected_tensors,
    expert_shapes,
    is_spare,
    present,
)
from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.checkpoint.fingerprint import model_fingerprint
from dancemoe_jax.checkpoint.finite import cast
from dancemoe_jax.checkpoint.orbax_store import DecoderTensors, ExpertStore, is_store
from dancemoe_jax.checkpoint.sources import Source, expert_sources, layer_sources, stored_dtype, whole_sources
from dancemoe_jax.checkpoint.tensor_files import TensorFiles
from dancemoe_jax.errors import ModelError, show
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, Experts
from dancemoe_jax.model.experts import ExpertWeights, dequantize, quantize
from dancemoe_jax.text.tokenizer import load_tokenizer

_READABLE = ("F16", "F32", "F64", "BF16", "F8_E4M3", "F8_E5M2", "MXFP4")


class Model(NamedTuple):
    """A loaded model: the decoder on the default device, the routed experts in host memory.

    `experts` has axes [MoE layers, experts] in front of each weight.
    """

    config: ModelConfig
    decoder: Decoder
    experts: ExpertWeights
    tokenizer: Tokenizer


class ExpertFile:
    """A model on disk, its routed experts read one at a time; opening it checks all of its tensors.

    Args:
        path: a Hugging Face directory, or a store of Orbax checkpoints (orbax_store.py).
        dtype: of all weights that are read.
        int8: whether experts are rounded to int8 with a scale per output channel as they are read. A store may hold them
            like that already; they stay so.
        fingerprint: of the model that it has to stay (`model_fingerprint`). With it a file that was only touched or copied
            since is compared and read on; without it such a file is refused.

    Raises:
        ModelError: the configuration or a tensor is missing, misshapen, of an unreadable type, or in a damaged file.
    """

    def __init__(self, path: str | Path, dtype: Any = np.float32, int8: bool = False, fingerprint: str = ""):
        self.config, self._path = read_config(path), Path(path)
        self._dtype, self._int8 = np.dtype(dtype), int8
        self._store = ExpertStore(path) if is_store(path) else None
        self._fingerprint = fingerprint
        same = self._is_same if fingerprint else None
        self._tensors = TensorFiles(path, same) if self._store is None else self._store.decoder
        _check(Path(path), self.config, self._tensors, self._store)

    def read(self, layer: int, expert: int, arena: Arena | None = None) -> ExpertWeights:
        """One logical expert; `layer` counts MoE layers. Safe from several threads at once.

        Args:
            arena: where its large arrays go if they lie in the file as they are to be; for threads beside others that
                compute (`extents.read_extent`).
        """
        if self._store is not None:
            stored = ExpertWeights(**self._store.read(layer, expert, arena if self._as_stored else None))
            where = f"{self._path}: expert {expert} of MoE layer {layer}"
            weights = ExpertWeights(**{f: self._cast(f, part, where) for f, part in stored._asdict().items()})
            return quantize(weights) if self._int8 and weights.s_in is None else weights
        shapes = expert_shapes(self.config)
        sources = expert_sources(self.config, layer, expert)
        weights = ExpertWeights(**{field: self._read(source, shapes[field]) for field, source in sources.items()})
        return quantize(weights) if self._int8 else weights

    def check(self, layer: int, expert: int, weights: ExpertWeights, whole: bool) -> None:
        """Raise ModelError unless weights that came from elsewhere are those of this model's expert.

        Their types and shapes are compared, and their checksum where a store has one of what is served.

        Args:
            whole: compare every number with the expert as it is read here, where there is no checksum.
        """
        where = f"expert {expert} of MoE layer {layer}"
        mine = {field: part for field, part in weights._asdict().items() if part is not None}
        if not self._fits(mine):
            raise ModelError(f"{where} has other shapes or types")
        if self._store is not None and self._as_stored:
            same = self._store.is_stored(layer, expert, mine)
        else:
            own = self.read(layer, expert) if whole else weights
            pairs = zip(weights, own, strict=True)
            same = all((a is None) == (b is None) and (a is None or _same_bits(a, b)) for a, b in pairs)
        if not same:
            raise ModelError(f"{where} has other numbers")

    def _fits(self, arrays: dict[str, np.ndarray]) -> bool:
        """Whether an expert's arrays, by field, have the types and shapes that are read here."""
        shapes, biases = expert_shapes(self.config), {"b_in", "b_out"} if self.config.expert_bias else set()
        int8 = self._int8 or (self._store is not None and "s_in" in self._store.expert_arrays())
        types = {"w": np.dtype(np.int8) if int8 else self._dtype, "b": self._dtype, "s": np.dtype(np.float32)}
        fields = {"w_in", "w_out"} | biases | ({"s_in", "s_out"} if int8 else set())
        return arrays.keys() == fields and all(
            array.dtype == types[field[0]] and array.shape == shapes.get(field, array.shape)
            for field, array in arrays.items()
        )

    def _is_same(self) -> bool:
        try:
            return model_fingerprint(self._path) == self._fingerprint
        except ModelError:
            return False

    @functools.cached_property
    def _as_stored(self) -> bool:
        """Whether a store's arrays are what is to be read, as they are."""
        kinds = {field: dtype for field, (_, dtype) in self._store.expert_arrays().items()} if self._store else {}
        same = all(self._kind(field, dtype) == dtype for field, dtype in kinds.items())
        return same and ("s_in" in kinds or not self._int8)

    def _cast(self, field: str, part: np.ndarray | None, where: str) -> np.ndarray | None:
        return part if part is None else cast(part, self._kind(field, part.dtype), f"{where}: {field}")

    def _kind(self, field: str, stored: np.dtype) -> np.dtype:
        """The type that an expert's array is to have."""
        return stored if stored == np.int8 or field.startswith("s_") else self._dtype

    def read_all(self) -> ExpertWeights:
        """All experts, axes [MoE layers, experts] in front."""
        grid = (self.config.num_moe_layers, self.config.num_experts)
        every = jax.tree.map(lambda a: np.empty((*grid, *a.shape), a.dtype), self.read(0, 0))
        for index in np.ndindex(grid):
            jax.tree.map(lambda whole, one, at=index: whole.__setitem__(at, one), every, self.read(*index))
        return every

    def decoder_tensors(self) -> TensorFiles | DecoderTensors:
        """The file's tensors as they are stored; `decoder_names` are those that are not routed experts."""
        return self._tensors

    def decoder_names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in expected_tensors(self.config, experts=False)))

    def decoder(self) -> Decoder:
        """Everything that is not a routed expert, on the default device."""
        decoder = abstract_decoder(self.config)
        for field, source in whole_sources(self.config).items():
            setattr(decoder, field, nnx.Param(jnp.asarray(self._read(source, getattr(decoder, field).shape))))
        for (start, stop), layers in zip(self.config.runs, decoder.runs, strict=True):
            for field in present(layers, layer_sources(self.config, start)):
                shape = getattr(layers, field).shape
                source = layer_sources(self.config, start)[field]
                stacked = _aligned_empty(shape, stored_dtype(source.names[0], self._dtype))
                for index in range(start, stop):
                    source = layer_sources(self.config, index)[field]
                    _bits(stacked)[index - start] = _bits(self._read(source, shape[1:]))
                setattr(layers, field, nnx.Param(jnp.asarray(stacked)))
        return decoder

    def _read(self, source: Source, shape: tuple[int, ...]) -> np.ndarray:
        """A parameter (or one expert's, one layer's part of it) from its tensors."""
        parts = [self._tensors.read(name, source.row) for name in source.names]
        dtype = stored_dtype(source.names[0], self._dtype)
        if source.span is not None:
            start, stop, width = source.span
            inputs = parts[0].shape[-1]
            parts = [parts[0].reshape(-1, width, inputs)[:, start:stop]]
        parts = [
            cast(part, dtype, f"{self._path}: tensor {name!r}") for name, part in zip(source.names, parts, strict=True)
        ]
        if len(parts) > 1:
            array, end = np.empty(shape, dtype), 0
            for part in parts:
                end += len(part)
                _bits(array)[end - len(part) : end] = _bits(np.ascontiguousarray(part))
            return array
        array = parts[0]
        if source.interleaved:
            array = np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1)
        if source.transposed:
            transposed = np.empty(array.shape[::-1], dtype)
            _transpose_into(transposed, array)
            array = transposed
        return np.ascontiguousarray(array.reshape(shape))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b))


def _transpose_into(out: np.ndarray, matrix: np.ndarray) -> None:
    """out = matrix.T, a strip of rows at a time: ten times as fast as numpy's own way through a large matrix."""
    strip = 64 // out.itemsize  # a strip's column is then one line of the cache
    for start in range(0, len(matrix), strip):
        rows = np.ascontiguousarray(matrix[start : start + strip], out.dtype)
        _bits(out)[:, start : start + strip] = _bits(rows).T


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers, because numpy copies types that it does not know by itself slowly."""
    return array.view(f"u{array.itemsize}")


def load_model(path: str | Path, dtype: Any = jnp.float32, int8: bool = False) -> Model:
    """Load a model directory.

    Everything is checked from the files' headers first, so an unusable directory costs no device memory.

    Args:
        dtype: of all weights; the files may be float16, bfloat16, float32, float64, float8 in blocks, or MXFP4.
        int8: round routed experts to int8 with a scale per output channel.

    Raises:
        ModelError: a file or tensor is missing, damaged or of the wrong shape, or the tokenizer has ids that the
            embedding has no row for.
    """
    file = ExpertFile(path, dtype, int8)
    tokenizer = load_tokenizer(path, file.config)
    return Model(file.config, file.decoder(), file.read_all(), tokenizer)


def on_device(config: ModelConfig, experts: ExpertWeights) -> Experts:
    """All experts on the default device, as `forward` takes them: for models that fit one device. int8 is multiplied out."""
    module = nnx.eval_shape(lambda: Experts(config, nnx.Rngs(0)))
    for field, array in dequantize(experts)._asdict().items():
        if array is not None:
            setattr(module, field, nnx.Param(jnp.asarray(array)))
    return module


def _check(path: Path, config: ModelConfig, tensors: TensorFiles | DecoderTensors, store: ExpertStore | None) -> None:
    """Raise ModelError unless every tensor of the model is there, with the shape that config.json asks for, and no other."""
    expected = set()
    for name, shape in expected_tensors(config, experts=store is None):
        expected.add(name)
        if name not in tensors:
            raise ModelError(f"{path}: tensor {name!r} is missing; config.json asks for it, export the model again")
        if tensors.shape(name) != shape:
            raise ModelError(
                f"{path}: tensor {name!r} has shape {list(tensors.shape(name))}, config.json asks for {list(shape)}; "
                "use the config.json that belongs to these weights"
            )
        if store is None and tensors.kind(name) not in _READABLE:
            raise ModelError(
                f"{path}: tensor {name!r} is stored as {tensors.kind(name)}; supported: {', '.join(_READABLE)}"
            )
    unused = [name for name in tensors.names() if name not in expected and not is_spare(config, name)]
    if unused:
        raise ModelError(
            f"{path}: tensor {unused[0]!r}{f' and {len(unused) - 1} more' if len(unused) > 1 else ''} would not be used: "
            "config.json has no place for it; use the config.json that belongs to these weights, or merge adapters first"
        )
    if store is not None:
        shapes = {field: shape for field, (shape, _) in store.expert_arrays().items() if not field.startswith("s_")}
        wanted = {f: shape for f, shape in expert_shapes(config).items() if config.expert_bias or f.startswith("w_")}
        held = (store.num_layers, store.num_experts, shapes)
        if held != (config.num_moe_layers, config.num_experts, wanted):
            raise ModelError(
                f"{path}: holds experts {show(held)}, config.json asks for others; convert the model again"
            )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Host memory that a CPU device can take over as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
