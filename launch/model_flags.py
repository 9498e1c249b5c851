"""What the flags leave of a model's shape, the same for every command that loads one."""

import dataclasses
from pathlib import Path
from typing import Any

from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.model.config import ModelConfig
from launch.arguments import LONGEST_CONTEXT
from placement import InputError


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
