"""The book of accepted requests: each is answered once, keeps its tokens when workers end, and is given up at last."""

import asyncio

import pytest

from dancemoe_jax.inference.sampling_params import SamplingParams
from dancemoe_jax.text.detokenizer import IncrementalDetokenizer
from dancemoe_jax.text.tokenizer import byte_tokenizer
from launch.engine.request import Request
from launch.http.book import Book, Refused
from launch.serve.requests import Text

EOS = 256


def accept(book: Book, most: int = 5, stop: tuple[str, ...] = ()):
    book.check_room(1)
    params = SamplingParams(max_tokens=most, stop=stop, seed=9, temperature=0.5)
    text = Text(IncrementalDetokenizer(byte_tokenizer(), stop), frozenset({EOS}))
    request = Request(0, [65, 66], most, 0.0, params=params, stop_token_ids=frozenset({EOS}), on_token=text.on_token)
    return book.accept(request, text)


@pytest.fixture
def book():
    made = Book(3, 100, EOS)
    made.cancelled, made.done = [], []
    made.cancel_in_worker = made.cancelled.append
    made.ended.append(made.done.append)
    return made


def give(book: Book, accepted, text: bytes) -> None:
    for token in text:
        book.take(accepted.number, [token])


def test_an_answer_ends_once_and_late_tokens_change_nothing(book):
    accepted = accept(book)
    (sent,) = book.unsent()
    assert (sent["id"], sent["prompt"], sent["output"], sent["params"]["seed"]) == (accepted.number, [65, 66], [], 9)
    assert book.unsent() == []
    give(book, accepted, b"abcdefgh")
    assert (accepted.text.text, accepted.ending.reason, len(accepted.tokens)) == ("abcde", "length", 5)
    book.fail(accepted.number, 500, "too late")
    assert accepted.ending.status == 200
    assert book.done == [accepted]
    assert len(book) == 0
    assert book.cancelled == []  # the worker ends it by itself


@pytest.mark.parametrize("stop", [(), ("cd",)])
def test_tokens_that_come_together_are_as_if_one_by_one(book, stop):
    text = "aébcdé!".encode()
    together, single = accept(book, 8, stop), accept(book, 8, stop)
    give(book, single, text)
    book.take(together.number, text[:3])
    assert together.text.text == "aé"
    book.take(together.number, text[3:])
    assert (together.text.text, together.ending, together.tokens) == (single.text.text, single.ending, single.tokens)
    assert (len(together.tokens), together.ending.reason) == ((6, "stop") if stop else (8, "length"))


def test_a_stop_text_cancels_it_in_the_worker_and_an_end_of_text_does_not(book):
    stopped, ended = accept(book, 50, ("c",)), accept(book, 50)
    book.unsent()
    give(book, stopped, b"abcd")
    give(book, ended, b"ab")
    book.take(ended.number, [EOS])
    assert (stopped.text.text, stopped.ending.reason) == ("ab", "stop")
    assert (ended.text.text, ended.ending.reason) == ("ab", "stop")
    assert book.cancelled == [stopped.number]


def test_the_next_worker_gets_the_tokens_so_far_in_order(book):
    first, second = accept(book), accept(book)
    book.unsent()
    give(book, second, b"xy")
    book.lost_worker(serving=True)
    assert [(sent["id"], sent["output"]) for sent in book.unsent()] == [(first.number, []), (second.number, [120, 121])]
    give(book, second, b"zab")
    assert second.text.text == "xyzab"


def test_a_request_that_outlives_three_workers_without_a_token_is_given_up(book):
    poison, waiting, slow = accept(book), accept(book), accept(book, 50)
    for round in range(3):
        waiting.sent = False
        for accepted in (poison, slow):
            accepted.sent = True
        give(book, slow, b"a")
        book.lost_worker(serving=True)
        assert (poison.ending is None) == (round < 2)
    assert poison.ending.status == 500
    assert waiting.ending is slow.ending is None
    for _ in range(5):  # workers that never served had it not
        waiting.sent = True
        book.lost_worker(serving=False)
    assert waiting.ending is None


def test_those_that_workers_ended_with_are_tried_one_at_a_time(book):
    poison, bystander = accept(book), accept(book)
    for _ in range(2):
        assert len(book.unsent()) == 2
        book.lost_worker(serving=True)
    fresh = accept(book)
    assert [sent["id"] for sent in book.unsent()] == [poison.number]
    assert book.unsent() == []
    book.lost_worker(serving=True)
    assert poison.ending.status == 500
    assert [sent["id"] for sent in book.unsent()] == [bystander.number]
    assert book.unsent() == []
    give(book, bystander, b"a")  # it was not the one
    assert [sent["id"] for sent in book.unsent()] == [fresh.number]
    assert bystander.ending is fresh.ending is None


def test_no_more_than_fit_are_accepted(book):
    for _ in range(3):
        accept(book)
    with pytest.raises(Refused) as refused:
        accept(book)
    assert (refused.value.status, refused.value.retry_after) == (429, 1)
    with pytest.raises(Refused) as refused:
        book.check_room(4)
    assert refused.value.status == 400  # it never will fit
    book.refusing = (503, "draining")
    with pytest.raises(Refused, match="draining"):
        book.check_room(1)


def test_those_who_wait_see_every_change_and_the_end(book):
    async def read(accepted) -> list[str]:
        return [accepted.text.text async for _ in accepted.changes()]

    async def run() -> list[list[str]]:
        accepted = accept(book)
        readers = [asyncio.create_task(read(accepted)) for _ in range(2)]
        for token in b"abc":
            await asyncio.sleep(0)
            book.take(accepted.number, [token])
        await asyncio.sleep(0)
        book.fail(accepted.number, 503, "gone")
        late = asyncio.create_task(read(accepted))
        return [await task for task in (*readers, late)]

    *readers, late = asyncio.run(run())
    assert all(found[-1] == "abc" for found in readers)
    assert late[-1] == "abc"
