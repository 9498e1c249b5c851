"""Compiling the native calls. Standard library only: pip's build, which has nothing else, uses this file too."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = "native.so"

# Bits are part of the interface: nothing that lets a compiler reorder additions or fuse what is not written as fused.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
_PER_INSTRUCTION_SET = {
    "x86_64": {
        "plain": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": _AVX512,
        "avx512bf16": [*_AVX512, "-mavx512bf16"],
    }
}


class BuildError(Exception):
    """The compiler refused; the message is what it said."""


def find_compiler() -> str | None:
    """A C++ compiler on the path, or None."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def sources() -> list[Path]:
    return sorted(p for p in SOURCES.iterdir() if p.suffix in (".cc", ".h"))


def fingerprint(compiler: str, jaxlib_version: str) -> str:
    """A name for what would be built: changes with sources, flags, compiler, processor family and jaxlib."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [jaxlib_version.encode(), version, platform.machine().encode(), Path(__file__).read_bytes()]
    digest = hashlib.sha256(b"\0".join(parts + [path.read_bytes() for path in sources()]))
    return digest.hexdigest()[:20]


def _takes(compiler: str, flags: list[str]) -> bool:
    command = [compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def build(out: Path, include: str, compiler: str) -> None:
    """Compile everything into the shared library `out`, which appears complete or not at all.

    Args:
        include: folder of the XLA FFI headers (`jax.ffi.include_dir()`).

    Raises:
        BuildError: the compiler failed.
        OSError: no place to write to.
    """
    sets = _PER_INSTRUCTION_SET.get(platform.machine(), {"plain": []})
    sets = {name: flags for name, flags in sets.items() if name != "avx512bf16" or _takes(compiler, flags)}
    units = [(path, path.stem, []) for path in sources() if path.suffix == ".cc" and path.stem != "vector_code"]
    inner = SOURCES / "vector_code.cc"
    units += [(inner, f"vector_code_{name}", [f"-DINSTRUCTION_SET={name}", *flags]) for name, flags in sets.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        objects = [f"{work}/{name}.o" for _, name, _ in units]
        running = [
            subprocess.Popen(
                [compiler, *_FLAGS, f"-I{include}", *flags, "-c", str(path), "-o", made],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for (path, _, flags), made in zip(units, objects, strict=True)
        ]
        said = [process.communicate()[0] for process in running]
        failed = [text for process, text in zip(running, said, strict=True) if process.returncode != 0]
        if failed:
            raise BuildError(failed[0].decode(errors="replace").strip()[-2000:])
        link = [compiler, "-shared", "-pthread", *objects, "-o", f"{work}/{LIBRARY}"]
        linked = subprocess.run(link, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if linked.returncode != 0:
            raise BuildError(linked.stdout.decode(errors="replace").strip()[-2000:])
        os.replace(f"{work}/{LIBRARY}", out)
