"""What the tables of all reports are made of: Markdown, and figures as they are written in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Column = tuple[str, str, Callable[[Any], str]]  # title, key in a row, how a value is written

MISSING = "-"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column at the left and the others at the right."""
    marks = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, marks, *rows]) + "\n"


def table_of(columns: Sequence[Column], rows: Iterable[dict[str, Any]]) -> str:
    """A Markdown table with a row for each of `rows`, which have the keys of all `columns`."""
    cells = [[show(row[key]) for _, key, show in columns] for row in rows]
    return markdown_table([title for title, _, _ in columns], cells)


def digits(pattern: str) -> Callable[[float | None], str]:
    """How numbers are written that may be missing: as `format(number, pattern)`."""
    return lambda value: MISSING if value is None else format(value, pattern)


def mib(size_bytes: float | None) -> str:
    return MISSING if size_bytes is None else f"{size_bytes / 2**20:.1f}"


def speedup(value: dict[str, float] | None) -> str:
    """A `throughput.ratio`."""
    if value is None:
        return MISSING
    return "{of_medians:.2f}; {paired_median:.2f} ({paired_p20:.2f} to {paired_p80:.2f})".format(**value)


def three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def spread(value: dict[str, float], show: Callable[[float], str] = three_digits) -> str:
    """A `throughput.spread`."""
    return "{} ({} to {})".format(*(show(value[key]) for key in ("median", "p20", "p80")))


def skipped_list(skipped: list[dict[str, Any]]) -> str:
    if not skipped:
        return ""
    lines = [f"- {item['variant']} at context {item['context']}, batch {item['batch']}: {item['reason']}"
             for item in skipped]  # fmt: skip
    return "### Skipped\n\n" + "\n".join(lines) + "\n"


def joined(*parts: str) -> str:
    """Parts of a report, an empty line between them; empty ones are left out."""
    return "\n".join(part for part in parts if part)


def conditions(found: dict[str, Any]) -> str:
    lines = [f"- {key}: `{value}`" for key, value in found.items() if key != "describe"]
    return "\n".join(lines) + f"\n\n```\n{found['describe']}\n```\n"
