"""What a check of a GPU looks like in reports and cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common.measurement import Figure, Measurement, Results
from hf_kvattn.evaluation.gpu_check.bars import CLEAN, median_ms
from hf_kvattn.evaluation.gpu_check.running import Found
from hf_kvattn.evaluation.gpu_check.stages import STAGES
from hf_kvattn.tools.tables import MISSING, Column, digits, joined, table_of, three_digits

REHEARSED = "**Rehearsed without a GPU: no number here means anything.**\n"
_STATES = {"held": "held", "missed": "**missed**", "not measured": "not measured"}


def _limit(bar: dict[str, Any]) -> str:
    return f"at {'least' if bar['at_least'] else 'most'} {bar['limit']:g}"


def _marked(columns: list[Column], rehearsed: bool) -> list[Column]:
    """The columns of a rehearsal say so beside each number."""

    def mark(show: Callable[[Any], str]) -> Callable[[Any], str]:
        return lambda value: f"{text} (rehearsed)" if any(map(str.isdigit, text := show(value))) else text

    words = ("name", "said", "bound", "why")
    return [(title, key, show if key in words or not rehearsed else mark(show)) for title, key, show in columns]


def _stage_rows(results: Results) -> Iterator[dict[str, Any]]:
    for name, found in results["stages"].items():
        cases = found["cases"]
        wrong = [case["case"] for case in cases if case.get("ok") is False or "raised" in case]
        said = [*([found[key] for key in ("not_here", "raised") if key in found]), *wrong[:3]]
        said += [f"and {len(wrong) - 3} more"] if len(wrong) > 3 else []
        said += [f"{len(found['left_out'])} left out"] if found["left_out"] else []
        yield {"name": f"{name}: {STAGES[name].title}", "status": found["status"], "said": "; ".join(said)} | {
            "seconds": found["seconds"],
            "right": sum(case.get("ok") is True for case in cases),
            "wrong": len(wrong),
            "absent": sum("not_here" in case for case in cases),
        }


def _figures_of(case: Found) -> str:
    """The numbers of a case that are no times, as words."""
    known = {"case", "ms", "ok", "error", "allowed", "kernels", "said", "traceback", "describe", "not_here", "raised"}
    shown = []
    for key, value in case.items():
        if isinstance(value, dict) and "median" in value:
            value = value["median"]
        if key not in known and isinstance(value, (int, float)) and not isinstance(value, bool):
            shown.append(f"{key.replace('_', ' ')} {three_digits(value)}")
    return ", ".join(shown)


def _measured(results: Results, name: str) -> Iterator[dict[str, Any]]:
    for case in results["stages"][name]["cases"]:
        reason = case.get("not_here") or case.get("raised")
        shown = reason or _figures_of(case)
        if shown or "ms" in case:
            yield {"name": case["case"], "ms": median_ms(case), "figures": shown or MISSING}


STAGE_COLUMNS: list[Column] = [
    ("stage", "name", str),
    ("status", "status", lambda status: f"**{status}**" if status in ("wrong", "failed", "unfinished") else status),
    ("right", "right", str),
    ("wrong", "wrong", str),
    ("not here", "absent", str),
    ("s", "seconds", digits(".1f")),
    ("", "said", str),
]
BAR_COLUMNS: list[Column] = [
    ("bar", "name", str),
    ("", "state", _STATES.__getitem__),
    ("measured", "value", three_digits),
    ("limit", "bound", str),
    ("why", "why", str),
]
FIGURE_COLUMNS: list[Column] = [
    ("case", "name", str),
    ("ms", "ms", lambda ms: MISSING if ms is None else three_digits(ms)),
    ("figures", "figures", str),
]


def tables(results: Results) -> str:
    """The stages, what the measuring ones found, and at the end the bars."""
    rehearsed = results["rehearsed"]
    parts = [REHEARSED if rehearsed else "", table_of(_marked(STAGE_COLUMNS, rehearsed), _stage_rows(results))]
    for name in results["stages"]:
        rows = list(_measured(results, name))
        if rows and not STAGES[name].checks:
            parts += [f"### {STAGES[name].title}\n", table_of(_marked(FIGURE_COLUMNS, rehearsed), rows)]
    bars = [{**bar, "name": bar["bar"], "bound": _limit(bar)} for bar in results["bars"]]
    return joined(*parts, "### Bars\n", table_of(_marked(BAR_COLUMNS, rehearsed), bars))


def _draw(results: Results) -> Any:
    """The bars' values over their limits, and the time of each whole step."""
    figure = drawing.new_figure(9.0, 7.0, TITLE, results["conditions"])
    bars, steps = figure.subplots(2, 1)
    found = [bar for bar in results["bars"] if "value" in bar and bar["limit"]]
    bars.barh([bar["bar"][:60] for bar in found], [bar["value"] / bar["limit"] for bar in found], color=drawing.OURS[0])
    drawing.mark(bars, 1.0, "the limit ", (4, 3), ha="right")
    drawing.caption(bars, x="times the limit")
    cases = results["stages"].get("steps", {"cases": []})["cases"]
    timed = {case["case"]: ms for case in cases if (ms := median_ms(case)) is not None}
    steps.barh(list(timed), list(timed.values()), color=drawing.OURS[2])
    drawing.caption(steps, x="a whole step: ms")
    for axes in (bars, steps):
        axes.invert_yaxis()
        axes.tick_params(labelsize=6)
        drawing.plain(axes)
    return figure


def _limits(results: Results) -> list[str]:
    lines = [f"Missed: {bar['bar']}." for bar in results["bars"] if bar["state"] == "missed"]
    lines += [f"Not measured: {bar['bar']}: {bar['why']}." for bar in results["bars"] if bar["state"] == "not measured"]
    return lines + [
        f"Stage {n}: {found['status']}." for n, found in results["stages"].items() if found["status"] not in CLEAN
    ]


def _figures(results: Results) -> Iterator[Figure]:
    for bar in results["bars"]:
        if "value" in bar:
            yield Figure("bars", "measured", bar["bar"], bar["value"])


TITLE = "A GPU, checked and measured"
MEASUREMENT = Measurement("gpu_check", TITLE, tables, "gpu_check.png", _draw, _limits, _figures)
