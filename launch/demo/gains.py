"""The page's first picture: what the placement changed, phase by phase, as bars of three figures."""

from typing import NamedTuple

from launch.demo.words import DASH, Figures, amount, escape, percent, seconds


class Bar(NamedTuple):
    """One phase: the bar itself, a second part that is added to it, and what uniform placement would have had."""

    label: str
    value: float | None
    text: str
    more: float = 0.0
    reference: float | None = None
    title: str = ""


def gains(result: Figures) -> str:
    """Three cards: calls to other servers, network time of a request, latency of a request."""
    phases, cluster = result["phases"], result["cluster"]
    link = ""
    if cluster.get("latency_s") is not None:
        link = f" of {amount(8e-6 * cluster['bandwidth_bytes_per_s'])} Mbit/s and {amount(1e3 * cluster['latency_s'], 2)} ms"
    cards = (
        _card(
            "Expert calls that leave their server",
            "Measured. Grey behind: uniform placement on the same calls.",
            [_share(n, p) for n, p in enumerate(phases, 1)],
        ),
        _card(
            "Network time of a request",
            f"What its calls take on links{link}: computed, for all servers share this machine.",
            [_network(n, p) for n, p in enumerate(phases, 1)],
        ),
        _card(
            "Latency of a request, median",
            "Full: measured on this machine, computing and queue. Hatched: the network time beside it.",
            [_latency(n, p) for n, p in enumerate(phases, 1)],
        ),
    )
    return f'<div class="grid fit gains">{"".join(cards)}</div>'


def _share(number: int, phase: Figures) -> Bar:
    share, uniform = phase.get("remote_share"), phase.get("remote_share_uniform")
    title = f"{percent(share, 1)}; uniform placement: {percent(uniform, 1)}"
    return Bar(f"{number} {phase['name']}", share, percent(share), reference=uniform, title=title)


def _network(number: int, phase: Figures) -> Bar:
    value, uniform = phase.get("network_request_s"), phase.get("network_request_uniform_s")
    text = DASH if value is None else amount(1e3 * value, 0, "ms")
    title = f"{text}; uniform placement: {DASH if uniform is None else amount(1e3 * uniform, 0, 'ms')}"
    return Bar(f"{number} {phase['name']}", value, text, reference=uniform, title=title)


def _latency(number: int, phase: Figures) -> Bar:
    value, network = phase["latency_p50_s"], phase.get("network_request_s") or 0.0
    total = None if value is None else value + network
    title = f"measured {seconds(value)}, 95th percentile {seconds(phase['latency_p95_s'])}; network {seconds(network)}"
    return Bar(f"{number} {phase['name']}", value, seconds(total), more=network, title=title)


def _card(name: str, note: str, bars: list[Bar]) -> str:
    most = max([(b.value or 0.0) + b.more for b in bars] + [b.reference or 0.0 for b in bars], default=0.0) or 1.0
    rows = "".join(_bar(bar, most) for bar in bars)
    caption = f"<figcaption>{name}<small>{note}</small></figcaption>"
    return f'<figure class="card gain">{caption}<div class="bars">{rows}</div></figure>'


def _bar(bar: Bar, most: float) -> str:
    ghost = f'<i class="ghost" style="width:{100 * bar.reference / most:.1f}%"></i>' if bar.reference else ""
    fill = "" if bar.value is None else f'<i style="width:{100 * bar.value / most:.1f}%"></i>'
    more = f'<i class="more" style="width:{100 * bar.more / most:.1f}%"></i>' if bar.more and bar.value else ""
    return (
        f'<div class="row" title="{escape(bar.title)}"><span>{escape(bar.label)}</span><b>{bar.text}</b>'
        f'<div class="rail">{ghost}<div class="fill">{fill}{more}</div></div></div>'
    )
