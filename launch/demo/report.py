"""The demo's figures as one HTML page that needs nothing else: no network, no script, no font, no image file.

`render` is a pure function from the figures (plain JSON types, format `dancemoe.demo/1`) to the page; nothing is
measured here. Within a layer all pictures put the experts in one order, by the server that called them most at first,
so that what belongs together stands together and the eye can follow it from the calls to the copies. The pictures
themselves are in pictures.py, the looks in report.css.
"""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from launch.demo.svg import (
    COPY_OPACITY,
    DASH,
    NBSP,
    Figures,
    amount,
    clip,
    copies_map,
    escape,
    heat_legend,
    heat_map,
    percent,
    plural,
    timeline,
)

CELL_LIMIT = 4000  # shapes a section may spend on single cells
MEMORY_WORDS = ("memory", "reserved", "budget", "resident")
SAMPLES, SAMPLE_CHARS = 48, 600
# Okabe and Ito's colours, told apart with any colour vision; olive and grey for their yellow and black, which vanish on
# light or dark.
SERVER_COLOURS = ("#0072b2", "#e08e0b", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7f1d", "#8c8c99")


def write(result: Figures, path: Path) -> None:
    """Write the page of `result` to `path`: all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(render(result), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render(result: Figures) -> str:
    """The figures of one demo run as a self-contained HTML page."""
    colours = {s["name"]: SERVER_COLOURS[i % len(SERVER_COLOURS)] for i, s in enumerate(result["cluster"]["servers"])}
    order = _expert_order(result)
    sections = (
        _headline(result),
        _cluster(result, colours),
        _timeline_section(result, colours),
        _phase_table(result, colours),
        _activation(result, colours, order),
        _placements(result, colours, order),
        _samples(result, colours),
    )
    css = resources.files("launch.demo").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>DanceMoE demo</title>'
        f"<style>\n{css}</style></head>\n<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


# ---- words and numbers -------------------------------------------------------------------------------------------


def _bytes(value: float | None) -> str:
    if value is None:
        return DASH
    unit = 0
    while value >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}{NBSP}{('B', 'KB', 'MB', 'GB', 'TB')[unit]}"


def _seconds(value: float | None) -> str:
    if value is None:
        return DASH
    return amount(1000 * value, 0, "ms") if value < 0.1 else amount(value, 2 if value < 10 else 1, "s")


def _fewer(reduction: float) -> str:
    return f"{percent(abs(reduction))} {'fewer' if reduction >= 0 else 'more'}"


def _chip(name: str, colours: dict[str, str], detail: str = "") -> str:
    small = f"<small>{escape(detail)}</small>" if detail else ""
    return f'<span class="chip" style="--c:{colours[name]}">{escape(name)}{small}</span>'


def _key(text: str, colour: str) -> str:
    return f'<span class="key" style="--c:{colour}">{escape(text)}</span>'


# ---- headline and cluster ----------------------------------------------------------------------------------------


def _headline(result: Figures) -> str:
    head, model = result["headline"], result["model"]
    first, second = head.get("reduction_first"), head.get("reduction_second")
    title = "No migration took place" if first is None else f"{_fewer(first)} remote expert calls"
    if first is not None and second is not None:
        title += f", and {_fewer(second)} after the workloads traded places"
    rows = (("uniform placement", "uniform"), ("after migration 1", "first"), ("after migration 2", "second"))
    shares = [(label, key, head.get(f"remote_share_{key}")) for label, key in rows]
    longest = max([share for *_, share in shares if share is not None], default=0) or 1
    bars = "".join(
        f'<span>{label}</span><span class="bar{" base" if key == "uniform" else ""}" title="{percent(share, 2)}">'
        f'<i style="width:{75 * (share or 0) / longest:.1f}%"></i>{percent(share)}</span>'
        for label, key, share in shares
    )
    against = "Fewer than uniform placement would have had with the calls of the same phase."
    same_calls = first is not None and all(p.get("remote_share_uniform") is not None for p in result["phases"])
    return (
        '<header class="hero"><div><div class="kicker">DanceMoE demo</div>'
        f"<h1>{title}</h1><p>{escape(model['name'])}: {plural(model['layers'], 'layer')} of "
        f"{plural(model['experts'], 'expert')}, top {model['top_k']}, {amount(model.get('parameters'))} parameters, "
        f"served by {plural(len(result['cluster']['servers']), 'server')} with room for "
        f"{amount(result['cluster'].get('copies'), 2)} copies of all experts between them. "
        f"{against if same_calls else ''}</p></div>"
        '<div class="card"><p class="kicker">Share of expert calls that went to another server</p>'
        f'<div class="share">{bars}</div></div></header>{_checks(result)}'
    )


def _checks(result: Figures) -> str:
    checks = result["checks"]
    wrong, compiled, within = checks["mismatches"], checks["compilations_after_warmup"], checks["within_budget"]
    tiles = (
        (
            wrong == 0 and checks["requests_checked"] > 0,
            plural(wrong, "difference"),
            f"to the dense reference in {plural(checks['requests_checked'], 'request')}, "
            f"{plural(checks['tokens_checked'], 'token')}",
        ),
        (compiled == 0, plural(compiled, "compilation"), "of the serving steps after warm-up"),
        (bool(within), "within budget" if within else "over budget", "expert bytes resident on each device"),
        (
            None,
            _bytes(result.get("peak_memory_bytes")),
            f"peak memory of the run, {_seconds(result.get('wall_s'))}, seed {escape(result.get('seed'))}",
        ),
    )
    marks = {True: '<i class="mark good">✓</i> ', False: '<i class="mark bad">✗ failed:</i> ', None: ""}
    cards = (f'<div class="card"><b>{marks[ok]}{big}</b><span>{small}</span></div>' for ok, big, small in tiles)
    return f'<div class="grid fit checks">{"".join(cards)}</div>'


def _cluster(result: Figures, colours: dict[str, str]) -> str:
    servers = result["cluster"]["servers"]
    largest = max((d["memory_bytes"] for s in servers for d in s["devices"]), default=1) or 1
    cards = []
    for server in servers:
        rows = ""
        for number, device in enumerate(server["devices"]):
            memory = device["memory_bytes"] or 1
            reserved, resident = 100 * device["reserved_bytes"] / memory, 100 * device["resident_bytes"] / memory
            title = ", ".join(f"{word} {amount(device[f'{word}_bytes'])} bytes" for word in MEMORY_WORDS)
            rows += (
                f'<span>device {number}</span><div title="{title}"><b>{_bytes(memory)}</b>, '
                f'{amount(device["slots"])} slots<div class="track" style="width:{100 * memory / largest:.1f}%">'
                f'<i class="reserved" style="width:{reserved:.1f}%"></i>'
                f'<i style="width:{resident:.1f}%"></i></div></div>'
            )
        name = server["name"]
        cards.append(
            f'<div class="card" style="--c:{colours[name]}">{_chip(name, colours)}'
            f'<div class="memory">{rows}</div></div>'
        )
    return (
        '<section><h2>The cluster</h2><p class="note">Memory of each device, to scale: hatched what everything but '
        "experts needs, coloured the experts resident at the end, grey what is free. A slot holds one expert of any "
        f'layer.</p><div class="grid fit" style="--column:250px">{"".join(cards)}</div></section>'
    )


# ---- local ratio over time ---------------------------------------------------------------------------------------


def _timeline_section(result: Figures, colours: dict[str, str]) -> str:
    moves = "".join(
        f"<li><b>{escape(m['from'])} → {escape(m.get('label') or m['to'])}</b> at {amount(m['at_s'], 1, 's')}: "
        f"{plural(m['copies_added'], 'copy')} added, {amount(m['copies_dropped'])} dropped, "
        f"{_bytes(m['bytes_moved'])} moved; staged in {_seconds(m['stage_s'])} in the background, longest stall "
        f"between two steps {_seconds(m['commit_s'])} with {plural(m['requests_in_flight'], 'request')} in flight; remote "
        f"share {percent(m['remote_share_before'])} → {percent(m['remote_share_after'])}</li>"
        for m in result["migrations"]
    )
    return (
        '<section><h2>Local ratio over time</h2><p class="note">Share of expert calls served on the server where they '
        "arose. Thin: as measured; broad: mean of the phase.</p>"
        f'<div class="card"><div class="scroll">{timeline(result, colours)}</div></div>'
        + (f'<ol class="moves">{moves}</ol>' if moves else "")
        + "</section>"
    )


# ---- phases ------------------------------------------------------------------------------------------------------


def _phase_table(result: Figures, colours: dict[str, str]) -> str:
    heads = (
        "local ratio, mean",
        "layers that needed the network",
        "requests",
        "tokens",
        "p50 latency",
        "p95 latency",
        "tokens/s",
        "bytes exchanged",
    )
    rows = []
    for number, p in enumerate(result["phases"], 1):
        local = "".join(
            f'{_key(p["workload"].get(s, DASH), c)}<span title="{percent(p["local_ratio"].get(s), 2)}">'
            f"{percent(p['local_ratio'].get(s))}</span>"
            for s, c in colours.items()
        )
        cells = (
            f"<b>{percent(p['local_ratio_mean'])}</b>",
            percent(p["network_layers"]),
            amount(p["requests"]),
            amount(p["tokens"]),
            _seconds(p["latency_p50_s"]),
            _seconds(p["latency_p95_s"]),
            amount(p["tokens_per_s"]),
            _bytes(p["bytes_exchanged"]),
        )
        rows.append(
            f'<tr title="{amount(p.get("bytes_needed"))} bytes needed, {amount(p.get("steps"))} steps">'
            f"<td>{number} {escape(p['name'])}<small>placement {escape(p['placement'])}</small></td>"
            f'<td class="left"><div class="local">{local}</div></td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    keys = "".join(_key(server, colour) for server, colour in colours.items())
    return (
        f'<section><h2>Phases</h2><div class="legend">{keys}</div><div class="card scroll"><table><thead><tr>'
        '<th>phase</th><th class="left">workload and local ratio by server</th>'
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "</section>"
    )


# ---- layers x experts --------------------------------------------------------------------------------------------


def _expert_order(result: Figures) -> np.ndarray:
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


def _activation(result: Figures, colours: dict[str, str], order: np.ndarray) -> str:
    snapshots = [(a, np.asarray(a["counts"], np.int64)) for a in result["activation"]]
    if not snapshots:
        return ""
    by_cell = sum(counts.size for _, counts in snapshots) <= CELL_LIMIT
    top = max(max(_shares(counts).max() for _, counts in snapshots), 1e-9)
    parts = []
    for snapshot, counts in snapshots:
        panels = []
        for server, (name, seen) in enumerate(zip(colours, counts, strict=False)):
            caption = _chip(name, colours, snapshot["workload"].get(name, ""))
            note = f"busiest quarter of the experts: {percent(_top_quarter(seen))} of the calls"
            panels.append(_panel(caption, heat_map(_shares(counts)[server], seen, top, order, by_cell), note))
        parts.append(f"<h3>{escape(_upper(snapshot['label']))}</h3>{_columns(panels, order.shape[1])}")
    return (
        '<section><h2>Experts each server calls</h2><p class="note">One row a layer, one cell an expert. In every '
        "picture the experts of a layer stand in the same order: first those that the first server called more than "
        "the others did before the first migration, then those of the second server, and so on.</p>"
        f"{heat_legend(top, order.shape[1])}{''.join(parts)}</section>"
    )


def _top_quarter(counts: np.ndarray) -> float | None:
    ranked = np.sort(counts, axis=-1)[:, ::-1]
    return float(ranked[:, : max(1, counts.shape[1] // 4)].sum() / counts.sum()) if counts.sum() else None


def _placements(result: Figures, colours: dict[str, str], order: np.ndarray) -> str:
    if not result["placements"]:
        return ""
    held = [_held(placement, order.shape) for placement in result["placements"]]
    by_cell = sum(int(h.sum()) for h in held) <= CELL_LIMIT
    parts = []
    for placement, resident in zip(result["placements"], held, strict=True):
        devices = placement["devices"]
        labels = [f"{d['server']} {d['device']}" for d in devices]
        largest = max((d["budget_bytes"] for d in devices), default=1) or 1
        copies = resident.sum(0)
        panels = []
        for name in colours:
            own = [i for i, d in enumerate(devices) if d["server"] == name]
            svg = copies_map(resident, own, labels, colours[name], order, by_cell)
            share = f"{int(resident[own].any(0).sum()):,} of {copies.size:,} experts"
            memory = _memory_bars([devices[i] for i in own], largest, colours[name])
            panels.append(_panel(_chip(name, colours, share), svg, memory))
        often = ", ".join(
            f"{int(n):,} with {k}{' or more' if k == 4 else ''}"
            for k, n in enumerate(np.bincount(np.minimum(copies, 4).ravel(), minlength=5))
            if n
        )
        small = f"<small>from {amount(placement['at_s'], 1, 's')}; experts by copies: {often}</small>"
        parts.append(f"<h3>{escape(_upper(placement['label']))} {small}</h3>{_columns(panels, order.shape[1])}")
    ink = "".join(
        _key(text, f"color-mix(in srgb, var(--ink) {100 * opacity:.0f}%, var(--plate))")
        for text, opacity in zip(("the only copy", "one of two", "one of three or more"), COPY_OPACITY, strict=True)
    )
    return (
        '<section><h2>Where the copies live</h2><p class="note">The same cells in the same order; a coloured cell '
        "is an expert this server holds. Below, the bytes of each device's expert pool within its budget, to scale.</p>"
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


def _memory_bars(devices: list[Figures], largest: int, colour: str) -> str:
    rows = "".join(
        f'<span>device {d["device"]}</span><div title="{d["resident_bytes"]:,} of {d["budget_bytes"]:,} bytes">'
        f"{_bytes(d['resident_bytes'])} of {_bytes(d['budget_bytes'])}"
        f'<div class="track" style="width:{100 * d["budget_bytes"] / largest:.1f}%">'
        f'<i style="width:{100 * d["resident_bytes"] / (d["budget_bytes"] or 1):.1f}%"></i></div></div>'
        for d in devices
    )
    return f'<div class="memory" style="--c:{colour}">{rows}</div>'


def _panel(caption: str, svg: str, below: str) -> str:
    return f'<figure class="panel card"><figcaption>{caption}</figcaption>{svg}<div class="note">{below}</div></figure>'


def _columns(panels: list[str], experts: int) -> str:
    return f'<div class="grid" style="--column:{min(max(2 * experts, 300), 500)}px">{"".join(panels)}</div>'


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- text --------------------------------------------------------------------------------------------------------


def _samples(result: Figures, colours: dict[str, str]) -> str:
    parts, shown = [], result["samples"][:SAMPLES]
    for phase in dict.fromkeys(sample["phase"] for sample in shown):
        cards = "".join(_sample(s, colours) for s in shown if s["phase"] == phase)
        parts.append(f'<h3>{escape(_upper(phase))}</h3><div class="grid text">{cards}</div>')
    note = '<p class="note">The prompt in grey, what the model wrote marked.</p>'
    return f"<section><h2>Generated text</h2>{note}{''.join(parts)}</section>" if parts else ""


def _sample(sample: Figures, colours: dict[str, str]) -> str:
    prompt, output = sample["prompt"], sample["output"]
    prompt = prompt if len(prompt) <= SAMPLE_CHARS else "…" + prompt[-SAMPLE_CHARS:]
    server = sample["server"]
    return (
        f'<div class="card" style="--c:{colours[server]}">{_chip(server, colours, sample["domain"])}'
        f"<pre>{escape(prompt)}<ins>{escape(clip(output, SAMPLE_CHARS))}</ins></pre></div>"
    )
