"""Fingerprints of what servers must have in common: the cluster file and the files of a model."""

import hashlib
import os
from pathlib import Path

from dancemoe_jax.checkpoint.fingerprint import model_fingerprint
from placement import Cluster, InputError

_HEAD_BYTES = 2**20


def cluster_fingerprint(cluster: Cluster) -> str:
    """Hash of what a cluster file says, whatever its layout and comments; hosts are left out, as each may see its own."""
    facts = repr([(server.name, server.devices) for server in cluster.servers]).encode()
    return hashlib.sha256(facts + cluster.bandwidth.tobytes() + cluster.latency.tobytes()).hexdigest()


def folder_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of what a model's folder holds (`model_fingerprint`); of names, sizes and first MiB of any other file or folder.

    Raises:
        InputError: it does not exist or cannot be read.
        ModelError: it is a model's folder, and a file of it is missing or damaged.
    """
    if (Path(path) / "config.json").is_file():
        return model_fingerprint(Path(path))
    root, digest = Path(path), hashlib.sha256()
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    try:
        for file in files:
            digest.update(repr((file.relative_to(root).as_posix(), file.stat().st_size)).encode())
            with open(file, "rb") as stream:
                digest.update(stream.read(_HEAD_BYTES))
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
