"""The flags that say which model to load and how, the same for every command that loads one."""

import dataclasses
from pathlib import Path
from typing import Any

from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.model.config import ModelConfig
from placement import InputError

DTYPES = ("float32", "bfloat16", "float16")
# Contexts of published models reach 131,072 tokens and more, and each sequence's cache is made for the whole of it.
LONGEST_CONTEXT = 4096


def add_model_arguments(parser) -> None:
    """The flags of `load`."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations (float32)")
    parser.add_argument("--int8", action="store_true", help="hold routed experts as int8, a scale per output channel")
    parser.add_argument("--devices", type=int, default=1, help="devices to share the experts (1)")
    parser.add_argument("--context", type=int, help=f"longest sequence (the model's, at most {LONGEST_CONTEXT})")


def read_shape(path: Path, args: Any) -> ModelConfig:
    """The model's configuration with the context that `--context` leaves of it.

    Raises:
        InputError: a flag is out of range.
    """
    config = read_config(path)
    if not 1 <= args.devices <= 64:
        raise InputError(f"--devices {args.devices}: must be from 1 to 64")
    context = min(config.max_position, LONGEST_CONTEXT) if args.context is None else args.context
    if not 2 <= context <= config.max_position:
        raise InputError(f"--context {context}: must be from 2 to the model's own {config.max_position}")
    return dataclasses.replace(config, max_position=context)
