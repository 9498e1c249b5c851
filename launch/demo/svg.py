"""Inline SVG of the demo's page: layers x experts as grids, the local ratio as curves; and the wording of their titles.

A picture knows nothing of the page around it but the classes of report.css. Every shape carries its exact values as a
hover title. Grids too large for one shape a cell become an embedded pixel image with one title a row.
"""

import base64
import html
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Figures = dict[str, Any]
Rgba = tuple[int, int, int, float]

DASH = "\N{EN DASH}"
NBSP = "\u00a0"
CURVE_POINTS = 300  # of one server
HEAT_ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, in quarters
HEAT_LEVELS = 32
COPY_OPACITY = (1.0, 0.6, 0.36)  # of an expert with one, two, more copies in the cluster

# Characters that HTML or XML refuses, or that nobody sees, as visible stand-ins.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), 0xFFFD)


def escape(value: object) -> str:
    """Any text as HTML and XML text or attribute value; control characters become visible ones."""
    return html.escape(str(value).translate(_VISIBLE))


def amount(value: float | None, digits: int = 0, unit: str = "") -> str:
    return DASH if value is None else f"{value:,.{digits}f}" + (NBSP + unit if unit else "")


def percent(value: float | None, digits: int = 0) -> str:
    return DASH if value is None else amount(100 * value, digits, "%")


def timeline(result: Figures, colours: dict[str, str]) -> str:
    """Local ratio of each server against seconds, with phases, migrations and other events."""
    phases, points = result["phases"], result["timeline"]
    marks = []
    for number, move in enumerate(result["migrations"], 1):
        label = f"migration {number}: {move['from']} → {move.get('label') or move['to']}"
        marks.append((move["at_s"], label, "event"))
    marks += [(e["at_s"], e["label"], "event swap") for e in result["events"]]
    end = max([p["end_s"] for p in phases] + [p["t_s"] for p in points] + [m[0] for m in marks], default=0) or 1
    left, right, width, height = 44, 1010, 1120, 240

    def x(seconds: float) -> float:
        return round(left + (right - left) * seconds / end, 1)

    labels = _lanes([(x(at), text, kind) for at, text, kind in marks], width)
    top = 14 + 18 * max((lane for *_, lane in labels), default=-1) + 18
    bottom = top + height

    def y(ratio: float) -> float:
        return round(bottom - height * ratio, 1)

    parts = []
    for number, phase in enumerate(phases):
        parts.append(_phase_band(number, phase, x(phase["start_s"]), x(phase["end_s"]), top, bottom))
    for quarter in range(5):
        parts.append(f'<path class="axis" d="M{left} {y(quarter / 4)}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(quarter / 4) + 4}" text-anchor="end">{25 * quarter}{NBSP}%</text>')
    for tick in _ticks(end):
        parts.append(f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:g}{NBSP}s</text>')
    names = []
    for server, colour in colours.items():
        curve = [(x(t), r, t) for t, r in _curve([(p["t_s"], p["local_ratio"].get(server)) for p in points])]
        known = [(at, r, t) for at, r, t in curve if r is not None]
        means = [(x(p["start_s"]) + 3, x(p["end_s"]) - 3, p["local_ratio"].get(server)) for p in phases]
        shapes = [f'<path class="mean" d="M{x0} {y(mean)}H{x1:.1f}"/>' for x0, x1, mean in means if mean is not None]
        shapes.append(f'<path class="curve" d="{_path((at, None if r is None else y(r)) for at, r, _ in curve)}"/>')
        for at, ratio, seconds in known:
            title = f"{escape(server)}, {seconds:.1f} s: {percent(ratio, 1)}"
            shapes.append(f'<circle class="dot" cx="{at}" cy="{y(ratio)}" r="4"><title>{title}</title></circle>')
        parts.append(f'<g style="--c:{colour}">{"".join(shapes)}</g>')
        names += [(y(known[-1][1]), server)] if known else []
    for text_y, server in _apart(names, 15, bottom):
        parts.append(f'<circle cx="{right + 12}" cy="{text_y}" r="4" fill="{colours[server]}"/>')
        parts.append(f'<text class="name" x="{right + 21}" y="{text_y + 4}">{escape(clip(server, 13))}</text>')
    for at, text_x, text, kind, lane in labels:
        text_y = top - 8 - 18 * lane
        parts.append(f'<path class="{kind}" d="M{at} {text_y - 10}V{bottom}"/>')
        parts.append(f'<text class="event-label" x="{text_x}" y="{text_y}">{escape(text)}</text>')
    head = f'<svg class="timeline" viewBox="0 0 {width} {bottom + 52}" role="img" aria-label="Local ratio over time">'
    return f"{head}{''.join(parts)}</svg>"


