"""Results for people and for programs: JSON, Markdown tables and plots.

A folder holds one `results.json` with a section for each kind of measurement. `write` puts its section in, keeps the
others, and makes `report.md` and the plots again from all of them, so both command lines can write to one folder.
Files appear whole or not at all: they are written under a temporary name and renamed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvattn.evaluation import inputs, markdown, plots, quality_tables, speed_tables
from hf_kvattn.evaluation.drawing import require_plotting
from hf_kvattn.kernels import dispatch


@dataclass(frozen=True)
class Kind:
    """One kind of measurement: its title, the text of its tables, the name of its plot, and what draws that."""

    title: str
    text: Callable[[dict[str, Any]], str]
    plot: str
    draw: Callable[[dict[str, Any]], Any]


KINDS: dict[str, Kind] = {
    "conversion": Kind("Conversion", quality_tables.conversion, "perplexity_by_method.png", plots.conversion),
    "throughput": Kind("Throughput", speed_tables.throughput, "step_ms.png", plots.throughput),
    "perplexity": Kind("Perplexity", quality_tables.perplexity, "kld_bits.png", plots.perplexity),
    "claims": Kind("Claims", speed_tables.claims, "claims.png", plots.claims),
    "bandwidth": Kind(
        "Decode attention against the memory's speed", speed_tables.bandwidth, "bandwidth.png", plots.bandwidth
    ),
    "calibration": Kind("Calibration", quality_tables.calibration, "calibrated_bits.png", plots.calibration),
    "prefix": Kind("A saved prefix", speed_tables.prefix, "prefix.png", plots.prefix),
    "stream": Kind("An endless stream", quality_tables.stream, "stream.png", plots.stream),
    "beams": Kind("Beam search: what is moved", speed_tables.beams, "beams.png", plots.beams),
}


def table(results: dict[str, Any]) -> str:
    """The Markdown tables of one measurement."""
    return KINDS[results["kind"]].text(results)


def section(results: dict[str, Any]) -> str:
    """One measurement in Markdown: title, plot and tables."""
    kind = KINDS[results["kind"]]
    return f"## {kind.title}\n\n![{kind.title}]({kind.plot})\n\n{kind.text(results)}"


def render(sections: dict[str, dict[str, Any]]) -> str:
    """`report.md` for the sections of a `results.json`."""
    parts = ["# hf_kvattn: measured results\n"]
    for results in (sections[kind] for kind in KINDS if kind in sections):
        parts += [section(results), "### Conditions\n", markdown.conditions(results["conditions"])]
    return "\n".join(parts)


def replace(path: Path, write_to: Callable[[Path], Any]) -> Path:
    """Write a file under a temporary name beside `path`, then rename it: it is there whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError that names the file where it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{path} is not JSON ({error}): move it away or choose another folder") from error


def read(out_dir: str | Path) -> dict[str, dict[str, Any]]:
    """The sections that a folder holds so far."""
    path = Path(out_dir) / "results.json"
    sections = read_json(path) if path.exists() else {}
    if not isinstance(sections, dict) or not set(sections) <= set(KINDS):
        raise ValueError(f"{path} holds something else than the sections {list(KINDS)}: choose another folder")
    return sections


def write(results: dict[str, Any], out_dir: str | Path) -> list[Path]:
    """Put the results into the folder's `results.json`, and make its report and this measurement's plot."""
    require_plotting()
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sections, kind = read(folder) | {results["kind"]: results}, KINDS[results["kind"]]
    text = json.dumps(sections, indent=1, allow_nan=False)
    return [
        replace(folder / "results.json", lambda path: path.write_text(text + "\n", encoding="utf-8")),
        replace(folder / "report.md", lambda path: path.write_text(render(sections), encoding="utf-8")),
        replace(folder / kind.plot, kind.draw(results).savefig),
    ]


def check_out_dir(out_dir: str | None) -> None:
    """Raise before a long measurement what `write` would raise after it."""
    if out_dir is not None:
        require_plotting()
        read(out_dir)


def measured(
    args: argparse.Namespace, measure: Callable[[PreTrainedModel, PreTrainedTokenizerBase, str], dict[str, Any]]
) -> dict[str, Any]:
    """The course of a command line with the arguments of `inputs.add_arguments`; returns the results.

    Args:
        args: what was asked for.
        measure: called with the model, its tokenizer and the text, under the backend asked for; its results get
            their conditions here, and are printed and written.
    """
    check_out_dir(args.out)
    model, tokenizer, text = inputs.load_from_arguments(args)
    with dispatch.backend(args.backend):
        results = measure(model, tokenizer, text)
        results["conditions"] = inputs.conditions(model, args)
    finish(results, args.out, args.json)
    return results


def finish(results: dict[str, Any], out_dir: str | None, as_json: bool) -> None:
    """The end of a command line: the tables, the files, and the JSON as the last line."""
    print(table(results))
    if out_dir is not None:
        print("written: " + ", ".join(str(path) for path in write(results, out_dir)))
    if as_json:
        print(json.dumps(results, allow_nan=False))
