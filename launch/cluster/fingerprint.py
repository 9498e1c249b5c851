"""Fingerprints of what servers must have in common: the cluster file and the files of a model."""

import hashlib
import os
from pathlib import Path

from placement import Cluster, InputError

_HEAD_BYTES = 2**20


def cluster_fingerprint(cluster: Cluster) -> str:
    """Hash of what a cluster file says, whatever its layout and comments; hosts are left out, as each may see its own."""
    said = repr([(server.name, server.devices) for server in cluster.servers]).encode()
    return hashlib.sha256(said + cluster.bandwidth.tobytes() + cluster.latency.tobytes()).hexdigest()


def folder_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of the names, sizes and first MiB of a file, or of all files below a folder: cheap for a large model.

    Raises:
        InputError: it does not exist or cannot be read.
    """
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
