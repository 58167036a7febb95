"""The record of a measurement, and how one is looked up by the kind of its results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
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


class Measurement(NamedTuple):
    """All that reports and cards know of a measurement; a module in `MEASUREMENTS` has it as `MEASUREMENT`."""

    kind: str  # of its results: the name of their section in results.json
    title: str  # of their section in the report
    tables: Callable[[Results], str]  # the text of that section, in Markdown
    plot: str  # the name of the plot's file
    draw: Callable[[Results], Any]  # makes the plot, a matplotlib Figure
    limits: Callable[[Results], list[str]]  # what came out badly, a line each, for the card
    figures: Callable[[Results], Iterable[Figure]]  # for the card's metadata


def measurement(kind: str) -> Measurement:
    """The measurement whose results are of this kind."""
    return importlib.import_module(MEASUREMENTS[kind].module).MEASUREMENT


def _skipped(results: Results, pattern: str) -> list[str]:
    pattern = pattern.format("{variant} at context {context}, batch {batch}: {reason}")
    return [pattern.format(**item) for item in results["skipped"]]


def skipped_list(results: Results) -> str:
    """What was not measured, for a report; empty if nothing was left out."""
    lines = _skipped(results, "- {}\n")
    return "### Skipped\n\n" + "".join(lines) if lines else ""


def skipped_limits(results: Results) -> list[str]:
    """What was not measured, for a card."""
    return _skipped(results, "Not measured: {}.")
