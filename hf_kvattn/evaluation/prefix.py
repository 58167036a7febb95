"""What a saved prefix saves: the time to compute it against the time to load it."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_kvattn.caches.base import KVCache
from hf_kvattn.caches.serialize import load_cache, save_cache
from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common import variants as caches
from hf_kvattn.evaluation.common.measurement import Figure, Measurement
from hf_kvattn.evaluation.common.running import model_command
from hf_kvattn.evaluation.common.timing import ratio, spread_of
from hf_kvattn.evaluation.common.variants import Variant
from hf_kvattn.tools.command_line import positive_int
from hf_kvattn.tools.tables import Column, joined, mib, same, show_spread, speedup, table_of

PARTS = ("prefill", "save", "load")


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    rounds: int = 5,
    new_tokens: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Computes, saves and loads a prefix with each cache in turns; a dict that JSON can hold.

    `token_ids`, 1-D, are the prefix and one token more. The model is on the CPU, where files are loaded to, from the
    page cache. A round that is not measured comes first. In each, the cache that was saved and the loaded one decode
    `new_tokens` greedily after the prefix.
    """
    foreign = [variant.name for variant in variants if not variant.hooked]
    if foreign or not variants:
        raise ValueError(f"only caches of hf_kvattn can be saved, got {foreign}")
    if len(token_ids) < 2 or rounds < 1 or new_tokens < 1:
        raise ValueError(f"impossible sizes: {len(token_ids)} tokens, {rounds=}, {new_tokens=}")
    times_ms: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}
    found: dict[str, dict[str, Any]] = {}
    prompt = token_ids[None].to(model.device)
    with tempfile.TemporaryDirectory() as folder:
        for turn in tqdm(range(rounds + 1), desc="prefix", unit="round", disable=not progress):
            for variant in variants:
                with caches.running(model, variant):
                    lap_ms, found[variant.name] = _round(model, prompt, variant, Path(folder) / "cache", new_tokens)
                if turn:
                    times_ms[variant.name].append(lap_ms)
    rows = []
    for name, laps_ms in times_ms.items():
        parts = {part: [[lap_ms[i]] for lap_ms in laps_ms] for i, part in enumerate(PARTS)}
        spreads = {f"{part}_ms": spread_of(laps) for part, laps in parts.items()}
        rows.append({"variant": name} | spreads | {"speedup": ratio(parts["prefill"], parts["load"])} | found[name])
    settings = {"context": prompt.shape[1] - 1, "rounds": rounds, "new_tokens": new_tokens}
    return {"kind": "prefix", "settings": settings, "rows": rows}


def _round(
    model: PreTrainedModel, prompt: torch.Tensor, variant: Variant, path: Path, new_tokens: int
) -> tuple[list[float], dict[str, Any]]:
    """The milliseconds of each part, and what does not depend on time."""
    prefix, last = prompt[:, :-1], prompt[:, -1:]
    cache: Any = variant.make(model.config, prompt.shape[1] + new_tokens)
    marks_s = [time.perf_counter()]
    model(prefix, past_key_values=cache, logits_to_keep=1)
    marks_s.append(time.perf_counter())
    save_cache(cache, path, prefix)
    marks_s.append(time.perf_counter())
    loaded = load_cache(path, model.config, prefix)
    marks_s.append(time.perf_counter())
    found = {
        "file_bytes": path.stat().st_size,
        "cache_bytes": cache.nbytes,
        "same_tokens": _continue(model, last, cache, new_tokens) == _continue(model, last, loaded, new_tokens),
    }
    return [(end - start) * 1e3 for start, end in pairwise(marks_s)], found


def _continue(model: PreTrainedModel, ids: torch.Tensor, cache: KVCache, new_tokens: int) -> list[int]:
    """Greedy tokens after `ids`, `(1, 1)`."""
    out = []
    for _ in range(new_tokens):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out


NOTES = (
    "A prefix of {context} tokens, computed, saved, and loaded from the page cache: medians (p20 to p80) of {rounds} "
    "rounds; how many times faster loading is than computing, of medians, then paired within each round. Tokens: "
    "{new_tokens} greedy ones after the prefix, with the loaded cache and with the one that was saved.\n"
)
COLUMNS: list[Column] = [
    ("cache", "variant", str),
    *((f"{part} ms", f"{part}_ms", show_spread) for part in PARTS),
    ("loading faster", "speedup", speedup),
    ("file MiB", "file_bytes", mib),
    ("tokens", "same_tokens", same),
]


def _tables(results: dict[str, Any]) -> str:
    return joined(NOTES.format(**results["settings"]), table_of(COLUMNS, results["rows"]))


def _draw(results: dict[str, Any]) -> Any:
    """What a prefix costs to compute, to save and to load, by cache."""
    rows = results["rows"]
    title = f"A prefix of {results['settings']['context']} tokens: computed, saved, loaded"
    figure = drawing.new_figure(6.4, 1.4 + 0.75 * len(rows), title, results["conditions"])
    axes = figure.subplots()
    for i, (part, color) in enumerate(zip(PARTS, ("#7d7468", drawing.OURS[4], drawing.OURS[0]), strict=True)):
        found = [row[f"{part}_ms"]["median"] for row in rows]
        bars = axes.barh([j + 0.26 * (i - 1) for j in range(len(found))], found, 0.24, color=color, label=part)
        drawing.label_bars(axes, bars, [f"{value:.3g}" for value in found])
    axes.set_xscale("log")
    drawing.name_rows(axes, rows, "ms, median")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _limits(results: dict[str, Any]) -> list[str]:
    wrong = [row["variant"] for row in results["rows"] if not row["same_tokens"]]
    lines = ["Files were loaded from the page cache: a disk that reads slower than memory adds its own time."]
    return lines + [f"{name}: other tokens after loading than before saving." for name in wrong]


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    part = "a prefix of {context} tokens".format(**results["settings"])
    for row in results["rows"]:
        name = f"times faster to load than to compute: {row['variant']}"
        yield Figure(part, "load_speedup", name, row["speedup"]["of_medians"], results["settings"])


MEASUREMENT = Measurement("prefix", "A saved prefix", _tables, "prefix.png", _draw, _limits, _figures)

HELP = """A prefix computed once and loaded later: how long each takes, on your model.

    hf-kvattn prefix
    hf-kvattn prefix --context 2048 --threads 2 --output results
    hf-kvattn prefix --model ./my-model --variants kvattn-static --json

Exits with status 1 when a loaded cache gives other tokens than the one that was saved.
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=positive_int, default=2048, help="tokens of the prefix")
    parser.add_argument("--new-tokens", type=positive_int, default=16, help="decoded after it, to compare")
    parser.add_argument("--rounds", type=positive_int, default=5, help="turns of each cache")


COMMAND = model_command(
    HELP,
    ["kvattn-static", "kvattn-int8", "kvattn-int4", "kvattn-int2"],
    _add_options,
    measure,
    lambda args: args.context + 1,
    failed=lambda results: not all(row["same_tokens"] for row in results["rows"]),
)
