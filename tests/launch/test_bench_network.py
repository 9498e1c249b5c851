"""`python -m launch bench exchange`, `testbed` and `scaling` on small inputs: what they say adds up."""

import json

import numpy as np
import pytest

from launch.__main__ import main
from launch.bench.harness.namespaces import missing

on_testbed = pytest.mark.skipif(missing() is not None, reason=str(missing()))


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


@on_testbed
@pytest.mark.slow
def test_requests_of_a_trace_are_served_by_every_plan(trace, capfd):
    given = ["--trace", trace, "--hidden-size", "64", "--expert-bytes", "1000", "--duration", "30", "--rounds", "2"]
    given += ["--strategies", "uniform,latency", "--fixed", "latency", "--chunk", "8", "--sequences", "2", "--json"]
    assert main(["bench", "testbed", *given]) == 0
    found = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    uniform, latency, fixed = found["rows"]
    assert (uniform["strategy"], latency["transport"], fixed["transport"]) == ("uniform", "pairs", "fixed")
    assert uniform["requests"] == latency["requests"] == fixed["requests"] > 2
    for row in found["rows"]:
        assert row["mean"] == pytest.approx(row["compute"] + row["network"] + row["waiting"])
        assert row["sent_bytes"] >= row["least_bytes"]
    for row in (uniform, latency):
        told = row["predicted"]
        assert told["mean"] == pytest.approx(told["compute"] + told["network"] + told["waiting"])
        assert told["compute"] > 0
    assert uniform["predicted"]["network"] > latency["predicted"]["network"]
    assert "predicted" not in fixed
    assert latency["remote"] == pytest.approx(fixed["remote"])
    assert latency["remote"] < uniform["remote"]
    assert latency["least_bytes"] < uniform["least_bytes"]


@pytest.mark.slow  # two minutes where other tests run beside it
@on_testbed
def test_an_exchange_sends_what_is_needed(trace, capfd):
    given = ["--trace", trace, "--hidden-size", "2048", "--steps", "3", "--rounds", "1", "--json"]
    assert main(["bench", "exchange", *given]) == 0
    rows = json.loads(capfd.readouterr().out.strip().splitlines()[-1])["rows"]
    by = {(row["placement"], row["case"], row["transport"]): row for row in rows}
    prefill = by["apart", "prefill, 3 servers", "pairs"]
    assert 1 < prefill["ratio"] < 1.25
    assert by["apart", "prefill, 1 server", "fixed"]["ratio"] > 3
    # What all tell each other in every step, and nothing for its layers.
    assert by["home", "prefill, 3 servers", "pairs"]["sent_bytes"] < 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["testbed", "--trace", "absent.npz"], "absent.npz"),
        (["testbed", "--trace", "T", "--strategies", "best"], "--strategies: 'best' is unknown"),
        (["testbed", "--trace", "T", "--rounds", "0"], "--rounds 0: must be greater than 0"),
        (["exchange", "--trace", "T", "--rate", "fast"], "--rate"),
        (["scaling", "--repeats", "0"], "--repeats 0: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(trace, arguments, message, capsys):
    assert main(["bench", *(trace if part == "T" else part for part in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_grows_with_layers(tmp_path, capsys):
    assert main(["bench", "scaling", "--repeats", "5", "--json", "--plot", str(tmp_path / "s.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    rows, local = found["steps"], found["local_layers"]
    # Beside other work the two are not the same to a percent; an exchange would take far longer.
    assert 0.5 < local["dispatched_s"] / local["alone_s"] < 1.5
    layers = {row["number"]: row["seconds"] for row in rows if row["of"] == "layers"}
    assert layers[32] > 2 * layers[4]
    assert (tmp_path / "s.png").stat().st_size > 5000
