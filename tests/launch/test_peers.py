"""Experts from another server: the same bytes, over one connection or several, and what happens when it fails."""

import logging
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from dancemoe_jax import ModelError, bundled_model
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.model.experts import ExpertWeights, quantize
from launch.__main__ import main
from launch.bench.harness.namespaces import Testbed, inside, missing
from launch.migration.peers import ExpertServer, OwnModel, PeerReader, quickest
from placement import Cluster

SECRET = b"known to the servers of these tests"


def cluster(loads, bandwidth="500Mbps"):
    servers = [{"name": f"s{i}", "devices": [{"memory": 1, "load_bandwidth": load}]} for i, load in enumerate(loads)]
    return Cluster.from_dict({"server": servers, "network": {"bandwidth": bandwidth, "latency": "1ms"}}, source="test")


@pytest.mark.parametrize(
    ("loads", "bandwidth", "expected"),
    [
        (["2GB/s", "1GB/s", "2GB/s"], "500Mbps", 1),  # the link is slower than any disk
        (["2GB/s", "10MB/s", "3GB/s"], "500Mbps", 0),  # 62.5 MB/s over either link
        (["40MB/s", "10MB/s", "50MB/s"], "500Mbps", 2),
        (["10MB/s", "10MB/s", "10MB/s"], "10Gbps", 1),
    ],
)
def test_another_server_is_asked_where_its_disk_and_the_link_are_faster(loads, bandwidth, expected):
    assert quickest(cluster(loads, bandwidth), 1) == expected


def weights(layer, expert, arena=None):
    rng = np.random.default_rng([layer, expert])
    plain = ExpertWeights(rng.normal(size=(60, 40)).astype(np.float32), rng.normal(size=(40, 30)).astype(np.float32))
    if layer == 1:
        plain = quantize(plain)
    if layer == 2:
        plain = ExpertWeights(*(w.astype(ml_dtypes.bfloat16) for w in plain[:2]))
    return plain


def refuse(layer, expert, arena=None):
    raise ModelError(f"expert {expert} of layer {layer} is damaged")


def test_experts_arrive_as_they_are_and_failures_fall_back():
    def read(layer, expert, arena):
        return refuse(layer, expert) if expert == 3 else weights(layer, expert)

    server, own = ExpertServer(read, "127.0.0.1", SECRET), []

    def from_own(layer, expert, arena):
        own.append((layer, expert))
        return weights(layer, expert)

    reader = PeerReader(server.address, OwnModel(from_own), SECRET)
    for layer in range(3):
        for expert in range(5):
            got, expected = reader(layer, expert), weights(layer, expert)
            for there, here in zip(got, expected, strict=True):
                if here is None:
                    assert there is None
                else:
                    assert there.dtype == here.dtype
                    np.testing.assert_array_equal(there, here)
    assert own == [(0, 3), (1, 3), (2, 3)]
    reader.close()
    server.close()
    assert PeerReader(server.address, OwnModel(weights), SECRET)(0, 1).w_in.shape == (60, 40)
    with pytest.raises(ModelError, match="expert 1 of layer 0 is damaged"):
        PeerReader(server.address, OwnModel(refuse), SECRET)(0, 1)


@pytest.fixture
def said():
    """What the reader of experts logs, whatever commands make of the log."""
    lines, logger = [], logging.getLogger("launch.migration.peers")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def sevens(weights):
    return jax.tree.map(lambda a: np.full_like(a, 7), weights)


def transposed(weights):
    return jax.tree.map(lambda a: a.T.copy(), weights)


def rounded(weights):
    return jax.tree.map(lambda a: a.astype(np.float16), weights)


