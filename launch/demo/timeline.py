"""Inline SVG over the seconds of a demo: the local ratio of every server as curves, and below it each request's latency.

The page has it twice, wide and narrow, and shows the one that fits the screen: letters keep their size on both.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median

from launch.demo.words import NBSP, Figures, amount, clip, escape, percent

CURVE_POINTS = 300  # of one server
REQUEST_DOTS = 1500
GAP = 2.5  # usual distances between two points beyond which no line joins them
RATIO_HEIGHT, LATENCY_HEIGHT = 220, 150
BETWEEN = 52  # from the first picture's bottom to the second's top

Scale = Callable[[float], float]


def timeline(result: Figures, colours: dict[str, str], width: int = 1120) -> str:
    """Both pictures over one axis of seconds, with phases, migrations and other events.

    Args:
        colours: of each server, in the cluster's order.
        width: of the picture in its own units, which are CSS pixels where the page has room for them.
    """
    phases, points = result["phases"], result["timeline"]
    marks = []
    for number, move in enumerate(result["migrations"], 1):
        label = f"migration {number}: {move['from']} → {move.get('label') or move['to']}"
        marks.append((move["at_s"], label, "event"))
    marks += [(e["at_s"], e["label"], "event swap") for e in result["events"]]
    end = max([p["end_s"] for p in phases] + [p["t_s"] for p in points] + [m[0] for m in marks], default=0) or 1
    wide = width > 700
    left, right = 46, width - 110 if wide else width - 12

    def x(seconds: float) -> float:
        return round(left + (right - left) * min(seconds, end) / end, 1)

    labels = _lanes([(x(at), text, kind) for at, text, kind in marks], width)
    top = 14 + 18 * max((lane for *_, lane in labels), default=-1) + 18
    middle = top + RATIO_HEIGHT
    requests = [r for r in result.get("requests", ()) if r["finished_s"] <= end][:REQUEST_DOTS]
    bottom = middle + BETWEEN + LATENCY_HEIGHT if requests else middle
    plots: list[tuple[float, float]] = [(top, middle)]
    if requests:
        plots.append((middle + BETWEEN, bottom))
    parts = [_phase_band(n, p, x(p["start_s"]), x(p["end_s"]), plots) for n, p in enumerate(phases)]
    parts += [_moving(move, x, plots) for move in result["migrations"]]
    captions: list[tuple[float, str]] = []
    parts.append(_ratios(result, colours, x, (left, right), (top, middle), wide))
    if requests:
        caption = "latency of each request, where it ended; line: phase median"
        parts.append(_latencies(requests, phases, colours, x, (left, right), plots[1]))
        captions.append((middle + BETWEEN - 9, caption))
    for tick in _ticks(end, 10 if wide else 5):
        parts.append(f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:g}{NBSP}s</text>')
    for at, text_x, text, kind, lane in labels:
        text_y = top - 8 - 18 * lane
        parts.append(f'<path class="{kind}" d="M{at} {text_y - 10}V{bottom}"/>')
        parts.append(f'<text class="event-label" x="{text_x}" y="{text_y}">{escape(text)}</text>')
    parts += [
        f'<text class="caption" x="{left}" y="{y}">{escape(clip(text, int(width / 6)))}</text>' for y, text in captions
    ]
    kind = "timeline" if wide else "timeline narrow"
    title = "Local ratio and latency over time"
    return f'<svg class="{kind}" viewBox="0 0 {width} {bottom + 52}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def _ratios(
    result: Figures,
    colours: dict[str, str],
    x: Scale,
    sides: tuple[float, float],
    plot: tuple[float, float],
    wide: bool,
) -> str:
    phases, points, (left, right), (top, bottom) = result["phases"], result["timeline"], sides, plot

    def y(ratio: float) -> float:
        return round(bottom - (bottom - top) * ratio, 1)

    parts = [_level(f"{25 * quarter}{NBSP}%", y(quarter / 4), left, right) for quarter in range(5)]
    names, moves = [], [move["at_s"] for move in result["migrations"]]
    for server, colour in colours.items():
        measured = _curve([(p["t_s"], p["local_ratio"].get(server)) for p in points], moves)
        curve = [(x(t), r, t) for t, r in measured]
        known = [(at, r, t) for at, r, t in curve if r is not None]
        means = [(x(p["start_s"]) + 3, x(p["end_s"]) - 3, p["local_ratio"].get(server)) for p in phases]
        shapes = [f'<path class="mean" d="M{x0} {y(mean)}H{x1:.1f}"/>' for x0, x1, mean in means if mean is not None]
        shapes.append(f'<path class="curve" d="{_path((at, None if r is None else y(r)) for at, r, _ in curve)}"/>')
        for at, ratio, seconds in known:
            title = f"{escape(server)}, {seconds:.1f} s: {percent(ratio, 1)}"
            shapes.append(f'<circle class="dot" cx="{at}" cy="{y(ratio)}" r="4"><title>{title}</title></circle>')
        parts.append(f'<g style="--c:{colour}">{"".join(shapes)}</g>')
        names += [(y(known[-1][1]), server)] if known else []
    for text_y, server in _apart(names, 15, bottom) if wide else ():
        parts.append(f'<circle cx="{right + 12}" cy="{text_y}" r="4" fill="{colours[server]}"/>')
        parts.append(f'<text class="name" x="{right + 21}" y="{text_y + 4}">{escape(clip(server, 13))}</text>')
    return "".join(parts)


def _latencies(
    requests: list[Figures],
    phases: list[Figures],
    colours: dict[str, str],
    x: Scale,
    sides: tuple[float, float],
    plot: tuple[float, float],
) -> str:
    """A dot for each request where it ended, and the median of each phase."""
    (left, right), (top, bottom) = sides, plot
    seconds = [r["finished_s"] - r["arrival_s"] for r in requests]
    most = max([*seconds, 1e-3]) * 1.05

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * value / most, 1)

    parts = [_level(f"{tick:g}{NBSP}s", y(tick), left, right) for tick in _ticks(most, 4)]
    for request, latency in zip(requests, seconds, strict=True):
        name = request["server"]
        title = f"{name}, {request['domain']}: {amount(latency, 2, 's')} for {request['tokens']} tokens"
        parts.append(
            f'<circle class="request" style="--c:{colours[name]}" cx="{x(request["finished_s"])}" cy="{y(latency)}" r="3">'
            f"<title>{escape(title)}</title></circle>"
        )
    for phase in phases:
        middle = phase["latency_p50_s"]
        if middle is not None:
            title = f"phase {phase['name']}: median {amount(middle, 2, 's')}"
            parts.append(
                f'<path class="median" d="M{x(phase["start_s"]) + 3:.1f} {y(min(middle, most))}H{x(phase["end_s"]) - 3:.1f}">'
                f"<title>{escape(title)}</title></path>"
            )
    return "".join(parts)


def _level(text: str, y: float, left: float, right: float) -> str:
    return (
        f'<path class="axis" d="M{left} {y}H{right}"/><text x="{left - 8}" y="{y + 4}" text-anchor="end">{text}</text>'
    )


def _phase_band(number: int, phase: Figures, x0: float, x1: float, plots: list[tuple[float, float]]) -> str:
    width = max(x1 - x0, 0)
    label = clip(f"{number + 1} {phase['name']}", int(width / 7))
    shade = "band odd" if number % 2 else "band"
    title = f"phase {number + 1}: {phase['name']}, {phase['start_s']:.1f} to {phase['end_s']:.1f} s"
    bottom = plots[-1][1]
    areas = [(top, below - top) for top, below in plots] + [(bottom + 28, 22)]
    shapes = "".join(
        f'<rect class="{shade}" x="{x0}" width="{width:.1f}" y="{y}" height="{height}"/>' for y, height in areas
    )
    return (
        f"<g><title>{escape(title)}</title>{shapes}"
        f'<text class="strong" x="{(x0 + x1) / 2:.1f}" y="{bottom + 43}" text-anchor="middle">'
        f"{escape(label)}</text></g>"
    )


def _moving(move: Figures, x: Scale, plots: list[tuple[float, float]]) -> str:
    """The seconds in which a migration stages and commits."""
    seconds = move.get("seconds") or 0.0
    x0, x1 = x(move["at_s"]), x(move["at_s"] + seconds)
    shapes = "".join(
        f'<rect class="moving" x="{x0}" width="{x1 - x0:.1f}" y="{top}" height="{bottom - top}"/>'
        for top, bottom in plots
    )
    return f"<g><title>experts move for {amount(seconds, 2, 's')}</title>{shapes}</g>"


def _lanes(marks: list[tuple[float, str, str]], width: float) -> list[tuple[float, float, str, str, int]]:
    """Labels (line x, text x, text, class, lane) without overlap; lines cross no label to their right."""
    starts: list[float] = []  # leftmost label of each lane
    placed = []
    for at, text, kind in sorted(marks, reverse=True):
        space = 7.2 * len(text) + 12
        start = max(0.0, min(at + 5, width - space))
        lane = next((i for i, taken in enumerate(starts) if start + space <= taken), len(starts))
        starts[lane : lane + 1] = [start]
        placed.append((at, start, text, kind, lane))
    return placed


def _ticks(end: float, most: int) -> list[float]:
    """Round numbers from 0 to `end`, at most `most` of them after 0."""
    step = next((10.0**e * m for e in range(-3, 7) for m in (1, 2, 5) if end / (10.0**e * m) <= most), end)
    return [step * i for i in range(int(end / step) + 1)]


def _curve(points: list[tuple[float, float | None]], moves: Sequence[float] = ()) -> list[tuple[float, float | None]]:
    """At most CURVE_POINTS points, means of neighbors where there are more.

    None stands where nothing was measured for long, and where a migration began: what was measured next was under
    another placement, and no line joins the two.
    """
    group = -(-len(points) // CURVE_POINTS) or 1
    curve: list[tuple[float, float | None]] = []
    for i in range(0, len(points), group):
        part = points[i : i + group]
        known = [r for _, r in part if r is not None]
        curve.append((sum(t for t, _ in part) / len(part), sum(known) / len(known) if known else None))
    steps = [b[0] - a[0] for a, b in pairwise(curve)]
    longest = GAP * median(steps) if steps else 0.0
    broken = []
    for point, before in zip(curve, [None, *curve], strict=False):
        moved = before is not None and any(before[0] <= at < point[0] for at in moves)
        if before is not None and (moved or point[0] - before[0] > longest):
            broken.append(((point[0] + before[0]) / 2, None))
        broken.append(point)
    return broken


def _path(points: Iterable[tuple[float, float | None]]) -> str:
    """An SVG path through the points, interrupted where there is no value."""
    parts, pen = [], "M"
    for at, value in points:
        if value is not None:
            parts.append(f"{pen}{at} {value}" + ("h0" if pen == "M" else ""))  # h0: a lone point is a dot
        pen = "M" if value is None else "L"
    return "".join(parts) or "M0 0"


def _apart(labels: list[tuple[float, str]], gap: float, bottom: float) -> list[tuple[float, str]]:
    """Labels moved up, from the lowest on, until they are `gap` apart."""
    placed, limit = [], bottom
    for at, text in sorted(labels, reverse=True):
        limit = min(at, limit)
        placed.append((limit, text))
        limit -= gap
    return placed
