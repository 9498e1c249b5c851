"""Traces of requests for OpenTelemetry, an extra: a span for each answer, and within it queue, prefill and decode."""

import time
from typing import Any

from launch.http.book import Accepted
from placement import InputError

_NS = 1_000_000_000


class Traces:
    """Sends spans of requests as they end.

    Args:
        server: name of this one; model: that it serves.
        exporter: takes the spans (opentelemetry.sdk.trace.export.SpanExporter); at_once: it gets each as it comes, and is
            waited for, instead of several at a time.

    Raises:
        InputError: the packages are not there.
    """

    def __init__(self, server: str, model: str, exporter: Any, *, at_once: bool = False) -> None:
        sdk = _packages()
        resource = sdk.Resource.create({"service.name": "dancemoe", "service.instance.id": server})
        self._provider = sdk.TracerProvider(resource=resource)
        self._provider.add_span_processor((sdk.SimpleSpanProcessor if at_once else sdk.BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("launch.http")
        self._sdk, self._model = sdk, model
        self._offset = time.time_ns() - round(time.monotonic() * _NS)

    def ended(self, accepted: Accepted) -> None:
        """Make the spans of a request that has ended."""
        assert accepted.ending is not None
        sdk, end = self._sdk, time.monotonic()
        parent = sdk.extract({"traceparent": accepted.parent}) if accepted.parent else sdk.Context()
        attributes = {
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": len(accepted.request.prompt),
            "gen_ai.usage.output_tokens": len(accepted.tokens),
            "gen_ai.response.finish_reasons": [accepted.ending.reason],
        }
        start = self._at(accepted.accepted_at)
        whole = self._tracer.start_span("request", parent, attributes=attributes, start_time=start)
        if accepted.ending.status != 200:
            whole.set_status(sdk.Status(sdk.StatusCode.ERROR, accepted.ending.message))
        inside = sdk.set_span_in_context(whole)
        # What did not come to its turn ends with the request.
        times = (accepted.accepted_at, accepted.begun_at or end, accepted.first_at or end, accepted.last_at or end)
        for name, first, last in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
            if first < end:
                span = self._tracer.start_span(name, inside, start_time=self._at(first))
                span.end(self._at(max(first, last)))
        whole.end(self._at(end))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    def _at(self, seconds: float) -> int:
        """Nanoseconds since 1970 of a time on the monotonic clock."""
        return self._offset + round(seconds * _NS)


def open_traces(url: str, server: str, model: str) -> Traces:
    """Traces to a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces. Raises InputError."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--traces {url}: give the address of a collector, such as http://127.0.0.1:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise _absent() from None
    return Traces(server, model, OTLPSpanExporter(endpoint=url))


def _absent() -> InputError:
    return InputError("--traces needs OpenTelemetry; pip install 'dancemoe-jax[otel]'")


def _packages() -> Any:
    """What is used of OpenTelemetry; loaded where traces are wanted."""
    from types import SimpleNamespace

    try:
        from opentelemetry.context import Context
        from opentelemetry.propagate import extract
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
    except ImportError:
        raise _absent() from None
    names = (Context, extract, Resource, TracerProvider, BatchSpanProcessor, SimpleSpanProcessor, Status, StatusCode)
    return SimpleNamespace(set_span_in_context=set_span_in_context, **{found.__name__: found for found in names})
