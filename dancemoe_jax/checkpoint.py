"""Model directories in the Hugging Face layout: written whole or not at all, checked before anything is loaded.

A directory holds `config.json`, `tokenizer.json` and `model.safetensors` (or shards and their index) with the tensor
names of transformers' Qwen3-MoE. Routed experts come back as host arrays, or one at a time straight from the file,
because which device gets which expert is not decided here.
"""

import importlib.resources
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from dancemoe_jax.config import ModelConfig, ModelError
from dancemoe_jax.model import Decoder, Experts
from dancemoe_jax.tokenizer import END_OF_TEXT, byte_tokenizer, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WRITTEN = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
_READABLE = ("F16", "F32", "F64", "BF16")

# Parameter -> tensor name, and how many of the parameter's leading axes a product sums over: torch keeps a matrix as
# [outputs, inputs] with heads flattened into either side. 0 = stored as it is.
_WHOLE = {
    "embedding": ("model.embed_tokens.weight", 0),
    "final_norm": ("model.norm.weight", 0),
    "head": ("lm_head.weight", 1),
}
_PER_LAYER = {
    "attention_norm": ("input_layernorm.weight", 0),
    "q": ("self_attn.q_proj.weight", 1),
    "k": ("self_attn.k_proj.weight", 1),
    "v": ("self_attn.v_proj.weight", 1),
    "o": ("self_attn.o_proj.weight", 2),
    "q_norm": ("self_attn.q_norm.weight", 0),
    "k_norm": ("self_attn.k_norm.weight", 0),
    "moe_norm": ("post_attention_layernorm.weight", 0),
    "router": ("mlp.gate.weight", 1),
}


class HostExperts(NamedTuple):
    """All routed experts in logical order as numpy arrays; `w_in` holds gate, then up, side by side."""

    w_in: np.ndarray  # [layers, experts, hidden, 2 * expert_size]
    w_out: np.ndarray  # [layers, experts, expert_size, hidden]


class Model(NamedTuple):
    """A loaded model: the decoder on the default device, the routed experts in host memory."""

    config: ModelConfig
    decoder: Decoder
    experts: HostExperts
    tokenizer: Tokenizer


