"""Inline SVG of the demo's page: layers x experts as grids. Curves over time are in timeline.py.

A picture knows nothing of the page around it but the classes of report.css. Every shape carries its exact values as a
hover title. Grids too large for one shape a cell become an embedded pixel image with one title a row.
"""

import base64
import struct
import zlib
from collections.abc import Callable

import numpy as np

from launch.demo.words import escape, percent, plural

Rgba = tuple[int, int, int, float]

HEAT_ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, in quarters
HEAT_LEVELS = 32
COPY_OPACITY = (1.0, 0.6, 0.36)  # of an expert with one, two, more copies in the cluster


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
