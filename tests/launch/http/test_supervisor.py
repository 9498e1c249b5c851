"""The supervisor with a worker that has no model: replaced when it ends or hangs, given up when it cannot serve."""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch.http.book import Book, Refused
from launch.http.supervisor import Supervisor
from tests.helpers.fake_worker import SECRET
from tests.helpers.paths import ROOT
from tests.launch.http.test_book import EOS, accept


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Makes a supervisor of a fake worker, its book, and the file that counts starts."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with tempfile.TemporaryDirectory() as folder:  # a socket's path is short

        def make(mode: str, **options) -> tuple[Supervisor, Book, Path]:
            starts = tmp_path / "starts"
            command = [sys.executable, "-m", "tests.helpers.fake_worker", mode, str(starts)]
            book = Book(8, 100, EOS)
            given = {"stuck": 60.0, "hold": 60.0, "deadline": 60.0} | options
            supervisor = Supervisor(command, Path(folder), SECRET, book, **given)
            book.cancel_in_worker = supervisor.cancel
            return supervisor, book, starts

        yield make


def started(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_an_answer_goes_on_in_the_next_worker_and_then_all_ends(begin):
    supervisor, book, starts = begin("once")

    async def run() -> int:
        running = asyncio.create_task(supervisor.run())
        answers = [accept(book, 6), accept(book, 1), accept(book, 4)]
        endings = [await accepted.end() for accepted in answers]
        assert {ending.reason for ending in endings} == {"length"}
        assert [accepted.text.text for accepted in answers] == ["abcdef", "a", "abcd"]
        supervisor.finish()
        return await running

    assert asyncio.run(asyncio.wait_for(run(), 60)) == 0
    assert (started(starts), supervisor.restarts) == (2, 1)


def test_a_worker_that_takes_no_step_is_replaced(begin):
    supervisor, book, starts = begin("mute", stuck=0.5)

    async def run() -> None:
        running = asyncio.create_task(supervisor.run())
        accepted = accept(book)
        while supervisor.restarts < 2:
            supervisor.flush()
            await asyncio.sleep(0.05)
        assert accepted.ending is None or accepted.ending.status == 500
        supervisor.end()
        await running

    asyncio.run(asyncio.wait_for(run(), 60))
    assert started(starts) >= 2


def test_a_worker_with_nothing_to_do_is_left_alone(begin):
    supervisor, _, starts = begin("mute", stuck=0.3)

    async def run() -> None:
        running = asyncio.create_task(supervisor.run())
        while not supervisor.serving:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)
        assert supervisor.serving
        supervisor.end()
        await running

    asyncio.run(asyncio.wait_for(run(), 60))
    assert started(starts) == 1


def test_what_cannot_be_served_is_given_up_with_its_status(begin):
    supervisor, _, starts = begin("refuse")
    assert asyncio.run(asyncio.wait_for(supervisor.run(), 60)) == 2
    assert started(starts) == 1


def test_requests_wait_no_longer_than_they_are_held(begin):
    supervisor, book, _ = begin("silent", hold=1.0)

    async def run() -> None:
        running = asyncio.create_task(supervisor.run())
        begun = time.monotonic()
        ending = await accept(book).end()
        assert ending.status == 503
        assert "no worker has served for 1 s" in ending.message
        assert 0.9 < time.monotonic() - begun < 20
        with pytest.raises(Refused, match="no worker has served"):
            supervisor.check_hope()
        supervisor.end()
        await running

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_answer_that_takes_too_long_is_given_up(begin):
    supervisor, book, _ = begin("mute", deadline=1.0)

    async def run() -> None:
        running = asyncio.create_task(supervisor.run())
        ending = await accept(book).end()
        assert ending.status == 504
        assert len(book) == 0
        supervisor.end()
        await running

    asyncio.run(asyncio.wait_for(run(), 60))
