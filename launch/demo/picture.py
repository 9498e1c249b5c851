"""The demo's result as one small picture, for a README: the local ratio over the phases, and what it changed.

`python -m launch demo --picture FILE.png` draws it; light, and legible at 800 pixels.
"""

from pathlib import Path
from typing import Any

from launch.demo.words import SERVER_COLOURS, Figures

INK, SOFT, PLATE = "#1d2329", "#5d6771", "#eef0f1"
ACCENT = "#3b528b"


def draw(result: Figures, file: Path) -> None:
    """Write the picture as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": SOFT, "ytick.color": SOFT}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(8, 5.2), facecolor="white", layout="constrained")
        rows = figure.add_gridspec(2, 3, height_ratios=(1.25, 1))
        _ratios(figure.add_subplot(rows[0, :]), result)
        phases = result["phases"]
        names = [f"{n} {phase['name'].replace(', ', chr(10))}" for n, phase in enumerate(phases, 1)]
        shares = [[100 * p[key] for p in phases] for key in ("remote_share", "remote_share_uniform")]
        network = [[1e3 * (p[key] or 0) for p in phases] for key in ("network_request_s", "network_request_uniform_s")]
        _bars(figure.add_subplot(rows[1, 0]), "calls to other servers", names, *shares, unit="%")
        _bars(figure.add_subplot(rows[1, 1]), "network, a request*", None, *network, unit="ms")
        _latency(figure.add_subplot(rows[1, 2]), phases)
        figure.supxlabel(_note(result), fontsize=8, color=SOFT, x=0.01, ha="left")
        figure.savefig(file, dpi=100, format="png")
        pyplot.close(figure)


def _ratios(axes: Any, result: Figures) -> None:
    """Local ratio of every server: the mean of each phase, and as measured."""
    phases = result["phases"]
    for number, phase in enumerate(phases):
        start, end = phase["start_s"], phase["end_s"]
        axes.axvspan(start, end, color=PLATE, alpha=1 if number % 2 == 0 else 0.5, lw=0)
        label = f"{number + 1} {phase['name'].replace(', ', chr(10))}"
        axes.text((start + end) / 2, 2, label, ha="center", va="bottom", color=INK, fontsize=9)
    for number, server in enumerate(result["cluster"]["servers"]):
        name, color = server["name"], SERVER_COLOURS[number % len(SERVER_COLOURS)]
        for phase in phases:
            within = [t for t in result["timeline"] if phase["start_s"] < t["t_s"] <= phase["end_s"] + 0.01]
            ratio = [float("nan") if (r := t["local_ratio"].get(name)) is None else 100 * r for t in within]
            axes.plot([t["t_s"] for t in within], ratio, color=color, lw=1, alpha=0.75)
            if (mean := phase["local_ratio"].get(name)) is not None:
                axes.hlines(100 * mean, phase["start_s"], phase["end_s"], color=color, lw=4, alpha=0.5)
                if phase is phases[-1]:
                    axes.text(phase["end_s"], 100 * mean, f" {name}", color=color, va="center", fontweight="bold")
    marks = [(m["at_s"], f"migration {n}", "-") for n, m in enumerate(result["migrations"], 1)]
    for at, text, line in [*marks, *((e["at_s"], e["label"], "--") for e in result["events"])]:
        axes.axvline(at, color=INK, lw=1.2, ls=line)
        axes.text(at, 101, f"{text} ", ha="center", va="bottom", fontsize=9, fontweight="bold")
    end = max(phase["end_s"] for phase in phases)
    axes.set(xlim=(0, end), ylim=(0, 100), yticks=range(0, 101, 25), ylabel="local calls, %")
    axes.set_xlabel("seconds", labelpad=0)
    _plain(axes)


def _bars(axes: Any, title: str, names: list[str] | None, values: list[float], uniform: list[float], unit: str) -> None:
    """A bar for each phase, before what uniform placement would have had with the same calls."""
    at = range(len(values))
    axes.barh(at, uniform, height=0.86, color=SOFT, alpha=0.35)
    axes.barh(at, values, height=0.5, color=ACCENT)
    most = max([*values, *uniform, 1e-9])
    for i, value in enumerate(values):
        axes.text(most * 1.03, i, f"{value:.0f} {unit}", va="center", fontweight="bold")
    axes.set(xlim=(0, most * 1.3), xticks=[], yticks=at)
    _finish(axes, title, names)


def _latency(axes: Any, phases: list[Figures]) -> None:
    """Median latency: as measured, and the network time beside it."""
    measured = [phase["latency_p50_s"] or 0.0 for phase in phases]
    network = [phase["network_request_s"] or 0.0 for phase in phases]
    axes.barh(range(len(phases)), measured, height=0.5, color=ACCENT)
    axes.barh(range(len(phases)), network, left=measured, height=0.5, color="white", edgecolor=ACCENT, hatch="/////")
    most = max(a + b for a, b in zip(measured, network, strict=True)) or 1.0
    for i, (own, links) in enumerate(zip(measured, network, strict=True)):
        axes.text(most * 1.03, i, f"{own + links:.2f} s", va="center", fontweight="bold")
    axes.set(xlim=(0, most * 1.3), xticks=[], yticks=range(len(phases)))
    _finish(axes, "latency, median + network*", None)


def _finish(axes: Any, title: str, names: list[str] | None) -> None:
    axes.set_yticklabels(names or [], color=INK, fontsize=9)
    axes.set_ylim(len(axes.get_yticks()) - 0.5, -0.5)  # the first phase on top
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _note(result: Figures) -> str:
    link = ""
    if (latency := result["cluster"]["latency_s"]) is not None:
        rate = 8e-6 * result["cluster"]["bandwidth_bytes_per_s"]
        link = f" of {rate:,.0f} Mbit/s and {1e3 * latency:.2g} ms"
    return (
        f"Grey: uniform placement on the same calls.  * computed for links{link}; latency is measured on one machine."
    )
