"""JSON within limits; a directory is replaced at once, and what killed processes left is removed."""

import os
import shutil
import subprocess
import sys

import pytest

from dancemoe_jax import ModelError, files
from dancemoe_jax.files import read_json, replace_directory, write_directory, write_json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not readable as JSON"),
        (b"[" * 10**6, "nest deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nest deeper than 64"),
        (b"[]", "holds a list"),
        (b'{"a": 1}' + b" " * 100, "longer than 100 bytes"),
    ],
)
def test_json_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, content, words):
    if "longer" in words:
        monkeypatch.setattr(files, "LONGEST_JSON", 100)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelError, match=words) as error:
        read_json(tmp_path / "x.json", "write it again")
    assert str(error.value).startswith(f"{tmp_path}/x.json: ")
    assert str(error.value).endswith("; write it again")
    assert "\n" not in str(error.value)


def test_json_with_a_byte_order_mark_and_without_a_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "x.json").read_bytes())
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert read_json(tmp_path / "y.json", optional=True) == {}
    with pytest.raises(ModelError, match="no such file"):
        read_json(tmp_path / "y.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path)


def directory(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged at once on Linux")
def test_a_process_that_is_killed_while_it_replaces_leaves_one_whole_directory(tmp_path, monkeypatch):
    place, fresh = directory(tmp_path / "place", "old"), directory(tmp_path / "fresh", "new")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    renames = []
    monkeypatch.setattr(os, "rename", lambda *names: renames.append(names))
    with pytest.raises(KeyboardInterrupt):
        replace_directory(fresh, place)
    assert (place / "file").read_text() == "new"
    assert not renames


@pytest.mark.parametrize("exchanges", [True, False])
def test_directories_are_replaced_and_nothing_else_stays(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for text in ("one", "two"):
        write_directory(tmp_path / "place", lambda fresh, text=text: (fresh / "file").write_text(text))
        assert (tmp_path / "place" / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["place"]

    def full(fresh):
        (fresh / "file").write_text("three")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(tmp_path / "place", full)
    assert (tmp_path / "place" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_what_killed_processes_left_is_removed_and_what_running_ones_write_is_not(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    names = [
        f".place.{done.pid}.new",
        f".place.{done.pid}.old",
        f".place.{os.getpid()}.new",
        ".place.notes",
        ".other.1.new",
    ]
    for name in names:
        directory(tmp_path / name, "")
    files.remove_leftovers(tmp_path / "place")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
