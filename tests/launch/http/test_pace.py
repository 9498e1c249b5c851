"""How long a newcomer may wait: what a queue means in seconds, who is refused, and when to come again."""

import pytest

from launch.http.book import Book, Refused
from launch.http.pace import Pace
from tests.launch.http.test_book import EOS, accept


def known(slots: int, seconds: float, longest: float | None = None) -> Pace:
    """A pace that has seen requests of so many seconds."""
    pace = Pace(slots, longest)
    for _ in range(8):
        pace.served(seconds, seconds)
    return pace


def test_as_many_as_are_served_at_once_may_wait_before_anything_is_known():
    pace = Pace(2)
    assert pace.wait(1, 2, 0.0) <= pace.longest(True) < pace.wait(2, 2, 0.0)
    for _ in range(7):
        pace.served(5.0, 5.0)
    assert pace.wait(1, 2, 0.0) <= pace.longest(False) < pace.wait(2, 2, 0.0)


def test_a_queue_takes_as_long_as_its_requests_need_slots():
    pace = known(4, 1.0)
    assert pace.wait(0, 3, 0.0) == 0  # a slot is free
    assert pace.wait(3, 0, 0.0) == 0  # they are about to have theirs
    assert pace.wait(0, 4, 0.0) == pytest.approx(0.25)
    assert pace.wait(3, 4, 0.5) == pytest.approx(1.0)
    assert pace.wait(1, 2, 5.0) == pytest.approx(1.0)  # slots are free, and yet one has waited long: memory is short


def test_an_answer_takes_at_most_twice_as_long_as_usual():
    pace = known(4, 1.0)
    assert pace.longest(False) == pytest.approx(0.4)  # and some to spare
    assert pace.longest(True) == pytest.approx(5.0)  # a bunch of requests is soon over
    for _ in range(16):  # these take less than those that count as usual; they had to wait
        pace.served(0.5, None)
    assert pace.longest(False) == pytest.approx(0.9)
    for _ in range(16):  # all is slow for a while: nobody waits
        pace.served(3.0, None)
    assert pace.longest(False) == 0
    assert pace.wait(0, 3, 0.0) == 0 < pace.wait(0, 4, 0.0)
    assert known(4, 1.0, longest=7.0).longest(False) == 7.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def serve(book: Book, clock: list[float], accepted, seconds: float) -> None:
    book.begun(accepted.number)
    clock[0] += seconds
    book.take(accepted.number, [EOS])
    assert accepted.ending.status == 200


def test_who_would_wait_too_long_is_told_when_to_come_again(clock):
    book = Book(100, 1000, EOS, Pace(2, 4.0))
    for _ in range(2):
        serve(book, clock, accept(book), 2.0)
    running = [accept(book) for _ in range(2)]
    for accepted in running:
        book.begun(accepted.number)
    for _ in range(3):
        assert accept(book).usual
    assert book.wait() == (4.0, 4.0)
    accept(book)
    with pytest.raises(Refused, match="would wait 5 s for its turn") as refused:
        accept(book)
    assert (refused.value.status, refused.value.retry_after) == (429, 1)
    book.take(running[0].number, [EOS])
    accept(book)
    book.lost_worker(serving=True)
    accept(book)  # while there is no worker, requests wait for one
    assert not accept(book).usual  # somebody was refused
    clock[0] += 11
    assert accept(book).usual


def test_what_outlives_a_worker_does_not_count_as_usual(clock):
    book = Book(100, 1000, EOS, pace := Pace(1))
    for _ in range(8):
        serve(book, clock, accept(book), 1.0)
    assert pace.longest(False) == pytest.approx(0.4)
    third = accept(book)
    book.begun(third.number)
    book.lost_worker(serving=True)
    clock[0] += 50
    serve(book, clock, third, 1.0)
    assert pace.longest(False) == pytest.approx(0.4)


def test_a_bunch_is_let_in_while_all_is_calm_and_nobody_waits_long_after_one_was_too_large(clock):
    book = Book(100, 1000, EOS, known(4, 1.0))
    running = [accept(book) for _ in range(4)]
    for accepted in running:
        book.begun(accepted.number)
    waiting = [accept(book) for _ in range(20)]
    assert [accepted.usual for accepted in waiting] == [True] + [False] * 19  # what waits longer is not what is usual
    assert book.wait() == (pytest.approx(5.25), pytest.approx(5.0))
    with pytest.raises(Refused):
        accept(book)
    assert book.wait()[1] == pytest.approx(0.4)
    for accepted in waiting[1:]:
        book.fail(accepted.number, 499, "gone")
    with pytest.raises(Refused, match=r"would wait 0\.5 s"):
        accept(book)
    clock[0] += 11
    assert book.wait()[1] == pytest.approx(5.0)
