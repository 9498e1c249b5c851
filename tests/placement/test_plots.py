"""Figures: whole pictures of a sensible size, refused in one line before any work, never half written."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from placement import Cluster, InputError, Profile, plan
from placement.__main__ import main
from placement.commands.plots import check_path, frontier, plot_costs, plot_grid, plot_latencies, plot_placement

CLUSTER = """
[[server]]
name = "a"
devices = [{ memory = 120 }]
[[server]]
name = "b"
devices = [{ memory = 80 }, { memory = 60 }]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text(CLUSTER)
    counts = np.random.default_rng(0).integers(1, 99, (2, 3, 6))
    Profile(counts, ("a", "b"), "tiny", 2, 16, 10, reserved_bytes=5).save("profile.npz")
    return tmp_path


def picture(path):
    """Decode a PNG by its definition: size, and how many different bytes its rows hold."""
    data = Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    file, chunks = io.BytesIO(data[8:]), {}
    while head := file.read(8):
        length, kind = struct.unpack(">I4s", head)
        body = file.read(length)
        assert struct.unpack(">I", file.read(4))[0] == zlib.crc32(kind + body)
        chunks[kind] = chunks.get(kind, b"") + body
    assert b"IEND" in chunks
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    pixels = zlib.decompress(chunks[b"IDAT"])
    assert len(pixels) == height * (width * 4 + 1)
    return width, height, len(set(pixels))


def placed(servers, layers, experts):
    counts = np.random.default_rng(0).integers(1, 99, (servers, layers, experts))
    tables = [{"name": f"s{n}", "devices": [{"memory": layers * experts}] * (1 + n % 2)} for n in range(servers)]
    profile = Profile(counts, tuple(f"s{n}" for n in range(servers)), "m", 2, 16, 1 + servers // 3)
    return plan(profile, Cluster.from_dict({"server": tables}), "uniform")


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 26, 64), (2, 61, 256), (9, 4, 8)])
def test_placement_figure(tmp_path, shape):
    plot_placement(placed(*shape), tmp_path / "x.png")
    width, height, values = picture(tmp_path / "x.png")
    assert 600 <= width <= 2000
    assert 400 <= height <= 3000
    assert values > 50
    assert os.listdir(tmp_path) == ["x.png"]


def test_costs_figure(tmp_path):
    costs = {f"s{i}": {"remote_share": i / 12, "network_probability": 1 / (1 + i)} for i in range(12)}
    for number in (1, 12):
        chosen = dict(list(costs.items())[:number])
        plot_costs(chosen, "m", tmp_path / "x.png")
        width, height, _ = picture(tmp_path / "x.png")
        assert 600 <= width <= 2000
        assert 400 <= height <= 1500


def test_latency_and_grid_figures(tmp_path):
    plot_latencies({"a": np.arange(9.0), "b": np.ones(1)}, "m", tmp_path / "l.png")
    cells = {("a", g, b, 8.0): {"mean": b / g} for g in (4, 16) for b in (100.0, 500.0)}
    plot_grid(cells, "m", tmp_path / "g.png")
    assert all(picture(tmp_path / name)[0] > 500 for name in ("l.png", "g.png"))
    # Of two strategies each cluster size has a panel of its own.
    plot_grid(cells | {("b", *cell[1:]): {"mean": 1.0} for cell in cells}, "m", tmp_path / "two.png")
    assert picture(tmp_path / "two.png")[0] > 1.2 * picture(tmp_path / "g.png")[0]


def test_same_data_same_picture(tmp_path):
    for name in ("x.png", "y.png"):
        plot_placement(placed(3, 4, 8), tmp_path / name)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_other_formats(tmp_path):
    plot_placement(placed(2, 3, 4), tmp_path / "x.svg")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()
    plot_placement(placed(2, 3, 4), tmp_path / "x.PDF")
    assert (tmp_path / "x.PDF").read_bytes().startswith(b"%PDF")


def test_frontier():
    points = {"both": (1, 3), "middle": (2, 2), "beaten": (3, 2), "same": (1, 3), "right": (4, 1)}
    assert frontier(points) == ["both", "middle", "right"]
    assert frontier({"one": (0, 0)}) == ["one"]


def test_legends_overlap_nothing(tmp_path, monkeypatch):
    """Legend boxes against axes boxes, as drawn."""
    import placement.commands.plots as plots

    seen = []

    def keep(plt, figure, path):
        figure.draw_without_rendering()
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
        boxes = [axis.get_window_extent() for axis in figure.axes]
        seen.extend((legend.get_window_extent(), box) for legend in legends for box in boxes)
        plt.close(figure)

    monkeypatch.setattr(plots, "_save", keep)
    plot_placement(placed(3, 26, 64), tmp_path / "x.png")
    plot_placement(placed(2, 61, 256), tmp_path / "x.png")
    plot_costs({f"s{i}": {"remote_share": i / 9, "network_probability": 0.5} for i in range(9)}, "m", "x.png")
    plot_grid({(f"s{i}", 4, 100.0, 8.0): {"mean": 1.0} for i in range(9)}, "m", "x.png")
    assert len(seen) > 8
    assert not any(legend.overlaps(box) for legend, box in seen)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.bmp", "unsupported suffix '.bmp'; use one of .png, .svg, .pdf"),
        ("x", "unsupported suffix ''"),
        ("absent/x.png", "is no folder that can be written to"),
        ("folder.png", "not a regular file"),
    ],
)
def test_refused_before_the_work(folder, capsys, monkeypatch, name, message):
    Path("folder.png").mkdir()
    with pytest.raises(InputError, match="--plot"):
        check_path(name)
    monkeypatch.setattr(Profile, "load", lambda path: pytest.fail("work began"))
    for args in (["plan", "--out", "new.json"], ["compare"], ["simulate"]):
        assert main([*args, "--cluster", "cluster.toml", "--profile", "profile.npz", "--plot", name]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
    assert not Path("new.json").exists()


def test_commands(folder, capsys):
    common = ["--cluster", "cluster.toml", "--profile", "profile.npz"]
    assert main(["plan", *common, "--strategy", "dance", "--out", "new.json", "--plot", "p.png"]) == 0
    assert main(["compare", *common, "--strategies", "uniform,dance", "--plot", "c.png"]) == 0
    assert all(picture(name)[2] > 20 for name in ("p.png", "c.png"))
    assert sorted(os.listdir()) == ["c.png", "cluster.toml", "new.json", "p.png", "profile.npz"]
