"""Model cards: what was measured, on what, by which command, and what came out badly, from `results.json` alone.

A card is the README.md of a results folder: metadata with a model-index that the Hugging Face Hub reads, the tables of
`report.py`, links to the plots beside it. Nothing in it is written by hand, so the same JSON gives the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_kvattn.evaluation import report
from hf_kvattn.evaluation.inputs import SMOLLM2
from hf_kvattn.evaluation.limits import LIMITS
from hf_kvattn.evaluation.markdown import markdown_table
from hf_kvattn.evaluation.variants import BASELINE

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
        ValueError: no results there, results that are not what the scripts write, or a plot that is missing.
    """
    folder = Path(folder)
    sections = report.read(folder)
    if not sections:
        raise ValueError(f"{folder / 'results.json'}: there are no results to make a card of")
    missing = [name for name in (report.KINDS[kind].plot for kind in sections) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: the plots {missing} of these results are missing")
    try:
        _check(sections)
        data, body = _metadata(sections), _body(sections)
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
            if key != "describe":  # stands in report.md only
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


def _name(results: dict[str, Any]) -> str:
    """The model that was measured; of a conversion, the one that it made."""
    name = results["conditions"]["model"]
    return f"{name} with {results['settings']['kv_heads_after']} KV heads" if results["kind"] == "conversion" else name


def _metadata(sections: dict[str, dict[str, Any]]) -> ModelCardData:
    measured = [sections[kind] for kind in report.KINDS if kind in sections and kind != "bandwidth"]
    names = list(dict.fromkeys(_name(results) for results in measured))
    models = dict.fromkeys(results["conditions"]["model"] for results in measured)
    known = [HUB_IDS.get(model, model) for model in models if model in HUB_IDS or "/" in model]  # no local folder
    return ModelCardData(
        base_model=known or None,
        library_name="transformers",
        pipeline_tag="text-generation" if names else None,
        tags=["kv-cache", "attention", "hf_kvattn", *sorted(sections)],
        model_name=", ".join(names) or "one attention layer",
        eval_results=[result for kind in report.KINDS if kind in sections for result in EVALUATE[kind](sections[kind])],
    )


def _result(
    dataset: str, part: str, metric: str, name: str, value: float, settings: dict[str, Any] | None = None
) -> EvalResult:
    """One figure. A model-index puts results together by the dataset's type and config, so `part` keeps them apart."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=DATASETS.get(dataset, "text"),
        dataset_name=f"{dataset}, {part}",
        dataset_config=part,
        dataset_args=settings,
        metric_type=metric,
        metric_name=name,
        metric_value=float(f"{value:.6g}"),
    )


def _evaluate_conversion(results: dict[str, Any]) -> Iterator[EvalResult]:
    settings, written = results["settings"], results["written"]
    values = [("original", results["perplexity_before"])]
    for row in results["rows"]:
        values.append((row["method"], row["perplexity"]))
        if "uptrained" in row:
            values.append((f"{row['method']}, uptrained", row["uptrained"]["perplexity"]))
    values.append((f"as written, {written['dtype']}", written["perplexity"]))
    found = [("perplexity", f"perplexity: {name}", value) for name, value in values]
    for when in ("before", "after"):
        name, value = f"bytes of keys and values a token, {when}", results[f"cache_bytes_per_token_{when}"]
        found.append(("cache_bytes_per_token", name, value))
    part = "{kv_heads_before} to {kv_heads_after} KV heads".format(**settings)
    for metric, name, value in found:
        yield _result(results["conditions"]["text"], part, metric, name, value, settings)


def _evaluate_perplexity(results: dict[str, Any]) -> Iterator[EvalResult]:
    text, settings = results["conditions"]["text"], results["settings"]
    part = f"windows of {settings['window']} tokens"
    kld = f"KL divergence from {BASELINE}, nats a token"
    for row in results["rows"]:
        yield _result(text, part, "perplexity", f"perplexity: {row['variant']}", row["perplexity"], settings)
        yield _result(text, part, "kl_divergence", f"{kld}: {row['variant']}", row["kld_mean"], settings)


def _evaluate_throughput(results: dict[str, Any]) -> Iterator[EvalResult]:
    for cell in results["cells"]:
        part, settings = "{context} tokens x {batch}".format(**cell), {key: cell[key] for key in ("context", "batch")}
        for row in cell["rows"]:
            name = f"median decode step, ms: {row['variant']}"
            yield _result(results["conditions"]["text"], part, "step_ms", name, row["step_ms"]["median"], settings)


def _evaluate_claims(results: dict[str, Any]) -> Iterator[EvalResult]:
    for row in results["claims"]:
        yield _result(results["conditions"]["text"], "stated figures", "measured", row["claim"], row["measured"])


def _evaluate_bandwidth(results: dict[str, Any]) -> Iterator[EvalResult]:
    part = f"decode attention over {results['context']} tokens"
    for backend, row in results["backends"].items():
        name = f"share of the memory's read bandwidth: {backend}"
        yield _result(results["conditions"]["text"], part, "share_of_read_bandwidth", name, row["share"])


def _evaluate_prefix(results: dict[str, Any]) -> Iterator[EvalResult]:
    settings = results["settings"]
    for row in results["rows"]:
        yield _result(
            results["conditions"]["text"],
            f"a prefix of {settings['context']} tokens",
            "load_speedup",
            f"times faster to load than to compute: {row['variant']}",
            row["speedup"]["of_medians"],
            settings,
        )


def _evaluate_stream(results: dict[str, Any]) -> Iterator[EvalResult]:
    settings = results["settings"]
    for row in (row for row in results["rows"] if row["last_perplexity"] is not None):
        part = f"the last {settings['last']} of a stream of {settings['tokens']} tokens"
        name = f"perplexity of the last tokens: {row['variant']}"
        yield _result(results["conditions"]["text"], part, "perplexity", name, row["last_perplexity"], settings)


def _evaluate_beams(results: dict[str, Any]) -> Iterator[EvalResult]:
    settings = results["settings"]
    for row in results["rows"]:
        yield _result(
            results["conditions"]["text"],
            f"{settings['batch']} prompts of {settings['context']} tokens, {settings['beams']} beams",
            "beam_bytes",
            f"bytes moved at a step of beam search: {row['variant']}",
            row["written_bytes"],
            settings,
        )


EVALUATE = {
    "conversion": _evaluate_conversion,
    "perplexity": _evaluate_perplexity,
    "calibration": _evaluate_perplexity,
    "throughput": _evaluate_throughput,
    "claims": _evaluate_claims,
    "bandwidth": _evaluate_bandwidth,
    "prefix": _evaluate_prefix,
    "stream": _evaluate_stream,
    "beams": _evaluate_beams,
}


def _body(sections: dict[str, dict[str, Any]]) -> str:
    kinds = [kind for kind in report.KINDS if kind in sections]
    subjects = dict.fromkeys(f"{_name(sections[kind])}, {sections[kind]['conditions']['dtype']}" for kind in kinds)
    parts = [
        f"# hf_kvattn: {'; '.join(subjects)}\n",
        "KV caches and attention of hf_kvattn, measured against what transformers brings. Every number comes from "
        "the JSON in this folder, and can be taken again with the commands below.\n",
        "## Measured on\n",
        _conditions(kinds, sections),
        "## Commands\n",
        "```\n" + "\n".join(sections[kind]["conditions"]["command"] for kind in kinds) + "\n```\n",
    ]
    for kind in kinds:
        if sections[kind]["kind"] != kind:
            raise ValueError(f"section {kind!r} holds {sections[kind]['kind']!r}")
        parts.append(report.section(sections[kind]))
    lines = [line for kind in kinds for line in LIMITS[kind](sections[kind])] + _limits(sections)
    return "\n".join([*parts, "## Limits and negative results\n", "\n".join(f"- {line}" for line in lines) + "\n"])


def _conditions(kinds: list[str], sections: dict[str, dict[str, Any]]) -> str:
    """One column for each kind of measurement: they may have been taken on different days and commits."""
    rows = [
        [key, *(f"`{sections[kind]['conditions'][key]}`" for kind in kinds)]
        for key in ("model", "dtype", "text", "backend", *HARDWARE, *SOFTWARE, "date")
    ]
    return markdown_table(["", *(report.KINDS[kind].title for kind in kinds)], rows)


def _limits(sections: dict[str, dict[str, Any]]) -> list[str]:
    """What holds for all of them."""
    found = [results["conditions"] for results in sections.values()]
    machines = {tuple(str(conditions[key]) for key in HARDWARE) for conditions in found}
    lines = [f"Taken on {len(machines)} machine{'s' * (len(machines) > 1)}; others give other times, and other ratios."]
    dirty = [kind for kind, results in sections.items() if str(results["conditions"]["commit"]).endswith("-dirty")]
    if dirty:
        lines.append(f"The code had changes that are in no commit when these were taken: {', '.join(dirty)}.")
    return lines


def check(folder: str | Path) -> bool:
    """Whether the card of a folder is there, and is what its results give."""
    path = Path(folder) / "README.md"
    return path.is_file() and path.read_bytes() == render(folder).encode()


def write(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the card of a folder to its README.md, or to `output`; replaces only what was made here before.

    Raises:
        ValueError: a file is in the way that somebody else wrote; it stays.
    """
    text = render(folder)
    path = Path(folder) / "README.md" if output is None else Path(output)
    if path.exists() and MARK.encode() not in path.read_bytes():
        raise ValueError(f"{path} was not made by this script: move it away or choose another --output")
    return report.replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
