"""Every reason why a server cannot answer now is said."""

from types import SimpleNamespace
from typing import Any

import pytest

from launch.http.book import Book
from launch.http.health import Health

GOOD: dict[str, Any] = {
    "serving": True,
    "served": True,
    "state": "serving",
    "problem": "",
    "stuck": 5.0,
    "stats": {"covered": 1.0, "controller": True},
    "restarts": 0,
    "worker": None,
}


def reported(book: Book | None = None, stuck_for: float = 0.0, **changed: Any) -> dict[str, Any]:
    supervisor: Any = SimpleNamespace(**GOOD | changed, stuck_for=lambda now: stuck_for)
    return Health("edge-a", Book(4, 100, None) if book is None else book, supervisor).report()


def test_nothing_against_it_is_ready():
    assert reported() == {
        "ready": True,
        "server": "edge-a",
        "reasons": [],
        "requests": 0,
        "worker": None,
        "restarts": 0,
    }
    assert reported(stats={"covered": 1.0, "controller": None})["ready"]  # experts do not migrate here
    assert reported(stats=None)["ready"]


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"stats": {"covered": 0.75, "controller": True}}, "coverage", "25.0% of the experts are on no device"),
        ({"stats": {"covered": 1.0, "controller": False}}, "controller", "has ended"),
        ({"serving": False, "state": "the worker is compiling"}, "worker", "compiling"),
        ({"serving": False, "served": False, "state": "the worker is starting"}, "starting", "starting"),
        ({"problem": "server edge-b has ended"}, "problem", "edge-b"),
        ({"stuck_for": 5.5}, "stuck", "no step has ended for 5.5 s"),
    ],
)
def test_each_reason_is_said(changed, code, words):
    found = reported(**changed)
    assert not found["ready"]
    (reason,) = found["reasons"]
    assert reason["code"] == code
    assert words in reason["message"]


def test_draining_and_all_else_at_once():
    book = Book(4, 100, None)
    book.refusing = (503, "the server is draining: it takes no more requests")
    found = reported(book, 9.0, problem="x", stats={"covered": 0.5, "controller": False})
    codes = [reason["code"] for reason in found["reasons"]]
    assert codes == ["draining", "problem", "stuck", "coverage", "controller"]