class ExpertFile:
    """The routed experts of a model directory, read one at a time; opening it checks all of the directory's tensors.

    Raises:
        ModelError: the configuration or a tensor is missing, misshapen, of an unreadable type, or in a damaged file.
    """

    def __init__(self, path: str | Path, dtype=np.float32):
        self.config = ModelConfig.from_hf(path)
        self._tensors = _Tensors(Path(path), self.config)
        self._dtype = np.dtype(dtype)

    def read(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """`w_in` [hidden, 2 * expert_size] and `w_out` [expert_size, hidden] of one logical expert."""
        gate, up, down = (self._tensors.read(name) for name in _expert_names(layer, expert))
        w_in = np.concatenate([gate.T, up.T], axis=1).astype(self._dtype, copy=False)
        return w_in, np.ascontiguousarray(down.T).astype(self._dtype, copy=False)

    def read_all(self) -> HostExperts:
        c = self.config
        grid = (c.num_layers, c.num_experts)
        w_in = np.empty((*grid, c.hidden_size, 2 * c.expert_size), self._dtype)
        w_out = np.empty((*grid, c.expert_size, c.hidden_size), self._dtype)
        for index in np.ndindex(grid):
            w_in[index], w_out[index] = self.read(*index)
        return HostExperts(w_in, w_out)

    def decoder(self) -> Decoder:
        """Everything that is not a routed expert, on the default device."""

        def param(shape: tuple[int, ...], inputs: int, tensor: np.ndarray) -> np.ndarray:
            return (tensor.T if inputs else tensor).reshape(shape).astype(self._dtype, copy=False)

        decoder, read = _abstract_decoder(self.config), self._tensors.read
        for field, (name, inputs) in _fields(_WHOLE, decoder):
            array = param(getattr(decoder, field).shape, inputs, read(name))
            setattr(decoder, field, nnx.Param(jnp.asarray(array)))
        for field, (name, inputs) in _fields(_PER_LAYER, decoder.layers):
            layers, *shape = getattr(decoder.layers, field).shape
            arrays = [param(tuple(shape), inputs, read(f"model.layers.{i}.{name}")) for i in range(layers)]
            setattr(decoder.layers, field, nnx.Param(jnp.asarray(np.stack(arrays))))
        return decoder


def load_model(path: str | Path, dtype: Any = jnp.float32) -> Model:
    """Load a model directory.

    Everything is checked from the files' headers first, so an unusable directory costs no device memory.

    Args:
        dtype: of all weights; the files may be float16, bfloat16, float32 or float64.

    Raises:
        ModelError: a file or tensor is missing, damaged or of the wrong shape, or the tokenizer has ids that the
            embedding has no row for.
    """
    file = ExpertFile(path, dtype)
    tokenizer = load_tokenizer(path, file.config)
    return Model(file.config, file.decoder(), file.read_all(), tokenizer)


def bundled_model() -> Path:
    """The directory of the small model that comes with the package."""
    return Path(str(importlib.resources.files("dancemoe_jax") / "assets" / "tiny-moe"))


def on_device(config: ModelConfig, experts: HostExperts) -> Experts:
    """All experts on the default device, as `forward` takes them: for models that fit one device."""
    module = nnx.eval_shape(lambda: Experts(config, nnx.Rngs(0)))
    module.w_in, module.w_out = nnx.Param(jnp.asarray(experts.w_in)), nnx.Param(jnp.asarray(experts.w_out))
    return module


def save_hf(out: Path, config: ModelConfig, decoder: Decoder, experts: Experts, dtype: str = "bfloat16") -> None:
    """Write a byte-level model as a directory that `load_model` and transformers load.

    The directory appears complete or not at all; a model directory in its place is replaced.

    Args:
        dtype: of the stored weights, `"bfloat16"` or `"float32"`.

    Raises:
        ModelError: `out` is something else than a model directory, or the model does not fit the layout.
    """
    out = Path(out)
    check_replaceable(out)
    fields = config.to_hf() | {"torch_dtype": dtype}
    if config.vocab_size <= 256 or config.eos_token not in (None, 256):
        raise ModelError(
            f"config: vocab_size = {config.vocab_size}, eos_token = {config.eos_token}; the byte-level tokenizer "
            "that is written with a model has 256 bytes and the end-of-text token 256"
        )
    tensors = _to_torch(config, decoder, experts, np.dtype(dtype))
    tokenizer_fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": config.max_position,
        "clean_up_tokenization_spaces": False,
    }

    def write(directory: Path) -> None:
        _write_json(directory / "config.json", fields)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / WEIGHTS)  # safetensors makes it its owner's alone
        byte_tokenizer().save(str(directory / "tokenizer.json"))
        _write_json(directory / "tokenizer_config.json", tokenizer_fields)

    _replace_directory(out, write)


def check_replaceable(out: Path) -> None:
    """Raise ModelError unless `out` is free, empty, or a model directory with nothing in it but a model's files."""
    if not out.exists() and not out.is_symlink():
        return
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() and not out.is_symlink() else None
    foreign = [out.name] if names is None else [name for name in names if name not in WRITTEN]
    if foreign:
        raise ModelError(
            f"{out}: exists and is not only a model ({foreign[0]!r}); choose another directory or remove it"
        )


