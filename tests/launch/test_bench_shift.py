"""`python -m launch bench shift`: what it says about users who change what they work on."""

import json

import numpy as np
import pytest

from launch.__main__ import main
from launch.bench.harness.namespaces import missing
from launch.bench.harness.shift_server import Storage, shifted
from launch.bench.harness.trace import Trace
from launch.bench.shift import figures, recovered
from placement.data.arrivals import Arrivals


@pytest.fixture
def trace(tmp_path, rng):
    """Three domains, each at home in its own third of 12 experts, 3 layers, top-2."""
    arrays = {"meta": json.dumps({"model": "made-up", "domains": ["x", "y", "z"]})}
    for number, domain in enumerate("xyz"):
        lengths = np.full(6, 20, np.int32)
        liking = np.ones(12)
        liking[4 * number : 4 * number + 4] = 20
        noise = rng.gumbel(size=(int(lengths.sum()), 3, 12)) + np.log(liking)
        arrays[f"ids_{domain}"] = np.argsort(-noise, -1)[..., :2].astype(np.uint8)
        arrays[f"gate_{domain}"] = np.full(arrays[f"ids_{domain}"].shape, 0.5, np.float16)
        arrays[f"seq_lens_{domain}"] = lengths
    path = tmp_path / "trace.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "absent.npz"], "absent.npz"),
        (["--trace", "T", "--gap", "0"], "--gap 0.0: must be greater than 0"),
        (["--trace", "T", "--interval", "0s"], "--interval 0s: must be greater than 0s"),
        (["--trace", "T", "--interval", "10"], "--interval"),
        (["--trace", "T", "--load-bandwidth", "fast"], "--load-bandwidth"),
        (["--trace", "T", "--duration", "0.1"], "--duration 0.1: no request comes before the shift"),
        (["--trace", "T", "--half-life", "0s"], "--half-life 0s: must be greater than 0s"),
        (
            ["--trace", "T", "--shift-at", "200"],
            "--shift-at 200: must be greater than 0 and less than the duration of 150",
        ),
        (["--trace", "T", "--staging-memory", "4"], "--staging-memory"),
        (["--trace", "T", "--plot", "absent/s.png"], "--plot absent/s.png: its folder does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(trace, arguments, message, capsys):
    assert main(["bench", "shift", *(trace if part == "T" else part for part in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_users_turn_to_the_next_domain(trace):
    arrivals = Arrivals(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 2, 0, 2]), *np.ones((2, 4), np.int64))
    requests = shifted(Trace.load(trace), arrivals, 2.0)
    assert [(r.server, r.arrival_s, r.label) for r in requests] == [(0, 0, "x"), (2, 1, "z"), (0, 2, "y"), (2, 3, "x")]


def test_a_ratio_recovers_with_two_windows_in_a_row():
    ratios = [9, 9, 3, 9, 5, 9, 9]  # of 10, from 0 s; users change at 10 s
    windows = [(5.0 * number, ratio, 10 - ratio) for number, ratio in enumerate(ratios)]
    assert recovered(windows, 10, 0.9) == 15
    assert recovered(windows[:-1], 10, 0.9) is None
    assert recovered(windows, 10, None) is None


def test_figures_are_of_all_servers():
    decision = {"verdict": "adopted", "copies": 3, "bytes": 30, "outcome": {"stage_s": 2.0, "copies_here": 2}}
    kept = {"verdict": "kept", "copies": 9, "bytes": 90, "outcome": None}
    one = {
        "requests": [[0, 1.0, 2.0, 0.1], [0, 12.0, 4.0, 0.3]],
        "windows": [[1, 8, 2], [2, 1, 9]],
        "decisions": [decision, kept],
    }
    other = {"requests": [[1, 11.0, 8.0, 0.2]], "windows": [[2, 1, 9], [3, 0, 0]], "decisions": []}
    found = figures({"a": one, "b": other}, 10.0, 5.0)
    assert [found["latency"][key]["mean"] for key in ("before", "after")] == [2, 6]
    assert found["local_ratio"]["before"] == 0.8
    assert found["local_ratio"]["right_after"] == 0.1
    assert found["recovered_s"] is None
    assert (found["adopted"], found["kept"], found["copies"], found["staging_s"]) == (1, 1, 3, 2)
    assert found["copies_first_server"] == 2
    assert found["longest_gap_s"] == 0.3


def test_storage_gives_experts_at_its_rate():
    import threading
    import time

    storage = Storage(lambda layer, expert, arena: (layer, expert), 0.05)
    begin = time.monotonic()
    threads = [threading.Thread(target=storage, args=(0, expert)) for expert in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin >= 0.2


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_migration_follows_users(trace, tmp_path, capfd):
    plot = tmp_path / "s.png"
    given = ["--trace", trace, "--expert-bytes", "100000", "--duration", "16", "--gap", "0.5", "--interval", "1s"]
    given += ["--horizon", "60s", "--window", "1", "--chunk", "8", "--sequences", "2", "--plot", str(plot), "--json"]
    assert main(["bench", "shift", *given]) == 0
    found = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    without, migrating = found["without"], found["with"]
    assert [r[:2] for r in without["requests"]] == [r[:2] for r in migrating["requests"]]
    assert (without["adopted"], without["decisions"]) == (0, [])
    assert migrating["adopted"] >= 1
    assert migrating["copies"] > 0
    assert without["local_ratio"]["end"] < without["local_ratio"]["before"]
    assert migrating["local_ratio"]["end"] > without["local_ratio"]["end"]
    assert plot.stat().st_size > 5000