@pytest.mark.parametrize("kind", ["store", "directory", "int8"])
@pytest.mark.parametrize("change", [sevens, transposed, rounded])
def test_experts_of_another_model_are_refused_in_one_line_and_read_here(kind, change, tmp_path, said):
    path = bundled_model()
    if kind == "store":
        path = tmp_path / "store"
        assert main(["convert", str(bundled_model()), str(path), "--dtype", "float32"]) == 0
    file = ExpertFile(path, int8=kind == "int8")
    server = ExpertServer(lambda *at: change(file.read(*at)), "127.0.0.1", SECRET, "f")
    reader = PeerReader(server.address, OwnModel(file.read, "f", file.check), SECRET, "edge-b")
    for expert in range(3):
        jax.tree.map(np.testing.assert_array_equal, reader(0, expert), file.read(0, expert))
    (line,) = said
    assert "edge-b" in line
    assert re.search("expert [0-2] of MoE layer 0 has other", line)  # the first that came in time
    assert "\n" not in line
    reader.close()
    server.close()


def test_a_store_notices_one_flipped_bit_of_any_expert(tmp_path, said):
    path = tmp_path / "store"
    assert main(["convert", str(bundled_model()), str(path), "--dtype", "bfloat16"]) == 0
    file = ExpertFile(path, ml_dtypes.bfloat16)

    def flipped(layer, expert, arena):
        found = file.read(layer, expert)
        if expert == 5:
            found.w_out.view(np.uint16)[3, 3] ^= 1
        return found

    server = ExpertServer(flipped, "127.0.0.1", SECRET, "f")
    reader = PeerReader(server.address, OwnModel(file.read, "f", file.check), SECRET, "edge-b")
    for expert in range(8):
        jax.tree.map(np.testing.assert_array_equal, reader(0, expert), file.read(0, expert))
    (line,) = said
    assert "expert 5 of MoE layer 0 has other numbers" in line
    reader.close()
    server.close()


def test_a_peer_with_another_fingerprint_is_refused_and_one_with_the_same_model_is_not(said):
    file, own = ExpertFile(bundled_model()), []

    def from_own(layer, expert, arena):
        own.append(expert)
        return file.read(layer, expert, arena)

    for fingerprint, count in (("f", 0), ("g", 3)):
        server = ExpertServer(file.read, "127.0.0.1", SECRET, fingerprint)
        reader = PeerReader(server.address, OwnModel(from_own, "f", file.check), SECRET, "edge-b")
        for expert in range(3):
            jax.tree.map(np.testing.assert_array_equal, reader(1, expert), file.read(1, expert))
        assert len(own) == count
        reader.close()
        server.close()
    (line,) = said
    assert "its fingerprint differs" in line


ANSWER = """
import sys, time, numpy as np
from dancemoe_jax.model.experts import ExpertWeights
from launch.migration.peers import ExpertServer
weights = ExpertWeights(np.ones((1536, 1024), np.float32), np.ones((1024, 768), np.float32))
print(ExpertServer(lambda layer, expert, arena: weights, sys.argv[1], b'secret').address[1], flush=True)
time.sleep(600)
"""
ASK = """
import sys, time
from dancemoe_jax.expert_parallel.pool import read_ahead
from launch.migration.peers import OwnModel, PeerReader
host, port, experts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def own(layer, expert, arena):
    raise SystemExit("not from there")
reader = PeerReader((host, port), OwnModel(own), b'secret')
reader(0, 0)
begin, size = time.monotonic(), 0
for weights in read_ahead(reader, [(0, expert) for expert in range(experts)], threads=2):
    size += weights.w_in.nbytes + weights.w_out.nbytes
print(8 * size / (time.monotonic() - begin))
"""


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_staging_from_another_server_fills_the_link():
    with Testbed(["edge-a", "edge-b"], 500e6) as bed:
        here, there = (inside(bed.namespaces[name]) for name in ("edge-a", "edge-b"))
        answering = [*there, sys.executable, "-c", ANSWER, bed.addresses["edge-b"]]
        with subprocess.Popen(answering, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                asking = [
                    *here,
                    sys.executable,
                    "-c",
                    ASK,
                    bed.addresses["edge-b"],
                    server.stdout.readline().strip(),
                    "20",
                ]
                staged = float(subprocess.run(asking, stdout=subprocess.PIPE, text=True, check=True).stdout)
                link, _ = bed.measure("edge-b", "edge-a", 50_000_000)
            finally:
                server.kill()
    print(f"staging {staged / 1e6:.0f} Mbit/s, one connection {link / 1e6:.0f} Mbit/s")
    assert staged >= 0.8 * link
