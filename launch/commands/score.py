"""`python -m launch score`: logits of token ids through the serving path, to compare with any other implementation's."""

import argparse
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.inference.steps import init_state, prefill
from dancemoe_jax.model.config import ModelConfig
from launch.engine.single_process import Local, load
from launch.model_flags import read_shape
from placement import InputError
from placement.files import write_bytes

CHUNK = 64


def run(args: argparse.Namespace) -> None:
    """Score the ids and write the logits.

    Raises:
        DanceMoEError, InputError: the model or the ids cannot be used.
    """
    path = args.model or bundled_model()
    config = read_shape(path, args)
    ids = _read_ids(args.ids, config)
    if args.placement_seed is not None and args.placement_seed < 0:
        raise InputError(f"--placement-seed {args.placement_seed}: must not be negative")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: {args.out.parent} is no directory; make it first")
    logits = score(load(path, config, args, args.placement_seed), ids)
    buffer = BytesIO()
    np.save(buffer, logits, allow_pickle=False)
    write_bytes(args.out, buffer.getvalue())
    print(f"{args.out}: float32 {list(logits.shape)}")


def score(local: Local, ids: np.ndarray) -> np.ndarray:
    """Float32 logits [batch, length, vocab] of ids [batch, length], sequences sharded over the devices."""
    devices = local.shapes["mesh"].size
    batch, length = ids.shape
    rows = -(-batch // devices)
    padded = np.zeros((rows * devices, -(-length // CHUNK) * CHUNK), np.int32)
    padded[:batch, :length] = ids
    padded = padded.reshape(devices, rows, -1)
    state: Any = init_state(local.config, local.shapes["mesh"], rows, local.weights.decoder.embedding[...].dtype)
    sequences = np.broadcast_to(np.arange(rows, dtype=np.int32), (devices, rows))
    parts = []
    for start in range(0, length, CHUNK):
        lengths = np.full((devices, rows), min(CHUNK, length - start), np.int32)
        chunk = padded[:, :, start : start + CHUNK]
        state, result = prefill(
            local.weights,
            state,
            chunk,
            sequences,
            np.full_like(lengths, start),
            lengths,
            **local.shapes,
            all_logits=True,
        )
        parts.append(np.asarray(result.logits))
    logits = np.concatenate(parts, axis=2)
    return np.ascontiguousarray(logits.reshape(rows * devices, -1, logits.shape[-1])[:batch, :length])


def _read_ids(file: Path, config: ModelConfig) -> np.ndarray:
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: a header may claim any size
    except FileNotFoundError:
        raise InputError(f"--ids {file}: no such file") from None
    except (OSError, ValueError, EOFError, OverflowError, zipfile.BadZipFile) as error:
        raise InputError(f"--ids {file}: not a .npy file of numbers ({error}); write it with numpy.save") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise InputError(f"--ids {file}: holds {found}; must be integers [batch, length], at least one")
    if ids.shape[1] > config.max_position:
        raise InputError(
            f"--ids {file}: sequences of {ids.shape[1]} tokens; the context takes {config.max_position}, see --context"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise InputError(f"--ids {file}: ids from {ids.min()} to {ids.max()}; must lie in 0..{config.vocab_size - 1}")
    return ids.astype(np.int32)
