"""The demo's figures as one HTML page that needs nothing else: no network, no script, no font, no image file.

`render` is a pure function from the figures (plain JSON types, format `dancemoe.demo/1`) to the page; nothing is
measured here. What was gained comes first (gains.py), then the course of the demo (timeline.py), then the grids of
experts (report_grids.py); the looks are in report.css.
"""

import os
from importlib import resources
from pathlib import Path

from launch.demo.gains import gains
from launch.demo.report_grids import activation, expert_order, placements
from launch.demo.timeline import timeline
from launch.demo.words import (
    DASH,
    SERVER_COLOURS,
    Figures,
    amount,
    chip,
    clip,
    escape,
    key,
    nbytes,
    percent,
    plural,
    seconds,
    upper,
)

MEMORY_WORDS = ("memory", "reserved", "budget", "resident")
SAMPLES, SAMPLE_CHARS = 48, 600
NARROW = 400  # of the timeline for phones, in CSS pixels


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
    order = expert_order(result)
    sections = (
        _headline(result),
        _timeline_section(result, colours),
        placements(result, colours, order),
        activation(result, colours, order),
        _phase_table(result, colours),
        _cluster(result, colours),
        _samples(result, colours),
    )
    css = resources.files("launch.demo").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>DanceMoE demo</title>'
        f"<style>\n{css}</style></head>\n<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _fewer(reduction: float) -> str:
    return f"{percent(abs(reduction))} {'fewer' if reduction >= 0 else 'more'}"


def _headline(result: Figures) -> str:
    head, model = result["headline"], result["model"]
    first, second = head.get("reduction_first"), head.get("reduction_second")
    title = "No migration took place" if first is None else f"{_fewer(first)} remote expert calls"
    if first is not None and second is not None:
        title += f", and {_fewer(second)} after the workloads traded places"
    against = "Fewer than uniform placement would have had with the calls of the same phase."
    same_calls = first is not None and all(p.get("remote_share_uniform") is not None for p in result["phases"])
    load = result.get("load")
    arrivals = ""
    if load:
        arrivals = f"{amount(load['requests_per_s'], 1)} requests a second came"
        if load["holds_per_s"]:
            arrivals += f", of {amount(load['holds_per_s'], 1)} that this machine can answer"
        arrivals += "."
    return (
        '<header class="hero"><div class="kicker">DanceMoE demo</div>'
        f"<h1>{title}</h1><p>{escape(model['name'])}: {plural(model['layers'], 'layer')} of "
        f"{plural(model['experts'], 'expert')}, top {model['top_k']}, {amount(model.get('parameters'))} parameters, "
        f"served by {plural(len(result['cluster']['servers']), 'server')} with room for "
        f"{amount(result['cluster'].get('copies'), 2)} copies of all experts between them. "
        f"{against if same_calls else ''} {arrivals}</p>{_network_gain(result)}</header>{gains(result)}{_checks(result)}"
    )


def _network_gain(result: Figures) -> str:
    """What the migrations did to a request's network time, in one sentence."""
    found = []
    for move in result["migrations"]:
        phase = result["phases"][move["phase"]]
        value, uniform = phase.get("network_request_s"), phase.get("network_request_uniform_s")
        if value is not None and uniform:
            found.append(f"{seconds(uniform)} → <b>{seconds(value)}</b> ({percent(1 - value / uniform)} less)")
    if not found:
        return ""
    return f"<p>Network time of a request, uniform placement → after the migration: {'; '.join(found)}.</p>"


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
            nbytes(result.get("peak_memory_bytes")),
            f"peak memory of the run, {seconds(result.get('wall_s'))}, seed {escape(result.get('seed'))}",
        ),
    )
    marks = {True: '<i class="mark good">✓</i> ', False: '<i class="mark bad">✗ failed:</i> ', None: ""}
    cards = (f'<div class="card"><b>{marks[ok]}{big}</b><span>{small}</span></div>' for ok, big, small in tiles)
    return f'<div class="grid fit checks">{"".join(cards)}</div>'


def _cluster(result: Figures, colours: dict[str, str]) -> str:
    every = max(result["model"]["layers"] * result["model"]["experts"], 1)
    cards = []
    for server in result["cluster"]["servers"]:
        rows = ""
        for number, device in enumerate(server["devices"]):
            title = ", ".join(f"{word} {amount(device[f'{word}_bytes'])} bytes" for word in MEMORY_WORDS)
            share = device["slots"] / every
            rows += (
                f'<span>device {number}</span><div title="{title}"><b>{amount(device["slots"])} experts</b>, '
                f'{percent(share)} of all<div class="track"><i style="width:{100 * min(share, 1):.1f}%"></i></div>'
                f"{nbytes(device['memory_bytes'])} of memory, {nbytes(device['reserved_bytes'])} of it for everything "
                "but experts</div>"
            )
        name = server["name"]
        cards.append(
            f'<div class="card" style="--c:{colours[name]}">{chip(name, colours)}<div class="memory">{rows}</div></div>'
        )
    return (
        '<section><h2>The cluster</h2><p class="note">How many of all experts each device has memory for.</p>'
        f'<div class="grid fit" style="--column:250px">{"".join(cards)}</div></section>'
    )


