"""Routing of requests: where one should enter, and that its answer is the same wherever it is served, also when one leaves."""

import asyncio
from contextlib import suppress

import numpy as np
import pytest

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.families import read_config
from launch.cluster.addresses import listen
from launch.cluster.async_framing import listen_at
from launch.engine.request import Request
from launch.http.book import Book
from launch.http.hand_over import PURPOSE, Hands, Takes
from launch.http.route import best_server, round_trips
from launch.serve.fits import Fits
from tests.launch.http.test_book import EOS, accept

SECRET = b"secret of the front doors"
CONFIG = read_config(bundled_model())


def test_fits_are_those_counted_one_by_one(rng):
    servers, layers, experts, k = 3, 4, 8, 2
    fits = Fits(layers, experts)
    counts = np.zeros((layers, experts), int)
    for _ in range(30):
        chosen = rng.integers(experts, size=(2, layers, k))
        fits.add([(Request(1, [1], 4, 0.0, "code"), chosen), (Request(1, [1], 4, 0.0), chosen)])
        for token in chosen:
            for layer, calls in enumerate(token):
                for expert in calls:
                    counts[layer, expert] += 1
    serving = rng.integers(servers, size=(servers, layers, experts))
    found = fits.report(serving, k)
    assert found.keys() == {"code"}  # those without a label are nobody's
    for server, layers_left in enumerate(found["code"]):
        expected = 0.0
        for layer in range(layers):
            local = sum(counts[layer, e] for e in range(experts) if serving[server, layer, e] == server)
            expected += 1 - (local / counts[layer].sum()) ** k
        assert layers_left == pytest.approx(expected, abs=1e-3)


def test_little_seen_and_long_unseen_labels_say_nothing(rng):
    fits = Fits(1, 4)
    serving = np.zeros((2, 1, 4), int)
    few = rng.integers(4, size=(47, 1, 2))
    fits.add([(Request(0, [1], 4, 0.0, "a"), few)])
    assert fits.report(serving, 2) == {}
    fits.add([(Request(0, [1], 4, 0.0, "a"), few[:1])])
    assert fits.report(serving, 2)["a"] == [0.0, 1.0]
    for number in range(300):
        fits.add([(Request(0, [1], 4, 0.0, f"user {number}"), few)])
    assert "a" not in fits.report(serving, 2)


def test_a_request_goes_where_what_it_saves_is_more_than_the_way():
    latency = np.array([[0, 1, 5], [1, 0, 5], [5, 5, 0]]) * 1e-3
    trips = round_trips(latency)

    def best(fits: list[float], own: int, tokens: int, allowed: tuple[int, ...] = (0, 1, 2)) -> int:
        return best_server(np.array(fits), trips, own, list(allowed), tokens)

    assert best([3.0, 0.0, 3.0], 0, 100) == 1
    assert best([3.0, 0.0, 3.0], 0, 100, (0, 2)) == 0  # its front door is not known
    assert best([3.0, 2.9, 3.0], 0, 1) == 0  # the way is longer than what one token saves
    assert best([3.0, 3.0, 3.0], 1, 100) == 1
    assert best([0.2, 0.0, 0.0], 0, 1000) == 1


class Worker:
    """Stands for a supervisor: gives each request that the book sends it its tokens, the place in the answer each."""

    def __init__(self, book: Book, most: int = 10**6) -> None:
        self._book, self._most, self.served = book, most, []

    def check_hope(self) -> None:
        pass

    def flush(self) -> None:
        for given in self._book.unsent():
            self.served.append({**given, "output": list(given["output"])})
            last = min(given["max_tokens"], len(given["output"]) + self._most)
            for place in range(len(given["output"]), last):
                asyncio.get_running_loop().call_soon(self._book.take, given["id"], [97 + place])


def handed_over(there_gives: int) -> tuple[str, Worker, Worker]:
    """Text of a request of six tokens whose front door hands it to one that gives so many; both workers."""

    async def run() -> tuple[str, Worker, Worker]:
        here, there = Book(8, 100, EOS), Book(8, 100, EOS)
        own, other = Worker(here), Worker(there, there_gives)
        takes = Takes(there, other, CONFIG, 1)
        with listen("127.0.0.1", 0, "test") as listening:
            listening.listen(8)
            port = listening.getsockname()[1]
            async with await listen_at(listening, SECRET, PURPOSE, takes.take):
                hands = Hands(here, SECRET, own.flush)
                accepted = accept(here, 6)
                hands.hand(accepted, f"127.0.0.1:{port}")
                own.flush()
                assert own.served == []  # it is away
                while len(accepted.tokens) < min(6, there_gives):
                    await asyncio.sleep(0.01)
                if there_gives < 6:
                    for one in there:
                        there.fail(one.number, 500, "the worker there has ended")
                await accepted.end()
                await asyncio.sleep(0.05)
                assert len(here) == len(there) == 0
                return accepted.text.text, own, other

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_a_request_is_served_there_with_the_same_answer():
    text, own, other = handed_over(6)
    assert text == "abcdef"
    assert own.served == []
    assert (other.served[0]["prompt"], other.served[0]["params"]["seed"]) == ([65, 66], 9)


def test_what_is_not_answered_there_goes_on_here():
    text, own, other = handed_over(2)
    assert text == "abcdef"
    assert [given["output"] for given in own.served] == [[97, 98]]


def test_a_front_door_that_cannot_be_reached_or_has_another_secret_takes_nothing():
    async def run(secret: bytes) -> tuple[str, int]:
        here = Book(8, 100, EOS)
        own = Worker(here)
        with listen("127.0.0.1", 0, "test") as listening:
            listening.listen(8)
            port = listening.getsockname()[1]
            async with await listen_at(listening, SECRET, PURPOSE, Takes(here, own, CONFIG, 0).take):
                accepted = accept(here, 3)
                Hands(here, secret, own.flush).hand(accepted, f"127.0.0.1:{port if secret != SECRET else 1}")
                await accepted.end()
                return accepted.text.text, here.returned

    for secret in (SECRET, b"another secret of front doors"):
        assert asyncio.run(asyncio.wait_for(run(secret), 30)) == ("abc", 1)


def test_a_client_that_leaves_ends_it_there_too():
    async def run() -> int:
        here, there = Book(8, 100, EOS), Book(8, 100, EOS)
        own, other = Worker(here), Worker(there, 1)
        with listen("127.0.0.1", 0, "test") as listening:
            listening.listen(8)
            port = listening.getsockname()[1]
            async with await listen_at(listening, SECRET, PURPOSE, Takes(there, other, CONFIG, 0).take):
                accepted = accept(here, 6)
                Hands(here, SECRET, own.flush).hand(accepted, f"127.0.0.1:{port}")
                while not accepted.tokens:
                    await asyncio.sleep(0.01)
                here.fail(accepted.number, 499, "the client has gone")
                with suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        while len(there):
                            await asyncio.sleep(0.01)
                return len(there)

    assert asyncio.run(asyncio.wait_for(run(), 30)) == 0