class _Tensors:
    """The named tensors of a directory's safetensors file or files, checked against a configuration on opening."""

    def __init__(self, path: Path, config: ModelConfig):
        self._file: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in _weight_files(path):
            try:
                opened = safe_open(file, framework="numpy")
            except FileNotFoundError:
                raise ModelError(f"{file}: no such file; a model directory needs its weights here") from None
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"{file}: damaged or truncated ({_first_line(error)}); export or download it again"
                ) from None
            self._open[file] = opened
            self._file |= dict.fromkeys(opened.keys(), file)
        for name, shape in _expected(config).items():
            self._check(path, name, shape)

    def _check(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._file:
            where = path / (WEIGHTS if len(self._open) == 1 else INDEX)
            raise ModelError(f"{where}: tensor {name!r} is missing; config.json asks for it, export the model again")
        piece = self._open[self._file[name]].get_slice(name)
        stored, kind = tuple(piece.get_shape()), piece.get_dtype()
        if stored != shape:
            raise ModelError(
                f"{self._file[name]}: tensor {name!r} has shape {list(stored)}, config.json asks for {list(shape)}; "
                "use the config.json that belongs to these weights"
            )
        if kind not in _READABLE:
            raise ModelError(
                f"{self._file[name]}: tensor {name!r} is stored as {kind}; supported: {', '.join(_READABLE)}"
            )

    def read(self, name: str) -> np.ndarray:
        return self._open[self._file[name]].get_tensor(name)


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if (path / WEIGHTS).exists() or not index.exists():
        return [path / WEIGHTS]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: not an index of shards ('weight_map'); download it again") from None


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name -> stored shape of a whole model."""
    decoder = _abstract_decoder(config)
    shapes = {name: _torch_shape(getattr(decoder, f).shape, inputs) for f, (name, inputs) in _fields(_WHOLE, decoder)}
    for layer in range(config.num_layers):
        for field, (name, inputs) in _fields(_PER_LAYER, decoder.layers):
            shapes[f"model.layers.{layer}.{name}"] = _torch_shape(getattr(decoder.layers, field).shape[1:], inputs)
        for expert in range(config.num_experts):
            gate, up, down = _expert_names(layer, expert)
            shapes[gate] = shapes[up] = (config.expert_size, config.hidden_size)
            shapes[down] = (config.hidden_size, config.expert_size)
    return shapes


def _to_torch(config: ModelConfig, decoder: Decoder, experts: Experts, dtype: np.dtype) -> dict[str, np.ndarray]:
    def convert(array, inputs: int) -> np.ndarray:
        flat = np.asarray(array).astype(dtype)
        if inputs:
            flat = flat.reshape(math.prod(flat.shape[:inputs]), -1).T
        return np.ascontiguousarray(flat)

    tensors = {name: convert(getattr(decoder, f)[...], inputs) for f, (name, inputs) in _fields(_WHOLE, decoder)}
    for field, (name, inputs) in _fields(_PER_LAYER, decoder.layers):
        for layer, array in enumerate(np.asarray(getattr(decoder.layers, field)[...])):
            tensors[f"model.layers.{layer}.{name}"] = convert(array, inputs)
    w_in, w_out = np.asarray(experts.w_in[...]), np.asarray(experts.w_out[...])
    for layer, expert in np.ndindex(config.num_layers, config.num_experts):
        matrices = [*np.split(w_in[layer, expert], 2, axis=-1), w_out[layer, expert]]
        for name, matrix in zip(_expert_names(layer, expert), matrices, strict=True):
            tensors[name] = convert(matrix, 1)
    return tensors


def _expert_names(layer: int, expert: int) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]


def _abstract_decoder(config: ModelConfig) -> Decoder:
    """The decoder's structure and shapes without its memory."""
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))


def _fields(table: dict[str, tuple[str, int]], module: nnx.Module) -> list[tuple[str, tuple[str, int]]]:
    """The rows of a table that this module really has (a tied model has no head)."""
    return [(field, row) for field, row in table.items() if getattr(module, field) is not None]


def _torch_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else tuple(shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace_directory(out: Path, write: Callable[[Path], None]) -> None:
    """Fill a new directory beside `out`, then put it in `out`'s place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
    fresh.mkdir()
    try:
        write(fresh)
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
