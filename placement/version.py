"""The version, in one place: pyproject.toml reads it from here, and programs say it."""

import importlib.metadata

VERSION = "0.1.0"


def version() -> str:
    """Of what is installed; of this source tree where nothing is."""
    try:
        return importlib.metadata.version("dancemoe-jax")
    except importlib.metadata.PackageNotFoundError:
        return VERSION
