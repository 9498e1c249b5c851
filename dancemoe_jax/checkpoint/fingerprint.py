"""A fingerprint of a model's content, for servers that must serve the same one: cheap for a large model, whole for a small."""

import hashlib
from pathlib import Path

import numpy as np

from dancemoe_jax.checkpoint.orbax_store import MANIFEST, is_store
from dancemoe_jax.checkpoint.tensor_files import INDEX, TensorFiles
from dancemoe_jax.errors import ModelError

TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
# Of models up to this many bytes everything is read; of larger ones as much, spread over all tensors.
WHOLE = 2**26
_BLOCK = 2**12


def model_fingerprint(path: str | Path, whole: int = WHOLE) -> str:
    """SHA-256 of what a model directory or store holds: headers, sizes and bytes of every tensor, and the text files.

    A store's manifest has the checksum of every array, which every read is checked against, so the manifest stands for
    them. Of a Hugging Face directory with more than `whole` bytes blocks of each tensor are read, its first and last
    ones among them.

    Raises:
        ModelError: a file is missing, damaged or not readable.
    """
    path, digest = Path(path), hashlib.sha256()
    try:
        for name in (*TEXT_FILES, MANIFEST, INDEX):
            if (path / name).is_file():
                data = (path / name).read_bytes()
                digest.update(f"{name} {len(data)}\n".encode())
                digest.update(data)
        if not is_store(path):
            _add_tensors(digest, TensorFiles(path), whole)
    except OSError as error:
        raise ModelError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def _add_tensors(digest, tensors: TensorFiles, whole: int) -> None:
    extents = tensors.extents()
    total = sum(extent.size for extent in extents)
    for file in sorted({extent.file for extent in extents}):
        own = [extent for extent in extents if extent.file == file]
        with file.open("rb") as opened:
            header = opened.read(min(extent.offset for extent in own))
            digest.update(f"{file.name} {file.stat().st_size} {len(header)}\n".encode())
            digest.update(header)
            for extent in own:
                if total <= whole or extent.size <= 2 * _BLOCK:
                    starts, size = [0], extent.size
                else:
                    count = max(2, int(extent.size / total * whole) // _BLOCK)
                    starts, size = np.linspace(0, extent.size - _BLOCK, count).astype(int).tolist(), _BLOCK
                for start in starts:
                    opened.seek(extent.offset + start)
                    digest.update(opened.read(size))
