"""Figures for Prometheus: of requests, as they end, and of the worker, as it last told them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launch.http.book import Accepted, Book
from launch.http.supervisor import Supervisor

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one front door and its worker.

    Args:
        server: name of this one.
    """

    def __init__(self, server: str, book: Book, supervisor: Supervisor) -> None:
        self._registry = CollectorRegistry()
        kept: Any = {"registry": self._registry}
        self._requests = Counter("dancemoe_requests", "Requests that have ended, by how", ["outcome"], **kept)
        self._prompt = Counter("dancemoe_prompt_tokens", "Tokens of prompts of requests that have ended", **kept)
        self._answer = Counter("dancemoe_generation_tokens", "Tokens of answers of requests that have ended", **kept)
        first, each = "from acceptance to the first token", "between tokens after the first, mean of a request"
        self._first = Histogram("dancemoe_time_to_first_token_seconds", f"Seconds {first}", buckets=_SECONDS, **kept)
        self._each = Histogram(
            "dancemoe_time_per_output_token_seconds", f"Seconds {each}", buckets=_TOKEN_SECONDS, **kept
        )
        self._whole = Histogram(
            "dancemoe_request_seconds", "Seconds from acceptance to the end", buckets=_SECONDS, **kept
        )
        self._registry.register(_State(server, book, supervisor))

    def ended(self, accepted: Accepted) -> None:
        """Count a request that has ended."""
        assert accepted.ending is not None
        status = accepted.ending.status
        self._requests.labels(
            accepted.ending.reason if status == 200 else "gone" if status == 499 else str(status)
        ).inc()
        tokens = len(accepted.tokens)
        self._prompt.inc(len(accepted.request.prompt))
        self._answer.inc(tokens)
        if tokens:
            self._first.observe(accepted.first_at - accepted.accepted_at)
            self._whole.observe(accepted.last_at - accepted.accepted_at)
        if tokens > 1:
            self._each.observe((accepted.last_at - accepted.first_at) / (tokens - 1))

    def refused(self, status: int) -> None:
        """Count a request that was not accepted."""
        self._requests.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class _State(Collector):
    """What holds at the moment that it is asked."""

    def __init__(self, server: str, book: Book, supervisor: Supervisor) -> None:
        self._server, self._book, self._supervisor = server, book, supervisor

    def collect(self) -> Iterable[Metric]:
        book, supervisor = self._book, self._supervisor
        running = sum(accepted.first_at > 0 for accepted in book)
        yield GaugeMetricFamily("dancemoe_requests_running", "Accepted requests with a first token", running)
        yield GaugeMetricFamily("dancemoe_requests_waiting", "Accepted requests without one", len(book) - running)
        yield GaugeMetricFamily(
            "dancemoe_expected_wait_seconds", "For its turn, of a request that came now", book.wait()[0]
        )
        yield GaugeMetricFamily("dancemoe_worker_serving", "Whether the worker serves", float(supervisor.serving))
        handed = {"there": book.handed, "returned": book.returned}
        yield _by("dancemoe_routed", "Requests handed to other servers", ["outcome"], handed, CounterMetricFamily)
        yield CounterMetricFamily("dancemoe_worker_restarts", "Workers that were replaced", supervisor.restarts)
        if stats := supervisor.stats:
            yield from self._of_worker(stats)

    def _of_worker(self, stats: dict[str, Any]) -> Iterable[Metric]:
        own = self._server
        yield _by("dancemoe_steps", "Steps taken", ["kind"], stats["steps"], CounterMetricFamily)
        yield _by("dancemoe_step_tokens", "Tokens in them", ["kind"], stats["tokens"], CounterMetricFamily)
        calls = {(own, target): count for target, count in stats["calls"].items()}
        labels = ["source", "target"]
        yield _by("dancemoe_expert_calls", "Calls of experts, by who served them", labels, calls, CounterMetricFamily)
        local = {group["layers"]: group["local"] / max(1, group["all"]) for group in stats["groups"]}
        yield _by("dancemoe_local_ratio", "Share of calls served here", ["layers"], local, GaugeMetricFamily)
        exchanged = stats["bytes_exchanged"]
        yield CounterMetricFamily("dancemoe_exchange_bytes", "Bytes of rows that left, there and back", exchanged)
        yield CounterMetricFamily(
            "dancemoe_exchanges", "Layers of steps that crossed servers", stats["layer_steps_crossing"]
        )
        sent = {(own, target): pair for target, pair in stats["pairs"].items()}
        for name, text in (
            ("bytes", "Bytes of rows that tokens here needed from a server, there and back"),
            ("exchanges", "Layers of steps in which a row went to a server"),
        ):
            found = {pair: counted[name] for pair, counted in sent.items()}
            yield _by(f"dancemoe_pair_{name}", text, labels, found, CounterMetricFamily)
        heat = {(str(layer), str(expert)): count for layer, expert, count in stats["hottest"]}
        yield _by(
            "dancemoe_expert_heat", "Calls of the most called experts", ["layer", "expert"], heat, GaugeMetricFamily
        )
        served = list(stats["calls"].values())
        balance = max(served) * len(served) / max(1, sum(served))
        yield GaugeMetricFamily(
            "dancemoe_balance", "Calls of the most called server over the mean, of users here", balance
        )
        yield GaugeMetricFamily("dancemoe_coverage", "Share of experts that some device holds", stats["covered"])
        yield GaugeMetricFamily("dancemoe_placement_epoch", "Placements before the present one", stats["epoch"])
        resident = stats["resident_bytes"]
        yield _by(
            "dancemoe_resident_bytes", "Bytes of experts on devices here", ["device"], resident, GaugeMetricFamily
        )
        cache = stats["cache"]
        pages = {"used": cache["used"], "free": cache["pages"] - cache["used"]}
        yield _by("dancemoe_cache_pages", "Pages for keys and values here", ["state"], pages, GaugeMetricFamily)
        yield CounterMetricFamily(
            "dancemoe_cache_found_tokens", "Prompt tokens that were in the cache already", cache["found"]
        )
        yield CounterMetricFamily(
            "dancemoe_preemptions", "Requests that had to give their pages back and begin anew", cache["preempted"]
        )
        done = stats["migrations"]
        outcomes = {"done": sum(not m["failed"] for m in done), "failed": sum(bool(m["failed"]) for m in done)}
        yield _by("dancemoe_migrations", "Migrations here", ["outcome"], outcomes, CounterMetricFamily)
        seconds = sum(m["seconds"] for m in done)
        yield CounterMetricFamily("dancemoe_migration_seconds", "Seconds of migrations here", seconds)
        moved = sum(m["bytes"] for m in done)
        yield CounterMetricFamily("dancemoe_migration_bytes", "Bytes of experts written here", moved)


def _by(name: str, text: str, labels: list[str], values: Mapping[Any, float], family: Callable[..., Any]) -> Metric:
    found = family(name, text, labels=labels)
    for key, value in values.items():
        found.add_metric([key] if isinstance(key, str) else list(key), value)
    return found
