"""Profile: round trips, and every malformed array or file is one clear line."""

import io
import json

import numpy as np
import pytest

from placement import Cluster, InputError, Problem, Profile

META = {"model": "m", "top_k": 2, "experts": 4, "hidden_size": 8, "expert_bytes": 10}


def profile(**changes):
    fields = {"counts": np.arange(24).reshape(2, 3, 4), "servers": ("a", "b"), "model": "m", "top_k": 2}
    fields |= {"hidden_size": 8, "expert_bytes": (10, 20, 10), "reserved_bytes": 5, "window": "1h"} | changes
    return Profile(**fields)


def tokens(seed=0, count=50):
    rng = np.random.default_rng(seed)
    ids = rng.random((count, 3, 4)).argsort(-1)[..., :2]
    return {"ids": ids, "server": rng.integers(0, 2, count), "sequence": np.arange(count) // 5}


def write(path, **changes):
    arrays = {"counts": np.ones((2, 3, 4), np.int64), "servers": np.array(["a", "b"])}
    arrays["meta"] = np.array(json.dumps(META))
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def refusal(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("changes", [{}, tokens(), {"counts": np.full((2, 3, 4), 0.5)}, {"reserved_bytes": (1, 2)}])
def test_round_trip(tmp_path, changes):
    before = profile(**changes)
    before.save(tmp_path / "p.npz")
    after = Profile.load(tmp_path / "p.npz")
    assert after.counts.dtype == before.counts.dtype
    for key in ("counts", "ids", "server", "sequence"):
        assert np.array_equal(getattr(after, key), getattr(before, key))
    for key in ("servers", "model", "top_k", "hidden_size", "expert_bytes", "reserved_bytes", "window"):
        assert getattr(after, key) == getattr(before, key)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.npz"]


def test_saved_file_is_what_the_contract_says(tmp_path):
    profile(expert_bytes=10).save(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == ["counts", "meta", "servers"]
        assert archive["counts"].dtype == np.int64
        assert archive["servers"].tolist() == ["a", "b"]
        assert json.loads(str(archive["meta"])) == META | {"reserved_bytes": 5, "window": "1h"}


def test_from_tokens_counts_by_source():
    t = tokens()
    made = Profile.from_tokens(**t, servers=["a", "b"], experts=4, model="m", hidden_size=8, expert_bytes=10)
    expected = np.zeros((2, 3, 4), np.int64)
    for row, server in zip(t["ids"], t["server"], strict=True):
        for layer, chosen in enumerate(row):
            expected[server, layer, chosen] += 1
    assert (made.counts == expected).all()
    assert made.top_k == 2


def test_defaults_and_narrow_types(tmp_path):
    loaded = Profile.load(write(tmp_path / "p.npz", counts=np.ones((2, 3, 4), np.uint8)))
    assert loaded.counts.dtype == np.int64
    assert (loaded.reserved_bytes, loaded.window, loaded.expert_bytes) == (0, None, (10, 10, 10))


ONES = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.ones((3, 4))}, "counts has shape (3, 4); must be [servers, layers, experts]"),
        ({"counts": np.ones((2, 0, 4))}, "counts has shape (2, 0, 4)"),
        ({"counts": np.where(np.arange(4) == 2, np.nan, ONES)}, "counts[0, 0, 2] = nan"),
        ({"counts": ONES * np.inf}, "counts[0, 0, 0] = inf"),
        ({"counts": -ONES.astype(int)}, "counts[0, 0, 0] = -1: must be a finite number from 0"),
        ({"counts": ONES * 2**60}, "from 0 to 2**53"),
        ({"counts": ONES > 0}, "counts has type bool"),
        ({"counts": ONES.astype("U")}, "counts has type <U"),
        ({"counts": np.ones((3, 3, 4))}, "servers = ('a', 'b'): must be 3 different names"),
        ({"counts": np.ones((2, 3, 5))}, "meta.experts = 4: counts has 5 experts"),
        ({"servers": np.array(["a", "a"])}, "must be 2 different names"),
        ({"servers": np.array([1, 2])}, "servers has type int64"),
        ({"counts": None}, "counts: missing"),
        ({"servers": None}, "servers: missing"),
        ({"meta": np.array("{")}, "meta: not valid JSON"),
        ({"meta": np.array("[1]")}, "meta = [1]: must be an object"),
        ({"ids": tokens()["ids"]}, "server: missing; the token level needs ids, server, sequence"),
        (tokens() | {"ids": tokens()["ids"] + 3}, "must be from 0 to 3"),
        (tokens() | {"ids": tokens()["ids"] * 0}, "names an expert twice"),
        (tokens() | {"ids": tokens()["ids"] * 1.0}, "ids has type float64"),
        (tokens() | {"ids": tokens()["ids"][:, :2]}, "ids has shape (50, 2, 2); must be (50, 3, 2)"),
        (tokens() | {"server": tokens()["server"] + 1}, "server has the value 2; must be from 0 to 1"),
        (tokens() | {"sequence": np.zeros(3, int)}, "sequence has shape (3,)"),
    ],
)
def test_bad_arrays(tmp_path, changes, message):
    text = refusal(Profile.load, write(tmp_path / "p.npz", **changes))
    assert message in text
    assert text.startswith(str(tmp_path / "p.npz"))


