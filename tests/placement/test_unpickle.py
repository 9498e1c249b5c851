"""Pickles of strangers: what is data is read, nothing else is, and nothing runs."""

import builtins
import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from placement import InputError
from placement.__main__ import main
from placement.engines.saved_arrays import load_npy, load_torch
from placement.engines.unpickle import load_pickle
from tests.helpers.torch_files import text, torch_pickle, zipped

COUNTS = np.random.default_rng(0).integers(1, 50, (3, 6)).astype(np.int32)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = {
    "os.system": (Calls(os.system, "touch owned"), "system"),
    "eval": (Calls(builtins.eval, "open('owned', 'w')"), "builtins.eval"),
    "exec": (Calls(exec, "open('owned', 'w')"), "builtins.exec"),
    "getattr": (Calls(getattr, {}, "pop"), "builtins.getattr"),
    "nested": ({"logical_count": [1, {"x": (Calls(os.system, "touch owned"),)}]}, "system"),
    "set": ({"logical_count": {1}}, "EMPTY_SET"),
    "object array": ({"logical_count": np.array([None, {}])}, "numpy object array"),
    "defaultdict": (collections.defaultdict(list), "defaultdict"),
    "array of a call": (np.array([[Calls(os.system, "touch owned")]]), "system"),
    "structured": (np.zeros(2, [("a", "i4")]), "numpy type"),
    "class": (Path, "pathlib"),
}


def refused(capsys, path):
    """Checks that convert refuses a file in one line and writes nothing; returns the line."""
    assert main(["convert", path, "--servers", "a", "--out", "new.npz"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not Path("new.npz").exists()
    return err


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles(tmp_path, monkeypatch, capsys, name, protocol):
    monkeypatch.chdir(tmp_path)
    content, names = HOSTILE[name]
    data = pickle.dumps(content, protocol)
    with pytest.raises(InputError) as caught:
        load_pickle(data, "x")
    if protocol >= 4:
        assert names in str(caught.value)
    assert "\n" not in str(caught.value)
    Path("r.pt").write_bytes(zipped(data[2:-1] if protocol > 1 else data[:-1]))
    assert "r.pt: " in refused(capsys, "r.pt")
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    Path("d.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data)
    assert "d.npy: " in refused(capsys, "d.npy")
    assert not Path("owned").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_pickles(protocol):
    array = np.arange(12, dtype=">i4").reshape(3, 4)
    content = {
        "a": array,
        "same": array,
        "t": (array[:, ::2], [1.5, None, True, 2**70, "é", b"x"]),
        "s": np.float32(2.5),
    }
    content["f"] = np.asfortranarray(np.ones((2, 3), bool))
    found = load_pickle(pickle.dumps(content, protocol), "x")
    assert (found["a"] == array).all()
    assert found["same"] is found["a"]
    assert (found["t"][0] == array[:, ::2]).all()
    assert found["t"][1] == [1.5, None, True, 2**70, "é", b"x"]
    assert found["s"] == 2.5
    assert found["f"].shape == (2, 3)


def test_every_truncation_is_refused(tmp_path):
    counts = COUNTS
    storages = []
    program = torch_pickle({"rank": 0, "logical_count": counts}, storages)
    whole = zipped(program, storages)
    assert (load_torch(whole, "x")["logical_count"] == counts).all()
    for end in range(0, len(whole), 7):
        with pytest.raises(InputError, match=r"truncated or damaged|not a PyTorch zip file"):
            load_torch(whole[:end], "x")
    buffer = io.BytesIO()
    np.save(buffer, {"logical_count": counts}, allow_pickle=True)  # pyright: ignore
    for end in range(0, len(buffer.getvalue()), 3):
        with pytest.raises(InputError, match=r"truncated or damaged|not a readable"):
            load_npy(buffer.getvalue()[:end], "x")


def tensor_program(numel, offset, size, stride):
    identity = (
        b"(" + text("storage") + b"ctorch\nIntStorage\n" + text("0") + text("cpu") + torch_pickle(numel, []) + b"tQ"
    )
    rest = b"".join(torch_pickle(part, []) for part in (offset, size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + rest + b"\x89ccollections\nOrderedDict\n)RtR"


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (6, 1, (2, 3), (3, 1)),  # past the end
        (6, 0, (2, 3), (4, 1)),
        (6, -1, (2, 3), (3, 1)),
        (6, 0, (2, 3), (-3, 1)),
        (7, 0, (2, 3), (3, 1)),  # a storage of another size
        (6, 0, (10**6, 10**6), (0, 0)),  # a small storage that becomes a huge array
        (6, 0, (2, 3), (3,)),
    ],
)
def test_tensors_stay_within_their_storage(numel, offset, size, stride):
    storage = [np.arange(6, dtype=np.int32)]
    assert (load_torch(zipped(tensor_program(6, 0, (3, 2), (1, 3)), storage), "x") == storage[0].reshape(2, 3).T).all()
    with pytest.raises(InputError, match="x: truncated or damaged: its pickle has"):
        load_torch(zipped(tensor_program(numel, offset, size, stride), storage), "x")


def test_zip_bombs_and_other_zips():
    bomb = zipped(b"}", [np.zeros(10**6, np.int32)], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed or encrypted parts"):
        load_torch(bomb, "x")
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    with pytest.raises(InputError, match=r"has 0 parts named data\.pkl"):
        load_torch(buffer.getvalue(), "x")
    with pytest.raises(InputError, match="not a PyTorch zip file; save it again"):
        load_torch(pickle.dumps({}), "x")


def test_nothing_grows_beyond_the_file():
    memo = b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b"."  # a memo entry far away costs nothing
    assert load_pickle(memo, "x") == []
    with pytest.raises(InputError):
        load_pickle(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.", "x")
