"""Traces of requests: what waited, what was computed, how it ended, within the client's own trace."""

import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from launch.http.book import Book
from launch.http.traces import Traces, open_traces
from placement import InputError
from tests.helpers.front_door import front_door
from tests.helpers.span_collector import collecting
from tests.launch.http.test_book import EOS, accept

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def kept():
    return InMemorySpanExporter()


@pytest.fixture
def book(clock, kept):
    made = Book(8, 100, EOS)
    made.ended.append(Traces("edge-a", "tiny-moe", kept, at_once=True).ended)
    return made


def seconds(kept) -> dict[str, float]:
    return {span.name: (span.end_time - span.start_time) / 1e9 for span in kept.get_finished_spans()}


def test_a_request_is_a_span_with_one_for_each_phase(book, clock, kept):
    accepted = accept(book, 3)
    accepted.parent = PARENT
    for wait, step in ((0.5, book.begun), (0.25, None), (1.0, None), (1.0, None)):
        clock[0] += wait
        step(accepted.number) if step else book.take(accepted.number, [65])
    assert seconds(kept) == pytest.approx({"queue": 0.5, "prefill": 0.25, "decode": 2.0, "request": 2.75})
    whole = next(span for span in kept.get_finished_spans() if span.name == "request")
    assert f"{whole.context.trace_id:032x}" in PARENT
    assert f"{whole.parent.span_id:016x}" in PARENT
    assert whole.attributes["gen_ai.usage.output_tokens"] == 3
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("length",)
    for span in kept.get_finished_spans():
        assert span is whole or span.parent.span_id == whole.context.span_id


def test_what_never_came_to_its_turn_has_waited_and_failed(book, clock, kept):
    accepted = accept(book)
    clock[0] += 4
    book.fail(accepted.number, 503, "no worker has served")
    assert seconds(kept) == pytest.approx({"queue": 4.0, "request": 4.0})
    whole = next(span for span in kept.get_finished_spans() if span.name == "request")
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "no worker has served")
    assert whole.parent is None


def test_a_front_door_sends_them_to_a_collector(tmp_path: Path):
    with collecting() as (url, received), front_door(tmp_path, "--traces", url) as door:
        body = {"prompt": "def main(", "max_tokens": 4, "temperature": 0}
        assert door.http.post("/v1/completions", json=body, headers={"traceparent": PARENT}).status_code == 200
        assert door.stop() == 0
    spans = {span.name: span for span in received}
    assert spans.keys() == {"request", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in received} == {PARENT.split("-")[1]}
    assert (
        spans["queue"].end_time_unix_nano <= spans["prefill"].end_time_unix_nano <= spans["decode"].end_time_unix_nano
    )


def test_what_cannot_be_used_is_said_in_a_line(monkeypatch):
    with pytest.raises(InputError, match="--traces x: give the address of a collector"):
        open_traces("x", "edge-a", "tiny-moe")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"pip install 'dancemoe-jax\[otel\]'"):
        open_traces("http://127.0.0.1:9", "edge-a", "tiny-moe")
