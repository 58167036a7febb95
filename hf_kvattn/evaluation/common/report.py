"""Results for people and for programs: JSON, Markdown tables and plots.

A folder holds one `results.json` with a section for each kind of measurement. `write` puts its section in, keeps the
others, and makes `report.md` again from all of them, and this measurement's plot: all commands can write to one folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_kvattn.evaluation import MEASUREMENTS
from hf_kvattn.evaluation.common.drawing import require_plotting
from hf_kvattn.evaluation.common.measurement import Results, measurement
from hf_kvattn.tools.files import read_json, replace, replace_text


def table(results: Results) -> str:
    """The Markdown tables of one measurement."""
    return measurement(results["kind"]).tables(results)


def plotted(results: Results) -> bool:
    """Whether there is a plot of these results: of a check of a GPU only where there was matplotlib."""
    return results.get("plotted", True)


def section(results: Results) -> str:
    """One measurement in Markdown: title, plot and tables."""
    kind = measurement(results["kind"])
    plot = f"![{kind.title}]({kind.plot})\n\n" if plotted(results) else ""
    return f"## {kind.title}\n\n{plot}{kind.tables(results)}"


def render(sections: dict[str, Results]) -> str:
    """`report.md` for the sections of a `results.json`."""
    parts = ["# hf_kvattn: measured results\n"]
    for results in (sections[kind] for kind in MEASUREMENTS if kind in sections):
        parts += [section(results), "### Conditions\n", _conditions(results["conditions"])]
    return "\n".join(parts)


def _conditions(found: dict[str, Any]) -> str:
    lines = [f"- {key}: `{value}`" for key, value in found.items() if key != "describe"]
    return "\n".join(lines) + f"\n\n```\n{found['describe']}\n```\n"


def read(out_dir: str | Path) -> dict[str, Results]:
    """The sections that a folder holds so far."""
    path = Path(out_dir) / "results.json"
    sections = read_json(path) if path.exists() else {}
    known = isinstance(sections, dict) and set(sections) <= set(MEASUREMENTS)
    if not known or not all(isinstance(section, dict) for section in sections.values()):
        raise ValueError(f"{path} holds something else than the sections {list(MEASUREMENTS)}: choose another folder")
    return sections


def write(results: Results, out_dir: str | Path) -> list[Path]:
    """Put the results into the folder's `results.json`, and make its report and this measurement's plot."""
    if plotted(results):
        require_plotting()
    folder, kind = Path(out_dir), measurement(results["kind"])
    written = [write_json(results, folder), replace_text(folder / "report.md", render(read(folder)))]
    return [*written, replace(folder / kind.plot, kind.draw(results).savefig)] if plotted(results) else written


def write_json(results: Results, folder: Path) -> Path:
    """Put the results into the folder's `results.json` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(read(folder) | {results["kind"]: results}, indent=1, allow_nan=False)
    return replace_text(folder / "results.json", text + "\n")


def check_out_dir(out_dir: str | None) -> None:
    """Raise before a long measurement what `write` would raise after it."""
    if out_dir is not None:
        require_plotting()
        read(out_dir)


def finish(results: Results, out_dir: str | None, as_json: bool) -> None:
    """The end of a command: the tables, the files, and the JSON as the last line."""
    print(table(results))
    if out_dir is not None:
        print("written: " + ", ".join(str(path) for path in write(results, out_dir)))
    if as_json:
        print(json.dumps(results, allow_nan=False))
