"""Figures for `--plot`: where copies live, what strategies cost, how simulated latency behaves. The only matplotlib."""

import io
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from placement.data.placement import Placement
from placement.files import InputError, write_bytes

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's palette: told apart by readers who do not see all colours. Markers differ too, for print in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C6D1F", "#7F7F7F", "#5D3FD3")
MARKERS = "osD^vP*X<>"
_STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False}
_PANELS = 6  # servers that get a panel each; more are shown together


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse a figure that could not be written, before any work.

    Raises:
        InputError: another suffix, or a folder that does not admit the file.
    """
    target = Path(os.path.realpath(path))
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: unsupported suffix {target.suffix!r}; use one of {', '.join(SUFFIXES)}")
    if target.exists() and not target.is_file():
        raise InputError(f"--plot {path}: cannot be written: not a regular file; name a file")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"--plot {path}: cannot be written: {target.parent} is no folder that can be written to")


def plot_placement(placement: Placement, path: str | os.PathLike[str]) -> None:
    """Layers x experts: the copies of each expert in the cluster, and what each server holds.

    Up to 6 servers have a panel each, in which a colour is a device; of more servers one panel shows how many experts
    of each layer they hold.

    Raises:
        InputError: the file cannot be written.
    """
    plt = _pyplot()
    resident = placement.resident
    servers = list(dict.fromkeys(server for server, _ in placement.devices))
    of = np.array([servers.index(server) for server, _ in placement.devices])
    held = np.stack([resident[of == n].any(0) for n in range(len(servers))])
    _, layers, experts = resident.shape
    separate = len(servers) <= _PANELS
    panels = 1 + (len(servers) if separate else 1)
    wide = experts > 2.5 * layers or experts > 100
    rows, columns = (panels, 1) if wide else (-(-panels // 2), 2)
    height = np.clip(0.05 * layers + 0.8, 1.8, 3.6) if wide else np.clip(4.6 * layers / experts + 0.6, 1.6, 5.0)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(10, height * rows + 0.8), squeeze=False, layout="constrained"
        )
        flat = axes.ravel()
        _copies(figure, flat[0], held.sum(0))
        if separate:
            for n, server in enumerate(servers):
                _held(flat[1 + n], resident[of == n], f"on {server}: {held[n].sum()} experts")
            _device_legend(plt, figure, int(np.bincount(of).max()))
        else:
            _experts_held(figure, flat[1], held.sum(2))
        for axis in flat[panels:]:
            axis.set_axis_off()
        spread = resident.sum() / (layers * experts)
        figure.suptitle(f"{placement.model['name']}, {placement.strategy}: {spread:.2f} copies per expert")
        _save(plt, figure, path)


def _layers_by_experts(axis: Any, title: str) -> None:
    axis.set(title=title, xlabel="expert", ylabel="layer")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(True)


def _copies(figure: Any, axis: Any, copies: np.ndarray) -> None:
    from matplotlib.colors import BoundaryNorm

    top = int(copies.max())
    steps = np.unique(np.linspace(1, top + 1, min(top, 10) + 1).astype(int)) - 0.5
    norm = BoundaryNorm(steps if len(steps) > 1 else [0.5, 1.5], 256)
    image = axis.imshow(copies, cmap="viridis_r", norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, pad=0.015, label="servers with a copy")
    middle = (steps[1:] + steps[:-1]) / 2
    names = [_range(low + 0.5, high - 0.5) for low, high in itertools.pairwise(steps)]
    bar.set_ticks(middle, labels=names)
    bar.ax.minorticks_off()
    _layers_by_experts(axis, "copies in the cluster")


def _range(low: float, high: float) -> str:
    return f"{low:g}" if high <= low else f"{low:g}-{high:g}"


def _held(axis: Any, resident: np.ndarray, title: str) -> None:
    """One server, bool [G, L, E]: which device holds what; the first of several that do."""
    picture = np.ones((*resident.shape[1:], 3))
    for device in range(len(resident))[::-1]:
        colour = COLOURS[device % len(COLOURS)].lstrip("#")
        picture[resident[device]] = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    axis.imshow(picture, aspect="auto", interpolation="nearest")
    _layers_by_experts(axis, title)


def _device_legend(plt: Any, figure: Any, devices: int) -> None:
    shown = min(devices, len(COLOURS))
    swatches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[device]) for device in range(shown)]
    swatches.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#999999"))
    names = [f"on its device {device}" for device in range(shown)] if devices > 1 else ["on its device"]
    figure.legend(swatches, [*names, "not on this server"], loc="outside lower center", ncols=6, frameon=False)


def _experts_held(figure: Any, axis: Any, amount: np.ndarray) -> None:
    image = axis.imshow(amount.T, cmap="viridis_r", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axis, pad=0.015, label="experts held")
    _layers_by_experts(axis, f"experts of each layer on each of {len(amount)} servers")
    axis.set_xlabel("server")


def plot_costs(costs: Mapping[str, Mapping[str, Any]], title: str, path: str | os.PathLike[str]) -> None:
    """Remote share of calls against P(a layer needs the network); strategies that none beats in both are joined.

    Args:
        costs: by strategy, with `remote_share` and `network_probability`.
        title: of the figure.
        path: where to write it.

    Raises:
        InputError: the file cannot be written.
    """
    plt = _pyplot()
    points = {name: (cost["remote_share"], cost["network_probability"]) for name, cost in costs.items()}
    best = frontier(points)
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
        if len(best) > 1:
            line = np.array([points[name] for name in best]).T
            axis.plot(*line, color="#999999", zorder=1, label="frontier", drawstyle="steps-post")
        for i, (name, point) in enumerate(points.items()):
            style: dict[str, Any] = {"s": 75 if name in best else 45, "edgecolors": "black" if name in best else "none"}
            marker, colour = MARKERS[i % len(MARKERS)], COLOURS[i % len(COLOURS)]
            axis.scatter(*point, marker=marker, color=colour, label=name, zorder=2, **style)
        axis.set(title=title, xlabel="remote share of calls (mean over servers)")
        axis.set_ylabel("P(a token's layer needs the network)")
        axis.grid(color="#E5E5E5", zorder=0)
        axis.margins(0.08)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        figure.supxlabel("Lower left is better. Black rims: no other strategy is as good in both.", fontsize=8)
        _save(plt, figure, path)


def plot_parts(parts: Mapping[str, Mapping[str, float]], title: str, path: str | os.PathLike[str]) -> None:
    """Where time goes: a bar for each name, made of parts in seconds.

    Raises:
        InputError: the file cannot be written.
    """
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 0.38 * len(parts) + 1.5), layout="constrained")
        left = np.zeros(len(parts))
        for i, part in enumerate(next(iter(parts.values()), {})):
            values = np.array([1e3 * bar[part] for bar in parts.values()])
            axis.barh(list(parts), values, left=left, color=COLOURS[i], label=part, height=0.7)
            left += values
        axis.invert_yaxis()
        axis.set(title=title, xlabel="milliseconds of a decoded token")
        axis.grid(color="#E5E5E5", axis="x")
        axis.set_axisbelow(True)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        _save(plt, figure, path)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names that no other beats in both figures, from left to right; of equal ones the first."""
    best, lowest = [], np.inf
    for name in sorted(points, key=lambda name: points[name]):
        if points[name][1] < lowest:
            best.append(name)
            lowest = points[name][1]
    return best


