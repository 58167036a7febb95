"""The Markdown tables of all reports, cards and commands, and how figures are written in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Title, key in a row (dots lead into inner dicts), how a value is written.
Column = tuple[str, str, Callable[[Any], str]]

MISSING = "-"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column at the left and the others at the right."""
    marks = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, marks, *rows]) + "\n"


def table_of(columns: Sequence[Column], rows: Iterable[dict[str, Any]]) -> str:
    """A Markdown table with a row for each of `rows`."""
    cells = [[_cell(row, path, show) for _, path, show in columns] for row in rows]
    return markdown_table([title for title, *_ in columns], cells)


def _cell(row: dict[str, Any], path: str, show: Callable[[Any], str]) -> str:
    """One figure of a row; a row that was written before the column existed lacks it."""
    value: Any = row
    for key in path.split("."):
        if key not in value:
            return MISSING
        value = value[key]
    return show(value)


def digits(pattern: str) -> Callable[[float | None], str]:
    """How numbers are written that may be missing: as `format(number, pattern)`."""
    return lambda value: MISSING if value is None else format(value, pattern)


def mib(size_bytes: float | None) -> str:
    return MISSING if size_bytes is None else f"{size_bytes / 2**20:.1f}"


def speedup(value: dict[str, float] | None) -> str:
    """A `timing.ratio`."""
    pattern = "{of_medians:.2f}; {paired_median:.2f} ({paired_p20:.2f} to {paired_p80:.2f})"
    return MISSING if value is None else pattern.format(**value)


def three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def show_spread(value: dict[str, float], show: Callable[[float], str] = three_digits) -> str:
    """A `timing.spread`."""
    return "{} ({} to {})".format(*(show(value[key]) for key in ("median", "p20", "p80")))


def joined(*parts: str) -> str:
    """Parts of a report, an empty line between them; empty ones are left out."""
    return "\n".join(part for part in parts if part)


def same(tokens: bool | None) -> str:
    """Whether a cache gave the tokens it was compared with; None for one that need not."""
    return {True: "same", False: "**differ**", None: "lossy"}[tokens]
