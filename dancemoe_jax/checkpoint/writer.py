"""Writing a model as a Hugging Face directory: config.json, model.safetensors, tokenizer files, replaced as a whole."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from dancemoe_jax.checkpoint.expected_tensors import present
from dancemoe_jax.checkpoint.families import fields_of
from dancemoe_jax.checkpoint.sources import Source, expert_sources, layer_sources, stored_dtype, whole_sources
from dancemoe_jax.checkpoint.tensor_files import WEIGHTS
from dancemoe_jax.errors import ModelError
from dancemoe_jax.files import write_directory, write_json
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, Experts
from dancemoe_jax.model.experts import ExpertWeights
from dancemoe_jax.text.tokenizer import END_OF_TEXT, byte_tokenizer

# Models trained here know no roles: a conversation is its texts, one after another.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
WRITTEN = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")


def stored_tensors(
    config: ModelConfig, decoder: Decoder, read: Callable[[int, int], ExpertWeights], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """A model's tensors under its family's names and in its layout, one after another.

    Args:
        read: (MoE layer, expert) -> weights, as ExpertFile.read. Called in order; where a family keeps a layer's experts
            in one tensor, one such layer is in memory at a time.
    """

    def of_module(module: nnx.Module, sources: dict[str, Source], index: int | None = None):
        fields = present(module, sources)
        where = ... if index is None else index
        arrays = {field: np.asarray(getattr(module, field)[where]) for field in fields}
        done: set[tuple[str, ...]] = set()
        for field in fields:
            names = sources[field].names
            sharing = sorted((f for f in fields if sources[f].names == names), key=lambda f: sources[f].span or ())
            if names not in done:  # parameters that are parts of one tensor go into it together
                done.add(names)
                whole = [arrays[f] for f in sharing]
                yield from _to_stored(sources[field], whole[0] if len(whole) == 1 else np.concatenate(whole, axis=-2))

    def all_parts():
        yield from of_module(decoder, whole_sources(config))
        for (start, stop), layers in zip(config.runs, decoder.runs, strict=True):
            for index in range(start, stop):
                yield from of_module(layers, layer_sources(config, index), index - start)
        for layer in range(config.num_moe_layers):
            if expert_sources(config, layer, 0)["w_in"].row is None:
                for expert in range(config.num_experts):
                    yield from of_expert(layer, read(layer, expert), expert)
            else:
                every = [read(layer, expert) for expert in range(config.num_experts)]
                yield from of_expert(layer, jax.tree.map(lambda *parts: np.stack(parts), *every), 0)

    def of_expert(layer: int, weights: ExpertWeights, expert: int):
        for field, source in expert_sources(config, layer, expert).items():
            yield from _to_stored(source, np.asarray(getattr(weights, field)))

    for name, array in all_parts():
        yield name, np.ascontiguousarray(array.astype(stored_dtype(name, dtype)))


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
    fields = fields_of(config) | {"torch_dtype": dtype}
    if config.vocab_size <= 256 or config.eos_token not in (None, 256):
        raise ModelError(
            f"config: vocab_size = {config.vocab_size}, eos_token = {config.eos_token}; the byte-level tokenizer "
            "that is written with a model has 256 bytes and the end-of-text token 256"
        )
    weights = jax.tree.map(np.asarray, experts.weights)

    def read(layer: int, expert: int) -> ExpertWeights:
        return jax.tree.map(lambda a: a[layer, expert], weights)

    tensors = dict(stored_tensors(config, decoder, read, np.dtype(dtype)))
    tokenizer_fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": config.max_position,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }

    def write(directory: Path) -> None:
        write_json(directory / "config.json", fields)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / WEIGHTS)  # safetensors makes it its owner's alone
        byte_tokenizer().save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", tokenizer_fields)

    write_directory(out, write)


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


def _to_stored(source: Source, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of ExpertFile's reading: a whole parameter as its tensors."""
    if source.transposed:
        array = np.swapaxes(array, -1, -2)
    if source.interleaved:
        array = np.stack(np.split(array, 2, axis=-1), axis=-1).reshape(array.shape)
    if source.span is not None:
        array = array.reshape(-1, array.shape[-1])
    yield from zip(source.names, np.split(array, len(source.names)), strict=True)