def _phase_band(number: int, phase: Figures, x0: float, x1: float, top: float, bottom: float) -> str:
    width = max(x1 - x0, 0)
    label = clip(f"{number + 1} {phase['name']}", int(width / 7))
    shade = "band odd" if number % 2 else "band"
    title = f"phase {number + 1}: {phase['name']}, {phase['start_s']:.1f} to {phase['end_s']:.1f} s"
    area = f'<rect class="{shade}" x="{x0}" width="{width:.1f}" '
    return (
        f'<g><title>{escape(title)}</title>{area}y="{top}" height="{bottom - top}"/>'
        f'{area}y="{bottom + 28}" height="22"/>'
        f'<text class="strong" x="{(x0 + x1) / 2:.1f}" y="{bottom + 43}" text-anchor="middle">'
        f"{escape(label)}</text></g>"
    )


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


def _ticks(end: float) -> list[float]:
    step = next((10.0**e * m for e in range(-3, 7) for m in (1, 2, 5) if end / (10.0**e * m) <= 10), end)
    return [step * i for i in range(int(end / step) + 1)]


def _curve(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most CURVE_POINTS points: means of neighbours where there are more."""
    group = -(-len(points) // CURVE_POINTS) or 1
    curve = []
    for i in range(0, len(points), group):
        part = points[i : i + group]
        known = [r for _, r in part if r is not None]
        curve.append((sum(t for t, _ in part) / len(part), sum(known) / len(known) if known else None))
    return curve


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


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + ("…" if length > 1 else "")


def _heat(level: float) -> Rgba:
    """Colour of a level in [0, 1]."""
    at = min(max(level, 0.0), 1.0) * (len(HEAT_ANCHORS) - 1)
    i = min(int(at), len(HEAT_ANCHORS) - 2)
    r, g, b = (round(lo + (hi - lo) * (at - i)) for lo, hi in zip(HEAT_ANCHORS[i], HEAT_ANCHORS[i + 1], strict=True))
    return (r, g, b, 1.0)


def heat_map(share: np.ndarray, counts: np.ndarray, top: float, order: np.ndarray, by_cell: bool) -> str:
    """Heat map of one server's calls [L, E]; the colour follows the square root of the share, 1 at `top`."""
    levels = 1 + np.rint(np.sqrt(share / top) * (HEAT_LEVELS - 1)).astype(int)
    palette = [(0, 0, 0, 0.0)] + [_heat(i / (HEAT_LEVELS - 1)) for i in range(HEAT_LEVELS)]

    def cell(layer: int, expert: int) -> str:
        return f"layer {layer}, expert {expert}: {counts[layer, expert]:,} calls, {percent(share[layer, expert], 1)}"

    def row(layer: int) -> str:
        best = np.argsort(-counts[layer], kind="stable")[:4]
        most = ", ".join(f"{e} ({percent(share[layer, e], 1)})" for e in best)
        return f"layer {layer}: {counts[layer].sum():,} calls; most to experts {most}"

    return _grid_svg(np.take_along_axis(levels, order, 1), palette, order, by_cell, cell, row)


def heat_legend(top: float, experts: int) -> str:
    stops = "".join(f'<stop offset="{i / 8}" stop-color="{_hex(_heat(i / 8))}"/>' for i in range(9))
    even = (1 / experts / top) ** 0.5
    ticks = [(0.0, "0"), (1.0, percent(top, 1))]
    if 0.25 < even < 0.75:
        ticks.insert(1, (even, f"even: {percent(1 / experts, 1)}"))
    marks = "".join(
        f'<path d="M{20 + 230 * at:.1f} 12v5" stroke="currentColor"/>'
        f'<text x="{20 + 230 * at:.1f}" y="29" text-anchor="middle">{text}</text>'
        for at, text in ticks
    )
    return (
        '<div class="legend"><span>share of the server\'s calls in the layer</span><svg viewBox="0 0 300 32"><defs>'
        f'<linearGradient id="heat">{stops}</linearGradient></defs><rect x="20" width="230" height="12" rx="2" '
        f'fill="url(#heat)"/>{marks}</svg></div>'
    )


def copies_map(
    resident: np.ndarray, own: list[int], names: list[str], colour: str, order: np.ndarray, by_cell: bool
) -> str:
    """Experts held by the devices `own`; the more copies an expert has in the cluster, the paler."""
    copies, here = resident.sum(0), np.any(resident[own], axis=0)
    levels = np.where(here, np.minimum(copies, len(COPY_OPACITY)), 0)
    rgb = tuple(bytes.fromhex(colour[1:]))
    palette = [(0, 0, 0, 0.0)] + [(rgb[0], rgb[1], rgb[2], opacity) for opacity in COPY_OPACITY]

    def cell(layer: int, expert: int) -> str:
        where = ", ".join(names[i] for i in np.flatnonzero(resident[:, layer, expert]))
        return f"layer {layer}, expert {expert}: {plural(int(copies[layer, expert]), 'copy')}, on {where}"

    def row(layer: int) -> str:
        alone = int((here[layer] & (copies[layer] == 1)).sum())
        return f"layer {layer}: {int(here[layer].sum())} of {here.shape[1]} experts here, {alone} of them nowhere else"

    return _grid_svg(np.take_along_axis(levels, order, 1), palette, order, by_cell, cell, row)


def _grid_svg(
    levels: np.ndarray,
    palette: list[Rgba],
    order: np.ndarray,
    by_cell: bool,
    cell_title: Callable[[int, int], str],
    row_title: Callable[[int], str],
) -> str:
    """Layers x experts, coloured by level (0: empty): a shape and title a cell, or a pixel a cell and a title a row."""
    layers, experts = levels.shape
    left, width, height = 26, 360, min(max(20 * layers, 60), 244)
    w, h = (width - left) / experts, height / layers
    gap = min(w, h) * 0.1 if by_cell else 0
    parts = [f'<rect class="plate" x="{left}" width="{width - left}" height="{height}" rx="2"/>']
    if not by_cell:
        parts.append(
            f'<image x="{left}" width="{width - left}" height="{height}" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{base64.b64encode(_png(levels, palette)).decode()}"/>'
        )
    step = -(-layers // int(height / 14))
    for layer in range(layers):
        if layer % step == 0:
            parts.append(f'<text x="{left - 6}" y="{h * (layer + 0.5) + 4:.1f}" text-anchor="end">{layer}</text>')
        hit = f'<rect class="hit" x="{left}" y="{h * layer:.2f}" width="{width - left}" height="{h:.2f}">'
        parts.append(f"{hit}<title>{escape(row_title(layer))}</title></rect>")
        for column in np.flatnonzero(levels[layer]) if by_cell else ():
            colour = palette[levels[layer, column]]
            faint = f' fill-opacity="{colour[3]}"' if colour[3] < 1 else ""
            title = escape(cell_title(layer, int(order[layer, column])))
            parts.append(
                f'<rect class="cell" x="{left + w * column + gap / 2:.4g}" y="{h * layer + gap / 2:.4g}" '
                f'width="{w - gap:.3g}" height="{h - gap:.3g}" fill="{_hex(colour)}"{faint}>'
                f"<title>{title}</title></rect>"
            )
    return f'<svg viewBox="0 -4 {width} {height + 8}" role="img" aria-label="layers by experts">{"".join(parts)}</svg>'


def _png(levels: np.ndarray, palette: list[Rgba]) -> bytes:
    """A palette image of one pixel a cell."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = levels.shape
    pixels = np.concatenate([np.zeros((rows, 1), np.uint8), levels.astype(np.uint8)], 1)  # a filter byte opens each row
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", b"".join(bytes(colour[:3]) for colour in palette))
        + chunk(b"tRNS", bytes(round(255 * colour[3]) for colour in palette))
        + chunk(b"IDAT", zlib.compress(pixels.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def _hex(colour: Rgba) -> str:
    return "#" + bytes(colour[:3]).hex()


def plural(count: int, noun: str) -> str:
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else several}"
