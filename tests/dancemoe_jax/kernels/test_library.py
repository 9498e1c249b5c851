"""How the library of native calls is found, built, or done without."""

import logging
import subprocess

import jax
import pytest

from dancemoe_jax.kernels import build, library


def test_without_a_compiler_one_line_says_what_it_costs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert library.load.__wrapped__() is None
    (record,) = caplog.records
    assert "no C++ compiler" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_compiler_that_fails_is_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build, "find_compiler", lambda: "false")
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "LIBRARY", "not-there.so")
    with caplog.at_level(logging.WARNING):
        assert library.load.__wrapped__() is None
    assert len(caplog.records) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_built_is_named_after_all_it_depends_on(monkeypatch):
    first = build.fingerprint("c++", "1.0")
    assert first == build.fingerprint("c++", "1.0") != build.fingerprint("c++", "1.1")
    monkeypatch.setattr(build, "sources", lambda: [build.SOURCES / "simd.h"])
    assert build.fingerprint("c++", "1.0") != first


def test_only_cpus_and_types_with_a_native_call_take_it():
    loaded = library.load() is not None
    assert library.use_native("auto", "cpu") == loaded
    assert library.use_native("auto", "cpu", jax.numpy.bfloat16) == loaded
    assert not library.use_native("auto", "cpu", jax.numpy.float16)
    assert not library.use_native("auto", "gpu")
    assert not library.use_native("xla", "cpu")
    with pytest.raises(ValueError, match="'auto' or 'xla'"):
        library.use_native("cuda", "cpu")


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_sources_compile_without_a_warning(tmp_path):
    for name in ("experts.cc", "linear.cc", "attention.cc", "norm.cc", "choice.cc", "instruction_set.cc"):
        command = [build.find_compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        source = str(build.SOURCES / name)
        subprocess.run([*command, f"-isystem{jax.ffi.include_dir()}", source], check=True)
