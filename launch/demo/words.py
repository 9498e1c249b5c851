"""Words and numbers of the demo's page: text made safe for HTML, amounts with their units."""

import html
from typing import Any

Figures = dict[str, Any]

DASH = "\N{EN DASH}"
NBSP = "\u00a0"
# Okabe and Ito's colours, told apart with any colour vision; olive and grey for their yellow and black, which vanish on
# light or dark.
SERVER_COLOURS = ("#0072b2", "#e08e0b", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7f1d", "#8c8c99")

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


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + ("…" if length > 1 else "")


def seconds(value: float | None) -> str:
    if value is None:
        return DASH
    return amount(1000 * value, 0, "ms") if value < 0.2 else amount(value, 2 if value < 10 else 1, "s")


def nbytes(value: float | None) -> str:
    if value is None:
        return DASH
    unit = 0
    while value >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}{NBSP}{('B', 'KB', 'MB', 'GB', 'TB')[unit]}"


def upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else several}"


def chip(name: str, colours: dict[str, str], detail: str = "") -> str:
    """A server's name beside its color."""
    small = f"<small>{escape(detail)}</small>" if detail else ""
    return f'<span class="chip" style="--c:{colours[name]}">{escape(name)}{small}</span>'


def key(text: str, colour: str) -> str:
    """A word of a legend beside its color."""
    return f'<span class="key" style="--c:{colour}">{escape(text)}</span>'
