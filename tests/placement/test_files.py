"""Readers of lines, JSON, TOML, CSV and arrays: what they take, and what they refuse before they work on it."""

import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from placement import InputError, Profile
from placement.__main__ import main
from placement.data.arrays import read_npy, read_npz
from placement.files import (
    MAX_DEPTH,
    parse_json,
    parse_line,
    read_csv,
    read_json,
    read_json_lines,
    read_lines,
    read_toml,
    show,
)
from tests.helpers.paths import ROOT


def refusal(call, *args):
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        call(*args)
    assert time.process_time() - start < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_newline_alone_ends_a_line(tmp_path):
    values = ["first half\u2028second half", "next\u0085line", "form\x0cfeed", "\u2029\x1c\x1d\x1e\x0b"]
    path = written(tmp_path, "\n".join(json.dumps(value, ensure_ascii=False) for value in values))
    assert [value for _, value in read_json_lines(path)] == values
    assert [line for _, line in read_lines(path)] == [json.dumps(value, ensure_ascii=False) for value in values]


def test_marks_carriage_returns_and_blank_lines(tmp_path):
    path = written(tmp_path, "\ufefffirst\r\n\r\n  \n\ufeffsecond\n")
    assert list(read_lines(path)) == [(1, "first"), (4, "\ufeffsecond")]
    assert list(read_lines(written(tmp_path, ""))) == []
    with pytest.raises(InputError, match="file: not text: line 2, byte 1 is not UTF-8"):
        list(read_lines(written(tmp_path, b"a\nb\xff\n")))


def test_a_line_that_begins_with_a_brace_is_json():
    assert parse_line('{"prompt": "a\u2028b"}', "f: line 1") == {"prompt": "a\u2028b"}
    assert parse_line("[INST] no JSON", "f: line 1") == "[INST] no JSON"
    assert "f: line 7: not valid JSON" in refusal(parse_line, ' {"prompt": "first"', "f: line 7")


def test_json_reads_what_json_is(tmp_path):
    value = {"a": [1, -2.5, 1e300, 9_000_000_000_000_000_000], "b": "[[[" * 500 + '\\"{' + "9" * 5000, "c": None}
    for text in (json.dumps(value), "\ufeff" + json.dumps(value, ensure_ascii=False)):
        assert parse_json(text, "f") == value
        assert read_json(written(tmp_path, text)) == value
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 65 + "]" * 65, "f: JSON nested 65 deep; at most 64"),
        ('{"a":' * 100_000, "f: JSON nested 100000 deep"),
        ('{"' + '\\"' * 10**6, "f: not valid JSON"),
        ('["' + "\\" * 4 + '", ' + "[" * 70, "JSON nested 71 deep"),
        ('["' + "\\" * 5 + '", ' + "[" * 70, "not valid JSON"),  # all in a string that has no end
        ('{"a": NaN}', "f: NaN: numbers must be finite"),
        ("[-Infinity]", "-Infinity: numbers must be finite"),
        ("[1e999]", "1e999: numbers must be finite"),
        ("[1, " + "9" * 5000 + "]", "f: an integer of 5000 digits; at most 19"),
        ("[-123456789012345678901]", "an integer of 21 digits"),
        ('{"a": 1', "f: not valid JSON, perhaps truncated: Expecting"),
        ("", "not valid JSON"),
        (b"\xff", "f: not text: byte 0 is not UTF-8"),
        ("[" + " " * 2**26 + "]", "f: larger than 67108864 bytes"),
    ],
)
def test_json_refuses(text, message):
    assert message in refusal(parse_json, text, "f")


def test_toml(tmp_path):
    assert read_toml(written(tmp_path, "\ufeffa = 1\r\n[b]\r\nc = 'x'\r\n")) == {"a": 1, "b": {"c": "x"}}
    assert read_toml(written(tmp_path, f"a = -{2**63}\nb = [{2**63 - 1}]"))["b"] == [2**63 - 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 3000 + "]" * 3000, "file: not valid TOML: nested too deep"),
        ("a = " + "[" * 100 + "]" * 100, "file: not valid TOML: nested too deep"),
        ("a = 0x" + "f" * 4500, "file: a = an integer of 18000 bits: must fit into 64 bits"),
        ("[[s]]\nd = [{ m = " + "9" * 400 + " }]", "file: s[0].d[0].m = an integer of 1329 bits: must fit"),
        ("a = " + "9" * 5000, "file: not valid TOML"),
        ("a = inf", "file: a = inf: must be a finite number"),
        (".".join("a" * 100_000) + " = 1", "a key of over 32 parts"),
        ('"x" . ' * 5000 + "y = 1", "a key of over 32 parts"),
        ("#" * 2**20 + "\n", "larger than 1048576 bytes"),
        (b"\xff\xfe", "not valid TOML: not text"),
    ],
)
def test_toml_refuses(tmp_path, text, message):
    assert message in refusal(read_toml, written(tmp_path, text))


@pytest.mark.parametrize("text", ["a,b\n1,x\n", "\ufeffa;b\r\n1; x\r\n\r\n", "a\tb\n1\tx", ' a , b \n "1","x" \n'])
def test_csv(tmp_path, text):
    names, rows = read_csv(written(tmp_path, text))
    assert (names, list(rows)) == (["a", "b"], [(2, ["1", "x"])])


def test_csv_refuses(tmp_path):
    for text, message in (
        ("a,b\n1,2,3\n", "line 2: has 3 cells, the header has 2"),
        ('a,b\n"1,2\n', "line 2: not valid CSV"),
    ):
        assert message in refusal(lambda t=text: list(read_csv(written(tmp_path, t))[1]))


