"""Model cards: what was measured, on what, by which command, and what came out badly, from `results.json` alone.

A card is the README.md of a results folder: metadata with a model-index that the Hugging Face Hub reads, the tables of
`report.py`, links to the plots beside it. Nothing in it is written by hand, so the same JSON gives the same bytes.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_kvattn.evaluation import MEASUREMENTS
from hf_kvattn.evaluation.common import report
from hf_kvattn.evaluation.common.measurement import Measurement, Results, measurement
from hf_kvattn.tools.command_line import Command
from hf_kvattn.tools.files import replace_text
from hf_kvattn.tools.inputs import SMOLLM2
from hf_kvattn.tools.tables import markdown_table

MARK = "<!-- Made by scripts/make_model_card.py from the JSON in this folder: change nothing here. -->"
MARKUP = re.compile(r"`|<[a-zA-Z!/]|\]\(")
HUB_IDS = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
DATASETS = {"wikitext": "Salesforce/wikitext"}
ABSOLUTE_PATH = re.compile(r"(^|[\s'\"=])(/|[A-Za-z]:\\)\w")
SOFTWARE = ("python", "torch", "transformers", "hf_kvattn", "commit")
HARDWARE = ("device", "cpu", "cores", "threads")


def render(folder: str | Path) -> str:
    """The card of a results folder.

    Raises:
        ValueError: no results there, rehearsed ones, results that are not what the scripts write, or a plot that is
            missing.
    """
    folder = Path(folder)
    sections = report.read(folder)
    if not sections:
        raise ValueError(f"{folder / 'results.json'}: there are no results to make a card of")
    measured = [(measurement(kind), sections[kind]) for kind in MEASUREMENTS if kind in sections]
    if rehearsed := [kind.kind for kind, results in measured if results.get("rehearsed")]:
        raise ValueError(f"{folder}: {', '.join(rehearsed)} was rehearsed: no number in it means anything")
    plots = [kind.plot for kind, results in measured if report.plotted(results)]
    missing = [plot for plot in plots if not (folder / plot).is_file()]
    if missing:
        raise ValueError(f"{folder}: the plots {missing} of these results are missing")
    try:
        _check(sections)
        data, body = _metadata(measured), _body(measured)
        text = f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n{body}"
        read_back = ModelCard(text).data  # what the Hub will see; raises where the model-index is not valid
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / 'results.json'} is not what the scripts write ({reason})") from error
    if read_back.to_dict() != data.to_dict():
        raise ValueError(f"{folder / 'results.json'}: its names do not survive in a card's metadata")
    return text


def _check(value: Any, where: str = "results") -> None:
    """Refuse what has no place in a card: numbers that are none, text that is markup, paths of somebody's machine."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check(str(key), where)
            if key not in ("describe", "traceback"):  # which stand in report.md and in the JSON only
                _check(item, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            _check(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")
    elif isinstance(value, str):
        breaks_table = "|" in value and not where.endswith(".command")
        if breaks_table or not value.isprintable() or MARKUP.search(value):
            raise ValueError(f"{where} holds {value[:60]!r}")
        if ABSOLUTE_PATH.search(value):
            raise ValueError(f"{where} holds an absolute path: {value[:60]!r}")


def _name(results: Results) -> str:
    """The model that was measured; of a conversion, the one that it made."""
    name = results["conditions"]["model"]
    return f"{name} with {results['settings']['kv_heads_after']} KV heads" if results["kind"] == "conversion" else name


def _metadata(measured: list[tuple[Measurement, Results]]) -> ModelCardData:
    """What the Hub reads. It puts results together by the dataset's type and config: the part keeps them apart."""
    of_models = [results for kind, results in measured if kind.kind != "bandwidth"]
    names = dict.fromkeys(_name(results) for results in of_models)
    models = dict.fromkeys(results["conditions"]["model"] for results in of_models)
    known = [HUB_IDS.get(model, model) for model in models if model in HUB_IDS or "/" in model]  # no local folder
    return ModelCardData(
        base_model=known or None,
        library_name="transformers",
        pipeline_tag="text-generation" if names else None,
        tags=["kv-cache", "attention", "hf_kvattn", *sorted(kind.kind for kind, _ in measured)],
        model_name=", ".join(names) or "one attention layer",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=DATASETS.get(results["conditions"]["text"], "text"),
                dataset_name=f"{results['conditions']['text']}, {figure.part}",
                dataset_config=figure.part,
                dataset_args=figure.settings,
                metric_type=figure.metric,
                metric_name=figure.name,
                metric_value=float(f"{figure.value:.6g}"),
            )
            for kind, results in measured
            for figure in kind.figures(results)
        ],
    )


