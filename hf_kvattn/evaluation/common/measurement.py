"""The record of a measurement, and how one is looked up by the kind of its results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_kvattn.evaluation import MEASUREMENTS

Results = dict[str, Any]  # a section of results.json: what JSON can hold


class Figure(NamedTuple):
    """One figure of a model card's metadata; figures of equal `part` are of the same conditions, the `settings`."""

    part: str
    metric: str
    name: str
    value: float
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Measurement:
    """All that reports and cards know of a measurement; a module in `MEASUREMENTS` has it as `MEASUREMENT`.

    Attributes:
        kind: of its results: the name of their section in results.json.
        title: of their section in the report.
        tables: the text of that section, in Markdown.
        plot: the name of the plot's file.
        draw: makes the plot, a matplotlib Figure.
        limits: what came out badly, a line each, for the card.
        figures: for the card's metadata.
    """

    kind: str
    title: str
    tables: Callable[[Results], str]
    plot: str
    draw: Callable[[Results], Any]
    limits: Callable[[Results], list[str]]
    figures: Callable[[Results], Iterable[Figure]]


def measurement(kind: str) -> Measurement:
    """The measurement whose results are of this kind."""
    return importlib.import_module(MEASUREMENTS[kind].module).MEASUREMENT


def skipped_list(results: Results) -> str:
    """What was not measured, for a report; empty if nothing was left out."""
    lines = [f"- {item['variant']} at context {item['context']}, batch {item['batch']}: {item['reason']}\n"
             for item in results["skipped"]]  # fmt: skip
    return "### Skipped\n\n" + "".join(lines) if lines else ""


def skipped_limits(results: Results) -> list[str]:
    """What was not measured, for a card."""
    return [
        f"Not measured: {item['variant']} at context {item['context']}, batch {item['batch']}: {item['reason']}."
        for item in results["skipped"]
    ]