def _timeline_section(result: Figures, colours: dict[str, str]) -> str:
    moves = "".join(_move(move, result["phases"]) for move in result["migrations"])
    keys = "".join(key(server, colour) for server, colour in colours.items())
    return (
        '<section><h2>While it served</h2><p class="note">Above, the local ratio: the share of expert calls served on the '
        "server where they arose; thin: as measured, broad: mean of the phase. Shaded: experts move. No line: nothing was "
        f'measured.</p><div class="card"><div class="legend narrow">{keys}</div>'
        f"{timeline(result, colours)}{timeline(result, colours, NARROW)}</div>"
        + (f'<ol class="moves">{moves}</ol>' if moves else "")
        + "</section>"
    )


def _move(move: Figures, phases: list[Figures]) -> str:
    """A migration, with the remote shares of the phases around it, which the bars above show too."""
    before, after = (phases[n].get("remote_share") for n in (move["phase"] - 1, move["phase"]))
    return (
        f"<li><b>{escape(move['from'])} → {escape(move.get('label') or move['to'])}</b> at {amount(move['at_s'], 1, 's')}: "
        f"{plural(move['copies_added'], 'copy')} added, {amount(move['copies_dropped'])} dropped, "
        f"{nbytes(move['bytes_moved'])} moved; staged in {seconds(move['stage_s'])} in the background, longest stall "
        f"between two steps {seconds(move['commit_s'])} with {plural(move['requests_in_flight'], 'request')} in flight; "
        f"calls that leave their server {percent(before)} → {percent(after)}</li>"
    )


def _phase_table(result: Figures, colours: dict[str, str]) -> str:
    heads = (
        "local ratio, mean",
        "network time of a request",
        "layers that needed the network",
        "requests",
        "tokens",
        "p50 latency",
        "p95 latency",
        "tokens/s",
        "bytes needed elsewhere",
    )
    rows = []
    for number, p in enumerate(result["phases"], 1):
        local = "".join(
            f'{key(p["workload"].get(s, DASH), c)}<span title="{percent(p["local_ratio"].get(s), 2)}">'
            f"{percent(p['local_ratio'].get(s))}</span>"
            for s, c in colours.items()
        )
        cells = (
            f"<b>{percent(p['local_ratio_mean'])}</b>",
            seconds(p.get("network_request_s")),
            percent(p["network_layers"]),
            amount(p["requests"]),
            amount(p["tokens"]),
            seconds(p["latency_p50_s"]),
            seconds(p["latency_p95_s"]),
            amount(p["tokens_per_s"]),
            nbytes(p.get("bytes_needed")),
        )
        rows.append(
            f'<tr title="{amount(p.get("bytes_exchanged"))} bytes exchanged, padding included; {amount(p.get("steps"))} steps">'
            f"<td>{number} {escape(p['name'])}<small>placement {escape(p['placement'])}</small></td>"
            f'<td class="left"><div class="local">{local}</div></td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    keys = "".join(key(server, colour) for server, colour in colours.items())
    return (
        f'<section><h2>Phases</h2><div class="legend">{keys}</div><div class="card scroll"><table><thead><tr>'
        '<th>phase</th><th class="left">workload and local ratio by server</th>'
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "</section>"
    )


def _samples(result: Figures, colours: dict[str, str]) -> str:
    parts, shown = [], result["samples"][:SAMPLES]
    for phase in dict.fromkeys(sample["phase"] for sample in shown):
        cards = "".join(_sample(s, colours) for s in shown if s["phase"] == phase)
        parts.append(f'<h3>{escape(upper(phase))}</h3><div class="grid text">{cards}</div>')
    note = '<p class="note">The prompt in grey, what the model wrote marked.</p>'
    return f"<section><h2>Generated text</h2>{note}{''.join(parts)}</section>" if parts else ""


def _sample(sample: Figures, colours: dict[str, str]) -> str:
    prompt, output = sample["prompt"], sample["output"]
    prompt = prompt if len(prompt) <= SAMPLE_CHARS else "…" + prompt[-SAMPLE_CHARS:]
    server = sample["server"]
    return (
        f'<div class="card" style="--c:{colours[server]}">{chip(server, colours, sample["domain"])}'
        f"<pre>{escape(prompt)}<ins>{escape(clip(output, SAMPLE_CHARS))}</ins></pre></div>"
    )