@pytest.mark.parametrize("key", sorted(META))
def test_missing_meta(tmp_path, key):
    meta = json.dumps({k: v for k, v in META.items() if k != key})
    assert f"meta.{key}: missing" in refusal(Profile.load, write(tmp_path / "p.npz", meta=np.array(meta)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("top_k", 5, "meta.top_k = 5: must be an integer from 1 to 4"),
        ("top_k", 0, "meta.top_k = 0"),
        ("top_k", True, "meta.top_k = True"),
        ("hidden_size", "8", "meta.hidden_size = '8'"),
        ("model", 3, "meta.model = 3"),
        ("experts", 5, "meta.experts = 5: counts has 4"),
        ("expert_bytes", 0, "meta.expert_bytes = 0"),
        ("expert_bytes", 1.5, "meta.expert_bytes = 1.5"),
        ("expert_bytes", None, "meta.expert_bytes = None"),
        ("expert_bytes", [1, 2], "meta.expert_bytes: 2 sizes for 3 layers"),
        ("expert_bytes", [1, 2, -3], "meta.expert_bytes = -3"),
        ("reserved_bytes", -1, "meta.reserved_bytes = -1"),
        ("reserved_bytes", "1GB", "meta.reserved_bytes = '1GB'"),
    ],
)
def test_bad_meta(tmp_path, key, value, message):
    meta = np.array(json.dumps(META | {key: value}))
    assert message in refusal(Profile.load, write(tmp_path / "p.npz", meta=meta))


def test_truncated_at_every_length(tmp_path):
    profile(**tokens()).save(tmp_path / "p.npz")
    data = (tmp_path / "p.npz").read_bytes()
    for keep in range(0, len(data) - 1, 7):
        (tmp_path / "cut.npz").write_bytes(data[:keep])
        text = refusal(Profile.load, tmp_path / "cut.npz")
        assert "truncated or damaged" in text or "not a .npz" in text


def test_damaged_bytes_never_crash(tmp_path):
    profile(**tokens()).save(tmp_path / "p.npz")
    data = bytearray((tmp_path / "p.npz").read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 150):
        damaged = data.copy()
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            Profile.load(tmp_path / "bad.npz")
        except InputError as error:
            assert "\n" not in str(error)


def test_pickles_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, counts=np.array([{}], object))
    (tmp_path / "p.npz").write_bytes(buffer.getvalue())
    assert "holds pickled objects" in refusal(Profile.load, tmp_path / "p.npz")


def test_profile_and_cluster_must_agree():
    def cluster(*names):
        return Cluster.from_dict({"server": [{"name": name, "devices": [{"memory": 10}]} for name in names]})

    assert "both must name the same servers" in refusal(Problem.build, profile(), cluster("b", "a"))
    assert "both must name the same servers" in refusal(Problem.build, profile(), cluster("a"))
    assert "3 entries" in refusal(Problem.build, profile(reserved_bytes=(1, 2, 3)), cluster("a", "b"))
    text = refusal(Problem.build, profile(reserved_bytes=(0, 13)), cluster("a", "b"))
    assert "b device 0: memory of 10 bytes is 3 bytes less than" in text


def test_frequency_keeps_the_weight_of_each_server():
    cluster = Cluster.from_dict({"server": [{"name": name, "devices": [{"memory": 99}]} for name in "ab"]})
    counts = np.zeros((2, 3, 4))
    counts[0, :, 0], counts[1, :, 1] = 3, 1
    problem = Problem.build(profile(counts=counts), cluster)
    assert np.allclose(problem.frequency.sum((0, 2)), 1)
    assert np.allclose(problem.frequency.sum((1, 2)), [2.25, 0.75])


def test_demand_of_a_silent_server_is_the_others():
    cluster = Cluster.from_dict({"server": [{"name": name, "devices": [{"memory": 99}]} for name in "ab"]})
    counts = np.zeros((2, 3, 4))
    counts[0, 0] = [1, 3, 0, 0]
    demand = Problem.build(profile(counts=counts), cluster).demand
    assert np.allclose(demand[1, 0], [0.25, 0.75, 0, 0])
    assert np.allclose(demand[:, 1:], 0.25)