def _body(measured: list[tuple[Measurement, Results]]) -> str:
    for kind, results in measured:
        if results["kind"] != kind.kind:
            raise ValueError(f"section {kind.kind!r} holds {results['kind']!r}")
    found = [results["conditions"] for _, results in measured]
    # One column for each kind of measurement: they may have been taken on different days and commits.
    keys = ("model", "dtype", "text", "backend", *HARDWARE, *SOFTWARE, "date")
    conditions = [[key, *(f"`{each[key]}`" for each in found)] for key in keys]
    machines = {tuple(str(each[key]) for key in HARDWARE) for each in found}
    limits = [line for kind, results in measured for line in kind.limits(results)]
    limits.append(
        f"Taken on {len(machines)} machine{'s' * (len(machines) > 1)}; others give other times, and other ratios."
    )
    dirty = [kind.kind for kind, results in measured if str(results["conditions"]["commit"]).endswith("-dirty")]
    if dirty:
        limits.append(f"The code had changes that are in no commit when these were taken: {', '.join(dirty)}.")
    subjects = dict.fromkeys(f"{_name(results)}, {results['conditions']['dtype']}" for _, results in measured)
    parts = [
        f"# hf_kvattn: {'; '.join(subjects)}\n",
        "KV caches and attention of hf_kvattn, measured against what transformers brings. Every number comes from "
        "the JSON in this folder, and can be taken again with the commands below.\n",
        "## Measured on\n",
        markdown_table(["", *(kind.title for kind, _ in measured)], conditions),
        "## Commands\n",
        "```\n" + "\n".join(each["command"] for each in found) + "\n```\n",
        *(report.section(results) for _, results in measured),
        "## Limits and negative results\n",
        "\n".join(f"- {line}" for line in limits) + "\n",
    ]
    return "\n".join(parts)


def check(folder: str | Path) -> bool:
    """Whether the card of a folder is there, and is what its results give."""
    path = Path(folder) / "README.md"
    return path.is_file() and path.read_bytes() == render(folder).encode()


def write(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the card of a folder to its README.md, or to `output`, unless somebody else wrote the file there."""
    text = render(folder)
    path = Path(folder) / "README.md" if output is None else Path(output)
    if path.exists() and MARK.encode() not in path.read_bytes():
        raise ValueError(f"{path} was not made by this script: move it away or choose another --output")
    return replace_text(path, text)


HELP = """Make the model card of a results folder from its results.json alone.

    hf-kvattn card model_cards/*
    hf-kvattn card results --output card.md
    hf-kvattn card model_cards/* --check

The card is the folder's README.md. A file there that this command did not write is left alone, with exit status 2.
With --check nothing is written, and the exit status is 1 when a card differs from what the results give.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="what --output of a measurement named")
    parser.add_argument("--output", metavar="FILE", help="write one folder's card there; None means its README.md")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")


def _main(args: argparse.Namespace) -> int:
    if args.output is not None and (args.check or len(args.folders) > 1):
        raise ValueError("--output takes one folder, and no --check")
    if not args.check:
        for folder in args.folders:
            print(f"written: {write(folder, args.output)}")
        return 0
    differing = [folder for folder in args.folders if not check(folder)]
    for folder in differing:
        print(f"{folder}: README.md is not what results.json gives")
    return 1 if differing else 0


COMMAND = Command(HELP, _add_arguments, _main)
