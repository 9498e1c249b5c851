"""`python -m launch score`: logits of token ids through the serving path, to compare with any other implementation's."""

import argparse
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.errors import ModelError
from dancemoe_jax.inference.finite import all_finite, not_finite
from dancemoe_jax.inference.state import init_state
from dancemoe_jax.inference.steps import prefill
from dancemoe_jax.model.config import ModelConfig
from launch.engine.single_process import Local, load
from launch.model_flags import read_shape
from placement import InputError
from placement.data.arrays import read_npy
from placement.files import read_bytes, write_bytes

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
    """Float32 logits [batch, length, vocab] of ids [batch, length], sequences sharded over the devices.

    Raises:
        ModelError: the model makes NaN or infinity of a sequence.
    """
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
        layers = np.asarray(result.finite_layers).reshape(-1)[:batch]
        if (layers < all_finite(local.config)).any():
            first = int(np.argmax(layers < all_finite(local.config)))
            raise ModelError(f"sequence {first} of --ids: {not_finite(local.config, int(layers[first]))}")
        parts.append(np.asarray(result.logits))
    logits = np.concatenate(parts, axis=2)
    return np.ascontiguousarray(logits.reshape(rows * devices, -1, logits.shape[-1])[:batch, :length])


def _read_ids(file: Path, config: ModelConfig) -> np.ndarray:
    ids = read_npy(read_bytes(file), f"--ids {file}")
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError(
            f"--ids {file}: holds {ids.dtype} {list(ids.shape)}; must be integers [batch, length], at least one"
        )
    if ids.shape[1] > config.max_position:
        raise InputError(
            f"--ids {file}: sequences of {ids.shape[1]} tokens; the context takes {config.max_position}, see --context"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise InputError(f"--ids {file}: ids from {ids.min()} to {ids.max()}; must lie in 0..{config.vocab_size - 1}")
    return ids.astype(np.int32)
