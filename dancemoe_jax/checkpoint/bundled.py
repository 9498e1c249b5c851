"""The small model that comes with the package. Loads no JAX."""

import importlib.resources
from pathlib import Path


def bundled_model() -> Path:
    """The directory of the small model that comes with the package."""
    return Path(str(importlib.resources.files("dancemoe_jax") / "assets" / "tiny-moe"))
