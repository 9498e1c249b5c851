"""What the demo prints: one row a phase, and the closing lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

_COLUMNS = (
    ("phase", 24),
    ("local ratio", 11),
    ("by server", 20),
    ("network layers", 14),
    ("requests", 8),
    ("p50", 7),
    ("p95", 7),
    ("tokens/s", 8),
    ("needed", 9),
    ("exchanged", 9),
)


def phase_table(phases: Sequence[dict[str, Any]], header: bool) -> Table:
    """A row for each phase; tables of the same columns line up when printed one after the other."""
    table = Table(box=None, show_header=header, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in _COLUMNS:
        table.add_column(
            name, min_width=width, max_width=width, justify="left" if name == "phase" else "right", no_wrap=True
        )
    for phase in phases:
        table.add_row(
            phase["name"],
            _share(phase["local_ratio_mean"]),
            " ".join(_share(value) for value in phase["local_ratio"].values()),
            _share(phase["network_layers"]),
            str(phase["requests"]),
            _seconds(phase["latency_p50_s"]),
            _seconds(phase["latency_p95_s"]),
            f"{phase['tokens_per_s']:.0f}",
            f"{phase['bytes_needed'] / 1e6:.1f} MB",
            f"{phase['bytes_exchanged'] / 1e6:.1f} MB",
        )
    return table


def summary_lines(result: dict[str, Any], report: Path) -> list[str]:
    """Generated text, then what was checked and measured over the whole run."""
    checks, headline = result["checks"], result["headline"]
    lines = ["", "generated text (prompt ends at the bar):"]
    for sample in result["samples"][-len(result["cluster"]["servers"]) :]:
        text = f"{sample['prompt'][-40:]}┃{sample['output'][:70]}".replace("\n", "⏎")
        lines.append(f"  {sample['server']} ({sample['domain']}): {text}")
    for name, word in (("first", "after the first migration"), ("second", "after the second")):
        lines.append(
            f"remote calls {word}: {100 * headline[f'reduction_{name}']:.0f} % fewer than under uniform on the same requests"
        )
    held = [
        f"{d['resident_bytes'] / 1e6:.2f} of {d['budget_bytes'] / 1e6:.2f}" for d in result["placements"][-1]["devices"]
    ]
    lines += [
        f"expert memory by device, resident of budget, MB: {', '.join(held)}",
        f"{checks['requests_checked']} requests ({checks['tokens_checked']} tokens, {checks['checked_across_migrations']} "
        f"requests across a migration) against the dense model: {checks['mismatches']} differ",
        f"compilations while serving: {checks['compilations_after_warmup']}",
        f"{result['wall_s']:.0f} s in all, peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB; pictures in {report}",
    ]
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
