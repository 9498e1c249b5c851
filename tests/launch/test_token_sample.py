"""Samples of tokens: what is kept, by age; and on their way to the one that plans."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest

from launch.cluster.addresses import free_port
from launch.cluster.channel import OwnChannel
from launch.engine.token_sample import Sampler
from launch.migration.telemetry import Counted, gather, gather_sample, tell

SHAPE = (3, 8, 2)


def tokens(rng, count):
    return rng.random((count, 3, 8)).argsort(-1)[..., :2]


def test_few_tokens_are_all_kept_and_arrive(rng):
    channel, given = OwnChannel(), [tokens(rng, 5), tokens(rng, 7)]
    assert len(gather_sample(channel, 2, SHAPE).ids) == 0
    for process, ids in enumerate(given):
        sampler = Sampler(SHAPE, 60.0, process)
        sampler.add(process + 1, ids)
        tell(channel, process, sampler.take())
    sample = gather_sample(channel, 2, SHAPE)
    np.testing.assert_array_equal(sample.ids, np.concatenate(given))
    assert sample.server.tolist() == [1] * 5 + [2] * 7
    assert sample.ids.dtype == np.uint8
    assert (abs(sample.at - time.time()) < 60).all()


def test_what_has_been_told_is_found_however_slow_the_store_is(rng):
    """A look waits for no deadline that a busy machine would miss: what it does not find looks like users who have left."""

    class Slow(OwnChannel):
        def get(self, name, seconds):
            return super().get(name, seconds) if seconds > 0.5 else None

    channel, sampler = Slow(), Sampler(SHAPE, 60.0)
    sampler.add(0, tokens(rng, 5))
    tell(channel, 0, sampler.take())
    assert len(gather_sample(channel, 1, SHAPE).ids) == 5
    buffer = io.BytesIO()
    np.savez(buffer, counts=np.full((1, 3, 8), 4), steps=np.array([1, 2]), fed=np.array([3, 4]))
    channel.put("counted/0", buffer.getvalue())
    found = gather(channel, Counted(np.zeros((1, 3, 8), np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64)))
    assert found.counts.sum() == 96
    assert (found.steps.tolist(), found.fed.tolist()) == ([1, 2], [3, 4])


def test_a_store_says_what_is_there_now():
    program = """
import jax
jax.distributed.initialize(f"127.0.0.1:{PORT}", 1, 0)
from launch.cluster.channel import ClusterChannel
channel = ClusterChannel("test/")
assert channel.look("x") is None
channel.put("x", b"1")
channel.put("x", b"2" * 3_000_000)
assert channel.look("x") == b"2" * 3_000_000
channel.drop("x")
assert channel.look("x") is None
jax.distributed.shutdown()
"""
    program = program.replace("{PORT}", str(free_port()))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_token_counts_half_after_a_half_life(rng, monkeypatch):
    """Of 20,000 tokens, half of them a half-life older, 1,024 are kept: nearly as if drawn with replacement."""
    sampler, now = Sampler(SHAPE, 10.0), time.monotonic()
    for age in (10.0, 0.0):
        monkeypatch.setattr(time, "monotonic", lambda age=age: now - age)
        for _ in range(10):
            sampler.add(0, tokens(rng, 1000))
    sample = sampler.take()
    assert len(sample.ids) == 1024
    assert (sample.at > time.time() - 5).mean() == pytest.approx(2 / 3, abs=0.06)


def test_tokens_are_forgotten_where_there_is_room_for_all(rng, monkeypatch):
    sampler, now = Sampler(SHAPE, 10.0), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sampler.add(0, tokens(rng, 900))
    assert len(sampler.take().ids) == 900
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    assert len(sampler.take().ids) == pytest.approx(450, abs=75)  # five deviations
    monkeypatch.setattr(time, "monotonic", lambda: now + 500)
    assert len(sampler.take().ids) == 0


def test_a_clock_that_is_set_back_keeps_no_old_tokens(rng, monkeypatch):
    sampler, wall, now = Sampler(SHAPE, 10.0), time.time(), time.monotonic()
    sampler.add(0, tokens(rng, 900))
    monkeypatch.setattr(time, "time", lambda: wall - 3600)
    monkeypatch.setattr(time, "monotonic", lambda: now + 500)
    assert len(sampler.take().ids) == 0
    sampler.add(1, tokens(rng, 5))
    sample = sampler.take()
    assert sample.server.tolist() == [1] * 5
    assert (sample.at == wall - 3600).all()


def test_large_models_keep_fewer(rng):
    sampler = Sampler((61, 256, 8), 60.0)
    sampler.add(0, rng.random((2000, 61, 256)).argsort(-1)[..., :8])
    assert sampler.take().ids.nbytes <= 2**18
