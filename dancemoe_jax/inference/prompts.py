"""What a prompt has to be before it is served. Loads no JAX."""

from collections.abc import Sequence

import numpy as np

from dancemoe_jax.errors import RequestError
from dancemoe_jax.model.config import ModelConfig


def check_prompt(config: ModelConfig, prompt: Sequence[int], name: str) -> None:
    """Raise RequestError where a prompt cannot be served.

    Args:
        prompt: token ids.
        name: of the prompt, for the message.
    """
    if any(isinstance(token, bool | np.bool_) or not isinstance(token, int | np.integer) for token in prompt):
        raise RequestError(f"{name}: holds something that is no whole number; give token ids")
    if not 1 <= len(prompt) < config.max_position:
        raise RequestError(
            f"{name}: {len(prompt)} tokens; the model's context of {config.max_position} takes 1 to "
            f"{config.max_position - 1} and leaves room for one more"
        )
    if not all(0 <= token < config.vocab_size for token in prompt):
        raise RequestError(f"{name}: token ids must lie in 0..{config.vocab_size - 1}")
