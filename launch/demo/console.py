"""What the demo prints: a row for each phase as it ends, generated text, and the result in a few lines. 80 columns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.demo.words import amount, clip, nbytes, percent, seconds
from placement.text_table import table_lines

_COLUMNS = (
    ("phase", 22),
    ("local", 6),
    ("requests", 8),
    ("p50", 6),
    ("p95", 6),
    ("tokens/s", 8),
    ("sent", 7),
)
_BAR = 20  # characters of the longest bar


def phase_lines(phase: dict[str, Any], header: bool) -> list[str]:
    """A phase's row, below the heads of all rows for the first; widths are fixed, so that rows line up."""
    cells = (
        clip(phase["name"], _COLUMNS[0][1]),
        percent(phase["local_ratio_mean"]),
        str(phase["requests"]),
        seconds(phase["latency_p50_s"]),
        seconds(phase["latency_p95_s"]),
        amount(phase["tokens_per_s"]),
        nbytes(phase["bytes_needed"]),
    )
    widths = [width for _, width in _COLUMNS]
    rows = [[name for name, _ in _COLUMNS]] * header + [[_plain(cell) for cell in cells]]
    lined_up = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return ["  ".join(row) for row in lined_up]


def text_lines(samples: Sequence[dict[str, Any]]) -> list[str]:
    """Generated text, each in one line."""
    lines = ["generated text (the prompt ends at the bar):"]
    for sample in samples:
        before = f"  {sample['server']} ({sample['domain']}): "
        text = f"{sample['prompt'][-24:]}┃{sample['output']}".replace("\n", "⏎")
        lines.append(before + clip(text, 79 - len(before)).rstrip())
    return lines


def summary_lines(result: dict[str, Any], report: Path) -> list[str]:
    """The result: what the placements changed, what was checked, what it took; about ten lines."""
    phases, checks = result["phases"], result["checks"]
    base = max([p["remote_share"] for p in phases], default=0.0) or 1.0
    rows = [
        [
            phase["name"],
            "█" * max(1, round(_BAR * phase["remote_share"] / base)),
            _plain(percent(phase["remote_share"])),
            _plain(percent(phase["remote_share_uniform"])),
            _plain(seconds(phase["network_request_s"])),
            _plain(seconds(phase["latency_p50_s"])),
        ]
        for phase in phases
    ]
    columns = ("phase", "calls elsewhere", "", "uniform", "network", "latency")
    within = "within" if checks["within_budget"] else "NOT within"
    head = result["headline"]
    return [
        *table_lines(columns, rows, left=2),
        "uniform: the same calls under uniform placement; network: of a request, computed",
        f"calls elsewhere against uniform: {_change(head['reduction_first'])}, and after the trade of workloads "
        f"{_change(head['reduction_second'])}",
        f"{checks['requests_checked']} requests ({checks['checked_across_migrations']} across a migration, "
        f"{checks['tokens_checked']:,} tokens) against dense: {checks['mismatches']} differ",
        f"{checks['compilations_after_warmup']} compilations while serving; expert memory {within} its budget everywhere",
        f"{result['wall_s']:.0f} s, {_plain(nbytes(result['peak_memory_bytes']))} of memory at most; pictures: {report}",
    ]


def _change(reduction: float) -> str:
    return f"{100 * -reduction:+.0f} %".replace("-", "−")


def _plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")