def test_show_ends():
    shared: list = [1]
    for _ in range(60):
        shared = [shared] * 10
    looped: list = []
    looped.append(looped)
    deep: tuple = ()
    for _ in range(200_000):
        deep = (deep,)
    for value in (shared, looped, deep, {"a": shared}, "x" * 10**7, np.zeros(10**6), 10**5000, -(2**300), object()):
        text = show(value)
        assert len(text) <= 60
        assert "\n" not in text
    assert show(("a", 1.5, None, {"b": [True]})) == "('a', 1.5, None, {'b': [True]})"
    assert (show((1,)), show("é\n"), show(np.int64(3))) == ("(1,)", "'é\\n'", "3")


@pytest.mark.parametrize(
    "args",
    [
        ["validate", "--cluster", "c.toml", "--placement", "nope.json"],
        ["diff", "--cluster", "c.toml", "nope.json", "nope.json"],
        ["plan", "--cluster", "nope.json", "--profile", "p.npz", "--out", "o"],
        ["model", "nope.json"],
        *[["convert", f"nope{end}", "--out", "o"] for end in (".json", ".jsonl", ".pt", ".npy", ".yaml")],
    ],
)
def test_a_missing_file_is_called_missing(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('[[server]]\nname = "a"\ndevices = [{ memory = 5 }]\n')
    assert main(args) == 2
    assert "cannot be read: No such file or directory\n" in capsys.readouterr().err


def test_names_that_are_too_long_or_of_several_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a" * 5000, "two\nlines"):
        for args in (["model", name], ["convert", name + ".json", "--out", "o"], ["convert", name, "--out", "o"]):
            assert main(args) == 2
            assert capsys.readouterr().err.count("\n") == 1


# ---- arrays

META = {"model": "m", "top_k": 2, "experts": 4, "hidden_size": 8, "expert_bytes": 10}
ARRAYS = {"counts": np.ones((2, 3, 4)), "servers": np.array(["a", "b"]), "meta": np.array(json.dumps(META))}


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                parts = [content] if isinstance(content, bytes) else content
                for part in parts:
                    member.write(part)
    return buffer.getvalue()


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(shape, dtype="<f8"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def peak(call):
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_members_that_nothing_uses_are_not_unpacked(tmp_path):
    zeros = (bytes(2**24) for _ in range(16))
    data = npz(**{key: saved(array) for key, array in ARRAYS.items()}, more=zeros)
    assert len(data) < 2**20
    found, most = peak(lambda: Profile.load(written(tmp_path, data)))
    assert (found.counts == 1).all()
    assert most < 2**24


def test_an_array_that_unpacks_to_much_more_than_the_file(tmp_path):
    members = {key: saved(array) for key, array in ARRAYS.items()}
    entries = 2**25
    counts = [header((1, 1, entries)), *(bytes(2**24) for _ in range(entries * 8 // 2**24))]
    path = written(tmp_path, npz(**{**members, "counts": counts}))
    text, most = peak(lambda: refusal(Profile.load, path))
    assert "unpacks from" in text
    assert most < 2**24
    small = [header((2**15, 2**8, 4), "|i1"), bytes(2**25)]
    assert "entries are more than 16777216" in refusal(
        Profile.load, written(tmp_path, npz(**{**members, "counts": small}))
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header((10**7, 10**6)), "its shape is (10000000, 1000000)"),
        (header((10**6, 10**5)), "has 81 bytes, its header says 800000000081"),
        (header("(99" + "9" * 300 + ",)"), "not a readable .npy file"),
        (header("(-1,)") + bytes(8), "not a readable .npy file"),
        (header("(0, 1099511627775, 1099511627775)"), "its shape is"),
        (header((2, 3)), "has 70 bytes, its header says 118: shape (2, 3) of float64"),
        (header((2,)) + bytes(17), "has 85 bytes, its header says 84"),
        (header((2,), "|V8") + bytes(16), "has type |V8; must be numbers"),
        (header((2,), "<f16") + bytes(32), "has type <f16"),
        (header((), "|O"), "holds pickled objects"),
        (b"\x93NUMPY\x01\x00\x36\x00" + b"(".ljust(54), "its header is '('"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "truncated header"),
        (b"\x93NUMPY\x09\x00\x02\x00{}", "truncated header"),
        (b"PK", "no header"),
    ],
)
def test_headers_of_npy_files(data, message):
    text = refusal(read_npy, data, "x.npy")
    assert message in text
    assert text.startswith("x.npy: ")
    assert "x: " in refusal(read_npz, npz(counts=data), "x", ["counts"], "save it again")


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3), ">f4")), np.zeros((0, 3)), np.array(5)]
)
def test_arrays_as_numpy_saves_them(array):
    found = read_npy(saved(array), "x")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert (found == array).all()
    assert (read_npz(npz(a=saved(array)), "x", ["a", "b"], "")["a"] == array).all()


def test_zip_files_of_many_or_double_members(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(20_001):
            archive.writestr(str(i), b"")
    assert "has over 20000 parts" in refusal(read_npz, buffer.getvalue(), "x", ["a"], "save it again")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for _ in range(2):
            with pytest.warns(UserWarning, match="Duplicate name") if archive.namelist() else io.BytesIO():
                archive.writestr("counts.npy", saved(np.ones(3)))
    assert "two parts are named 'counts.npy'" in refusal(read_npz, buffer.getvalue(), "x", ["counts"], "save it again")


@pytest.mark.parametrize("args", [[], ["deepseek.npz", "out"], ["unknown.npz", "out"]])
def test_the_maker_of_profiles_says_where_its_traces_come_from(tmp_path, args):
    script = ROOT / "tests/fixtures/make_trace_profiles.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *args]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "github.com/deepseek-ai/ESFT" in done.stderr
    assert "Traceback" not in done.stderr