def plot_latencies(latency: Mapping[str, np.ndarray], title: str, path: str | os.PathLike[str]) -> None:
    """Distribution of request latency by strategy; latency in seconds, [R] each.

    Raises:
        InputError: the file cannot be written.
    """
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
        for i, (name, values) in enumerate(latency.items()):
            share = np.arange(1, len(values) + 1) / len(values)
            axis.step(np.sort(values), share, where="post", color=COLOURS[i % len(COLOURS)], label=name)
        axis.set(
            title=title, xlabel="request latency (s)", ylabel="share of requests at most this slow", ylim=(0, 1.02)
        )
        axis.grid(color="#E5E5E5")
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        _save(plt, figure, path)


def plot_grid(
    cells: Mapping[tuple[str, int, float, float], Mapping[str, Any]], title: str, path: str | os.PathLike[str]
) -> None:
    """Mean latency over bandwidth, a column per cluster size, a row per gap, both axes logarithmic.

    Of one strategy alone there is one column, with a line for each cluster size.

    Args:
        cells: `mean` in seconds by strategy, GPUs, Mbit/s and gap.
        title: of the figure.
        path: where to write it.

    Raises:
        InputError: the file cannot be written.
    """
    plt = _pyplot()
    strategies = list(dict.fromkeys(cell[0] for cell in cells))
    gpus = sorted({cell[1] for cell in cells})
    bandwidths, gaps = (sorted({float(cell[i]) for cell in cells}) for i in (2, 3))
    by_size = [(f"{number} GPUs", [(name, (name, number)) for name in strategies]) for number in gpus]
    if len(strategies) == 1:
        by_size = [(strategies[0], [(f"{number} GPUs", (strategies[0], number)) for number in gpus])]
    with plt.rc_context(_STYLE):
        size = (2.5 * len(by_size) + 1.8 + (len(by_size) == 1), 2.1 * len(gaps) + 0.8)
        figure, axes = plt.subplots(
            len(gaps), len(by_size), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for row, gap in enumerate(gaps):
            for column, (what, lines) in enumerate(by_size):
                axis = axes[row, column]
                for i, (name, cell) in enumerate(lines):
                    mean = [cells[*cell, bandwidth, gap]["mean"] for bandwidth in bandwidths]
                    style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
                    axis.plot(bandwidths, mean, linewidth=1.2, label=name, **style)
                axis.set(xscale="log", yscale="log", title=f"{what}, a request every {gap:g} s")
                axis.set_xticks(bandwidths, labels=[f"{b:g}" for b in bandwidths])
                axis.minorticks_off()
                axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.grid(color="#E5E5E5")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.supxlabel("bandwidth between servers (Mbit/s)")
        figure.supylabel("mean request latency (s)")
        figure.suptitle(title)
        _save(plt, figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    kind = Path(path).suffix.lower().lstrip(".")
    figure.savefig(buffer, format=kind, dpi=140)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())
