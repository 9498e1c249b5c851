"""Cluster and Placement: what the files say is what the arrays say, and every wrong file is one clear line."""

import json

import numpy as np
import pytest

from placement import Cluster, InputError, Placement
from placement.units import parse_bytes, parse_rate, parse_seconds

CLUSTER = """
[[server]]
name = "edge-a"
host = "10.0.0.1"
devices = [{ memory = "12GB", load_bandwidth = "2GB/s" }]
[[server]]
name = "edge-b"
devices = [{ memory = "16GiB", speed = 2 }, { memory = 1000 }]
[[server]]
name = "edge-c"
devices = [{ memory = "0.5KB" }]
[network]
bandwidth = "500Mbps"
latency = "0.2ms"
[[link]]
from = "edge-a"
to = "edge-b"
bandwidth = "100MB/s"
[[link]]
from = "edge-b"
to = "edge-c"
latency = "5ms"
both = true
"""
ONE = '[[server]]\nname = "a"\ndevices = [{ memory = 5 }]\n'
TWO = ONE + '[[server]]\nname = "b"\ndevices = [{ memory = 5 }]\n'


def read(tmp_path, text):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return Cluster.from_toml(path)


def test_cluster_file(tmp_path):
    cluster = read(tmp_path, CLUSTER)
    assert cluster.names == ("edge-a", "edge-b", "edge-c")
    assert [server.host for server in cluster.servers] == ["10.0.0.1", None, None]
    assert cluster.memory.tolist() == [12 * 10**9, 16 * 2**30, 1000, 500]
    assert cluster.memory.dtype == np.int64
    assert cluster.device_server.tolist() == [0, 1, 1, 2]
    assert cluster.device_names == (("edge-a", 0), ("edge-b", 0), ("edge-b", 1), ("edge-c", 0))
    assert cluster.load_bandwidth.tolist() == [2e9, 1e9, 1e9, 1e9]
    assert cluster.speed.tolist() == [1, 2, 1, 1]
    usual, inf = 500e6 / 8, np.inf
    assert cluster.bandwidth.tolist() == [[inf, 100e6, usual], [usual, inf, usual], [usual, usual, inf]]
    assert cluster.latency.tolist() == [[0, 2e-4, 2e-4], [2e-4, 0, 5e-3], [2e-4, 5e-3, 0]]


def test_cluster_without_network_table():
    cluster = Cluster.from_dict({"server": [{"name": n, "devices": [{"memory": 1}]} for n in "ab"]})
    assert cluster.bandwidth[0, 1] == 125e6
    assert cluster.latency[0, 1] == 2e-4


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[(7, 7), ("7B", 7), ("1KB", 1000), ("1.5 MB", 1_500_000), ("2GB", 2 * 10**9), ("1TB", 10**12)],
        *[("1KiB", 1024), ("1MiB", 2**20), ("0.1GiB", 107374182), ("1TiB", 2**40), ("1e3B", 1000)],
    ],
)
def test_bytes(text, size):
    assert parse_bytes(text, "x") == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [("8bps", 1), ("1kbps", 125), ("500Mbps", 62.5e6), ("1Gbit/s", 125e6), ("2GB/s", 2e9), ("1MiB/s", 2**20)],
)
def test_rates(text, rate):
    assert parse_rate(text, "x") == rate


@pytest.mark.parametrize(("text", "seconds"), [("150us", 150e-6), ("0.2ms", 2e-4), ("1s", 1.0), ("0s", 0.0)])
def test_seconds(text, seconds):
    assert parse_seconds(text, "x") == seconds


