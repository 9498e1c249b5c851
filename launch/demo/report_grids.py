"""The page's grids of layers x experts: what each server calls, and where the copies live.

Within a layer all pictures put the experts in one order, by the server that called them most at first, so that what
belongs together stands together and the eye can follow it from the calls to the copies.
"""

from collections.abc import Sequence

import numpy as np

from launch.demo.svg import COPY_OPACITY, copies_map, heat_legend, heat_map
from launch.demo.words import Figures, amount, chip, escape, key, nbytes, percent, upper

CELL_LIMIT = 4000  # shapes a section may spend on single cells


def expert_order(result: Figures) -> np.ndarray:
    """Experts of each layer, ordered by the server that called them most at first, clearest first; int [L, E]."""
    layers, experts = result["model"]["layers"], result["model"]["experts"]
    if not result["activation"]:
        return np.tile(np.arange(experts), (layers, 1))
    share = _shares(np.asarray(result["activation"][0]["counts"], np.int64))
    home = np.where(share.any(0), share.argmax(0), len(share))
    return np.lexsort((-(2 * share.max(0) - share.sum(0)), home), axis=-1)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Share of each expert in the calls of its server and layer; [N, L, E]."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def activation(result: Figures, colours: dict[str, str], order: np.ndarray) -> str:
    snapshots = [(a, np.asarray(a["counts"], np.int64)) for a in result["activation"]]
    if not snapshots:
        return ""
    by_cell = sum(counts.size for _, counts in snapshots) <= CELL_LIMIT
    top = max(max(_shares(counts).max() for _, counts in snapshots), 1e-9)
    parts = []
    for snapshot, counts in snapshots:
        panels = []
        for server, (name, seen) in enumerate(zip(colours, counts, strict=False)):
            caption = chip(name, colours, snapshot["workload"].get(name, ""))
            note = f"busiest quarter of the experts: {percent(_top_quarter(seen))} of the calls"
            panels.append(_panel(caption, heat_map(_shares(counts)[server], seen, top, order, by_cell), note))
        parts.append(f"<h3>{escape(upper(snapshot['label']))}</h3>{_columns(panels, order.shape[1])}")
    return (
        '<section><h2>Experts each server calls</h2><p class="note">One row a layer, one cell an expert. In every '
        "picture the experts of a layer stand in the same order: first those that the first server called more than "
        "the others did before the first migration, then those of the second server, and so on.</p>"
        f"{heat_legend(top, order.shape[1])}{''.join(parts)}</section>"
    )


def _top_quarter(counts: np.ndarray) -> float | None:
    ranked = np.sort(counts, axis=-1)[:, ::-1]
    return float(ranked[:, : max(1, counts.shape[1] // 4)].sum() / counts.sum()) if counts.sum() else None


def placements(result: Figures, colours: dict[str, str], order: np.ndarray) -> str:
    if not result["placements"]:
        return ""
    size = result["model"]["expert_bytes"]
    held = [_held(placement, order.shape) for placement in result["placements"]]
    by_cell = sum(int(h.sum()) for h in held) <= CELL_LIMIT
    parts = []
    for placement, resident in zip(result["placements"], held, strict=True):
        devices = placement["devices"]
        labels = [f"{d['server']} {d['device']}" for d in devices]
        copies = resident.sum(0)
        panels = []
        for name in colours:
            own = [i for i, d in enumerate(devices) if d["server"] == name]
            svg = copies_map(resident, own, labels, colours[name], order, by_cell)
            share = f"{int(resident[own].any(0).sum()):,} of {copies.size:,} experts"
            panels.append(
                _panel(chip(name, colours, share), svg, "; ".join(_pool(devices[i], resident[i], size) for i in own))
            )
        often = ", ".join(
            f"{int(n):,} with {k}{' or more' if k == 4 else ''}"
            for k, n in enumerate(np.bincount(np.minimum(copies, 4).ravel(), minlength=5))
            if n
        )
        small = f"<small>from {amount(placement['at_s'], 1, 's')}; experts by copies: {often}</small>"
        parts.append(f"<h3>{escape(upper(placement['label']))} {small}</h3>{_columns(panels, order.shape[1])}")
    ink = "".join(
        key(text, f"color-mix(in srgb, var(--ink) {100 * opacity:.0f}%, var(--plate))")
        for text, opacity in zip(("the only copy", "one of two", "one of three or more"), COPY_OPACITY, strict=True)
    )
    return (
        '<section><h2>Where the copies live</h2><p class="note">The same cells in the same order; a coloured cell '
        "is an expert this server holds.</p>"
        f'<div class="legend">{ink}</div>'
        f"{''.join(parts)}</section>"
    )


def _held(placement: Figures, shape: Sequence[int]) -> np.ndarray:
    """bool [devices, L, E]"""
    held = np.zeros((len(placement["devices"]), *shape), bool)
    for i, device in enumerate(placement["devices"]):
        for layer, experts in enumerate(device["experts"]):
            held[i, layer, experts] = True
    return held


def _pool(device: Figures, held: np.ndarray, expert_bytes: int) -> str:
    """How much of a device's expert pool is in use, and that the pool is within its budget."""
    size = f"{nbytes(device['resident_bytes'])} of {nbytes(device['budget_bytes'])} for experts"
    slots = device["resident_bytes"] // max(expert_bytes, 1)
    return f'<span title="{size}">device {device["device"]}: {int(held.sum()):,} of {slots:,} slots in use</span>'


def _panel(caption: str, svg: str, below: str) -> str:
    return f'<figure class="panel card"><figcaption>{caption}</figcaption>{svg}<div class="note">{below}</div></figure>'


def _columns(panels: list[str], experts: int) -> str:
    return f'<div class="grid" style="--column:{min(max(2 * experts, 300), 500)}px">{"".join(panels)}</div>'
