"""Samples of tokens: what is kept, by age; and on their way to the one that plans."""

import time

import numpy as np
import pytest

from launch.channel import OwnChannel
from launch.sampled import Sampler, gather_sample, tell

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


def test_a_token_counts_half_after_a_half_life(rng, monkeypatch):
    """Of 20,000 tokens, half of them a half-life older, 1,024 are kept: nearly as if drawn with replacement."""
    sampler, now = Sampler(SHAPE, 10.0), time.time()
    for age in (10.0, 0.0):
        monkeypatch.setattr(time, "time", lambda age=age: now - age)
        for _ in range(10):
            sampler.add(0, tokens(rng, 1000))
    sample = sampler.take()
    assert len(sample.ids) == 1024
    assert (sample.at == now).mean() == pytest.approx(2 / 3, abs=0.06)


def test_tokens_are_forgotten_where_there_is_room_for_all(rng, monkeypatch):
    sampler, now = Sampler(SHAPE, 10.0), time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    sampler.add(0, tokens(rng, 900))
    assert len(sampler.take().ids) == 900
    monkeypatch.setattr(time, "time", lambda: now + 10)
    assert len(sampler.take().ids) == pytest.approx(450, abs=75)  # five deviations
    monkeypatch.setattr(time, "time", lambda: now + 500)
    assert len(sampler.take().ids) == 0


def test_large_models_keep_fewer(rng):
    sampler = Sampler((61, 256, 8), 60.0)
    sampler.add(0, rng.random((2000, 61, 256)).argsort(-1)[..., :8])
    assert sampler.take().ids.nbytes <= 2**18
