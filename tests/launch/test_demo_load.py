"""The demo's load: what was asked for, else half of what the machine answered."""

import pytest

from dancemoe_jax import bundled_model
from dancemoe_jax.checkpoint.families import read_config
from launch.cluster.example import demo_cluster
from launch.demo.figures import Figures
from launch.demo.server import FULL


@pytest.fixture
def figures():
    config, lines = read_config(bundled_model()), []
    found = Figures(
        config,
        demo_cluster(config, 16_000_000),
        "tiny-moe",
        0,
        capacity=[1] * 4,
        reserved=16_000_000,
        uniform=None,  # pyright: ignore
        decode=str,
        show=print,
        say=lines.append,
        loading_s=0.0,
    )
    return found, lines


def test_half_of_what_the_slowest_process_answers(figures):
    found, lines = figures
    # Three servers' requests in 6 s, the last server's process being the slowest.
    rate = found.load(0.0, [4.0, 5.0, 6.0])
    assert rate == pytest.approx(0.5 * FULL / 6)
    assert found.holds == pytest.approx(3 * FULL / 6)
    assert lines == [f"this machine answers 4.0 requests a second; {rate:.2f} arrive at each server"]


def test_a_machine_that_answers_next_to_nothing_still_gets_requests(figures):
    found, _ = figures
    assert found.load(0.0, [240.0]) == 0.3
    assert found.holds == pytest.approx(0.1)


def test_a_rate_that_was_given_is_kept(figures):
    found, lines = figures
    assert found.load(1.5, [None, None, None]) == 1.5
    assert (found.rate, found.holds, lines) == (1.5, None, [])