BAD_CLUSTERS = [
    ("", "no server"),
    ("server = []", "no server"),
    ("[[server]\n", "not valid TOML"),
    ('[[server]]\nname = "a"', "server[0].devices = None"),
    ('[[server]]\nname = "a"\ndevices = []', "server[0].devices = []"),
    ("[[server]]\ndevices = [{ memory = 5 }]", "server[0].name = None"),
    ('[[server]]\nname = ""\ndevices = [{ memory = 5 }]', "server[0].name = ''"),
    ('[[server]]\nname = "a"\ndevices = [{}]', "devices[0].memory: missing"),
    ('[[server]]\nname = "a"\ndevices = [3]', "devices[0] = 3: must be a table"),
    (ONE.replace("5", '"12XB"'), "unknown unit 'XB'"),
    (ONE.replace("5", '"12"'), "needs a unit"),
    (ONE.replace("5", '"-1GB"'), "'-1GB': not a quantity >= 0"),
    (ONE.replace("5", "-5"), "= -5: must be at least 1 byte"),
    (ONE.replace("5", "0"), "= 0: must be at least 1 byte"),
    (ONE.replace("5", '"0.5B"'), "must be at least 1 byte"),
    (ONE.replace("5", "true"), "= True: needs a unit"),
    (ONE.replace("5", "1.5"), "= 1.5: needs a unit"),
    (ONE.replace("5", '"1e99GB"'), "must be at least 1 byte and below"),
    (ONE.replace("memory", "memroy"), "unknown key 'memroy'; known are load_bandwidth, memory, speed"),
    (ONE.replace("5", "5, speed = 0"), "speed = 0: must be a number greater than 0"),
    (ONE.replace("5", "5, speed = nan"), "speed = nan"),
    (ONE.replace("5", '5, load_bandwidth = "0GB/s"'), "must be greater than 0"),
    (ONE + "memory = 3", "unknown key 'memory'"),
    (ONE + ONE, "server[1].name = 'a': already used"),
    (TWO + '[network]\nbandwith = "1Gbps"', "network: unknown key 'bandwith'"),
    (TWO + "[network]\nbandwidth = 500", "network.bandwidth = 500: needs a unit"),
    (TWO + '[network]\nlatency = "1h"', "unknown unit 'h'; use one of us, ms, s"),
    (TWO + '[network]\nlatency = "-1ms"', "network.latency = '-1ms'"),
    (TWO + '[[link]]\nfrom = "a"\nto = "z"', "link[0].to = 'z': no such server; known are a, b"),
    (TWO + '[[link]]\nto = "b"', "link[0].from = None: no such server"),
    (TWO + '[[link]]\nfrom = ["a"]\nto = "b"', "link[0].from = ['a']: no such server"),
    (TWO + '[[link]]\nfrom = "a"\nto = "a"', "joins two different servers"),
    (TWO + '[[link]]\nfrom = "a"\nto = "b"\nboth = 1', "link[0].both = 1"),
    (TWO + '[[link]]\nfrom = "a"\nto = "b"\nboth = true\n[[link]]\nfrom = "b"\nto = "a"', "b to a is given twice"),
    (ONE.replace("5", "0x" + "f" * 4500), "memory = an integer of 18000 bits: must fit into 64 bits"),
    (
        ONE.replace("5", f"5, speed = {10**18}"),
        "speed = 1000000000000000000: must be a number greater than 0 and at most 1e+06",
    ),
    (ONE.replace("5", "5, speed = 1e-300"), "speed = 1e-300: must be at least 1e-06; 1.0 is the usual device"),
    (ONE.replace("5", "'" + "9" * 5000 + "GB'"), "not a quantity >= 0"),
    (TWO + '[network]\nbandwidth = "1e99Gbps"', "network.bandwidth = '1e99Gbps': no link or disk has this rate"),
    (TWO + '[network]\nbandwidth = "1e-9bps"', "network.bandwidth = '1e-9bps': no link or disk has this rate"),
    (TWO + '[network]\nlatency = "1e99s"', "network.latency = '1e99s': must be at most 1e+09 seconds"),
    (
        "".join(ONE.replace('"a"', f'"{i}"') for i in range(1025)),
        "1025 servers with 1025 devices; at most 1024 and 4096",
    ),
    ("servers = 3\n" + ONE, "unknown key 'servers'; known are link, network, server"),
    ("network = 3\n" + ONE, "network = 3: must be a table"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CLUSTERS)
def test_bad_cluster_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "cluster.toml"))
    assert "\n" not in str(caught.value)


def test_cluster_that_is_no_text(tmp_path):
    (tmp_path / "c").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid TOML"):
        Cluster.from_toml(tmp_path / "c")
    with pytest.raises(InputError, match="cannot be read"):
        Cluster.from_toml(tmp_path / "absent")


@pytest.fixture
def cluster(tmp_path):
    return read(tmp_path, TWO.replace("{ memory = 5 }", "{ memory = 40 }, { memory = 30 }", 1))


@pytest.fixture
def placement(cluster):
    resident = np.zeros((3, 2, 4), bool)
    resident[0, 0], resident[1, 1], resident[2, 0, 0] = True, True, True
    model = {"name": "m", "layers": 2, "experts": 4, "top_k": 2, "expert_bytes": [5, 2], "reserved_bytes": 0}
    return Placement(resident, cluster.device_names, "by hand", model, {"remote_share": 0.5})


def test_placement_file_round_trip(tmp_path, cluster, placement):
    path = tmp_path / "placement.json"
    placement.save(path)
    parsed = json.loads(path.read_text())
    assert list(parsed) == ["format", "model", "strategy", "devices", "predicted"]
    assert parsed["format"] == "dancemoe.placement/1"
    assert parsed["devices"][2] == {"server": "b", "device": 0, "experts": [[0], []]}
    again = Placement.load(path)
    assert (again.resident == placement.resident).all()
    assert (again.devices, again.strategy, again.model) == (placement.devices, "by hand", placement.model)
    assert again.predicted == {"remote_share": 0.5}
    assert again.used_bytes.tolist() == [20, 8, 5]
    again.validate(cluster)
    assert [entry.name for entry in tmp_path.glob("*placement*")] == ["placement.json"]  # no scratch file stays


