"""`bench requests`: what came of a load, and what cannot be sent."""

import argparse
import json
import math

import numpy as np
import pytest

from launch.__main__ import main
from launch.bench.requests import _prompts, summary
from launch.bench.requests_picture import draw_requests
from launch.bench.sent_request import Sent
from placement import InputError
from placement.data.arrivals import Arrivals


def test_the_summary_counts_what_was_answered_and_what_was_good():
    sent = [
        Sent(0.1, 0.5, 5, 200),
        Sent(0.2, 2.2, 5, 200),
        Sent(3.0, 3.4, 5, 200),
        Sent(status=429),
        Sent(0.1, 0.2, 2, 200, "gone"),
    ]
    found = summary(sent, 10.0, first=1.0, each=0.1)
    assert (found["requests"], found["answered"], found["statuses"]) == (5, 3, {"200": 4, "429": 1})
    assert found["goodput_per_s"] == 0.1  # one is slow between tokens, one at the first
    assert found["tokens_per_s"] == 1.5
    assert found["first_s"]["p50"] == 0.2
    assert found["each_s"]["p50"] == pytest.approx(0.1)
    assert found["errors"] == {"gone": 1}
    one = summary([Sent(0.1, 0.1, 1, 200)], 1.0, 1.0, 0.1)
    assert one["each_s"] is None
    assert one["goodput_per_s"] == 1.0
    assert math.isnan(Sent().first)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["http://127.0.0.1:9"], "lists no models"),
        (["nonsense://x"], "lists no models"),
        (["http://127.0.0.1:9", "--rate", "0"], "--rate 0.0: must be greater than 0"),
        (["http://127.0.0.1:9", "--arrivals", "absent.csv"], "absent.csv"),
        (["http://127.0.0.1:9", "--picture", "x.jpg"], "--picture x.jpg: give a name that ends with .png or .svg"),
        (["http://127.0.0.1:9", "--picture", "absent/x.png"], "there is no folder absent"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_a_line(flags, words, capsys):
    assert main(["bench", "requests", *flags]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn_whatever_came_of_the_load(tmp_path, suffix):
    for number, sent in enumerate(
        (
            [Sent(0.1, 0.5, 5, 200, due=1.0), Sent(0.2, 2.2, 5, 200, due=2.0), Sent(status=429, due=3.0)],
            [Sent(status=429, due=3.0)],
            [Sent(0.1, 0.1, 1, 200)],
        )
    ):
        file = tmp_path / f"{number}.{suffix}"
        draw_requests(sent, "a load", file)
        assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_a_server_that_refuses_all_is_status_1(capsys, monkeypatch):
    async def refused(args, arrivals):
        return [Sent(status=429) for _ in arrivals.seconds], 1.0

    monkeypatch.setattr("launch.bench.requests._send_all", refused)
    assert main(["bench", "requests", "http://x", "--rate", "30", "--duration", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["statuses"] == {"429": found["requests"]}
    assert 15 < found["requests"] < 50


def test_prompts_are_a_domains_text_or_random_tokens():
    sizes = np.array([40, 20, 33])
    arrivals = Arrivals(np.arange(3.0), np.zeros(3, int), sizes, sizes)

    def made(domain: str | None) -> list:
        return _prompts(argparse.Namespace(domain=domain, seed=0), arrivals, np.random.default_rng(0))

    sums = made("arithmetic")
    assert all(len(prompt) <= size and prompt.endswith(" =") for prompt, size in zip(sums, sizes, strict=True))
    assert [len(prompt) for prompt in made(None)] == sizes.tolist()
    with pytest.raises(InputError, match="--domain poems: known are code, prose, arithmetic"):
        made("poems")
