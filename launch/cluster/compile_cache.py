"""Compiled programs are kept on disk, so that a second start compiles nothing."""

import logging
from pathlib import Path

import jax

from launch.cluster.jax_runtime import write_cache_everywhere
from launch.cluster.secret import user_cache
from placement import InputError

log = logging.getLogger(__name__)


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled programs in a folder. Before anything is compiled.

    Args:
        folder: "off" keeps none; None takes what JAX is set to already, or the user's cache folder.

    Raises:
        InputError: the folder that is given cannot be made. Without the user's own cache folder nothing is kept.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    write_cache_everywhere()
    if folder is None and jax.config.values["jax_compilation_cache_dir"]:
        return
    path = Path(folder) if folder else user_cache() / "jax"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if folder is None:
            log.info("compiled programs are not kept: %s cannot be made (%s)", path, error.strerror)
            return
        raise InputError(
            f"--compile-cache {path}: cannot be made ({error.strerror}); give another folder, or off"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", 2 * 10**9)  # with a limit JAX takes a lock: servers share it
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    log.debug("compiled programs are kept in %s", path)