def test_validate_counts_bytes(cluster, placement):
    placement.validate(cluster, [20, 22, 0])
    with pytest.raises(InputError, match=r"a device 0 is over its memory by 1 bytes: .*take 20, .*has 40 less 21"):
        placement.validate(cluster, [21, 22, 0])
    with pytest.raises(InputError, match="b device 0 is over its memory by 2 bytes"):
        placement.validate(cluster, 2)


def test_validate_uses_recorded_reserve(cluster, placement):
    placement.model["reserved_bytes"] = [0, 23, 0]
    with pytest.raises(InputError, match="a device 1 is over its memory by 1 bytes"):
        placement.validate(cluster)


def test_validate_names_lost_expert(cluster, placement):
    placement.resident[1, 1, 2:] = False
    with pytest.raises(InputError, match=r"layer 1 expert 2 is on no device \(and 1 more\)"):
        placement.validate(cluster)


def test_validate_other_cluster(tmp_path, placement):
    with pytest.raises(InputError, match=r"devices = 'a/0 a/1 b/0', but .* has 'a/0 b/0'"):
        placement.validate(read(tmp_path, TWO))


def change(path, value):
    def apply(parsed):
        *front, last = path
        for key in front:
            parsed = parsed[key]
        parsed[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other/1", "format = 'other/1': must be"),
        (["model"], None, "model = None"),
        (["model", "name"], 3, "model.name = 3"),
        (["model", "layers"], -1, "model.layers = -1"),
        (["model", "layers"], 10**9, "model.layers = 1000000000"),
        (["model", "top_k"], True, "model.top_k = True"),
        (["model", "expert_bytes"], [5], "model.expert_bytes = [5]"),
        (["model", "expert_bytes"], 0, "model.expert_bytes = 0"),
        (["model", "reserved_bytes"], [1, 2], "model.reserved_bytes: 2 entries for 3 devices"),
        (["model", "reserved_bytes"], -1, "model.reserved_bytes = -1"),
        (["strategy"], 1, "strategy = 1"),
        (["predicted"], [], "predicted = []"),
        (["devices"], [], "devices = []"),
        (["devices", 0], 7, "devices[0] = 7"),
        (["devices", 1, "device"], 0, "one is listed twice"),
        (["devices", 1, "device"], -1, "devices[1] = "),
        (["devices", 0, "experts"], [[0]], "devices[0].experts: 1 lists; must be 2 lists"),
        (["devices", 0, "experts", 1], [4], "devices[0].experts[1] = [4]: must list expert ids from 0 to 3"),
        (["devices", 0, "experts", 1], [-1], "must list expert ids"),
        (["devices", 0, "experts", 1], ["0"], "must list expert ids"),
        (["devices", 0, "experts", 1], [1, 1], "lists an expert twice"),
        (["devices", 0, "server"], "a\u2028b", "devices[0] = "),
    ],
)
def test_bad_placement_is_one_clear_line(tmp_path, placement, path, value, message):
    file = tmp_path / "placement.json"
    placement.save(file)
    parsed = json.loads(file.read_text())
    change(path, value)(parsed)
    file.write_text(json.dumps(parsed))
    with pytest.raises(InputError) as caught:
        Placement.load(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 30, 200])
def test_truncated_placement(tmp_path, placement, keep):
    file = tmp_path / "placement.json"
    placement.save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="not valid JSON, perhaps truncated"):
        Placement.load(file)


def test_save_refuses_what_is_no_file(tmp_path, placement):
    with pytest.raises(InputError, match="not a regular file"):
        placement.save(tmp_path)
    with pytest.raises(InputError, match="cannot be written: No such file"):
        placement.save(tmp_path / "absent" / "p.json")


def test_a_placement_that_claims_a_grid_beyond_memory(tmp_path, placement):
    file = tmp_path / "placement.json"
    placement.save(file)
    parsed = json.loads(file.read_text())
    parsed["model"] |= {"layers": 10**5, "experts": 10**5, "expert_bytes": 1}
    file.write_text(json.dumps(parsed))
    with pytest.raises(InputError, match=r"devices\[0\].experts: 2 lists; must be 100000 lists"):
        Placement.load(file)
    parsed["model"]["layers"] = 100
    parsed["devices"] = [{"server": "a", "device": i, "experts": [[]] * 100} for i in range(2)]
    file.write_text(json.dumps(parsed))
    with pytest.raises(InputError, match="2 x 100 x 100000 entries are more than 16777216"):
        Placement.load(file)


def test_figures_that_are_no_numbers_are_saved_as_null(tmp_path, placement):
    placement.predicted["gap"] = {"a": float("nan"), "b": [float("inf"), 1.5]}
    placement.save(tmp_path / "p.json")
    assert Placement.load(tmp_path / "p.json").predicted["gap"] == {"a": None, "b": [None, 1.5]}
